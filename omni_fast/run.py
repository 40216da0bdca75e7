"""A run folder: what is finished, what was measured, and where to go on.

    config.json        the resolved configuration; a folder of another one is refused
    state.json         finished phases with their results, seconds and token counts (replaced atomically)
    metrics.jsonl      one row per step and per evaluation
    checkpoints/STAGE/ the stage under way: weights, optimiser, prompt stream (last k)
    weights/NAME/      fp32 weights at the end of a stage: where the next one starts
    result.json, report.html

A phase is a unit that is either finished (its result is in state.json) or done again from its last checkpoint; everything in it
is seeded by names and counts, so doing it again gives the same. Rows of metrics.jsonl beyond the last saved state belong to
work that will be done again and are cut off at the start.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypedDict

from torch import Tensor

from omni_fast import checkpoint
from omni_fast.config import Config
from omni_fast.errors import RunError
from omni_fast.tasks.base import Json

BASE = "base"  # the initial policy's name among phases and weights


class Interrupted(RunError):
    """The user asked to stop (Ctrl-C, SIGTERM) and everything up to here is saved."""

    exit_code = 130


class State(TypedDict):
    phases: dict[str, Json]  # finished phase -> result
    metrics_bytes: int
    seconds: dict[str, float]
    counts: dict[str, float]
    facts: dict[str, Json]  # what the parts say of themselves: sandbox, judge


class Run:
    """An open, locked run folder. Use `Run.open`."""

    def __init__(self, folder: Path, config: Config, state: State) -> None:
        self.folder, self.config, self.state = folder, config, state
        self.stopping = False
        self._metrics = (folder / "metrics.jsonl").open("ab")
        self._metrics.truncate(state["metrics_bytes"])

    @classmethod
    @contextmanager
    def open(cls, folder: Path, config: Config) -> Iterator[Run]:
        """Create or resume. UserError for a folder in use, of another config, or that cannot be written."""
        folder = folder.expanduser()
        with checkpoint.run_lock(folder):
            checkpoint.check_fingerprint(folder, config.model_dump(mode="json", exclude={"logging", "checkpoint"}))
            state_file = folder / "state.json"
            state: State = {"phases": {}, "metrics_bytes": 0, "seconds": {}, "counts": {}, "facts": {}}
            if state_file.is_file():
                state = json.loads(state_file.read_text(encoding="utf-8"))
            run = cls(folder, config, state)
            previous = {number: signal.signal(number, run._stop) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield run
            finally:
                run._metrics.close()
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def finished(self, phase: str) -> bool:
        return phase in self.state["phases"]

    def result(self, phase: str) -> Json:
        """What the phase left; None when it is not finished."""
        return self.state["phases"].get(phase)

    def finish(self, phase: str, result: Json) -> None:
        """Mark a phase as done, with what it left; checkpoints inside it are not needed any more."""
        self.state["phases"][phase] = result
        self._save_state()
        shutil.rmtree(self._checkpoints(phase.removeprefix("train ")), ignore_errors=True)

    def record_of(self, phase: str) -> dict[str, Json]:
        """The result of a phase that has to be finished."""
        record = self.result(phase)
        if not isinstance(record, dict):
            raise RunError(f"{self.folder} has no result for '{phase}'; run the job to that point first")
        return record

    def record(self, row: Mapping[str, object]) -> None:
        """Append one row to metrics.jsonl."""
        self._metrics.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._metrics.flush()

    def add_seconds(self, **parts: float) -> None:
        for name, value in parts.items():
            self.state["seconds"][name] = self.state["seconds"].get(name, 0.0) + value

    def add_counts(self, **parts: float) -> None:
        for name, value in parts.items():
            self.state["counts"][name] = self.state["counts"].get(name, 0.0) + value

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add_seconds(**{name: time.perf_counter() - start})

    # The stage under way, and the weights at the end of stages.

    def save_checkpoint(self, stage: str, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Json]) -> None:
        """Everything a resume needs, published by one rename; also counts the metrics rows it covers."""
        everything = {"step": step, "run": self._snapshot(), **state}
        keep = self.config.checkpoint.keep_last
        checkpoint.save(self._checkpoints(stage), f"step-{step}", tensors, everything, keep_last=keep)

    def load_checkpoint(self, stage: str, warn: Callable[[str], None]) -> checkpoint.Checkpoint | None:
        """The newest valid checkpoint of the stage; the run's counters and metrics go back to it."""
        found = checkpoint.latest(self._checkpoints(stage), warn)
        if found is not None:
            snapshot = found.state["run"]
            self.state["seconds"], self.state["counts"] = snapshot["seconds"], snapshot["counts"]
            self._metrics.truncate(snapshot["metrics_bytes"])
        return found

    def checkpoint_due(self, step: int, steps: int) -> bool:
        """Every few steps, and when the user wants to stop; the end of a stage is kept as weights."""
        return self.stopping or (step % self.config.checkpoint.every_steps == 0 and step < steps)

    def keep_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Store the weights at the end of the stage `name`."""
        checkpoint.save_tensors(self._weights(name), weights)

    def has_weights(self, name: str) -> bool:
        return self._weights(name).is_dir()

    def weights(self, name: str) -> dict[str, Tensor]:
        """Weights at the end of a stage; a stage that repeats a finished run has that run's."""
        trained = self.result(f"train {name}")
        own = trained["same_as"] or name if isinstance(trained, dict) else name
        return checkpoint.load_tensors(self._weights(own))

    def _checkpoints(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage.replace(":", "-")

    def _weights(self, name: str) -> Path:
        return self.folder / "weights" / name.replace(":", "-")

    # Stopping.

    def raise_if_stopping(self) -> None:
        if self.stopping:
            raise Interrupted("stopped; the same command resumes where it was")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            os._exit(130)  # asked twice: now
        self.stopping = True

    def _snapshot(self) -> dict[str, Json]:
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        return {
            "metrics_bytes": self._metrics.tell(),
            "seconds": dict(self.state["seconds"]),
            "counts": dict(self.state["counts"]),
        }

    def _save_state(self) -> None:
        self.state.update(self._snapshot())
        checkpoint.write_json(self.folder / "state.json", self.state)
