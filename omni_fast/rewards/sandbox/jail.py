"""The fork-server inside the jail: one locked-down child per job, made ready before its job arrives.

Runs as `python -I -S -B jail.py SETTINGS` with an inherited socket to the trusted side; standard library only,
because it runs on the system's interpreter (3.9 or newer), not in the trainer's environment.
This process is trusted but needs no trust: it holds no expected values, and the host treats its bytes as hostile.

Frames: u32 little-endian length, payload. From the jail "ready" once, then one for each job.
  host -> jail  lines of `wire` data, first {"source", "entry"}, then one tuple of arguments a line
  jail -> host  how the child ended, `wire.REPORT`; then what it wrote (hostile)
Lines the child writes: ["load", outcome, detail], then one [index, outcome, value or detail] a call.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import mmap
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402

# What model-written code imports most: loaded once here, shared by all children for nothing.
PRELOAD = """abc array bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime decimal
enum fractions functools hashlib heapq inspect io itertools json math numbers operator random re statistics string struct
textwrap time traceback types typing unicodedata"""

RESULT_FD, JOB_FD = 3, 4  # in the child, which keeps no other descriptor
READY = b"ready"  # what a child says before it is given a job; else, why it could not be locked down
HOST_FD = 3  # in the fork-server
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x08000000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND = 2, 4, 8, 4096
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 22, 24, 38
SECCOMP_MODE_FILTER = 2
SYS_CLONE, SYS_CAPSET = {"x86_64": (56, 126), "aarch64": (220, 91)}.get(os.uname().machine, (0, 0))

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the interpreter lock stays held, also across clone
libc.syscall.restype = ctypes.c_long


def check(result: int, what: str) -> None:
    """Every step of the lock-down must have worked: a half-locked child never gets a job."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


# ------------------------------------------------------------------------------------------------- the child


def map_ids(uid: int, gid: int) -> None:
    """The same uid inside the new user namespace as outside, so that nothing gains a name."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(fd, text.encode())
        os.close(fd)


def lock_down(settings: dict) -> None:
    """Everything that takes power away from this process, in the order in which the power is needed."""
    # Its own session: kill(0) and kill(getppid()) reach the process group, and groups cross pid namespaces.
    os.setsid()
    if settings["isolate"]:
        # A fresh /tmp per job: nothing a job writes is seen by the next one, and nothing else is writable.
        options = f"size={settings['disk_bytes']},nr_inodes=1024,mode=1777".encode()
        check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options), "mount /tmp")
        # /proc shows the fork-server's memory map and settings: an empty folder instead.
        check(libc.mount(b"/empty", b"/proc", None, MS_BIND, None), "mount /proc")
        os.chdir("/tmp")
    for name, limit in (
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_CPU, settings["cpu_s"]),
        (resource.RLIMIT_NPROC, 32),  # threads; processes are denied by seccomp
        (resource.RLIMIT_FSIZE, settings["disk_bytes"]),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, 64 << 20),
    ):
        hard = resource.getrlimit(name)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(name, (value, value))
    if settings["isolate"]:
        for capability in range(64):
            if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                break  # past the last capability this kernel knows
        header = struct.pack("=II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        check(libc.syscall(SYS_CAPSET, header, bytes(24)), "capset")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, settings["filter"], 0, 0), "seccomp")


def attempt(work, *args):  # noqa: ANN001, ANN002, ANN201 -- hostile values have no type
    """Outcome and result. Catches all: SystemExit and KeyboardInterrupt are a sample's tricks, not ours."""
    try:
        return "ok", work(*args)
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:  # noqa: BLE001
        return "error", describe(error)


def describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:  # noqa: BLE001 -- a hostile __str__
        return "error without a text"


def reply(line: str) -> None:
    data = line.encode("ascii") + b"\n"
    while data:
        data = data[os.write(RESULT_FD, data) :]


def load(job: dict) -> object:
    """Run the module and find the entry point. `sys.exit()` at import is an error like any other."""
    namespace = {"__name__": "solution"}
    exec(compile(job["source"], "<solution>", "exec"), namespace)  # noqa: S102 -- this is what the jail is for
    return namespace[job["entry"]]


def value_line(function, index: int, line: bytes) -> str:  # noqa: ANN001
    """One call of the sample's function, as the line that tells its value."""
    return wire.to_json([index, "ok", wire.encode(function(*wire.loads(line)))])


def work(settings: dict) -> None:
    """Body of the child: read one job, answer its calls in order. Never returns."""
    lock_down(settings)
    random.seed(0)  # rewards are reproducible: the hash seed is fixed by the environment, this by us
    os.write(RESULT_FD, READY)
    lines = os.fdopen(JOB_FD, "rb")
    loaded, function = attempt(load, wire.loads(lines.readline()))
    reply(wire.to_json(["load", loaded, "" if loaded == "ok" else function]))
    for index, line in enumerate(lines if loaded == "ok" else ()):
        outcome, text = attempt(value_line, function, index, line)
        reply(text if outcome == "ok" else wire.to_json([index, outcome, text]))
    os._exit(0)


# -------------------------------------------------------------------------------------------- the fork-server


class Child:
    """One prepared process: locked down, waiting on its job pipe."""

    def __init__(self, settings: dict) -> None:
        job_read, self.job_fd = os.pipe()
        self.result_fd, result_write = os.pipe()
        self.pid = 0
        try:
            self.pid = self._spawn(settings, job_read, result_write)
        finally:
            os.close(job_read)
            os.close(result_write)
        os.set_blocking(self.job_fd, False)
        # Before any job is in it, so that no job can say it: a sample must not be able to call itself the jail's failure.
        if (word := os.read(self.result_fd, 1000)) != READY:
            sys.exit(word.decode("utf-8", "replace"))

    def _spawn(self, settings: dict, job_read: int, result_write: int) -> int:
        """fork, or clone into new user, pid, mount and ipc namespaces; the child never returns from here.

        PID 1 of its own namespace, the child takes all it could have started with it when it ends. clone(2) directly,
        because unshare(2) moves only the next child into a pid namespace and a second fork costs a millisecond. Python's
        and libc's own after-fork work is not needed here: this process has one thread and holds no lock.
        """
        flags = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC if settings["isolate"] else 0
        uid, gid = os.getuid(), os.getgid()
        pid = libc.syscall(SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0) if flags else os.fork()
        if pid == 0:
            try:
                if flags:
                    map_ids(uid, gid)
                self._become_child(settings, job_read, result_write)
            except BaseException as error:  # noqa: BLE001 -- this process must never fall back into the server
                os.write(result_write, describe(error).encode("utf-8", "replace"))
            finally:
                os._exit(70)
        check(min(pid, 0), "clone")
        return pid

    def _become_child(self, settings: dict, job_read: int, result_write: int) -> None:
        null = os.open("/dev/null", os.O_RDWR)
        job, result = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (job_read, result_write))
        for number, fd in ((0, null), (1, null), (2, null), (RESULT_FD, result), (JOB_FD, job)):
            os.dup2(fd, number)
        os.closerange(5, 64)  # every pipe of the fork-server; `main` has put all it holds below 64
        work(settings)

    def end(self) -> tuple:
        """Kill, reap: no job outlives its answer. Returns wait status and resource usage."""
        for fd in (self.job_fd, self.result_fd):
            if fd >= 0:
                os.close(fd)
        self.job_fd = self.result_fd = -1
        os.kill(self.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        return status, usage


class Memory:
    """Bytes on their way through this process, in pages that no child inherits.

    In ordinary memory a job's source and answers would lie about after it, and the next child, a copy of this process,
    could read another sample's solution.
    """

    def __init__(self, size: int) -> None:
        pages = mmap.mmap(-1, size)
        pages.madvise(mmap.MADV_DONTFORK)
        self.view = memoryview(pages)
        self.start = self.stop = 0  # what is in it and not yet passed on

    def read_job(self, sock: socket.socket) -> None:
        """Take one job in. Ends the process when the host is gone or sends too much."""
        header = sock.recv(4, socket.MSG_WAITALL)
        if len(header) < 4:
            sys.exit(0)
        (size,) = struct.unpack("<I", header)
        if size > len(self.view):
            sys.exit(1)
        self.start, self.stop = 0, sock.recv_into(self.view[:size], size, socket.MSG_WAITALL)

    def write_some(self, fd: int) -> None:
        """Pass on what `fd` takes; all is dropped when its reader is gone."""
        try:
            self.start += os.write(fd, self.view[self.start : self.stop])
        except OSError:
            self.start = self.stop
        if self.start == self.stop:
            self.start = self.stop = 0


def relay(sock: socket.socket, child: Child, inbox: Memory, outbox: Memory, settings: dict) -> None:
    """Carry bytes between host and child until the child ends, the wall clock runs out or the output cap is reached."""
    deadline = time.monotonic() + settings["wall_s"]
    outbox.stop, cut = 0, b""
    while True:
        poller = select.poll()
        poller.register(child.result_fd, select.POLLIN)
        if inbox.stop:
            poller.register(child.job_fd, select.POLLOUT)
        elif child.job_fd >= 0:
            os.close(child.job_fd)
            child.job_fd = -1
        left = deadline - time.monotonic()
        events = dict(poller.poll(left * 1000)) if left > 0 else {}
        if not events:
            cut = b"wall"
            break
        if child.job_fd in events:  # never blocks: a child that stops reading must not stop the server
            inbox.write_some(child.job_fd)
        if child.result_fd in events:
            size = os.readv(child.result_fd, [outbox.view[outbox.stop :]])
            outbox.stop += size
            if size == 0:
                break
            if outbox.stop == len(outbox.view):
                cut = b"output"
                break
    status, usage = child.end()
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    report = wire.REPORT.pack(code, number, usage.ru_utime + usage.ru_stime, cut)
    sock.sendall(struct.pack("<I", len(report) + outbox.stop) + report)
    sock.sendall(outbox.view[: outbox.stop])


def rehearse() -> None:
    """Walk the children's way a few times: what the interpreter warms up here, no child has to, nor copy its pages."""
    for number in range(20):
        source = f"def rehearsal(x):\n    return [x, {number}, 'a', 1.5, (x,)]\n"
        function = load(wire.loads(wire.dumps({"source": source, "entry": "rehearsal"})))
        attempt(value_line, function, number, wire.dumps((number,)))
        random.seed(0)


def main() -> None:
    settings = json.loads(sys.argv[1])
    for name in PRELOAD.split():
        __import__(name)
    os.dup2(settings["fd"], HOST_FD)
    os.closerange(HOST_FD + 1, 65536)  # what else the way here has left open
    sock = socket.socket(fileno=HOST_FD)
    program = bytes.fromhex(settings["seccomp"])
    buffer = ctypes.create_string_buffer(program, len(program))  # lives as long as this process
    settings["filter"] = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    inbox, outbox = Memory(wire.MAX_FRAME_BYTES), Memory(settings["output_bytes"] + 1)
    rehearse()
    gc.collect()
    gc.freeze()  # children then share these pages instead of copying them at the first collection
    child = Child(settings)
    sock.sendall(struct.pack("<I", 5) + b"ready")
    while True:
        inbox.read_job(sock)
        relay(sock, child, inbox, outbox, settings)
        child = Child(settings)


if __name__ == "__main__":
    main()
