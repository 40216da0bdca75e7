"""Ctrl-C, a second one, and kills: what is answered, what is left of processes, terminal and files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest

from omni_fast import build, grading, serving
from omni_fast.config import load
from omni_fast.run import Interrupted, Run
from omni_fast.serving import Launch, Server, process


def test_ctrl_c_is_answered_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Run.open(tmp_path, load("quickstart")) as run:
        signal.raise_signal(signal.SIGINT)
        assert run.stopping and "Ctrl-C again: at once" in capfd.readouterr().err
        with pytest.raises(Interrupted, match="the same command resumes"):
            run.raise_if_stopping()


SERVED = """
import json, signal, subprocess, sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from omni_fast import build, serving
from omni_fast.config import load
from omni_fast.progress import Progress
from omni_fast.run import Run
from omni_fast.serving import Launch, Server, process

def up(section, model, folder, **more):
    child = subprocess.Popen(["sleep", "100"], start_new_session=True)
    server = Server(Launch("policy-0", model), "http://127.0.0.1:9", child.pid, process.born(child.pid), "log", "1")
    folder.mkdir()
    (folder / "servers.json").write_text(json.dumps([asdict(server)]))
    print(child.pid, server.born, flush=True)
    return [server.url]

serving.up = up
config = load("quickstart", ["engine.kind=sglang"])
with Run.open(Path(sys.argv[1]), config) as run, ExitStack() as stack:
    build.engine_urls(config, SimpleNamespace(name_or_path="m"), run, stack, Progress())
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
"""


def test_ctrl_c_twice_leaves_no_server(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SERVED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    pid, birth = map(int, done.stdout.split())
    assert done.returncode == Interrupted.exit_code, done
    until = time.monotonic() + 10
    while process.alive(pid, birth) and time.monotonic() < until:
        time.sleep(0.05)
    assert not process.stop([(pid, birth)], 0.0), "it outlived the run"


PANEL = """
import signal, sys
from pathlib import Path
from omni_fast.config import load
from omni_fast.progress import Progress
from omni_fast.run import Run

with Run.open(Path(sys.argv[1]), load("quickstart")), Progress():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
"""


def test_ctrl_c_twice_gives_the_cursor_back(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    done = subprocess.run([sys.executable, "-c", PANEL, str(tmp_path)], stdout=theirs, timeout=120)
    shown = os.read(ours, 1 << 16)
    assert done.returncode == Interrupted.exit_code
    assert shown.rindex(b"\x1b[?25h") > shown.index(b"\x1b[?25l"), shown


def test_a_kill_while_the_judge_is_fitted_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume would have refused it."""

    class Killed:
        def save(self, path: Path) -> None:
            path.write_text("{")
            raise KeyboardInterrupt

    monkeypatch.setattr(grading, "fit_head", lambda encode, seed: Killed())
    model, tokenizer = build.load_model(load("quickstart-tiny"))
    with ExitStack() as stack, pytest.raises(KeyboardInterrupt):
        grading.Grading(load("quickstart"), stack, tmp_path, model, tokenizer).reward_judge()
    assert not (tmp_path / "judge_head.json").exists()


def test_a_server_that_left_children_is_killed_with_them(tmp_path: Path) -> None:
    with subprocess.Popen(
        ["sh", "-c", "sleep 100 & echo $!; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as leader:  # fmt: skip
        assert leader.stdin is not None and leader.stdout is not None
        birth, child = process.born(leader.pid), int(leader.stdout.readline())
        leader.stdin.close()
        leader.wait(10)
    assert process.group(leader.pid, birth) == [child]
    left = Server(Launch("policy-0", "m"), "http://127.0.0.1:9", leader.pid, birth, "log")
    (tmp_path / "servers.json").write_text(json.dumps([asdict(left)]))
    serving.kill(tmp_path)
    until = time.monotonic() + 10
    while process.group(leader.pid, birth) and time.monotonic() < until:
        time.sleep(0.05)
    assert not process.stop([(leader.pid, birth)], 0.0), "a child outlived the run"


HANGS = """
import threading
from omni_fast import scoring
from omni_fast.config import RewardsConfig
from omni_fast.curriculum.stages import Draw
from omni_fast.errors import RunError
from omni_fast.groups import Group
from omni_fast.progress import Progress
from omni_fast.tasks.base import Item

class Never:
    def score(self, items, completions):
        threading.Event().wait()

def stop():
    raise RunError("stopped")

scoring.STOP_S = 0.1
scorer = scoring.Scorer({"own": Never()}, RewardsConfig(), Progress(), stop)
group = Group(Draw("own", 0, 0), Item("a", "b"), [1], texts=["c"])
scorer.submit(group)
try:
    scorer.finish([group])
except RunError as error:
    print(error)
scorer.close()
"""


def test_a_reward_that_never_returns_holds_up_no_exit() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "stopped\n", done
