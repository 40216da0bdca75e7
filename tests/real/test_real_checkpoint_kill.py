"""Real processes killed with SIGKILL while they write checkpoints, and a real full disk."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omni_fast.checkpoint import latest, load_tensors

WRITER = """
import sys, torch
from pathlib import Path
from omni_fast.checkpoint import latest, load_tensors, run_lock, save
folder = Path(sys.argv[1])
with run_lock(folder):
    found = latest(folder / "checkpoints")
    step = found.state["step"] if found else 0
    if found:
        assert load_tensors(found.path)["w"][0].item() == step, (step, found.state)
    print("ready", flush=True)
    while True:
        step += 1
        tensors = {"w": torch.full((200_000,), float(step))}
        save(folder / "checkpoints", "stage", tensors, {"step": step}, keep_last=2)
        print(step, flush=True)
"""


def test_kill_at_any_moment_loses_no_finished_checkpoint(tmp_path: Path) -> None:
    draw = random.Random(5)
    promised = 0
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None and writer.stderr is not None
        assert writer.stdout.readline() == "ready\n", writer.stderr.read()
        time.sleep(draw.uniform(0.0, 0.3))
        writer.kill()
        output, _ = writer.communicate(timeout=60)
        promised = max([promised, *(int(line) for line in output.splitlines())])
        said: list[str] = []
        found = latest(tmp_path / "checkpoints", said.append)
        assert said == [], "a killed writer must not leave a damaged checkpoint under its final name"
        step = found.state["step"] if found else 0
        assert step >= promised
        if found:
            assert load_tensors(found.path)["w"][-1].item() == step
    assert promised > 3


FILLER = """
import sys, torch
from pathlib import Path
from omni_fast.checkpoint import latest, load_tensors, save
from omni_fast.errors import RunError
folder = Path(sys.argv[1])
for step in range(1, 6):
    try:
        save(folder, f"step-{step}", {"w": torch.full((200_000,), float(step))}, {"step": step}, keep_last=5)
    except RunError as error:
        print(error)
        found = latest(folder)
        print(found.state["step"], load_tensors(found.path)["w"][0].item())
        break
"""


def test_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    command = 'mount -t tmpfs -o size=2m none "$1" && "$0" -c "$2" "$1"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", command, sys.executable, str(tmp_path), FILLER],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()[:80]}")
    message, state = done.stdout.splitlines()
    assert "000003-step-3 could not be written" in message and "No space left" in message
    assert "what was saved before is intact" in message
    assert state == "2 2.0"
