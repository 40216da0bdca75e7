"""The processes that compare what needs math-verify: their grammar, their limits, and what a lost one costs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from omni_fast.rewards import math_pool
from omni_fast.rewards.math import MathVerifier
from omni_fast.rewards.score import Part


def test_the_quick_grammar_reads_what_the_full_one_reads():
    """Fast prediction alone stops half-way in most of these."""
    texts = ["3x^2-2x", "x^2+2x+1", r"\int_0^1 x dx", "a_1 + a_2", "f(x)=x^2", "(1,7)", r"\frac{d}{dx} x^2", "x=5", "("]
    program = (
        "import sys, importlib.util as u; import math_verify.parser as p\n"
        "spec = u.spec_from_file_location('worker', sys.argv[1]); worker = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(worker)\n"
        "def read(text):\n"
        "    p.parse_latex_cached.cache_clear(); p.extract_latex.cache_clear()\n"
        "    return repr(p.parse(f'${text}$', parsing_timeout=None))\n"
        "plain = [read(text) for text in sys.argv[2:]]\n"
        "worker.quicken()\n"
        "assert [read(text) for text in sys.argv[2:]] == plain\n"
    )
    worker = Path(math_pool.__file__).with_name("math_worker.py")
    subprocess.run([sys.executable, "-P", "-c", program, str(worker), *texts], check=True, capture_output=True)


def test_a_slow_comparison_is_killed_and_scores_0():
    with MathVerifier(workers=1, timeout_s=0.3) as verifier:
        slow = r"\boxed{(x+y+z+t)^{90}}"
        assert verifier.score([slow, r"\boxed{x+x}"], ["\\pi", "2x"]) == [Part(0.0, "timeout"), Part(1.0)]


def test_a_lost_worker_is_replaced_and_shifts_no_answer():
    """One killed between two requests once left an answer behind, which the next request took for its own."""

    def check(*pairs):
        return [
            part.reason
            for part in verifier.score([rf"\boxed{{{answer}}}" for _, answer in pairs], [g for g, _ in pairs])
        ]

    with MathVerifier(workers=1) as verifier:
        assert check(("x+x", "2x")) == ["ok"]
        (worker,) = verifier._workers.workers
        outer = worker._process.pid
        (inner,) = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        os.kill(int(inner), signal.SIGKILL)
        assert check(("x+x+x", "3x"), ("x", "3x"), ("x+2x", "3x")) == ["ok", "wrong", "ok"]
        os.killpg(worker._process.pid, signal.SIGKILL)
        assert check(("y+y", "2y"), ("y", "2y")) == ["ok", "wrong"]


def test_a_worker_that_cannot_start_makes_scores_invalid(monkeypatch):
    monkeypatch.setattr("omni_fast.rewards.math_pool.sys.executable", "/nonexistent/python")
    with MathVerifier(workers=1) as verifier:
        assert verifier.score([r"\boxed{x}"], ["y"]) == [Part(None, "worker_lost")]


def test_a_request_that_kills_its_worker_twice_scores_0(monkeypatch, tmp_path):
    """Stand-in for a crash inside sympy: a worker whose inner process ends at any request."""
    script = tmp_path / "math_worker.py"
    script.write_text(
        "import sys\nfrom multiprocessing.connection import Connection\npipe = Connection(int(sys.argv[1]))\n"
        "pipe.send_bytes(b'ready')\nwhile pipe.recv_bytes():\n    pipe.send_bytes(b'died')\n"
    )
    monkeypatch.setattr("omni_fast.rewards.math_pool.__file__", str(tmp_path / "math_pool.py"))
    with MathVerifier(workers=1) as verifier:
        assert verifier.score([r"\boxed{x}"], ["y"]) == [Part(0.0, "crash")]
