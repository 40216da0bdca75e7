"""Checkpoints: round trip, retention, damage, full and read-only disks, the run folder's lock and configuration."""

from __future__ import annotations

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

from omni_fast.checkpoint import Checkpoints, check_config, run_lock, write_json
from omni_fast.errors import RunError, UserError

TENSORS = {
    "policy": {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    },
    "rng": {"cpu": torch.arange(16, dtype=torch.uint8)},
}


def saved(folder: Path, steps: range, keep_last: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_last=keep_last)
    for step in steps:
        checkpoints.save(step, TENSORS, {"step": step, "pi": 0.1 + 0.2})
    return checkpoints


def test_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.latest() is None
    state = {"cursor": {"math": [1, 2]}, "score": 0.1 + 0.2, "none": None, "text": "é\n", "flag": True}
    checkpoints.save(7, {**TENSORS, "view": {"t": TENSORS["policy"]["a"].T}}, state)
    found = checkpoints.latest()
    assert found is not None and found.step == 7 and found.state == state
    for name, group in TENSORS.items():
        for key, value in found.tensors(name).items():
            assert value.dtype == group[key].dtype and torch.equal(value, group[key])
    assert torch.equal(found.tensors("view")["t"], TENSORS["policy"]["a"].T)
    with pytest.raises(KeyError):
        found.tensors("absent")
    assert not [path for path in (tmp_path / "step-00000007").iterdir() if path.suffix in (".pt", ".pkl", ".bin")]


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, range(1, 6), keep_last=2)
    assert checkpoints.steps() == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


@given(choice=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_any_damage_is_found_and_the_previous_taken(
    tmp_path_factory: pytest.TempPathFactory, choice: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("run")
    checkpoints = saved(folder, range(1, 4))
    newest = folder / "step-00000003"
    victim = choice.choice(sorted(newest.iterdir()))
    content = bytearray(victim.read_bytes())
    kind = choice.choice(["flip", "cut", "empty", "remove"])
    if kind == "remove":
        victim.unlink()
    else:
        if kind == "flip":
            content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        victim.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[kind])
    said: list[str] = []
    found = checkpoints.latest(said.append)
    assert found is not None
    if found.step == 3:  # a flipped bit may hit white space or the stored step of the manifest: nothing was lost
        assert victim.name == "manifest.json" and kind == "flip" and found.state["step"] == 3
        return
    assert found.step == 2 and found.state["step"] == 2
    if not (victim.name == "manifest.json" and kind == "remove"):
        assert len(said) == 1 and "step-00000003" in said[0] and "step 2" in said[0]


def test_all_damaged_is_said(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, range(1, 3))
    for path in tmp_path.glob("step-*/policy.safetensors"):
        path.write_bytes(b"")
    said: list[str] = []
    with pytest.raises(UserError, match="All 2 checkpoints"):
        checkpoints.latest(said.append)
    assert len(said) == 2


def test_a_damaged_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, range(1, 4))
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    assert checkpoints.latest(lambda message: None).step == 2  # type: ignore[union-attr]
    checkpoints.save(3, TENSORS, {"again": True})
    assert checkpoints.latest().state == {"again": True}  # type: ignore[union-attr]
    assert checkpoints.steps() == [1, 2, 3]


def test_leftovers_of_a_killed_process_are_ignored_then_swept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, range(1, 2))
    for name in (".writing-step-00000002", ".old-step-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert checkpoints.latest().step == 1  # type: ignore[union-attr]
    checkpoints.save(2, TENSORS, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


LIMITED = """
import resource, sys, torch
from pathlib import Path
from omni_fast.checkpoint import Checkpoints
from omni_fast.errors import RunError
checkpoints = Checkpoints(Path(sys.argv[1]), keep_last=1)
checkpoints.save(1, {"policy": {"a": torch.zeros(10)}}, {"ok": True})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(2, {"policy": {"a": torch.zeros(100_000)}}, {})
except RunError as error:
    print(error)
    print(checkpoints.latest().step)
"""


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    message, step = done.stdout.splitlines()
    assert "step 2 could not be written" in message and "too large" in message and "step 1 is intact" in message
    assert step == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="step 1 could not be written.*no earlier one"):
        saved(tmp_path / "file" / "checkpoints", range(1, 2))
    with pytest.raises(UserError, match=r"run folder .* cannot be written"), run_lock(tmp_path / "file" / "run"):
        pass
    with pytest.raises(RunError, match="could not be written"):
        write_json(tmp_path / "file" / "x.json", {})


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


def test_configuration_of_a_folder(tmp_path: Path) -> None:
    first = {"seed": 1, "optimizer": {"learning_rate": 1e-5}, "tasks": [{"name": "math"}, {"name": "qa"}]}
    check_config(tmp_path, first)
    check_config(tmp_path, json.loads(json.dumps(first)))
    second = {"seed": 1, "optimizer": {"learning_rate": 2e-5}, "tasks": [{"name": "math"}]}
    with pytest.raises(
        UserError, match=r"learning_rate was 1e-05 and is 2e-05; tasks\.1\.name was \"qa\" and is absent"
    ):
        check_config(tmp_path, second)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        check_config(tmp_path, first)


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_keep_last_must_keep_something(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last"):
        Checkpoints(tmp_path, keep_last=0)
