"""The attacks a sandbox has to stop, as programs, and how to tell whether one was.

Each program defines `attack(x)`. A `goal` says what would be a success for it:
  score   to be graded as right: the hidden answer of the one test is 42, and nothing in the jail knows it;
  reach   to return proof that it got at something: only "denied" and the like, or no value, may come back;
  stall   to hold the jail or the host beyond the limits, or to take it down: any outcome will do, in time.
After each attack every jail must answer a normal job, and nothing may be left of the attack.
Sources: catalogues of reward hacking (prime-environments, terminal-bench, LeetCode hacks), the usual ways out of a process.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from omni_fast.rewards.sandbox.job import Call, Job

SECRET = 42  # the expected value; the arguments do not tell it


@dataclass(frozen=True, slots=True)
class Attack:
    name: str
    goal: Literal["score", "reach", "stall"]
    source: str

    @property
    def job(self) -> Job:
        return Job(self.source, "attack", [(7,)])


# `=== goal: name`, then the program; a program of the goal "reach" is the body of `attack`.
PROGRAMS = files("omni_fast.rewards.sandbox").joinpath("attacks.txt").read_text(encoding="utf-8")

# Numbers on x86_64; elsewhere they mean other calls, so there these attacks are left out.
SYSTEM_CALLS = dict(
    unshare=272, setns=308, mount=165, umount2=166, pivot_root=155, chroot=161, ptrace=101, process_vm_readv=310, bpf=321,
    perf_event_open=298, io_uring_setup=425, keyctl=250, add_key=248, userfaultfd=323, memfd_create=319, socketpair=53,
    clone3=435, vfork=58, execve=59, prctl=157, seccomp=317, personality=135, shmget=29, mknod=133, setuid=105,
    kexec_load=246, init_module=175, open_by_handle_at=304,
)  # fmt: skip
ARGUMENTS = dict(
    unshare="0x10000000", memfd_create="b'x', 0", socketpair="1, 1, 0, (ctypes.c_int * 2)()", prctl="4, 1",
    shmget="0, 4096, 0o1600",
)  # fmt: skip


def _parse(text: str) -> Iterator[Attack]:
    for block in text.split("=== ")[1:]:
        title, body = block.split("\n", 1)
        goal, name = title.split(": ", 1)
        yield _reach(name, body) if goal == "reach" else Attack(name, goal, body)  # type: ignore[arg-type]


def _reach(name: str, body: str) -> Attack:
    """OSError and a missing module or function mean that the attempt was denied."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    refused = "(OSError, ImportError, AttributeError)"
    return Attack(name, "reach", f"def attack(x):\n    try:\n{lines}    except {refused}:\n        return 'denied'\n")


def _system_call(name: str) -> Attack:
    number, arguments = SYSTEM_CALLS[name], ARGUMENTS.get(name, "0, 0, 0, 0, 0, 0")
    return _reach(
        f"system call {name}",
        f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nresult = libc.syscall({number}, {arguments})\n"
        "return 'denied' if result == -1 and ctypes.get_errno() in (1, 38) else f'{result} {ctypes.get_errno()}'\n",
    )


ATTACKS: tuple[Attack, ...] = (
    *_parse(PROGRAMS),
    Attack("odd source", "score", "\x00\ud800\u202edef attack(x): return 42"),
    *(_system_call(name) for name in SYSTEM_CALLS if platform.machine() == "x86_64"),
)


def stopped(attack: Attack, call: Call) -> bool:
    """Whether the attack failed, judged by what came out. To be taken for a failure of the jail is a way out of a 0."""
    if attack.goal == "score":
        won = call.outcome == "ok" and type(call.value) is int and call.value == SECRET
    else:  # to stall: it came back, and the caller looks at the clock
        won = attack.goal == "reach" and call.outcome == "ok" and call.value != "denied"
    return call.outcome != "infrastructure" and not won
