"""Optional trackers beside metrics.jsonl: TensorBoard, trackio, Weights & Biases. Imported only when the config asks for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from omni_fast.config import Config
from omni_fast.errors import UserError
from omni_fast.records import EvalRow, StepRow

Log = Callable[[Mapping[str, float], int], None]


class Trackers:
    """Sends the numbers of each row to the trackers that the config switches on; x is the count of rows so far."""

    def __init__(self, config: Config, folder: Path, rows: int) -> None:
        """rows: already in metrics.jsonl, so that a resumed run continues its curves."""
        self._rows = rows
        self._logs: list[Log] = []
        self._ends: list[Callable[[], object]] = []
        if config.logging.tensorboard:
            writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

            def add_scalars(values: Mapping[str, float], x: int) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, x)

            self._logs.append(add_scalars)
            self._ends.append(writer.close)
        for package, wanted in (("trackio", config.logging.trackio), ("wandb", config.logging.wandb)):
            if wanted:
                module = _module(package, package)
                module.init(project="omni_fast", name=folder.name, config=config.model_dump(mode="json"))
                self._logs.append(partial(_log_step, module))
                self._ends.append(module.finish)

    def log(self, row: StepRow | EvalRow) -> None:
        self._rows += 1
        for log in self._logs:
            log(numbers(row), self._rows)

    def close(self) -> None:
        for end in self._ends:
            end()


def _log_step(module: ModuleType, values: Mapping[str, float], x: int) -> None:
    module.log(dict(values), step=x)


def numbers(row: StepRow | EvalRow) -> dict[str, float]:
    """The plottable values of a row under flat names, such as `math/reward` or `test/qa`."""
    if row["event"] == "eval":
        scores = {f"{row['split']}/{task}": score["value"] for task, score in row["scores"].items()}  # type: ignore[typeddict-item]
        return {key: value for key, value in scores.items() if value is not None}
    step: StepRow = row  # type: ignore[assignment]
    found: dict[str, float | None] = {"loss": step["loss"], "grad_norm": step["grad_norm"]}
    found |= {f"seconds/{part}": value for part, value in step["seconds"].items()}
    found["tokens_per_s"] = step["tokens_per_s"]
    found["staleness_mean"] = step["update"].get("staleness_mean")
    for task, values in step["tasks"].items():
        for key in ("reward", "entropy", "mixed_groups", "completion_tokens", "truncated"):
            found[f"{task}/{key}"] = values[key]
    return {key: value for key, value in found.items() if value is not None}


def _module(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"logging.{package} is on and {package} is not installed; pip install {package}") from None
