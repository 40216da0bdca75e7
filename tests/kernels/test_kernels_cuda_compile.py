"""What ptxas makes of the CUDA sources: for compute capability 9.0, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"

ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.S,
)
SOURCES = {"rows.cu": (12, 80), "linear.cu": (7, 168)}  # kernels, registers that the launch bounds leave


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: the CUDA sources are not compiled")
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_without_spills(source: str, tmp_path: Path) -> None:
    kernels, most = SOURCES[source]
    command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin"]
    built = subprocess.run(
        [*command, str(CUDA / source), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True, timeout=240
    )
    assert built.returncode == 0, built.stderr
    found = ENTRY.findall(built.stderr)
    assert len(found) == kernels, built.stderr
    assert "wgmma" not in built.stderr and "setmaxnreg" not in built.stderr, built.stderr  # what it could not keep
    for name, stack, stores, loads, registers, rest in found:
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), name
        assert int(registers) <= most, name
        static = re.search(r"(\d+) bytes smem", rest)
        assert static is None or int(static[1]) <= 1024, name  # all but a little is dynamic, and planned
    assert "warning" not in built.stderr.lower(), built.stderr
