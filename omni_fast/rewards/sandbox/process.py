"""The host's end of one jail: start the fork-server, hand it jobs, believe nothing it says.

`Jail` runs `jail.py` inside bubblewrap (`isolate=True`) or, for `unsafe`, as a bare child process with resource limits
and seccomp alone. One jail runs one job at a time; `Sandbox` owns several.
What comes from the socket is hostile: sizes are capped, every wait ends, and a jail that breaks the frame protocol is
killed and started anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from omni_fast.rewards.sandbox import bwrap, seccomp, wire
from omni_fast.rewards.sandbox.cgroup import Group
from omni_fast.rewards.sandbox.job import Call, JailError, Job, Limits
from omni_fast.rewards.sandbox.wire import Data

START_S = 20.0  # a cold interpreter on a busy machine
GRACE_S = 3.0  # how much longer than the job's own wall clock the host waits for the fork-server
OVERHEAD_BYTES = 192 << 20  # fork-server, /tmp and bubblewrap, on top of a job's own memory, in the group's limit
PIDS = 96  # bubblewrap, fork-server, one job with its threads
HERE = Path(__file__).parent


class Exit(NamedTuple):
    """How the child ended, as the fork-server says (`wire.REPORT`)."""

    code: int
    signal: int
    cpu_s: float
    cut: bytes


class Jail:
    """One fork-server process and its socket. For one thread at a time."""

    def __init__(self, limits: Limits, isolate: bool = True, command: Sequence[str] | None = None) -> None:
        """command: run this in place of the fork-server, for tests that put a liar there; `{fd}` is the socket."""
        self.limits = limits
        self.isolate = isolate
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._group: Group | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the jail's outermost process; None when it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def layers(self) -> tuple[str, ...]:
        """What this machine added to the layers that every jail has."""
        controllers = self._group.active() if self._group else ()
        return (f"cgroup: {', '.join(controllers)}",) if controllers else ()

    def start(self) -> None:
        """(Re)start the fork-server and wait until it is ready. Raises JailError with the reason."""
        self.stop()
        self._socket, theirs = socket.socketpair()
        try:
            with theirs, contextlib.ExitStack() as fds:
                self._spawn(theirs.fileno(), fds)
            if self._read_frame(time.monotonic() + START_S) != b"ready":
                raise JailError("the fork-server did not report ready")
        except (JailError, OSError, KeyError) as error:
            text = self._last_words()
            self.stop()
            raise JailError(f"cannot start the jail: {error}{'; ' if text else ''}{text}") from None

    def _spawn(self, fd: int, fds: contextlib.ExitStack) -> None:
        """Start the process with `fd` as its socket; what it needs only at the start is closed with `fds`."""
        settings = json.dumps(
            asdict(self.limits) | {"isolate": self.isolate, "fd": fd, "seccomp": seccomp.build().hex()}
        )
        inherited, standard = [fd], [subprocess.DEVNULL]
        if self._command is not None:
            line = [word.format(fd=fd) for word in self._command]
        elif self.isolate:
            files = [_as_fd(HERE / name, fds) for name in ("jail.py", "wire.py")]
            inherited += files
            self._group = Group(self.limits.memory_bytes + OVERHEAD_BYTES, PIDS)
            line, standard = self._group.enter(bwrap.command(files[0], files[1], settings), fds)
        else:
            line = [sys.executable, "-I", "-S", "-B", str(HERE / "jail.py"), settings]
        # RLIMIT_NPROC does not bind real root, and root owns too much: then the whole jail, bubblewrap included, is nobody.
        drop = bwrap.NOBODY if self.isolate and os.getuid() == 0 else None
        self._process = subprocess.Popen(
            line,
            stdin=standard[0],
            stdout=standard[-1],
            stderr=subprocess.PIPE,
            # nothing of the trainer's environment: keys live there
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            pass_fds=inherited,
            user=drop,
            group=drop,
            extra_groups=None if drop is None else [],
            start_new_session=True,  # Ctrl-C on the terminal is for the trainer
            cwd="/",
        )

    def stop(self) -> None:
        """Kill the jail with all in it; harmless when it does not run."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            with self._process:  # waits for its end and closes its pipe
                self._process.kill()
        if self._group is not None:
            self._group.remove()
        self._socket = self._process = self._group = None

    def run(self, job: Job) -> list[Call]:
        """All calls of one job, whatever the sample does. Raises JailError when the jail itself failed."""
        try:
            message = _message(job, self.limits)
        except wire.WireError as error:
            return [Call("error", detail=str(error))] * len(job.calls)
        if self._socket is None:
            raise JailError("the jail does not run")
        self._socket.settimeout(self.limits.wall_s + GRACE_S)
        try:
            self._socket.sendall(struct.pack("<I", len(message)) + message)
        except OSError as error:
            raise JailError(f"the jail does not read: {error}") from None
        reply = self._read_frame(time.monotonic() + self.limits.wall_s + GRACE_S)
        if len(reply) < wire.REPORT.size:
            raise JailError("no report on the child's end")
        end = Exit(*wire.REPORT.unpack_from(reply))
        if end.cut.rstrip(b"\0") not in (b"", b"wall", b"output"):
            raise JailError("bytes that are not a report")
        return outcomes(reply[wire.REPORT.size :], len(job.calls), end, self.limits)

    def _read_frame(self, deadline: float) -> bytes:
        (size,) = struct.unpack("<I", self._read(4, deadline))
        if size > self.limits.output_bytes + 4096:
            raise JailError("bytes that are not a frame")
        return self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._socket is not None
        parts = bytearray()
        while len(parts) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise JailError("the jail does not answer")
            self._socket.settimeout(left)
            try:
                chunk = self._socket.recv(size - len(parts))
            except OSError as error:  # includes the time limit
                raise JailError(f"the jail does not answer: {error}") from None
            if not chunk:
                raise JailError("the jail ended")
            parts += chunk
        return bytes(parts)

    def _last_words(self) -> str:
        if self._process is None or self._process.stderr is None:
            return ""
        self._process.kill()
        lines = self._process.stderr.read(4096).decode("utf-8", "replace").split("\n")
        return next((line[:300] for line in reversed(lines) if line.strip()), "")


def _as_fd(path: Path, fds: contextlib.ExitStack) -> int:
    """The file's bytes behind a descriptor: the jail's uid may not be allowed to open the path."""
    fd = os.memfd_create(path.name)
    fds.callback(os.close, fd)
    os.write(fd, path.read_bytes())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _message(job: Job, limits: Limits) -> bytes:
    """The job as lines for the jail. Raises WireError when it is too large or not data."""
    if len(job.source) > limits.source_chars:
        raise wire.WireError("source too long")
    first = wire.dumps({"source": job.source, "entry": job.entry})
    message = b"".join(line + b"\n" for line in (first, *(wire.dumps(tuple(call)) for call in job.calls)))
    if len(message) > wire.MAX_FRAME_BYTES:
        raise wire.WireError("the inputs are too large")
    return message


def outcomes(output: bytes, count: int, end: Exit, limits: Limits) -> list[Call]:
    """The child's bytes -> the outcomes of `count` calls, in order. Total: any bytes give outcomes.

    A line can claim any value, which is worth nothing unless it is the right answer; it cannot claim to be right, nor
    that the jail failed.
    """
    calls: list[Call] = []
    failure: Call | None = None  # the fate of all calls that follow
    loaded = False
    *lines, tail = output.split(b"\n")
    for line in lines:
        reply: Data = None
        with contextlib.suppress(wire.WireError):
            reply = wire.loads(line)
        match reply:
            case ["load", "ok", _] if not loaded:
                loaded = True
            case ["load", "error" | "memory" as outcome, str(detail)] if not loaded:
                failure = Call(outcome, detail=detail[:200])
            case [int(index), "ok", value] if loaded and index == len(calls) < count:
                calls.append(Call("ok", value))
            case [int(index), "error" | "memory" as outcome, str(detail)] if loaded and index == len(calls) < count:
                calls.append(Call(outcome, detail=detail[:200]))
            case _:
                failure = Call("protocol", detail="a line that is not a reply")
        if failure:
            break
    return calls + [failure or _unanswered(end, limits, bool(tail))] * (count - len(calls))


def _unanswered(end: Exit, limits: Limits, cut_line: bool) -> Call:
    """Why the calls after the last reply have none."""
    if end.cut.startswith(b"wall"):
        return Call("timeout", detail="wall clock")
    if end.cut.startswith(b"output"):
        return Call("protocol", detail="output limit")
    # The kernel answers RLIMIT_CPU with SIGKILL, by its own coarse clock: hence half. Nobody in the jail can send signals.
    if end.signal in (signal.SIGKILL, signal.SIGXCPU) and end.cpu_s >= 0.5 * limits.cpu_s:
        return Call("timeout", detail="CPU limit")
    if end.signal == signal.SIGKILL:
        return Call("memory", detail="killed by the kernel")
    if end.signal:
        return Call("killed", detail=f"signal {end.signal}")
    return Call("protocol", detail="a cut line") if cut_line else Call("killed", detail=f"left with status {end.code}")
