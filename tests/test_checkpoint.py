"""Checkpoints: round trip, retention, damage, full and read-only disks, the run folder's lock and configuration."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.checkpoint import (
    Checkpoint,
    differences,
    latest,
    load_tensors,
    published,
    run_lock,
    save,
    save_tensors,
    write_json,
)
from omni_fast.errors import RunError, UserError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "rng": torch.arange(16, dtype=torch.uint8),
}


def save_steps(folder: Path, steps: range, keep_last: int = 3) -> None:
    for step in steps:
        save(folder, f"math-{step}", TENSORS, {"step": step, "pi": 0.1 + 0.2}, keep_last=keep_last)


def newest(folder: Path) -> Checkpoint:
    found = latest(folder, lambda message: None)
    assert found is not None
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None
    state = {"cursor": {"math": [1, 2]}, "score": 0.1 + 0.2, "none": None, "text": "é\n", "flag": True}
    path = save(tmp_path, "stage", {**TENSORS, "view": TENSORS["a"].T}, state, keep_last=2)
    found = newest(tmp_path)
    assert found.path == path and found.state == state
    tensors = load_tensors(path)
    for key, value in {**TENSORS, "view": TENSORS["a"].T}.items():
        assert tensors[key].dtype == value.dtype and torch.equal(tensors[key], value)
    assert names(path) == ["manifest.json", "state.json", "tensors.safetensors"]


def test_the_last_ones_are_kept_in_the_order_of_writing(tmp_path: Path) -> None:
    save_steps(tmp_path, range(9, 4, -1), keep_last=2)
    assert names(tmp_path) == ["000004-math-6", "000005-math-5"]
    assert newest(tmp_path).state["step"] == 5


@given(choice=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_any_damage_is_found_and_the_previous_taken(
    tmp_path_factory: pytest.TempPathFactory, choice: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("run")
    save_steps(folder, range(1, 4))
    victim = choice.choice(sorted((folder / "000003-math-3").iterdir()))
    content = bytearray(victim.read_bytes())
    kind = choice.choice(["flip", "cut", "empty", "remove"])
    if kind == "remove":
        victim.unlink()
    else:
        if kind == "flip":
            content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        victim.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[kind])
    said: list[str] = []
    found = latest(folder, said.append)
    assert found is not None
    if found.state["step"] == 3:  # a flipped bit of the manifest's white space: nothing was lost
        assert victim.name == "manifest.json" and kind == "flip"
        return
    assert found.state["step"] == 2
    if not (victim.name == "manifest.json" and kind == "remove"):
        assert len(said) == 1 and "000003-math-3" in said[0] and "trying the one before, 000002-math-2" in said[0]


def test_all_damaged_is_said(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 3))
    for path in tmp_path.glob("*/tensors.safetensors"):
        path.write_bytes(b"")
    said: list[str] = []
    with pytest.raises(UserError, match="All 2 checkpoints"):
        latest(tmp_path, said.append)
    assert len(said) == 2


def test_leftovers_of_a_killed_process_are_ignored_then_swept(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 2))
    for name in (".writing-000002-math-2", ".old-000000-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert newest(tmp_path).state["step"] == 1
    save_steps(tmp_path, range(2, 3))
    assert names(tmp_path) == ["000001-math-1", "000002-math-2"]


def test_weights_are_replaced_whole_and_checked(tmp_path: Path) -> None:
    folder = tmp_path / "weights" / "math"
    for factor in (1, 2):
        save_tensors(folder, {"a": TENSORS["a"] * factor})
    assert torch.equal(load_tensors(folder)["a"], TENSORS["a"] * 2)
    assert names(tmp_path / "weights") == ["math"]
    (folder / "tensors.safetensors").write_bytes(b"0" * 10)
    with pytest.raises(UserError, match="damaged.*10 bytes"):
        load_tensors(folder)
    with pytest.raises(UserError, match="damaged"):
        load_tensors(tmp_path / "absent")


LIMITED = """
import resource, sys, torch
from pathlib import Path
from omni_fast.checkpoint import latest, save
from omni_fast.errors import RunError
folder = Path(sys.argv[1])
save(folder, "first", {"a": torch.zeros(10)}, {"ok": True}, keep_last=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(folder, "second", {"a": torch.zeros(100_000)}, {}, keep_last=1)
except RunError as error:
    print(error)
    print(latest(folder).state["ok"])
"""


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    message, state = done.stdout.splitlines()
    assert "000002-second could not be written" in message and "too large" in message and "is intact" in message
    assert state == "True" and names(tmp_path) == ["000001-first"]


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="checkpoints/000001-math-1 could not be written"):
        save_steps(tmp_path / "file" / "checkpoints", range(1, 2))
    with pytest.raises(RunError, match="could not be written"):
        save_tensors(tmp_path / "file" / "weights", TENSORS)
    with pytest.raises(UserError, match=r"run folder .* cannot be written"), run_lock(tmp_path / "file" / "run"):
        pass
    with pytest.raises(RunError, match="could not be written"):
        write_json(tmp_path / "file" / "x.json", {})


def test_a_folder_that_cannot_be_written_whole_leaves_the_one_before(tmp_path: Path) -> None:
    def write(text: str, full: bool) -> None:
        with published(tmp_path / "final") as work:
            (work / "config.json").write_text(text)
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write("old", full=False)
    (tmp_path / ".old-final").mkdir()  # of a process killed while it replaced the folder
    (tmp_path / ".old-final" / "config.json").write_text("older")
    with pytest.raises(RunError, match=r"final could not be written \(No space left on device; .* is intact"):
        write("new", full=True)
    assert (tmp_path / "final" / "config.json").read_text() == "old"
    write("new", full=False)
    assert (tmp_path / "final" / "config.json").read_text() == "new" and names(tmp_path) == ["final"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_run_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"), run_lock(tmp_path):
        pass


def test_two_owners_of_a_run_folder(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        with pytest.raises(UserError, match=rf"pid {os.getpid()}\)"), run_lock(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    with run_lock(tmp_path / "run"):
        pass


def test_differences_are_named_by_their_path() -> None:
    first = {"seed": 1, "optimizer": {"learning_rate": 1e-5}, "tasks": [{"name": "math"}, {"name": "qa"}]}
    assert differences(first, json.loads(json.dumps(first))) == []
    second = {"seed": 1, "optimizer": {"learning_rate": 2e-5}, "tasks": [{"name": "math"}]}
    assert differences(first, second) == [
        "optimizer.learning_rate was 1e-05 and is 2e-05",
        'tasks.1.name was "qa" and is absent',
    ]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
