"""How many samples a second can the verifiers grade: jobs in the sandbox, checks on the exact path and through the pool?

    python benchmarks/bench_rewards.py [--rounds 5] [--output benchmarks/results/rewards.json]

Sandbox: one function, 10 inputs a job, as many jails as cores; `median_ms` is one job at a time. Its peer is what a
process per sample costs: the same function in a bare `python -I -S`, no isolation at all. Maths: 20,000 answers that
decide as text or number, and 2 x 300 different ones a round that need math-verify (repeats would come
from the cache of the pool).
Contenders take turns in every round; medians over rounds, with the spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from omni_fast.errors import UserError
from omni_fast.rewards.code import Case, CodeVerifier, Tests
from omni_fast.rewards.math import MathVerifier
from omni_fast.rewards.sandbox import Job, Sandbox

SOURCE = "def total(n):\n    result = 0\n    for i in range(n):\n        result += i\n    return result\n"
TESTS = Tests("total", tuple(Case((n,), n * (n - 1) // 2) for n in range(10)))
TARGETS = {"bwrap jobs/s": 300, "exact checks/s": 50_000, "pool checks/s, short formulas": 300}


def rate(count: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def bare_processes(count: int) -> None:
    """One interpreter a sample, one at a time a core would do no better: start-up is all processor time."""
    program = SOURCE + "print([total(n) for n in range(10)])"
    for _ in range(count):
        subprocess.run([sys.executable, "-I", "-S", "-c", program], stdout=subprocess.DEVNULL, check=True)


def alone_ms(box: Sandbox, count: int) -> float:
    job = Job(SOURCE, "total", [case.args for case in TESTS.cases])
    times = []
    for _ in range(count):
        started = time.perf_counter()
        box.run([job])
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    boxes: dict[str, Sandbox] = {}
    for name in ("bwrap", "monty"):
        try:
            boxes[name] = Sandbox(backends=(name,)).start()
        except UserError as error:
            print(f"without {name}: {error}")
    exact = MathVerifier()
    pool = MathVerifier()
    pool.score(["\\boxed{x}"] * 2, ["y", "z"])  # starts the workers
    numbers = [f"we add and get #### {n}" for n in range(20_000)]
    golds = [str(n if n % 3 else n + 1) for n in range(20_000)]

    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    for turn in range(options.rounds):
        for name, box in boxes.items():
            verifier = CodeVerifier(box)
            sources = [f"{SOURCE}# {turn}.{number}\n" for number in range(400)]  # equal ones would run once
            note(f"{name} jobs/s", rate(400, lambda v=verifier, s=sources: v.score(s, [TESTS] * 400)))  # type: ignore[misc]
            note(f"{name} median ms", alone_ms(box, 200))
        note("bare process jobs/s", rate(40, lambda: bare_processes(40)))
        note("exact checks/s", rate(20_000, lambda: exact.score(numbers, golds)))
        for kind, answers, golds_of_kind in ordinary_formulas(turn):
            note(f"pool checks/s, {kind}", rate(300, lambda a=answers, g=golds_of_kind: pool.score(a, g)))  # type: ignore[misc]
    for box in boxes.values():
        box.close()
    exact.close()
    pool.close()

    rows = {
        name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
        for name, values in seen.items()
    }
    for name, row in rows.items():
        target = f"  target {TARGETS[name]:,}" if name in TARGETS else ""
        print(f"{name:<32}{row['median']:>12,.1f}   ({row['low']:,.1f} .. {row['high']:,.1f}){target}")
    report = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "kernel": platform.release()},
        "rounds": options.rounds,
        "results": rows,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def ordinary_formulas(turn: int) -> Iterator[tuple[str, list[str], list[str]]]:
    """What reaches math-verify in practice: a few symbols around a number, and one that has to be multiplied out."""
    numbers = range(2 + 1000 * turn, 302 + 1000 * turn)
    short = ("{n}\\sqrt{{2}}", "\\frac{{{n}\\pi}}{{4}}", "(1,{n})", "x={n}", "{n}\\text{{ cm}}", "{n}x+1")
    others = ("{n}\\sqrt{{3}}", "\\frac{{\\pi {n}}}{{4}}", "({n},1)", "{n}", "{n}", "1+{n}x")
    answers = ["\\boxed{" + short[n % 6].format(n=n) + "}" for n in numbers]
    yield "short formulas", answers, [others[n % 6].format(n=n) for n in numbers]
    products = [f"\\boxed{{(x+{n})^2}}" for n in numbers]
    yield "products", products, [f"x^2 + {2 * n}x + {n * n}" for n in numbers]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
