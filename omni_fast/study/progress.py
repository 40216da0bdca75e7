"""What a person sees of a study: one line per policy, with the arm, the seed, how many are done and the time left.

Steps that take a second or more are told one by one as in a training run; shorter ones are not.
"""

from __future__ import annotations

import time

from rich.console import Console

from omni_fast.progress import Progress
from omni_fast.records import EvalRow, StepRow

TOLD_S = 1.0


class StudyProgress(Progress):
    """left: units of work that are left, one for each step and some for each evaluation, over all seeds of this process."""

    def __init__(self, console: Console) -> None:
        self.head = self.note = ""
        self.left = self.done = 0.0
        self.began = time.monotonic()
        super().__init__(console)

    def stage(self, name: str) -> None:
        self._stage, self._step = f"{self.head}  {name}", ""

    def step(self, row: StepRow, steps: int) -> None:
        if row["seconds"]["total"] >= TOLD_S or self.console.is_terminal:
            super().step(row, steps)

    def evaluated(self, row: EvalRow) -> None:
        if row["split"] != "test":
            return
        told = [self.head]
        for task, score in row["scores"].items():
            shown = "–" if score["value"] is None else f"{score['value']:.3f}"
            self._rows.setdefault(task, {})["test"] = shown
            told.append(f"{task} {shown}")
        self.say("  ".join([*told, *filter(None, [self.note]), f"left {self.time_left()}"]))
        self.note = ""

    def advance(self, work: float, before: bool) -> None:
        """A policy is there; before: it was there already, so it says nothing of the pace."""
        self.left -= work
        self.done += 0.0 if before else work

    def time_left(self) -> str:
        seconds = (time.monotonic() - self.began) * max(self.left, 0.0) / self.done if self.done else 0.0
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}" if self.done else "–"
