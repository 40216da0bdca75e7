"""What trackers get of a row, and what the user gets without the package."""

import sys
from pathlib import Path

import pytest

from omni_fast import config as configs
from omni_fast.errors import UserError
from omni_fast.records import EvalRow
from omni_fast.trackers import Trackers, numbers


def test_an_evaluation_becomes_one_number_per_measured_task() -> None:
    known = {"value": 0.5, "n": 4, "low": 0.2, "high": 0.8}
    unknown = {"value": None, "n": 0, "low": None, "high": None}
    row = EvalRow(event="eval", stage="base", split="test", scores={"math": known, "code": unknown}, seconds=1.0)
    assert numbers(row) == {"test/math": 0.5}


def test_a_missing_tracker_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"):
        Trackers(configs.load("quickstart", ("logging.trackio=true",)), tmp_path, 0)


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    trackers = Trackers(configs.load("quickstart"), tmp_path, 0)
    trackers.log(EvalRow(event="eval", stage="base", split="test", scores={}, seconds=1.0))
    trackers.close()
    assert not list(tmp_path.iterdir())
