"""Domains: prompts, rewards and test metrics behind one interface (`base.Task`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from omni_fast.config import TaskConfig
from omni_fast.tasks.base import Resources, Task
from omni_fast.tasks.code import CodeTask
from omni_fast.tasks.jsonl import load_task
from omni_fast.tasks.math import MathTask
from omni_fast.tasks.own import OwnTask
from omni_fast.tasks.qa import QaTask
from omni_fast.tasks.splits import BuiltIn
from omni_fast.tasks.writing import WritingTask

BUILT_IN: Mapping[str, type[BuiltIn]] = {"math": MathTask, "code": CodeTask, "qa": QaTask, "writing": WritingTask}
_KINDS: Mapping[str, Callable[[TaskConfig, int, Resources], Task]] = {"jsonl": load_task, "python": OwnTask, **BUILT_IN}


def build_tasks(blocks: Sequence[TaskConfig], *, seed: int, resources: Resources) -> dict[str, Task]:
    """The tasks by name, in the order of the blocks, splits drawn by the seed. UserError for what a block gets wrong."""
    return {block.name: _KINDS[block.kind](block, seed, resources) for block in blocks}
