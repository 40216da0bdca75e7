"""torchrun with two real ranks: the run of one process, and the same end after a rank is killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)

PATIENCE_S = 300.0
SMALL = (
    "threads=1",
    "curriculum.mode=joint",
    "curriculum.steps_per_stage=4",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=8",
    "evaluation.select_items=5",
    "evaluation.test_items=6",
    "evaluation.bootstrap_draws=200",
    "checkpoint.every_steps=2",
)


def start(folder: Path, *more: str, ranks: int = 2) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--max-restarts=1"]
        launcher += [f"--nproc-per-node={ranks}", "-m", "--"]
    return subprocess.Popen(
        [*launcher, "omni_fast", "train", "quickstart-tiny", "--run", str(folder), *SMALL, *more],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output


def steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [row for row in map(json.loads, lines) if row["event"] == "step"]


def learnt(row: dict[str, Any]) -> dict[str, Any]:
    """What a step did, without what a clock says."""
    update = {key: value for key, value in row["update"].items() if not key.startswith("seconds/")}
    return {"step": row["step"], "tasks": row["tasks"], "update": update}


def other_rank(process: subprocess.Popen[str]) -> int:
    """The process number of rank 1, a child of torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(
        int(child) for child in children if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    code, output = end(start(folder))
    assert code == 0, output
    return folder


def test_two_ranks_take_the_steps_of_one_process(whole: Path, tmp_path: Path) -> None:
    code, output = end(start(tmp_path / "one", ranks=1))
    assert code == 0, output
    one, two = steps(tmp_path / "one"), steps(whole)
    assert len(one) == len(two) == 16
    first, shared = learnt(one[0]), learnt(two[0])
    assert shared["tasks"] == first["tasks"], "the same samples with the same scores"
    for name in ("loss", "grad_norm", "tokens", "sample_tokens", "entropy"):
        assert shared["update"][name] == pytest.approx(first["update"][name], rel=2e-3, abs=1e-6), name
    assert [list(row["tasks"]) for row in two] == [list(row["tasks"]) for row in one]


def test_a_killed_rank_is_started_again_and_the_run_ends_the_same(whole: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    process = start(broken)
    give_up = time.monotonic() + PATIENCE_S
    while not any(broken.glob("checkpoints/joint/[0-9]*-step-6/manifest.json")):
        assert process.poll() is None, end(process)[1]
        assert time.monotonic() < give_up
        time.sleep(0.005)
    os.kill(other_rank(process), signal.SIGKILL)
    code, output = end(process)
    assert code == 0, output
    assert re.search(r"resumed after step \d+", output), output
    assert [learnt(row) for row in steps(broken)] == [learnt(row) for row in steps(whole)]
    assert (broken / "final" / "model.safetensors").read_bytes() == (whole / "final" / "model.safetensors").read_bytes()


def test_a_run_of_two_ranks_goes_on_in_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    give_up = time.monotonic() + PATIENCE_S
    while len(steps(folder)) < 5:
        assert process.poll() is None, end(process)[1]
        assert time.monotonic() < give_up
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    end(process)
    before = len(steps(folder))
    assert 5 <= before < 16, "Ctrl-C stopped it"
    code, output = end(start(folder, ranks=1))
    assert code == 0 and f"resumed after step {before}" in output, output
    assert [row["step"] for row in steps(folder)] == list(range(1, 17))


def test_a_finished_run_is_said_to_be_finished(whole: Path) -> None:
    code, output = end(start(whole))
    assert code == 0 and "this run is finished already" in output, output


def test_ranks_with_different_configs_are_refused(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from omni_fast.cli import main\n"
        "sys.argv = ['omni-fast', 'train', 'quickstart-tiny', f'seed={os.environ[\"RANK\"]}', '--run', sys.argv[1]]\n"
        "main()\n"
    )
    (tmp_path / "differ.py").write_text(script)
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    found = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node=2", str(tmp_path / "differ.py"), str(tmp_path / "run")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert found.returncode != 0
    assert "rank 1 has another config than rank 0 (seed was 0 and is 1)" in found.stdout, found.stdout
