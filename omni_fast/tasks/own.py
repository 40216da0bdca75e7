"""A task of the user's own: the class that a config names as "module:Class" (docs/tasks.md).

Whatever the class raises, or gives that is not what `base.Task` states, is told as its mistake with file and line.
"""

from __future__ import annotations

import importlib
import math
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from omni_fast.config import TaskConfig
from omni_fast.errors import RunError, UserError
from omni_fast.rewards.compose import Composition
from omni_fast.rewards.score import Score
from omni_fast.tasks.base import SPLITS, Item, Resources, Split, Task

T = TypeVar("T")
MEMBERS = ("name", "system", "composition", "max_new_tokens", "items", "score", "metric")


class OwnTask:
    """The user's object behind the `Task` interface, called as `Class(name=..., seed=..., max_new_tokens=...)`."""

    def __init__(self, block: TaskConfig, seed: int, resources: Resources) -> None:
        self.name, self.where = block.name, f"task '{block.name}'"
        made = self._class(block.cls)
        self.task: Task = self._call(
            "constructor", lambda: made(name=block.name, seed=seed, max_new_tokens=block.max_new_tokens)
        )
        if missing := [member for member in MEMBERS if not hasattr(self.task, member)]:
            raise UserError(
                f"{self.where}: cls '{block.cls}' lacks {', '.join(missing)}; omni_fast/tasks/base.py states the interface"
            )
        self.system, self.max_new_tokens = self.task.system, self.task.max_new_tokens
        self.composition: Composition = self.task.composition
        if not isinstance(self.composition, Composition):
            raise UserError(f"{self.where}: composition is {self.composition!r:.80}; it has to be a `Composition`")
        self._items = {split: self._read(split) for split in SPLITS}
        ids = Counter(item.id for items in self._items.values() for item in items)
        if twice := [one for one, count in ids.items() if count > 1]:
            raise UserError(f"{self.where} has two items with the id {twice[0]!r}; ids differ within a task")

    def items(self, split: Split) -> Sequence[Item]:
        return self._items[split]

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        found = self._call("score", lambda: list(self.task.score(items, completions)))
        parts = self.composition.weights.keys()
        whole = all(isinstance(score, Score) and parts <= score.parts.keys() for score in found)
        if not whole or len(found) != len(completions):
            wanted = f"{len(completions)} times a `Score` with {', '.join(parts)}"
            raise UserError(f"the score of {self.where} gave {found!r:.200}; it has to give {wanted}")
        return found

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        found = self._call(
            "metric", lambda: [None if x is None else float(x) for x in self.task.metric(items, completions)]
        )
        wrong = [x for x in found if x is not None and not (math.isnan(x) or 0 <= x <= 1)]
        if wrong or len(found) != len(items):
            told = f"the value {wrong[0]:g}" if wrong else f"{len(found)} values for {len(items)} items"
            raise UserError(
                f"the metric of {self.where} gave {told}; it has to give each item one number in 0..1, or None"
            )
        return found

    def _class(self, path: str) -> Callable[..., Task]:
        module_name, _, class_name = path.partition(":")
        if not module_name or not class_name:
            raise UserError(f"{self.where}: cls '{path}' must read \"module:Class\"")
        try:
            module = self._call("import", lambda: importlib.import_module(module_name))
        except UserError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            raise UserError(
                f"cls '{path}' cannot be imported ({error.__cause__}); is its folder on PYTHONPATH? For a file beside "
                "you: PYTHONPATH=. omni-fast ..."
            ) from error
        found = getattr(module, class_name, None)
        if not callable(found):
            raise UserError(f"{self.where}: module {module_name} has no class {class_name}; correct cls '{path}'")
        return found

    def _read(self, split: Split) -> list[Item]:
        items = self._call(f"items('{split}')", lambda: list(self.task.items(split)))
        if not items or not all(isinstance(item, Item) for item in items):
            raise UserError(f"{self.where} has {items!r:.80} in split '{split}'; every split needs some `Item`s")
        return items

    def _call(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (UserError, RunError):
            raise
        except Exception as error:  # of code that is not ours: where it was raised is what its author needs
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"the {what} of {self.where} raised {type(error).__name__}: {error} ({at.filename}, line {at.lineno}); "
                "correct it and run the same command again"
            ) from error
