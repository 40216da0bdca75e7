"""The fallback where the kernel forbids user namespaces: pydantic-monty, a Python interpreter written in Rust.

Its worker is a process that executes no machine code of the sample's making and opens no file, socket or process; time
and memory are limited inside, and a stuck worker is killed from outside. The price is the language: no classes of some
kinds, a small standard library. All 164 reference solutions of HumanEval run.
Optional: `pip install pydantic-monty`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import textwrap
import threading
import time
from typing import TYPE_CHECKING

from omni_fast.rewards.sandbox import wire
from omni_fast.rewards.sandbox.job import Call, JailError, Job, Limits
from omni_fast.rewards.sandbox.wire import Data

if TYPE_CHECKING:
    from pydantic_monty import Monty

# Runs inside, before the sample: the value leaves as the text of `wire`. A set built out here from the worker's own
# message would hash what the sample chose, and colliding numbers make that quadratic. A sample that breaks this
# function breaks its own answers; the f-string around the call leaves no other type a way out.
# One name outside of it, that no honest program has: HumanEval/93 asks for a function `encode`.
_INSIDE = (
    f"import base64, json, math\nData = Json = None\nWireError, bytearray = ValueError, bytes\n"
    f"MAX_DEPTH, PLAIN_INT = {wire.MAX_DEPTH}, {wire.PLAIN_INT}\n{inspect.getsource(wire.encode)}"
    "return lambda value: json.dumps(encode(value))\n"
)
ENCODER = f"def _encoder():\n{textwrap.indent(_INSIDE, '    ')}\n_encode = _encoder()\n"

_STARTING = threading.Lock()  # it looks its program up through sysconfig, whose first use two threads must not share
MAX_MEMORY = 64 << 20  # a value is built in this process before its size can be looked at


class MontyJail:
    """One interpreter process. For one thread at a time."""

    layers: tuple[str, ...] = ()

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._pool: Monty | None = None

    def start(self) -> None:
        """Raises JailError when the package is missing or its worker does not start."""
        self.stop()
        try:
            pydantic_monty = importlib.import_module("pydantic_monty")
        except ImportError:
            raise JailError("pydantic-monty is not installed") from None
        try:
            with _STARTING:
                pool = pydantic_monty.Monty(max_processes=1, request_timeout=self.limits.wall_s)
                pool.__enter__()
        except (OSError, RuntimeError, pydantic_monty.MontyError) as error:
            raise JailError(f"the interpreter does not start: {error}") from None
        self._pool = pool

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.__exit__(None, None, None)
            self._pool = None

    def run(self, job: Job) -> list[Call]:
        """All calls of one job. Raises JailError when the interpreter cannot be had."""
        import pydantic_monty

        if self._pool is None:
            raise JailError("the interpreter does not run")
        limits = pydantic_monty.ResourceLimits(
            max_feed_duration_secs=float(self.limits.cpu_s),
            max_memory=min(self.limits.memory_bytes, MAX_MEMORY),
            max_suspensions=100,
        )
        policy = pydantic_monty.OSPolicy(random_start={"seed": 0}, sleep="zero")
        deadline = time.monotonic() + self.limits.wall_s
        checkout = self._pool.checkout(limits=limits, os_policy=policy)

        def feed(code: str, **inputs: Data) -> Call:
            if time.monotonic() > deadline:
                return Call("timeout", detail="wall clock")
            try:
                value = session.feed_run(code, inputs=inputs, print_callback=lambda stream, text: None)
                if not isinstance(value, str):
                    return Call("protocol", detail="a reply that is not text")
                if len(value) > self.limits.output_bytes:
                    return Call("protocol", detail="output limit")
                return Call("ok", wire.loads(value.encode("ascii")))
            except pydantic_monty.MontyCrashedError as error:
                return Call("timeout" if error.timed_out else "killed", detail=str(error)[:200])
            except pydantic_monty.MontyError as error:
                kind = type(error.exception())
                names = {TimeoutError: "timeout", MemoryError: "memory"}
                return Call(names.get(kind, "error"), detail=str(error)[:200])  # type: ignore[arg-type]
            except (ValueError, TypeError) as error:  # no wire data; arguments of a type the interpreter does not know
                return Call("protocol" if isinstance(error, ValueError) else "error", detail=str(error)[:200])

        with contextlib.ExitStack() as stack:
            try:
                session = stack.enter_context(checkout)
                session.feed_run(ENCODER)
            except (OSError, pydantic_monty.MontyError) as error:
                raise JailError(f"the interpreter is lost: {error}") from None
            if len(job.source) > self.limits.source_chars or not job.entry.isidentifier():
                return [Call("error", detail="source too long or no function name")] * len(job.calls)
            last = feed(job.source + "\n\n'null'")  # two newlines: the source may end with a backslash
            if last.outcome != "ok":
                return [last] * len(job.calls)
            calls: list[Call] = []
            for args in job.calls:
                if last.outcome not in ("timeout", "killed"):
                    last = feed(f"f'{{_encode({job.entry}(*_arguments))}}'", _arguments=tuple(args))
                calls.append(last)
            return calls
