"""The Triton backend without a GPU: numbers from the interpreter, machine code compiled ahead of time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omni_kernels import backends

HERE = Path(__file__).parent
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of a program, by compute capability
MOST_REGISTERS = 65_536  # of a processor

pytest.importorskip("triton")


@pytest.mark.timeout(900)
def test_the_interpreted_kernels_pass_their_tests() -> None:
    """In a process of its own: Triton decides to interpret when it is first imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_kernels_triton_interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 200, done.stdout[-2000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("capability", "cases"), [(80, "bfloat16 V=151936"), (90, ""), (100, "bfloat16 V=151936")])
def test_machine_code_neither_spills_nor_asks_for_too_much(capability: int, cases: str, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "aot" / "compile_triton.py"), str(capability), cases]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    table = {(m["kernel"], m["registers"], m["local_bytes"], m["shared_bytes"], m["warps"]): m for m in made}
    print(f"\nsm_{capability}: kernel, registers, local bytes, shared bytes, warps, words a load, example")
    for m in table.values():
        columns = ("kernel", "registers", "local_bytes", "shared_bytes", "warps", "vector_words", "case")
        print("  ", *(m[c] for c in columns))
    kernels = {"segment_statistics", "merge_statistics", "block_gradient", "row_policy_loss"}
    assert {m["kernel"] for m in made} == kernels
    for m in made:
        assert m["local_bytes"] == 0, m
        assert m["shared_bytes"] <= SHARED_BYTES[capability], m
        aligned = m["kernel"] != "merge_statistics" and "V=151936" in m["case"]
        assert not aligned or m["vector_words"] == 4, m  # 16 bytes a load
        if m["kernel"] == "row_policy_loss" and aligned:
            assert 2 * 32 * m["warps"] * m["registers"] <= MOST_REGISTERS, m  # two rows on a processor


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absence_is_explained_and_cpu_tensors_fall_through() -> None:
    reason = backends.reason_unavailable("triton")
    assert reason is not None and "TRITON_INTERPRET=1" in reason
    with pytest.raises(ValueError, match="backend 'triton' is not available: there is no NVIDIA GPU here"):
        backends.select(torch.device("cpu"), torch.float32, "triton")
    assert backends.select(torch.device("cpu"), torch.float32).__name__.endswith((".cpu", ".torch"))


def test_an_installation_without_triton_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from omni_kernels import backends; print(backends.reason_unavailable('triton'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install triton" in done.stdout
