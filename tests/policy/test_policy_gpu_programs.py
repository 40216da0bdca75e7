"""The programs that measure on a GPU, where their time ends or a server dies: what was found is told, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_engine
from benchmarks.train import levers
from benchmarks.train.case import Case
from benchmarks.train.worker import message
from omni_fast.errors import RunError
from omni_fast.serving import process


def test_levers_for_which_no_time_is_left_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(levers, "time", SimpleNamespace(monotonic=lambda: now))

    def call(seconds: float) -> None:
        nonlocal now
        now += seconds

    calls = {name: lambda: call(1) for name in ("generate", "update", "short")} | {"long": lambda: call(10)}
    calls |= {"none": lambda: call(1)}
    against = {"short": "update", "long": "update", "none": "update"}
    seconds, before, peaks, failed = levers._timed(Case("", None, 1, 1), calls, against, 3, end=32.0)
    # Tried within half of the time, but for what has begun: 6 s and twice 10; a first round until 31 + 10; no second one.
    assert now == 41 and failed == {"none": "left out: no time"} and set(peaks) == {*calls} - {"none"}
    assert {name: len(found) for name, found in seconds.items() if found} == dict.fromkeys(list(calls)[:4], 1)
    assert len(before["long"]) == 1


def test_a_message_keeps_both_ends() -> None:
    words = message(RunError("no nvcc; " + "compiling " * 500 + "found no cublasLt.h"))
    assert words.startswith("RunError: no nvcc") and words.endswith("found no cublasLt.h") and len(words) < 1600
    assert message(RunError("short")) == "RunError: short"


def engine(folder: Path, does: str) -> dict[str, str]:
    """The environment in which servers run `does` in place of SGLang."""
    program = folder / "engine"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    return {"OMNI_FAST_ENGINE_PYTHON": str(program)}


def test_a_server_that_dies_leaves_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in engine(tmp_path, "seq 1000 1200; echo no NCCL here; seq 100; exit 3").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError), gpu_engine.server(tmp_path, "float32"):
        pass
    assert "no NCCL here" in capsys.readouterr().out


def test_a_program_told_to_end_leaves_no_server(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    environment = os.environ | engine(tmp_path, f"echo $$ > {pid}.part; mv {pid}.part {pid}; sleep 60")
    program = [sys.executable, str(Path(gpu_engine.__file__)), "--small"]
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as child:
        until = time.monotonic() + 50
        while not pid.exists():
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        leader = int(pid.read_text())
        birth = process.born(leader)
        assert process.group(leader, birth)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 143
    assert not process.group(leader, birth)
