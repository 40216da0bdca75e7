"""A run that is killed at several points, stopped by Ctrl-C and robbed of a checkpoint ends as one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)

PROGRAM = str(Path(sys.executable).with_name("omni-fast"))
SMALL = (
    "threads=1",
    "curriculum.steps_per_stage=5",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "evaluation.select_items=5",
    "evaluation.test_items=6",
    "evaluation.bootstrap_draws=200",
    "checkpoint.every_steps=2",
)
PATIENCE_S = 300.0


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PROGRAM, "quickstart", "--tiny", "--run", str(folder), *SMALL],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in output, output
    return process.returncode, output


def stop_when(folder: Path, reached: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Start or resume, and send the signal as soon as `reached` holds."""
    process = start(folder)
    give_up = time.monotonic() + PATIENCE_S
    while not reached():
        assert process.poll() is None, f"ended before the point was reached: {end(process)}"
        assert time.monotonic() < give_up
        time.sleep(0.002)
    process.send_signal(number)
    return end(process)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Whole rows only: the last one may be half written while the process runs."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a clock says."""
    kept = {
        key: value for key, value in row.items() if key not in ("seconds", "scoring_s", "tokens_per_s", "waited_for")
    }
    if "update" in kept:
        kept["update"] = {key: value for key, value in row["update"].items() if not key.startswith("seconds/")}
    return kept


def scores(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    clocks = ("seconds", "throughput", "peak_bytes", "sandbox_detail")
    return {key: value for key, value in result.items() if key not in clocks}


def has_row(folder: Path, **wanted: object) -> Callable[[], bool]:
    return lambda: any(all(row.get(key) == value for key, value in wanted.items()) for row in rows(folder))


def has_checkpoint(folder: Path, stage: str, name: str) -> Callable[[], bool]:
    return lambda: any((folder / "checkpoints" / stage).glob(f"[0-9]*-{name}/manifest.json"))


def test_killed_stopped_and_damaged_it_ends_like_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output = end(start(whole))
    assert code == 0, output

    # In the middle of a stage, after a checkpoint of it.
    code, _ = stop_when(broken, has_checkpoint(broken, "single-math", "step-2"), signal.SIGKILL)
    assert code == -signal.SIGKILL
    # During an evaluation: one split is written down, the other is not.
    code, output = stop_when(broken, has_row(broken, stage="single:math", split="select"), signal.SIGKILL)
    assert code == -signal.SIGKILL and "resumed after step" in output
    # Between two stages: everything of one is finished.
    code, _ = stop_when(broken, has_row(broken, stage="single:code", split="test"), signal.SIGKILL)
    assert code == -signal.SIGKILL

    # Ctrl-C in a stage: the step is finished and a checkpoint written.
    code, output = stop_when(broken, has_row(broken, stage="single:qa", step=2), signal.SIGINT)
    assert code == 130, output
    assert "the same command resumes" in output
    kept = sorted((broken / "checkpoints" / "single-qa").glob("[0-9]*"))
    assert kept and rows(broken)[-1]["step"] == int(kept[-1].name.split("-")[-1])
    # Ctrl-C in an evaluation: it is done again.
    code, output = stop_when(broken, has_row(broken, stage="single:qa", split="select"), signal.SIGINT)
    assert code in (0, 130), output

    # In a later stage, and the newest checkpoint of it damaged.
    stage = json.loads((whole / "result.json").read_text())["order"][1]
    where = broken / "checkpoints" / f"curriculum-2-{stage}"
    code, _ = stop_when(broken, has_checkpoint(broken, where.name, "step-4"), signal.SIGKILL)
    assert code == -signal.SIGKILL
    newest = sorted(where.glob("[0-9]*"))[-1] / "tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)

    code, output = end(start(broken))
    assert code == 0, output
    assert "is damaged" in output and "resumed after step 2" in output

    assert [timeless(row) for row in rows(broken)] == [timeless(row) for row in rows(whole)]
    assert scores(broken) == scores(whole)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (broken / "final" / name).read_bytes() == (whole / "final" / name).read_bytes(), name
    assert [path for path in (broken / "checkpoints").rglob("*") if path.is_file()] == []


def test_ctrl_c_while_setting_up_stops_soon(tmp_path: Path) -> None:
    process = start(tmp_path / "run")
    while not (tmp_path / "run" / ".lock").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, output = end(process)
    assert code == 130, output
    assert "step 1/" not in output
