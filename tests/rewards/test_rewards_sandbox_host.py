"""The host's end: whatever a jail sends, the host goes on; the filter lets through what its table says and no more."""

import contextlib
import signal
import struct
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.errors import UserError
from omni_fast.rewards import sandbox
from omni_fast.rewards.sandbox import OUTCOMES, PLAIN, Call, Job, Limits, Sandbox, cgroup, probe, seccomp
from omni_fast.rewards.sandbox.attacks import ATTACKS
from omni_fast.rewards.sandbox.process import Exit, Jail, JailError, outcomes

LIMITS = Limits(wall_s=0.3, cpu_s=1)


@settings(deadline=None, max_examples=300)
@given(
    chunks=st.lists(
        st.binary(max_size=40)
        | st.sampled_from(
            [
                b'["load","ok",""]\n',
                b'[0,"ok",1]\n',
                b'[1,"ok",{"$set":[1]}]\n',
                b'[0,"error","x"]\n',
                b'[0,"memory",""]\n',
            ]
        ),
        max_size=8,
    ),
    count=st.integers(0, 4),
    end=st.builds(
        Exit,
        st.integers(-1, 255),
        st.integers(0, 64),
        st.floats(0, 10),
        st.sampled_from([b"", b"wall", b"output", b"?"]),
    ),
)
def test_any_bytes_give_one_outcome_per_call(chunks, count, end):
    calls = outcomes(b"".join(chunks), count, end, LIMITS)
    assert len(calls) == count
    assert {call.outcome for call in calls} <= set(OUTCOMES) - {"infrastructure"}


def test_values_arrive_only_in_their_places():
    calls = outcomes(b'["load","ok",""]\n[0,"ok",5]\n[2,"ok",7]\n[1,"ok",6]\n', 3, Exit(0, 0, 0.0, b""), LIMITS)
    assert [call.outcome for call in calls] == ["ok", "protocol", "protocol"]


# Programs in the jail's place, each with the socket as `s`. All let the host believe in a start first, or not even that.
READY = "s.sendall(struct.pack('<I', 5) + b'ready')\n"
LIARS = {
    "never ready": "time.sleep(60)",
    "ends at once": "",
    "random bytes": READY + "s.recv(9)\nimport random\ns.sendall(random.Random(0).randbytes(5000))",
    "huge size": READY + "s.recv(9)\ns.sendall(struct.pack('<I', 2**32 - 1))\ntime.sleep(60)",
    "half a frame": READY + "s.recv(9)\ns.sendall(struct.pack('<I', 500) + b'x' * 10)",
    "stalls": READY + "time.sleep(60)",
    "endless output": READY + "s.recv(9)\nwhile True:\n    s.sendall(struct.pack('<I', 65536) + b'x' * 65536)",
    "bad report": READY + "s.recv(9)\ns.sendall(struct.pack('<I', 99) + b'[' * 99)",
    "half a report": READY + "s.recv(9)\ns.sendall(struct.pack('<I', 5) + b'[[[[[')",
    "dies": READY + "s.recv(9)\nimport os\nos.abort()",
}


def liar(body: str) -> list[str]:
    head = "import socket, struct, sys, time\ns = socket.socket(fileno=int(sys.argv[1]))\n"
    return [sys.executable, "-I", "-S", "-c", (head + body).replace("{", "{{").replace("}", "}}"), "{fd}"]


@pytest.mark.parametrize("name", LIARS)
def test_the_host_survives_a_lying_jail(name, monkeypatch):
    monkeypatch.setattr("omni_fast.rewards.sandbox.process.START_S", 2.0)
    monkeypatch.setattr("omni_fast.rewards.sandbox.process.GRACE_S", 0.3)
    jail = Jail(LIMITS, isolate=False, command=liar(LIARS[name]))
    with pytest.raises(JailError):
        jail.start()
        jail.run(Job("def f(x): return x", "f", [(1,)]))
    jail.stop()
    assert jail.pid is None


def test_without_a_backend_it_refuses_and_says_what_to_do():
    with pytest.raises(UserError, match=r"bubblewrap.*--unsafe"):
        Sandbox(backends=()).start()


class Answers(Jail):
    """Runs nothing; answers every attack alike."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def run(self, job: Job) -> list[Call]:
        return [Call("ok", [42]) if job is PLAIN else self.call]


def test_the_probe_takes_nothing_but_a_refusal_for_one():
    assert set(sandbox.PROBES) <= {attack.name for attack in ATTACKS}
    probe(Answers(Call("ok", "denied")), isolated=True)
    probe(Answers(Call("error", detail="NotImplementedError")), isolated=True)
    for call in (Call("ok", "done"), *(Call(outcome) for outcome in OUTCOMES if outcome not in ("ok", "error"))):
        with pytest.raises(JailError, match=f"not stopped.*{call.outcome}"):
            probe(Answers(call), isolated=True)


def test_a_jail_without_isolation_fails_the_probe(monkeypatch):
    monkeypatch.setattr(sandbox, "PROBES", ("read the host's files",))  # another one leaves a file behind
    jail = Jail(Limits(), isolate=False)
    jail.start()
    try:
        probe(jail, isolated=False)
        with pytest.raises(JailError, match="read the host's files"):
            probe(jail, isolated=True)
    finally:
        jail.stop()


def test_run_before_start_is_a_mistake_of_the_caller():
    with pytest.raises(RuntimeError, match="not running"):
        Sandbox().run([])


def verdict(program: bytes, arch: int, number: int, argument: int = 0) -> int:
    """A small interpreter of the filter's instructions."""
    code = [struct.unpack_from("=HBBI", program, offset) for offset in range(0, len(program), 8)]
    data = {seccomp.OFFSET_NR: number, seccomp.OFFSET_ARCH: arch, seccomp.OFFSET_ARG0: argument}
    accumulator, position = 0, 0
    while True:
        operation, if_true, if_false, operand = code[position]
        position += 1
        if operation == seccomp.RET:
            return operand
        if operation == seccomp.LD_ABS:
            accumulator = data[operand]
        elif operation == seccomp.AND:
            accumulator &= operand
        else:
            compare = {
                seccomp.JEQ: accumulator == operand,
                seccomp.JGE: accumulator >= operand,
                seccomp.JGT: accumulator > operand,
            }
            position += if_true if compare[operation] else if_false


@pytest.mark.parametrize("column, machine", list(enumerate(seccomp.AUDIT_ARCH)))
def test_the_filter_allows_its_table_and_nothing_else(column, machine):
    program, arch = seccomp.build(machine), seccomp.AUDIT_ARCH[machine]
    allowed = {pair[column] for pair in seccomp.ALLOWED.values()}
    for number in range(600):
        if number in (seccomp.CLONE[column], seccomp.CLONE3[column], seccomp.IOCTL[column]):
            continue
        expected = seccomp.RET_ALLOW if number in allowed else seccomp.RET_ERRNO | seccomp.EPERM
        assert verdict(program, arch, number) == expected, number
    assert verdict(program, arch ^ 1, 0) == seccomp.RET_KILL_PROCESS
    assert verdict(program, arch, seccomp.X32_BIT + 1) == seccomp.RET_KILL_PROCESS
    clone = seccomp.CLONE[column]
    assert verdict(program, arch, clone, 0x3D0F00) == seccomp.RET_ALLOW  # what pthread_create asks for
    for flags in (17, 0x10000000, 0x3D0F00 | 0x10000000, 0x4111):
        assert verdict(program, arch, clone, flags) == seccomp.RET_ERRNO | seccomp.EPERM


def test_a_group_limits_the_process_that_entered_it_and_leaves_nothing(monkeypatch):
    home = cgroup._homes()
    group = cgroup.Group(1 << 30, 17)
    if not group.controllers:
        pytest.skip("no control group can be made here")
    left = cgroup.Group(1 << 30, 17)  # as by a trainer that was killed
    with contextlib.ExitStack() as fds:
        line, standard = group.enter([sys.executable, "-c", "import time; time.sleep(60)"], fds)
        process = subprocess.Popen(line, stdin=standard[0], stdout=standard[-1])
    end = time.monotonic() + 10
    while not group.active():
        if time.monotonic() > end:
            process.kill()
            pytest.skip("no control group can be entered here")
        time.sleep(0.01)
    assert all((folder / "cgroup.procs").read_text().split() == [str(process.pid)] for folder in group.controllers)
    assert left.active() == [], "a limit that binds nobody is no layer"
    monkeypatch.setattr(cgroup, "START_S", 0.0)
    again = cgroup.Group(1 << 30, 17)
    assert not any(folder.exists() for folder in left.controllers) and all(
        folder.exists() for folder in group.controllers
    )
    folders = [*group.controllers, *again.controllers]
    group.remove()
    again.remove()
    assert process.wait() == -signal.SIGKILL and not any(folder.exists() for folder in folders)
    assert cgroup._homes() == home, "this process has not moved"


def test_an_unknown_machine_has_no_filter():
    with pytest.raises(KeyError, match="riscv64"):
        seccomp.build("riscv64")
