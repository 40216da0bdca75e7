"""What trackers get of a row, and what the user gets without the package."""

import sys
from pathlib import Path

import pytest

from omni_fast import config as configs
from omni_fast.curriculum.scores import ScoreDict
from omni_fast.errors import UserError
from omni_fast.records import EvalRow
from omni_fast.trackers import Trackers


class Module:
    """As trackio and wandb are."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def init(self, **named: object) -> None:
        self.named = named

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.logged.append((-1, {}))


def test_a_row_becomes_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"trackio": Module(), "wandb": Module()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    trackers = Trackers(configs.load("quickstart", ("logging.trackio=true", "logging.wandb=true")), tmp_path, 3)
    known = ScoreDict(value=0.5, n=4, low=0.2, high=0.8)
    unknown = ScoreDict(value=None, n=0, low=None, high=None)
    trackers.log(
        EvalRow(event="eval", stage="base", split="test", scores={"math": known, "code": unknown}, seconds=1.0)
    )
    trackers.close()
    scores = {f"test/scores/math/{key}": value for key, value in known.items()} | {"test/scores/code/n": 0}
    for module in modules.values():
        assert module.logged == [(4, scores | {"test/seconds": 1.0}), (-1, {})]


def test_a_missing_tracker_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"):
        Trackers(configs.load("quickstart", ("logging.trackio=true",)), tmp_path, 0)


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    trackers = Trackers(configs.load("quickstart"), tmp_path, 0)
    trackers.log(EvalRow(event="eval", stage="base", split="test", scores={}, seconds=1.0))
    trackers.close()
    assert not list(tmp_path.iterdir())
