"""The run folder of one seed: that of a training run, with a file per policy, since a study has a hundred of them.

A policy is finished when its file is there. What a stage sampled and how long it took is counted in the run's totals,
which go through checkpoints, so that a killed stage is counted once.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from omni_fast.checkpoint import Checkpoint, write_json
from omni_fast.errors import RunError
from omni_fast.records import EvalRow, Evaluated, StepRow, joined
from omni_fast.run import Run
from omni_fast.study.records import stored


class SeedRun(Run):
    """A run folder with a file per policy; also counts, per stage, what it sampled and how long it took."""

    on_update: Callable[[str], None] = staticmethod(lambda stage: None)  # after each step that moved the weights
    describe: Callable[[str], dict[str, Any]]  # what stands in a policy's file besides its evaluation

    def file(self, name: str) -> Path:
        return self.folder / "nodes" / f"{name}.json"

    def node(self, name: str) -> dict[str, Any] | None:
        return stored(self.file(name)) if self.file(name).is_file() else None

    def evaluated(self, name: str) -> Evaluated | None:
        found = self.node(name)
        return found["evaluated"] if found else None

    def finish_evaluation(self, name: str, evaluated: Evaluated) -> None:
        if bad := [task for task, entropy in evaluated["entropy"].items() if not math.isfinite(entropy)]:
            self._diverged(name, f"the entropy of its tokens is not finite on {', '.join(bad)}")
        self._save_state()  # first: what the rows count is known before the file says that they are complete
        before = self.node(name) or {"evaluated": None, "sweep": {}}
        whole = joined(before["evaluated"], evaluated)
        self.write_node(name, self.describe(name) | {"evaluated": whole, "sweep": before["sweep"]})

    def write_node(self, name: str, data: Mapping[str, Any]) -> None:
        self.file(name).parent.mkdir(exist_ok=True)
        write_json(self.file(name), data)

    def keep_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        if bad := [key for key, value in weights.items() if not torch.isfinite(value).all()]:
            self._diverged(name, f"{len(bad)} of its tensors are not finite, {bad[0]} for one")
        super().keep_weights(name, weights)

    def _diverged(self, name: str, what: str) -> NoReturn:
        """What there is of the policy goes, so that the next call trains it from its start."""
        shutil.rmtree(self._checkpoints(name), ignore_errors=True)
        self.drop_weights(name)
        raise RunError(
            f"{name} diverged: {what}; look at its rewards, or lower optimizer.learning_rate in another folder"
        )

    def _begun(self) -> str:
        """Nothing: a policy's name holds the tasks that it depends on."""
        return ""

    def drop_weights(self, name: str) -> None:
        """By one rename, so that what a kill leaves half removed does not pass for weights."""
        gone = self.folder / ".dropped"
        shutil.rmtree(gone, ignore_errors=True)
        if self.has_weights(name):
            self._weights(name).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def weights_hash(self, name: str) -> str:
        files = json.loads((self._weights(name) / "manifest.json").read_text(encoding="utf-8"))["files"]
        return str(files["tensors.safetensors"]["sha256"])

    def record(self, row: StepRow | EvalRow) -> None:
        super().record(row)
        if row["event"] == "step":
            step = cast(StepRow, row)
            groups = {task: seen["groups"] for task, seen in step["tasks"].items()}
            self.count(step["stage"], groups, step["seconds"]["total"])
            if not step["update"]["skipped"]:
                self.on_update(step["stage"])

    def count(self, stage: str, groups: Mapping[str, int], seconds: float) -> None:
        self.add_counts(**{f"groups:{stage}:{task}": n for task, n in groups.items()})
        self.add_seconds(**{f"node:{stage}": seconds})

    def counted(self, stage: str) -> dict[str, int]:
        """Task -> groups that were sampled to train the stage."""
        head = f"groups:{stage}:"
        counts = self.state["totals"]["counts"]
        return {name.removeprefix(head): round(n) for name, n in counts.items() if name.startswith(head)}

    def load_checkpoint(self, stage: str, warn: Callable[[str], None]) -> Checkpoint | None:
        """Other stages may have been finished since: then the checkpoint says how far this one was, and no more."""
        totals = self.state["totals"]
        found = super().load_checkpoint(stage, warn)
        if found is not None and found.state["totals"]["metrics_bytes"] >= totals["metrics_bytes"]:
            return found
        mine = (f"groups:{stage}:", f"node:{stage}")
        saved = found.state["totals"] if found is not None else {"counts": {}, "seconds": {}}
        for part in ("counts", "seconds"):
            others = {name: n for name, n in totals[part].items() if not name.startswith(mine)}
            totals[part] = others | {name: n for name, n in saved[part].items() if name.startswith(mine)}
        self.state["totals"] = totals
        return found
