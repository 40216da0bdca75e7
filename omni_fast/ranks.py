"""The processes that torchrun starts: which one this is, and their group.

Rank 0 runs the job; the others only take part in its optimiser steps (policy/sharded.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from omni_fast.checkpoint import differences
from omni_fast.errors import UserError

STEP_S = 600.0  # limit on one exchange between ranks within a step


def world() -> int:
    """How many ranks there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device() -> str:
    """The GPU, this rank's own under torchrun, where there is one."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if world() > 1 else "cuda"


def threads() -> int:
    """This process's share of the cores."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def together(fingerprint: dict[str, Any]) -> Iterator[None]:
    """The group of all ranks, if torchrun started more than one. UserError where they were given different configs."""
    if world() == 1:
        yield
        return
    # Ctrl-C reaches all ranks: rank 0 finishes its step, saves, and lets the others go
    if int(os.environ.get("RANK", 0)):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=STEP_S)
    store, own, count = next(iter(rendezvous("env://", timeout=limit)))
    # torchrun may hand restarted ranks the store of the attempt before, in which the addresses of dead ranks still are
    attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=attempt, rank=own, world_size=count, timeout=limit)
    try:
        parts: list[Any] = [None] * world()
        dist.all_gather_object(parts, fingerprint)
        for other, part in enumerate(parts):
            if odd := differences(parts[0], part):
                told = f"rank {other} has another config than rank 0 ({'; '.join(odd[:5])})"
                raise UserError(f"{told}: start all hosts with the same file and overrides")
        yield
    finally:
        dist.destroy_process_group()
