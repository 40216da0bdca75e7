"""Processes that outlive whoever started them: known by pid and time of birth, stopped with all their children.

A server leads a process group of its own. Linux only, as SGLang is: read from /proc, without asking any library.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omni_fast.errors import RunError

SAY_EVERY_S = 15.0


def born(pid: int) -> int:
    """When the process was started, in clock ticks since boot: with the pid it names a process for good. 0: no such."""
    return _stat(pid)[2]


def alive(pid: int, birth: int) -> bool:
    """Whether this very process runs; one that waits to be collected by its parent does not."""
    _collect(pid)
    state, _, found = _stat(pid)
    return found == birth != 0 and state != "Z"


def group(leader: int, birth: int) -> list[int]:
    """The running processes of the group; empty when its number belongs to another process by now."""
    _collect(leader)
    if born(leader) not in (0, birth):
        return []
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    stats = {pid: _stat(pid) for pid in pids}
    return [pid for pid, (state, of, _) in stats.items() if of == leader and state not in ("Z", "")]


def stop(leader: int, birth: int, grace_s: float) -> bool:
    """SIGTERM to the group, SIGKILL to what is left after `grace_s`. Returns whether anything was running."""
    if not group(leader, birth):
        return False
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(leader, number)
        except ProcessLookupError:  # gone by itself just now
            return True
        until = time.monotonic() + patience
        while group(leader, birth):
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        else:
            return True
    return True


def _stat(pid: int) -> tuple[str, int, int]:
    """State, process group and time of birth; ("", 0, 0) without such a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0, 0
    return fields[0], int(fields[2]), int(fields[19])


def _collect(pid: int) -> None:
    """If it is our child and has ended, let it go."""
    with suppress(ChildProcessError):  # another process's child
        os.waitpid(pid, os.WNOHANG)


@contextmanager
def alone(lock: Path, what: str, timeout_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time is inside; the kernel drops the lock of a killed one. RunError after `timeout_s`."""
    started, told = time.monotonic(), -SAY_EVERY_S
    with lock.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - started
            if waited > timeout_s:
                raise RunError(f"Another process has been {what} for {waited:.0f} s: wait for it or stop it.")
            if waited - told >= SAY_EVERY_S:
                told = waited
                say(f"another process is {what}; waiting ({waited:.0f} of at most {timeout_s:.0f} s)")
            time.sleep(0.2)
        yield
