"""A run folder: what is finished, what was measured, and where to go on.

    fingerprint.json   the resolved configuration; a folder of another one is refused, but for tasks added behind the old
                       ones while no stage has begun that depends on the list
    state.json         finished stages and evaluations, seconds and token counts (replaced atomically)
    metrics.jsonl      one row per step and per evaluation
    checkpoints/STAGE/ the stage under way: weights, optimiser, prompt stream (last k)
    weights/NAME/      fp32 weights at the end of a stage: where the next one starts
    final/             the last policy as transformers and SGLang load it
    result.json, report.html

A stage or an evaluation is either finished (state.json says so) or done again from its last checkpoint; everything in it is
seeded by names and counts, so doing it again gives the same. Rows of metrics.jsonl beyond the last saved state or checkpoint
belong to work that is done again; they are cut off before the first new row.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from omni_fast import checkpoint
from omni_fast.config import Config
from omni_fast.errors import RunError, UserError
from omni_fast.records import EvalRow, Evaluated, State, StepRow, Totals, Trained, empty_state, joined, scored

BASE = "base"  # the initial policy's name among evaluations and weights
FINGERPRINT = "fingerprint.json"


class Interrupted(RunError):
    """The user asked to stop (Ctrl-C, SIGTERM) and everything up to here is saved."""

    exit_code = 130


class Run:
    """A run folder; `Run.open` owns it for training, `Run.read` only looks."""

    def __init__(self, folder: Path, config: Config, state: State) -> None:
        self.folder, self.config, self.state = folder, config, state
        self.stopping = False
        self.at_once: Callable[[], None] = lambda: None  # what a second Ctrl-C must not leave behind
        self.added: list[str] = []  # tasks that the folder did not have when it was last used
        self._metrics: FileIO  # open while the run is owned
        self._cut = False  # whether rows of work that is done again are dropped from it
        self._since = time.perf_counter()  # what is spent since then is not in the totals yet

    @classmethod
    @contextmanager
    def open(cls, folder: Path, config: Config) -> Iterator[Run]:
        """Create or resume. UserError for a folder in use, of another config, or that cannot be written."""
        folder = folder.expanduser()
        with checkpoint.run_lock(folder):
            path = folder / "state.json"
            state: State = read_json(path) if path.is_file() else empty_state()
            run = cls(folder, config, state)
            if (folder / FINGERPRINT).is_file():
                run.added = run._check()
            else:
                # What is there is of a set-up that failed, perhaps of another model.
                (folder / "judge_head.json").unlink(missing_ok=True)
            run._metrics = (folder / "metrics.jsonl").open("ab", buffering=0)
            previous = {number: signal.signal(number, run._stop) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield run
            finally:
                run._metrics.close()
                for number, handler in previous.items():
                    signal.signal(number, handler)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """A run folder as it stands. UserError when there is none."""
        settings, state = folder / FINGERPRINT, folder / "state.json"
        if not settings.is_file() or not state.is_file():
            raise UserError(f"{folder} is not a run folder with anything finished in it; give the folder of a run")
        try:
            config = Config.of_fingerprint(read_json(settings))
        except ValidationError as error:
            raise UserError(f"{settings} is of another version of omni-fast; use the one that made the run") from error
        return cls(folder, config, read_json(state))

    def same_items(self, digests: Mapping[str, str]) -> None:
        """UserError where a task has other items than when the run began: scores are compared, and prompts counted, by place."""
        known = self.state.setdefault("items", {})
        if changed := [task for task, digest in digests.items() if known.get(task, digest) != digest]:
            old = f"The run folder {self.folder} has begun with other items of {', '.join(changed)}"
            raise UserError(f"{old} (data, class or package has changed): bring them back, or give another folder.")
        known |= digests

    def bind(self) -> None:
        """From here on the folder belongs to this configuration; a mistake found while setting up leaves it as it was."""
        checkpoint.write_json(self.folder / FINGERPRINT, self.config.fingerprint())

    def _check(self) -> list[str]:
        """Tasks behind those that the folder has, which may be added; UserError for any other difference."""
        before, now = read_json(self.folder / FINGERPRINT), self.config.fingerprint()
        added = added_tasks(self.folder, before, now)
        if added and (stage := self._begun()):
            begun = f"The run folder {self.folder} has begun its curriculum ({stage}) without {', '.join(added)}"
            raise UserError(f"{begun}, too late to add: give another folder, or the old list of tasks.")
        return added

    def _begun(self) -> str:
        """A stage that depends on the list of tasks, as every one does but the single-task runs; "" if there is none."""
        under_way = (path.name.replace("-", ":") for path in self.folder.glob("checkpoints/*"))
        return next((name for name in (*self.state["trained"], *under_way) if not name.startswith("single:")), "")

    # What is finished.

    def trained(self, stage: str) -> Trained | None:
        return self.state["trained"].get(stage)

    def evaluated(self, name: str) -> Evaluated | None:
        return self.state["evaluated"].get(name)

    def unscored(self, name: str, tasks: Iterable[str]) -> list[str]:
        """Tasks that a policy has no score on: it is not evaluated, the task was added since, or its verifier failed then."""
        found = self.evaluated(name)
        splits = found["splits"].values() if found else ({},)
        return [task for task in tasks if not all(scored(split.get(task)) for split in splits)]

    def scores_of(self, name: str) -> Evaluated:
        """The scores of a policy that has to be evaluated by now."""
        if (found := self.evaluated(name)) is None:
            raise UserError(f"{self.folder} has no scores of '{name}' yet; `omni-fast train` on it goes on to them")
        return found

    def finish_stage(self, stage: str, trained: Trained) -> None:
        """Its checkpoints are not needed any more: the weights at its end are kept."""
        self.state["trained"][stage] = trained
        self._save_state()
        shutil.rmtree(self._checkpoints(stage), ignore_errors=True)

    def finish_evaluation(self, name: str, evaluated: Evaluated) -> None:
        """With the scores that the policy has on other tasks."""
        self.state["evaluated"][name] = joined(self.evaluated(name), evaluated)
        self._save_state()

    def finish(self) -> None:
        """All of it is done: the same command finds nothing to do."""
        self.state["finished"] = True
        self._save_state()

    # Metrics and totals.

    def record(self, row: StepRow | EvalRow) -> None:
        """Append one row to metrics.jsonl, behind the rows that the state or the loaded checkpoint counts."""
        if not self._cut:
            size = os.fstat(self._metrics.fileno()).st_size
            self._metrics.truncate(min(size, self.state["totals"]["metrics_bytes"]))
            self._cut = True
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with checkpoint.writing(self.folder / "metrics.jsonl"):
            if self._metrics.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl as it stands, without a last row that a full disk or a kill cut off."""
        whole, _, _ = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def add_seconds(self, **parts: float) -> None:
        _add(self.state["totals"]["seconds"], parts)

    def add_counts(self, **parts: float) -> None:
        _add(self.state["totals"]["counts"], parts)

    # The stage under way, and the weights at the end of stages.

    def save_checkpoint(self, stage: str, step: int, tensors: checkpoint.Contents, state: dict[str, Any]) -> None:
        """Everything a resume needs, published by one rename; also counts the metrics rows it covers."""
        everything = {"step": step, "totals": self._totals(), **state}
        keep = self.config.checkpoint.keep_last
        checkpoint.save(self._checkpoints(stage), f"step-{step}", tensors, everything, keep_last=keep)

    def load_checkpoint(self, stage: str, warn: Callable[[str], None]) -> checkpoint.Checkpoint | None:
        """The newest valid checkpoint of the stage; the run's totals go on from it."""
        if found := checkpoint.latest(self._checkpoints(stage), warn):
            self.state["totals"] = found.state["totals"]
        return found

    def checkpoint_due(self, step: int, steps: int) -> bool:
        """Every few steps, and when the user wants to stop; the end of a stage is kept as weights."""
        return step < steps and (self.stopping or step % self.config.checkpoint.every_steps == 0)

    def keep_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Store the weights at the end of the stage `name`."""
        checkpoint.save_tensors(self._weights(name), weights)

    def has_weights(self, name: str) -> bool:
        return self._weights(name).is_dir()

    def weights(self, name: str) -> dict[str, Tensor]:
        """Weights at the end of a stage; a stage that repeats a finished run has that run's."""
        trained = self.trained(name)
        return checkpoint.load_tensors(self._weights((trained and trained["same_as"]) or name))

    # Stopping.

    def raise_if_stopping(self) -> None:
        if self.stopping:
            raise Interrupted("stopped; the same command resumes where it was")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            try:
                self.at_once()
            finally:
                if os.isatty(1):
                    os.write(1, b"\x1b[?25h")  # the cursor, which the live panel hides
                os._exit(Interrupted.exit_code)  # asked twice: now
        self.stopping = True
        os.write(2, b"stopping once what is under way is saved; Ctrl-C again: at once\n")  # print is not safe in here

    def _checkpoints(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage.replace(":", "-")

    def _weights(self, name: str) -> Path:
        return self.folder / "weights" / name.replace(":", "-")

    def _totals(self) -> Totals:
        os.fsync(self._metrics.fileno())
        since, self._since = self._since, time.perf_counter()
        self.add_seconds(total=self._since - since)
        totals = self.state["totals"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.state["facts"]["peak_bytes"] = max(peak, self.state["facts"].get("peak_bytes", 0))
        size = os.fstat(self._metrics.fileno()).st_size
        return Totals(metrics_bytes=size, seconds=dict(totals["seconds"]), counts=dict(totals["counts"]))

    def _save_state(self) -> None:
        self.state["totals"] = self._totals()
        checkpoint.write_json(self.folder / "state.json", dict(self.state))  # type: ignore[arg-type]  # a TypedDict is JSON


def added_tasks(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the tasks that one fingerprint has behind those of another one before it; UserError for any other difference."""
    old, new = ({task["name"]: task for task in either["tasks"]} for either in (before, now))
    kept, added = list(new)[: len(old)], list(new)[len(old) :]
    sides = {**before, "tasks": old}, {**now, "tasks": {name: new[name] for name in kept}}
    if kept != list(old):
        problem = f"has the tasks {', '.join(old)}, behind which new ones may stand, and got {', '.join(new)}"
    elif changed := checkpoint.differences(*sides):
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        problem = f"belongs to another configuration ({'; '.join(changed[:5])}{more})"
    elif added and now["model"]["path"] == "tiny":
        problem = f"cannot take {', '.join(added)} as well, since the model 'tiny' is made for its tasks"
    else:
        return added
    raise UserError(f"The folder {folder} {problem}: give another folder, or the old settings.")


def read_json(path: Path, remedy: str = "restore it, or give another folder") -> Any:
    """One JSON file of a run or a study. UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged, not valid JSON ({error}): {remedy}") from error


def _add(totals: dict[str, float], parts: Mapping[str, float]) -> None:
    for name, value in parts.items():
        totals[name] = totals.get(name, 0.0) + value
