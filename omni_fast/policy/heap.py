"""Freed memory stays with the process, so that the next step need not fault it in again.

glibc hands freed blocks of more than 32 MiB, and the free end of its heap, back to the system at once. A training step frees
a gigabyte of activations, and the next one gets it back page by page, each zeroed in the kernel: on a CPU that took a
fifth of the step.

Limits: glibc; elsewhere nothing happens. The process keeps what its largest step took until it ends.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_BLOCK = 1 << 30  # bytes: larger ones are handed back still


def keep_freed_memory() -> None:
    """For the whole process, from now on."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
