"""`omni-fast doctor`: what this machine has, and what each lack costs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from omni_kernels.backends import cpu

MEMORY_GB = 8  # peak of the quickstart
DISK_GB = 6  # its weights and checkpoints


class Finding(NamedTuple):
    what: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """One finding per thing that matters, in the order a person would check them."""
    return [_python(), _torch(), _native(), _bf16(), _cores(), _memory(), _disk(), _bubblewrap(), _gpu()]


def _python() -> Finding:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("Python", ok, platform.python_version() + ("" if ok else "; tested on 3.11 to 3.13"))


def _torch() -> Finding:
    return Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")


def _native() -> Finding:
    reason = cpu.reason_unavailable()
    return Finding("native CPU kernels", reason is None, reason or "loaded")


def _bf16() -> Finding:
    flags = cpu_flags()
    units = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return Finding(
        "bf16 units", bool(units), ", ".join(units) or "none: the working copy stays fp32 and a step takes longer"
    )


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    busy = load > 0.5 * usable
    note = f"; load is {load:.1f}: other work makes OpenMP wait, lower `threads`" if busy else ""
    return Finding("cores", not busy, f"{usable}{note}")


def _memory() -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Finding("memory", free >= MEMORY_GB, f"{free:.1f} GiB free; the quickstart needs {MEMORY_GB} at most")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("disk", free >= DISK_GB, f"{free:.1f} GiB free here; the quickstart writes about {DISK_GB}")


def _bubblewrap() -> Finding:
    path = shutil.which("bwrap")
    lack = "missing: install bubblewrap, or model-written code runs in the slower fallback"
    return Finding("bubblewrap", path is not None, path or lack)


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", True, "none; everything runs on the CPU")
    return Finding("GPU", True, torch.cuda.get_device_name())


def cpu_flags() -> set[str]:
    """The processor's feature flags as Linux names them; empty where /proc does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].split()) if lines else set()
