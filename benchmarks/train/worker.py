"""A contender in a process of its own, which makes a step when told to and says what it cost.

Memory is the process's own: resident bytes at the peak of a step, less what was resident once everything was imported and
no model loaded.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path


@dataclass
class Step:
    """What one step took. phases in seconds; reward: mean over the samples; tokens: sampled, all samples together.

    rows: what the forward pass of the update computed. peak_bytes: resident, without the imports' share.
    """

    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    tokens: int = 0
    rows: int = 0
    peak_bytes: int = 0


@dataclass
class Hello:
    """Sent once before the first step. state_bytes: weights, gradients, optimiser state."""

    settings: dict[str, object]
    state_bytes: int
    prompts: list[list[list[int]]]


class Reporter:
    """The child's side: waits for the word, clocks phases, sends what they took."""

    def __init__(self, connection: Connection) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.baseline = _status("VmRSS")
        self.connection = connection
        self.step = Step()
        self.started = 0.0

    def hello(self, hello: Hello) -> None:
        self.connection.send(hello)

    def wait(self) -> bool:
        """Blocks until a step is wanted; False: the end, or the parent is gone."""
        try:
            if not self.connection.recv():
                return False
        except EOFError:
            return False
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        self.step = Step()
        self.started = time.perf_counter()
        return True

    def done(self) -> None:
        self.step.seconds = time.perf_counter() - self.started
        self.step.peak_bytes = _status("VmHWM") - self.baseline
        self.connection.send(self.step)

    def timed(self, phase: str, function: Callable) -> Callable:
        """`function` with its seconds added to `phase`."""

        def call(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.step.phases[phase] = self.step.phases.get(phase, 0.0) + time.perf_counter() - start
            return result

        return call


class Worker:
    """The parent's side. `target(connection, *args)` runs in a fresh process."""

    def __init__(self, name: str, target: Callable[..., None], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, child = context.Pipe()
        self.process = context.Process(target=target, args=(child, *args), daemon=True)
        self.process.start()
        child.close()
        self.hello: Hello = self._receive()
        self.steps: list[Step] = []

    def step(self) -> Step:
        self.connection.send(True)
        self.steps.append(self._receive())
        return self.steps[-1]

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.connection.send(False)
        self.process.join(60)
        self.process.kill()

    def _receive(self):
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join(10)
            raise SystemExit(f"{self.name} ended with exit code {self.process.exitcode}; its output is above") from None


def _status(field_name: str) -> int:
    found = re.search(rf"{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024
