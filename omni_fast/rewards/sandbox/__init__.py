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
from collections.abc import Sequence
from typing import Self

from omni_fast.errors import UserError
from omni_fast.rewards.sandbox.attacks import ATTACKS, stopped
from omni_fast.rewards.sandbox.job import OUTCOMES, Call, JailError, Job, Limits
from omni_fast.rewards.sandbox.monty import MontyJail
from omni_fast.rewards.sandbox.process import Jail
from omni_fast.rewards.sandbox.wire import Data
from omni_fast.rewards.workers import Workers

__all__ = ["OUTCOMES", "Call", "Data", "Job", "Limits", "Sandbox"]

log = logging.getLogger(__name__)

_PROCESS = ("no_new_privs", "seccomp allow-list", "rlimits")
LAYERS = {
    "bwrap": (
        "bubblewrap: no network, empty environment, read-only minimal root",
        "unprivileged uid, no capabilities",
        "user, pid, mount and ipc namespace per job",
        *_PROCESS,
    ),
    "monty": (
        "own interpreter in a separate process: no files, network, processes or machine code",
        "time, memory and recursion limits",
    ),
    "unsafe": _PROCESS,
}

# What a backend has to stop before it gets a sample.
PROBES = ("daemon", "exec", "write beside the interpreter", "read the host's files", "be root", "unix socket")
PLAIN = Job("def double(x):\n    return [2 * x]\n", "double", [(21,)])

Backend = Jail | MontyJail  # one place to run jobs, used by one thread at a time


class Sandbox:
    """A few jails behind one batch call. Safe to call from several threads."""

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits | None = None,
        unsafe: bool = False,
        backends: Sequence[str] = ("bwrap", "monty"),
    ) -> None:
        """workers: jails at the same time (default: one per usable core). unsafe: allow running without isolation.

        backends: what to try, in this order, before the unsafe one.
        """
        self.workers = workers or len(os.sched_getaffinity(0))
        self.limits = limits or Limits()
        self._names = [*backends, "unsafe"] if unsafe else list(backends)
        self.backend = ""
        self.refused: dict[str, str] = {}
        self.restarts = 0
        self._jails: Workers[Backend] | None = None

    def start(self) -> Self:
        """Pick the first backend that starts and passes the probe. Raises UserError when there is none."""
        for name in self._names:
            # The kernel kills a jail when the *thread* that started it ends, so it starts on one that lives as long.
            jails = Workers([self._make(name) for _ in range(self.workers)], "sandbox")
            try:
                jails.run(lambda jail, _: jail.start(), jails.workers)
                probe(jails.workers[0], isolated=name != "unsafe")
            except JailError as error:
                self.refused[name] = str(error)
                for jail in jails.close():
                    jail.stop()
                continue
            self.backend, self._jails = name, jails
            if name == "unsafe":
                log.warning("model-written code runs WITHOUT isolation (unsafe)")
            return self
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        raise UserError(
            f"no isolation for model-written code works on this machine ({reasons}); install bubblewrap and allow user "
            "namespaces, or `pip install pydantic-monty`, or accept the risk with --unsafe"
        )

    def _make(self, name: str) -> Backend:
        return MontyJail(self.limits) if name == "monty" else Jail(self.limits, isolate=name == "bwrap")

    def run(self, jobs: Sequence[Job]) -> list[list[Call]]:
        """Outcomes of every call of every job, in order. Never raises for anything a job does."""
        if self._jails is None:
            raise RuntimeError("the sandbox is not running: call start() or use it as a context manager")
        return self._jails.run(self._run_one, jobs)

    def _run_one(self, jail: Backend, job: Job) -> list[Call]:
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

    def describe(self) -> dict[str, object]:
        """What protects this run, for result.json and the report."""
        layers = [*LAYERS.get(self.backend, ()), *(self._jails.workers[0].layers if self._jails else ())]
        return {
            "backend": self.backend or "none",
            "isolated": self.backend not in ("", "unsafe"),
            "layers": ["data-only protocol", *layers, "output cap", "wall clock"],
            "workers": self.workers,
            "restarts": self.restarts,
            "refused": dict(self.refused),
        }

    def close(self) -> None:
        """End all jails. May be called twice."""
        jails, self._jails = self._jails, None
        for jail in jails.close() if jails else ():
            jail.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()


def probe(jail: Backend, isolated: bool) -> None:
    """Run a plain program, and attacks that isolation must stop. Raises JailError with what came of them."""
    (call,) = jail.run(PLAIN)
    if call.value != [42]:
        raise JailError(f"a plain program: {call.outcome} {call.detail[:80]}".rstrip())
    for attack in ATTACKS:
        if not isolated or attack.name not in PROBES:
            continue
        (call,) = jail.run(attack.job)
        if call.outcome not in ("ok", "error") or not stopped(attack, call):  # a jail that breaks has stopped nothing
            raise JailError(f"not stopped: {attack.name} ({call.outcome} {str(call.value)[:80]})")
