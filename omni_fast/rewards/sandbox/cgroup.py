"""A control group around each jail where this machine lets us make one: a second bound on its memory and processes.

Versions 1 and 2 of the interface, detected, never assumed: containers often mount them read-only or without controllers, and
then the jail does without. What it adds to rlimits: it counts the whole jail (fork-server, its /tmp, all threads) at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
LIMIT_FILES = {  # controller: its files in version 2 and version 1
    "memory": ("memory.max", "memory.limit_in_bytes"),
    "pids": ("pids.max", "pids.max"),
}


def _homes() -> list[Path]:
    """The folders of the groups that this process is in and that carry one of our controllers."""
    homes = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                homes.append(ROOT / path.lstrip("/"))
            homes += [ROOT / name / path.lstrip("/") for name in controllers.split(",") if name in LIMIT_FILES]
    return homes


class Group:
    """One group per controller that can be had; `controllers` says which, perhaps none."""

    def __init__(self, memory_bytes: int, pids: int) -> None:
        self.controllers: list[str] = []
        self._folders: list[Path] = []
        for home in _homes():
            with contextlib.suppress(OSError):
                folder = Path(tempfile.mkdtemp(prefix="omni_fast-", dir=home))
                found = [
                    (name, file)
                    for name, files in LIMIT_FILES.items()
                    for file in dict.fromkeys(files)
                    if (folder / file).exists()
                ]
                for name, file in found:
                    (folder / file).write_text(str(memory_bytes if name == "memory" else pids))
                    self.controllers.append(name)
                if found:
                    self._folders.append(folder)
                else:
                    folder.rmdir()

    def add(self, pid: int) -> None:
        """Move a process in; its later children follow. Raises OSError."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Kill what is left inside and remove the groups. Waits up to a second for the kernel to let go."""
        for folder in self._folders:
            for _ in range(100):
                try:
                    os.rmdir(folder)
                    break
                except FileNotFoundError:
                    break
                except OSError:  # busy: bubblewrap has ended, its namespace is still being torn down
                    with contextlib.suppress(OSError):
                        for pid in (folder / "cgroup.procs").read_text().split():
                            os.kill(int(pid), signal.SIGKILL)
                    time.sleep(0.01)
        self._folders = []
