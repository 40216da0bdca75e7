"""What goes into a sandbox and what comes out of it: plain data, whichever backend runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from omni_fast.rewards.sandbox.wire import Data

# ok: the call returned `value`. error: it raised, or the module did not load, or the value cannot be carried.
# timeout, memory: a limit of the sample. killed: it died by a signal or left without an answer. protocol: its bytes are
# not the encoding, or too many. infrastructure: the jail failed, not the sample; the score is then invalid, never 0.
Outcome = Literal["ok", "error", "timeout", "memory", "killed", "protocol", "infrastructure"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class JailError(Exception):
    """The jail (not the sample) failed: it did not start, died, or broke the frame protocol."""


@dataclass(frozen=True, slots=True)
class Job:
    """A solution and the inputs it is called with; expected values are not part of it and never enter a jail.

    source: Python source text, untrusted. entry: name of the function in it. calls: one tuple of arguments a call.
    """

    source: str
    entry: str
    calls: Sequence[tuple[Data, ...]]


@dataclass(frozen=True, slots=True)
class Call:
    """What became of one call. `value` counts only when `outcome` is "ok"; `detail` is for people, untrusted."""

    outcome: Outcome
    value: Data = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one job (all its calls together). Memory is address space; disk is what /tmp may hold."""

    memory_bytes: int = 512 << 20
    cpu_s: int = 2
    wall_s: float = 4.0
    output_bytes: int = 128 << 10
    disk_bytes: int = 16 << 20
    source_chars: int = 100_000
