"""A control group around each jail where this machine lets us make one: a second bound on its memory and processes.

Versions 1 and 2 of the interface, detected, never assumed: containers often mount them read-only or without controllers, and
then the jail does without. What it adds to rlimits: it counts the whole jail (fork-server, its /tmp, all threads) at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "omni_fast-"
START_S = 60.0  # a group that is this old has got its process
LIMITS = {"memory.max": "memory", "memory.limit_in_bytes": "memory", "pids.max": "pids"}  # file -> controller


def _homes() -> list[Path]:
    """The folders of the groups that this process is in and that carry one of our controllers."""
    homes = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                homes.append(ROOT / path.lstrip("/"))
            homes += [ROOT / name / path.lstrip("/") for name in controllers.split(",") if name in LIMITS.values()]
    return homes


def _sweep(home: Path) -> None:
    """Remove what a killed trainer left; a group that is in use cannot be removed."""
    for left in home.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > START_S:
                left.rmdir()


class Group:
    """A group in each hierarchy that we may make one in, perhaps none. controllers: folder -> what it limits."""

    def __init__(self, memory_bytes: int, pids: int) -> None:
        self.controllers: dict[Path, list[str]] = {}
        for home in _homes():
            with contextlib.suppress(OSError):
                _sweep(home)
            with contextlib.suppress(OSError):
                folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=home))
                self.controllers[folder] = []
                for file, name in LIMITS.items():
                    if (folder / file).exists():
                        (folder / file).write_text(str(memory_bytes if name == "memory" else pids))
                        self.controllers[folder].append(name)
                if not self.controllers[folder]:
                    del self.controllers[folder]
                    folder.rmdir()

    def active(self) -> list[str]:
        """The controllers that bind somebody: those of the groups with a process in it."""
        held: list[str] = []
        for folder, names in self.controllers.items():
            with contextlib.suppress(OSError):  # without a process it may have been swept by another run
                held += names if (folder / "cgroup.procs").read_text() else []
        return held

    def enter(self, line: list[str], fds: contextlib.ExitStack) -> tuple[list[str], list[int]]:
        """A command that moves itself into the groups and then becomes `line`, and its standard input and output.

        The files are opened here: who runs the command may not be allowed to.
        """
        if not self.controllers:
            return line, [subprocess.DEVNULL]
        move = ["/bin/sh", "-c", 'echo 0 >&0; echo 0 >&1; exec "$@" </dev/null >/dev/null', "sh", *line]
        return move, [fds.enter_context((folder / "cgroup.procs").open("w")).fileno() for folder in self.controllers]

    def remove(self) -> None:
        """Kill what is left inside and remove the groups. Waits up to a second for the kernel to let go."""
        for folder in self.controllers:
            for _ in range(100):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:  # busy: bubblewrap has ended, its namespace is still being torn down
                    with contextlib.suppress(OSError):
                        for pid in (folder / "cgroup.procs").read_text().split():
                            os.kill(int(pid), signal.SIGKILL)
                    time.sleep(0.01)
        self.controllers = {}
