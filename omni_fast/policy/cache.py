"""The cache folder of built models: each is made once, in a temporary folder, and appears under its name when complete.

Two processes that ask for the same folder at once: one builds, the other waits for it (bounded, and it says so). The lock
that does that is for others too.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from omni_fast.errors import RunError, UserError

WAIT_S = 900.0
SAY_EVERY_S = 15.0


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


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; if it is not there, `build(folder)` fills it first.

    A folder is visible under its name only when `build` has returned and its files are on disk, so a killed process
    leaves nothing that looks complete.
    """
    from omni_fast.checkpoint import published  # which imports torch

    home = cache_home()
    final = home / name
    if final.is_dir():
        return final
    try:
        with alone(home / f".{name}.lock", f"preparing {name}", WAIT_S, partial(print, file=sys.stderr)):
            if not final.is_dir():
                with published(final) as folder:
                    build(folder)
    except (OSError, RunError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise RunError(
            f"{name} could not be written to the cache folder {home} ({cause.strerror or cause}): "
            "free some disk space there, or set OMNI_FAST_HOME to another folder."
        ) from error
    return final
