"""Domains: prompts, rewards and test metrics behind one interface (`base.Task`).

`build_tasks` makes the tasks of a config. A domain's module is imported only when a block names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omni_fast.config import TaskConfig
from omni_fast.rewards.code import CodeVerifier
from omni_fast.rewards.judge.base import Judge
from omni_fast.rewards.math import MathVerifier
from omni_fast.tasks.base import Task


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
    from omni_fast.tasks.own import OwnTask

    return OwnTask(block, seed)
