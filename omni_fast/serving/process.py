"""Processes that outlive whoever started them: known by pid and time of birth, stopped with all their children.

A server leads a process group of its own. Linux only, as SGLang is: read from /proc, without asking any library.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


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


def listens(leader: int, birth: int, port: int) -> bool:
    """Whether a process of the group listens on that TCP port, where somebody else may answer."""
    tables = [Path("/proc/net/tcp"), *Path("/proc/net").glob("tcp6")]  # none where IPv6 is switched off
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    there = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for pid in group(leader, birth):
        with suppress(FileNotFoundError, ProcessLookupError):  # gone by itself just now
            if any(os.readlink(file) in there for file in Path(f"/proc/{pid}/fd").iterdir()):
                return True
    return False


def stop(leaders: Iterable[tuple[int, int]], grace_s: float) -> list[tuple[int, int]]:
    """SIGTERM to the groups (leader, birth), SIGKILL to what is left after `grace_s`; those that were running.

    Without grace it is over at once: nothing waits, not even for the end of what was killed.
    """
    running = left = [one for one in leaders if group(*one)]
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0 if grace_s else 0.0)):
        for leader, _ in left:
            with suppress(ProcessLookupError):  # gone by itself just now
                os.killpg(leader, number)
        until = time.monotonic() + patience
        while (left := [one for one in left if group(*one)]) and time.monotonic() < until:
            time.sleep(0.05)
    return running


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
