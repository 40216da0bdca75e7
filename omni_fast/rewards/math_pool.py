"""A killable process around math-verify, so that no string can stall or exhaust the trainer.

A worker is driven by one thread. A request may use `timeout_s` of processor time, after which the kernel ends the
worker; a request that gets no answer for several times as long on the clock, because the machine is too busy or
something is stuck, is killed from here and invalid. A worker that dies gives its request to a new one; dying twice is the
request's doing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Literal, cast

Verdict = Literal["ok", "wrong", "memory", "timeout", "crash", "worker_lost"]
PATIENCE = 30  # the clock's limit in units of the limit on processor time
MEMORY_BYTES = 1 << 30  # of a worker
START_S = 120.0  # importing sympy on a busy machine


class MathWorker:
    """One outer process and the inner one that answers. For one thread at a time."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe, _ = Pipe()

    def check(self, pair: tuple[str, str]) -> Verdict:
        """(gold, answer) -> verdict. Two processes that end under a request are its doing, a start that fails is not."""
        for _ in range(2):
            if (self._process is None or self._process.poll() is not None) and not self._start():
                return "worker_lost"
            with suppress(OSError, EOFError):
                self._pipe.send_bytes(json.dumps(pair).encode("ascii"))
                if not self._pipe.poll(self._timeout_s * PATIENCE):
                    self.stop()
                    return "worker_lost"
                line = self._pipe.recv_bytes(100).decode("ascii", "replace")
                if line in ("ok", "wrong", "memory", "timeout"):
                    return cast(Verdict, line)
            self.stop()  # with its pipe: it may hold an answer that would be taken for the next request's
        return "crash"

    def stop(self) -> None:
        self._pipe.close()
        if self._process is not None:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _start(self) -> bool:
        """Whether there is a new process that is ready."""
        self.stop()
        self._pipe, theirs = Pipe()
        script = str(Path(__file__).with_name("math_worker.py"))
        # -P: this folder must not be on its path, a file here is named like the standard library's `math`
        line = [sys.executable, "-P", script, str(theirs.fileno()), str(MEMORY_BYTES), str(self._timeout_s)]
        null = subprocess.DEVNULL
        with suppress(OSError, EOFError):
            with theirs:  # start_new_session: one group to kill, and Ctrl-C stays with the trainer
                self._process = subprocess.Popen(
                    line, stdin=null, stdout=null, stderr=null, pass_fds=[theirs.fileno()], start_new_session=True
                )
            if self._pipe.poll(START_S) and self._pipe.recv_bytes(100) == b"ready":
                return True
        self.stop()
        return False
