"""`make gpu` with a Python that only plays its part: what fails or crashes leaves the rest alone, and is told."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu.sh"


def run(folder: Path, cases: str, parts: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """cases: of a shell's `case` over the arguments. settings: of the environment.

    Returns what happened, and the calls of Python.
    """
    python, calls = folder / "python", folder / "calls"
    python.write_text(
        f'#!/bin/bash\necho "$*" | tr "\\n" " " >> {calls}\necho >> {calls}\ncase "$*" in\n{cases}\nesac\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "RESULTS": "results", "PARTS": parts, "SGLANG_ARCHIVE": "none"}
    environment |= settings
    environment.pop("OMNI_FAST_ENGINE_PYTHON", None)
    done = subprocess.run(["bash", SCRIPT], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done, calls = run(tmp_path, "*) echo;;", "tests kernels train engine")
    assert done.returncode == 2 and "here there is none" in done.stderr and len(calls) == 1


def test_a_failing_part_leaves_the_others(tmp_path: Path) -> None:
    cases = """
        *get_device_name*) echo "NVIDIA H200";;
        *"pip install"*) exit 1;;
        *"-k triton and"*) echo "1 passed";;
        *pytest*) echo "1 failed"; exit 1;;
        *"T2 --without cuda cuda_exp"*) echo "T2 after all";;
        *T2*) kill -SEGV $$;;
    """
    done, calls = run(tmp_path, cases, "tests kernels train engine")
    assert done.returncode == 1, done.stderr
    log = (tmp_path / "results" / "gpu-tests.log").read_text()
    assert "1 passed" in log and "1 failed" in log and "exit status 1" in log
    tests = [call for call in calls if "-m pytest" in call]
    assert "triton" in tests[0] and "cuda_exp or linear" in tests[2] and "policy" in tests[3]  # the surest first
    asked = [call.split("--questions ")[1].split()[0] for call in calls if "bench_kernels" in call]
    assert asked == ["T1", "T2", "T2", "T4", "T3", "T5", "T6", "T7"] and "T2 after all" in done.stdout
    (train,) = (call for call in calls if "gpu_train" in call)
    assert 0 < int(train.split("--budget-s ")[1].split()[0]) < 540 - 30
    assert "left out without none" in done.stdout


def test_only_what_is_asked_for_runs(tmp_path: Path) -> None:
    done, calls = run(tmp_path, '*get_device_name*) echo "NVIDIA H200";;', "kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any("-m pytest" in call or "gpu_train" in call for call in calls)


def test_servers_see_the_archive_and_the_trainer_the_pydantic_it_lacks(tmp_path: Path) -> None:
    names = ("sglang", "pydantic", "pydantic_core", "annotated_types", "typing_inspection")
    for name in names:
        (tmp_path / "site" / name).mkdir(parents=True)
    with tarfile.open(tmp_path / "archive.tar.xz", "w:xz") as archive:
        for name in names:
            archive.add(tmp_path / "site" / name, name)
    toolkit, wrapped = tmp_path / "toolkit" / "bin", tmp_path / "bin"
    for folder in (toolkit, wrapped):
        folder.mkdir(parents=True)
    (toolkit / "nvcc").touch(0o755)
    (wrapped / "nvcc").symlink_to(toolkit / "nvcc")
    cases = """
        *get_device_name*) echo "NVIDIA H200";;
        *nvidia/cu13/lib*) echo /torch/lib;;
        *"import pydantic"*) exit 1;;
        *gpu_train*) echo "trainer: $PYTHONPATH"; LD_LIBRARY_PATH=/mine "$OMNI_FAST_ENGINE_PYTHON" -m "a server";;
        *"a server"*) echo "server: $PYTHONPATH $CUDA_HOME $LD_LIBRARY_PATH";;
    """
    path = f"{wrapped}:{os.environ['PATH']}"
    done, _ = run(tmp_path, cases, "train", SGLANG_ARCHIVE="archive.tar.xz", PATH=path, CUDA_HOME="/nothing/here")
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(("trainer:", "server:")))
    own = tmp_path / "build" / "pydantic-site"
    assert told["trainer"].split(":")[-1] == str(own) and {entry.name for entry in own.iterdir()} == {*names[1:]}
    assert told["server"] == f"{tmp_path}/build/sglang-site {tmp_path}/toolkit /torch/lib:/mine"
