"""`omni-fast doctor`: what this machine has, and what each lack costs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from omni_fast.policy.model import working_dtype
from omni_kernels.backends import cpu

MEMORY_GB = 8  # peak of the quickstart
DISK_GB = 6  # its weights and checkpoints


def examine() -> list[tuple[str, bool, str]]:
    """What was looked at, whether it is fine, and the detail, in the order a person would check them."""
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    native = cpu.reason_unavailable()
    bf16 = working_dtype() == torch.bfloat16
    usable, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    busy = f"; load is {load:.1f}: other work makes OpenMP wait, lower `threads`" if load > 0.5 * usable else ""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    bwrap = shutil.which("bwrap")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; everything runs on the CPU"
    return [
        ("Python", supported, platform.python_version() + ("" if supported else "; tested on 3.11 to 3.13")),
        ("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("native CPU kernels", native is None, native or "loaded"),
        ("bf16 units", bf16, "used" if bf16 else "none: the working copy stays fp32 and a step takes longer"),
        ("cores", not busy, f"{usable}{busy}"),
        ("memory", memory >= MEMORY_GB, f"{memory:.1f} GiB free; the quickstart needs {MEMORY_GB} at most"),
        ("disk", disk >= DISK_GB, f"{disk:.1f} GiB free here; the quickstart writes about {DISK_GB}"),
        ("bubblewrap", bool(bwrap), bwrap or "missing: model-written code runs in the slower fallback"),
        ("GPU", True, gpu),
    ]
