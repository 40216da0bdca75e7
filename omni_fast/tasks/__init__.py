"""Domains: prompts, rewards and test metrics behind one interface (`base.Task`).

`build_tasks` makes the tasks of a config. A domain's module is imported only when a block names it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from omni_fast.config import TaskConfig
from omni_fast.errors import UserError
from omni_fast.rewards.code import CodeVerifier
from omni_fast.rewards.judge.base import Judge
from omni_fast.rewards.math import MathVerifier
from omni_fast.tasks.base import SPLITS, Task


@dataclass(frozen=True, slots=True)
class Resources:
    """What tasks grade with. Each is made when a task first needs it, so that a run without code starts no sandbox.

    reward_judge trains the writing task, metric_judge is what its score is reported by: two different judges.
    """

    math: Callable[[], MathVerifier]
    code: Callable[[], CodeVerifier]
    reward_judge: Callable[[], Judge]
    metric_judge: Callable[[], Judge]


def build_tasks(blocks: Sequence[TaskConfig], *, seed: int, resources: Resources) -> dict[str, Task]:
    """The tasks by name, in the order of the blocks. Raises UserError for what a block gets wrong."""
    return {block.name: build_task(block, seed=seed, resources=resources) for block in blocks}


def build_task(block: TaskConfig, *, seed: int, resources: Resources) -> Task:
    """One task, its splits drawn from the seed."""
    if block.kind == "math":
        from omni_fast.tasks.math import MathTask

        return MathTask(resources.math(), block, seed)
    if block.kind == "code":
        from omni_fast.tasks.code import CodeTask

        return CodeTask(resources.code(), block, seed)
    if block.kind == "qa":
        from omni_fast.tasks.qa import QaTask

        return QaTask(block, seed)
    if block.kind == "writing":
        from omni_fast.tasks.writing import WritingTask

        return WritingTask(resources.reward_judge(), resources.metric_judge(), block, seed)
    if block.kind == "jsonl":
        from omni_fast.tasks.jsonl import load_task

        return load_task(block, seed=seed, resources=resources)
    return _own_class(block, seed)


def _own_class(block: TaskConfig, seed: int) -> Task:
    """The user's class, called as `Class(name=..., seed=..., max_new_tokens=...)` and checked for the interface."""
    module_name, separator, class_name = block.cls.partition(":")
    where = f"task '{block.name}': cls = '{block.cls}'"
    if not separator:
        raise UserError(f'{where} must read "module:Class"')
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{where} cannot be imported ({error}); is its folder on PYTHONPATH?") from error
    made = getattr(module, class_name, None)
    if not callable(made):
        raise UserError(f"{where}: module {module_name} has no class {class_name}; correct the name")
    try:
        task = made(name=block.name, seed=seed, max_new_tokens=block.max_new_tokens)
    except TypeError as error:
        raise UserError(f"{where} must take the arguments name, seed, max_new_tokens ({error})") from error
    members = ("name", "system", "composition", "max_new_tokens", "items", "score", "metric")
    missing = [member for member in members if not hasattr(task, member)]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; omni_fast/tasks/base.py states the interface")
    empty = [split for split in SPLITS if not task.items(split)]
    if empty:
        raise UserError(f"{where} has no items in split {', '.join(empty)}; every split needs some")
    return cast(Task, task)
