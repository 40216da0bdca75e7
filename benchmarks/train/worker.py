"""A contender in a process of its own, which makes a step when told to and says what it cost.

Memory is the process's own: resident bytes at the peak of a step, less what was resident once everything was imported and
no model loaded; on a GPU the bytes that PyTorch had allocated there at the peak.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import scoreboard
from benchmarks.train.case import settle


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

    def __init__(self, connection: Connection, device: str) -> None:
        self.baseline = scoreboard.resident()
        self.device = device
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
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        self.step = Step()
        self.started = time.perf_counter()
        return True

    def done(self) -> None:
        self.step.seconds = self.now() - self.started
        on_gpu = self.device == "cuda"
        self.step.peak_bytes = (
            torch.cuda.max_memory_allocated() if on_gpu else scoreboard.status("VmHWM") - self.baseline
        )
        self.connection.send(self.step)

    def now(self) -> float:
        """Seconds, once the device has done all it was told to."""
        settle(self.device)
        return time.perf_counter()

    def timed(self, phase: str, function: Callable) -> Callable:
        """`function` with its seconds added to `phase`."""

        def call(*args: object, **kwargs: object) -> object:
            start = self.now()
            result = function(*args, **kwargs)
            self.step.phases[phase] = self.step.phases.get(phase, 0.0) + self.now() - start
            return result

        return call


def message(error: Exception) -> str:
    """Its kind, how its words begin, and their end: there a compiler or a server's log says why."""
    words = f"{type(error).__name__}: {error}"
    return words if len(words) <= 1500 else f"{words[:300]} ... {words[-1200:]}"


class Failed(Exception):
    """A contender that ended, or did not answer in time."""


class Worker:
    """The parent's side. `target(connection, *args)` runs in a fresh process, which begins at once."""

    def __init__(self, name: str, target: Callable[..., None], *args: object, answer_s: float = 1800.0) -> None:
        """answer_s: how long its start, and each of its steps, may take."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.answer_s = answer_s
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_run, args=(target, child, *args), daemon=True)
        self.process.start()
        child.close()
        self.steps: list[Step] = []

    def hello(self) -> Hello:
        """Waits until the contender has prepared itself. Raises Failed, as `step` does."""
        found = self.receive()
        assert isinstance(found, Hello)
        return found

    def step(self) -> Step:
        with suppress(BrokenPipeError):
            self.connection.send(True)
        found = self.receive()
        assert isinstance(found, Step)
        self.steps.append(found)
        return found

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.connection.send(False)
        self.process.join(60 if self.process.is_alive() else 0)
        self.process.kill()

    def receive(self) -> object:
        """What it sends next."""
        try:
            found = self.connection.recv() if self.connection.poll(self.answer_s) else None
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            raise Failed(f"ended with exit code {self.process.exitcode}") from None
        if found is None:
            self.process.kill()
            raise Failed(f"did not answer within {self.answer_s:.0f} s")
        if isinstance(found, Failed):
            raise found
        return found


def _run(target: Callable[..., None], connection: Connection, *args: object) -> None:
    try:
        target(connection, *args)
    except Exception as error:  # whatever it is, the other contenders are still worth measuring
        traceback.print_exc()
        with suppress(BrokenPipeError):
            connection.send(Failed(message(error)))
