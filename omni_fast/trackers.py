"""Optional trackers beside metrics.jsonl: TensorBoard, trackio, Weights & Biases. Imported only when the config asks for one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

from omni_fast.config import Config
from omni_fast.errors import UserError
from omni_fast.records import EvalRow, StepRow


class Trackers:
    """Sends the numbers of each row to the trackers that the config switches on; x is the count of rows so far."""

    def __init__(self, config: Config, folder: Path, rows: int) -> None:
        """rows: already in metrics.jsonl, so that a resumed run continues its curves."""
        self._rows = rows
        self._writer = None
        if config.logging.tensorboard:
            self._writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))
        self._modules = [_module(name, name) for name in ("trackio", "wandb") if getattr(config.logging, name)]
        for module in self._modules:
            module.init(project="omni_fast", name=folder.name, config=config.model_dump(mode="json"))

    def log(self, row: StepRow | EvalRow) -> None:
        self._rows += 1
        values = numbers(row, f"{row['split']}/" if row["event"] == "eval" else "")  # type: ignore[typeddict-item]
        for module in self._modules:
            module.log(values, step=self._rows)
        if self._writer:
            for key, value in values.items():
                self._writer.add_scalar(key, value, self._rows)

    def close(self) -> None:
        for module in self._modules:
            module.finish()
        if self._writer:
            self._writer.close()


def numbers(row: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """Every number of a row under its path, such as `tasks/math/reward`; those of an evaluation under `test/scores/qa/value`."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def _module(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"logging.{package} is on and {package} is not installed; pip install {package}") from None
