"""The cache folder of built models: each is made once, in a temporary folder, and appears under its name when complete.

Two processes that ask for the same folder at once: one builds, the other waits for it (bounded, and it says so).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omni_fast.errors import RunError, UserError

WAIT_S = 900.0


def cache_home() -> Path:
    """`$OMNI_FAST_HOME`, else `~/.cache/omni_fast`. Created when missing; UserError where that is not possible."""
    home = Path(os.environ.get("OMNI_FAST_HOME") or "~/.cache/omni_fast").expanduser()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {home} cannot be created ({error.strerror}): set OMNI_FAST_HOME to a writable folder."
        ) from error
    return home


@contextmanager
def _exclusive(lock: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock on `lock`; the kernel drops it when the holder dies."""
    with lock.open("w") as handle:
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - started
                if waited == 0 or int(waited) % 30 == 0:
                    print(f"waiting for another process that prepares {what} ({waited:.0f} s)", file=sys.stderr)
                if waited > WAIT_S:
                    raise RunError(
                        f"Another process has held {lock} for {WAIT_S:.0f} s while preparing {what}."
                    ) from None
                time.sleep(1.0)
        yield


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; if it is not there, `build(folder)` fills it first.

    A folder is visible under its name only when `build` has returned and its files are on disk, so a killed process
    leaves nothing that looks complete.
    """
    home = cache_home()
    final = home / name
    if final.is_dir():
        return final
    try:
        with _exclusive(home / f".{name}.lock", name):
            if final.is_dir():
                return final
            for stale in home.glob(f".{name}.tmp-*"):
                shutil.rmtree(stale)
            folder = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=home))
            try:
                build(folder)
                for path in folder.iterdir():
                    with path.open("rb") as handle:
                        os.fsync(handle.fileno())
                folder.rename(final)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        raise RunError(
            f"{name} could not be written to the cache folder {home} ({error.strerror or error}): "
            "free some disk space there, or set OMNI_FAST_HOME to another folder."
        ) from error
    return final
