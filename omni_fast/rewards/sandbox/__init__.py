"""Run model-written Python where it can reach neither the reward nor the machine.

    with Sandbox() as sandbox:
        calls = sandbox.run([Job(source, "add", [(1, 2), (3, 4)])])[0]   # [Call("ok", 3), Call("ok", 7)]

Only data crosses the border: source, entry point and inputs go in, values come out. Expected values and the comparison
stay with the caller, so nothing inside can forge a pass. `start()` tries the backends in turn, proves by attacks that
the isolation holds, and refuses to run without one unless `unsafe=True`.
Limits: what the kernel and the interpreter of the backend guarantee; docs/sandbox.md lists the layers and the attacks.
"""

from __future__ import annotations

import logging
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from omni_fast.errors import UserError
from omni_fast.rewards.sandbox.job import OUTCOMES, Call, Job, Limits, Outcome
from omni_fast.rewards.sandbox.process import Jail, JailError
from omni_fast.rewards.sandbox.wire import Data, WireError, decode, encode

__all__ = ["OUTCOMES", "Call", "Data", "Job", "Limits", "Outcome", "Sandbox", "WireError", "decode", "encode"]

log = logging.getLogger(__name__)

LAYERS = {
    "bwrap": (
        "data-only protocol",
        "bubblewrap: no network, empty environment, read-only minimal root",
        "unprivileged uid, no capabilities",
        "user, pid, mount and ipc namespace per job",
        "no_new_privs",
        "seccomp allow-list",
        "rlimits",
        "output cap",
        "wall clock",
    ),
    "unsafe": ("data-only protocol", "no_new_privs", "seccomp allow-list", "rlimits", "output cap", "wall clock"),
}

# What must come out of the jail's own mouth before it gets a sample: each function tries one thing and says what it
# saw.
PROBE = """
import os, socket
def tries(what):
    try:
        if what == "fork": return os.fork() and "forked"
        if what == "socket": return str(socket.socket())
        if what == "write": return str(open("/left-behind", "w"))
        if what == "files":
            return [path for path in ("/etc/passwd", "/root", "/home", "/proc/self", "/sys") if os.path.exists(path)]
        if what == "root": return os.getuid() == 0
        return what
    except OSError:
        return "denied"
"""
PROBE_EXPECTED = {"fork": "denied", "socket": "denied", "write": "denied", "files": [], "root": False, "plain": "plain"}


class Backend(Protocol):
    """One place to run jobs, used by one thread at a time."""

    def start(self) -> None: ...

    def run(self, job: Job) -> list[Call]: ...

    def stop(self) -> None: ...


class Sandbox:
    """A few jails behind one batch call. Safe to call from several threads."""

    def __init__(self, workers: int | None = None, limits: Limits | None = None, unsafe: bool = False) -> None:
        """workers: jails at the same time (default: one per usable core). unsafe: allow running without isolation."""
        self.workers = workers or len(os.sched_getaffinity(0))
        self.limits = limits or Limits()
        self.unsafe = unsafe
        self.backend = ""
        self.refused: dict[str, str] = {}
        self.restarts = 0
        self._jails: list[Backend] = []
        self._free: queue.SimpleQueue[Backend] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def start(self) -> Self:
        """Pick the first backend that starts and passes the probe. Raises UserError when there is none."""
        # The kernel kills a jail when the *thread* that started it ends, so jails start on threads that live as long.
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        for name, make in self._ladder():
            jails = [make() for _ in range(self.workers)]
            try:
                list(self._threads.map(lambda jail: jail.start(), jails))
                probe(jails[0], name)
            except JailError as error:
                self.refused[name] = str(error)
                for jail in jails:
                    jail.stop()
                continue
            self.backend, self._jails = name, jails
            for jail in jails:
                self._free.put(jail)
            if name == "unsafe":
                log.warning("model-written code runs WITHOUT isolation (unsafe)")
            return self
        self._threads.shutdown()
        self._threads = None
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        raise UserError(
            f"no isolation for model-written code works on this machine ({reasons}); install bubblewrap and allow user "
            "namespaces, or `pip install pydantic-monty`, or accept the risk with --unsafe"
        )

    def _ladder(self) -> list[tuple[str, Callable[[], Backend]]]:
        ladder: list[tuple[str, Callable[[], Backend]]] = [("bwrap", lambda: Jail(self.limits))]
        if self.unsafe:
            ladder.append(("unsafe", lambda: Jail(self.limits, isolate=False)))
        return ladder

    def run(self, jobs: Sequence[Job]) -> list[list[Call]]:
        """Outcomes of every call of every job, in order. Never raises for anything a job does."""
        if self._threads is None:
            raise RuntimeError("the sandbox is not running: call start() or use it as a context manager")
        return list(self._threads.map(self._run_one, jobs))

    def _run_one(self, job: Job) -> list[Call]:
        jail = self._free.get()
        try:
            try:
                return jail.run(job)
            except JailError as first:
                log.warning("sandbox: %s; starting the jail again", first)
            try:
                self.restarts += 1
                jail.start()
                return jail.run(job)
            except JailError as error:
                jail.stop()
                return [Call("infrastructure", detail=str(error))] * len(job.calls)
        finally:
            self._free.put(jail)

    def describe(self) -> dict[str, object]:
        """What protects this run, for result.json and the report."""
        return {
            "backend": self.backend or "none",
            "isolated": self.backend not in ("", "unsafe"),
            "layers": list(LAYERS.get(self.backend, ())),
            "workers": self.workers,
            "restarts": self.restarts,
            "refused": dict(self.refused),
        }

    def close(self) -> None:
        """End all jails. May be called twice."""
        for jail in self._jails:
            jail.stop()
        self._jails = []
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def probe(jail: Backend, name: str) -> None:
    """Let the backend try what it must not be able to do. Raises JailError with what it could do."""
    calls = jail.run(Job(PROBE, "tries", [(what,) for what in PROBE_EXPECTED]))
    for (what, expected), call in zip(PROBE_EXPECTED.items(), calls, strict=True):
        if call.outcome != "ok" or (name != "unsafe" and call.value != expected):
            raise JailError(f"probe {what!r} gave {call.outcome} {str(call.value)[:60]!r} {call.detail[:80]}".rstrip())
