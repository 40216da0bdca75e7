"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and torch.mm beside the loaded module."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

TIMES_MM = """
import statistics, sys, time
import torch
x, w = torch.randn(256, 512), torch.randn(512, 4096)
logits, targets = torch.randn(64, 4096), torch.zeros(64, dtype=torch.int64)
if sys.argv[1] == "native":
    from omni_kernels.backends import cpu
def turn():
    if sys.argv[1] == "native":
        cpu.rows_forward(logits, targets)
    start = time.perf_counter()
    torch.mm(x, w)
    return time.perf_counter() - start
[turn() for _ in range(50)]
print(statistics.median(turn() for _ in range(300)))
"""


@pytest.mark.skipif(CMAKE is None, reason="needs cmake and a C++ compiler with sanitizers")
@pytest.mark.timeout(600)
def test_kernels_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    assert CMAKE is not None
    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([CMAKE, "-S", str(ROOT), "-B", str(tmp_path), "-DOMNI_SANITIZE=ON"], **run)  # type: ignore[call-overload]
    subprocess.run([CMAKE, "--build", str(tmp_path), "-j", "2"], **run)  # type: ignore[call-overload]
    done = subprocess.run([str(tmp_path / "omni_rows_check")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("cases, no error\n")


def test_matrix_products_keep_their_speed_beside_the_module() -> None:
    """A second pool of threads would make every torch.mm after a kernel call several times slower."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    }

    def seconds(mode: str) -> float:
        command = [sys.executable, "-c", TIMES_MM, mode]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=120)
        return float(done.stdout)

    pairs = [(seconds("native"), seconds("torch")) for _ in range(5)]
    assert statistics.median(native / alone for native, alone in pairs) < 1.5, pairs
