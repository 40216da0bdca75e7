"""How many samples a second can the verifiers grade: jobs in the sandbox, checks on the exact path and through the pool?

    python benchmarks/bench_rewards.py [--rounds 5] [--output benchmarks/results/rewards.json]

Sandbox: one function, 10 inputs a job, as many jails as cores; `median_ms` is one job at a time. Its peer is what a
process per sample costs: the same function in a bare `python -I -S`, no isolation at all. Maths: 20,000 answers that
decide as text or number, and 2 x 300 different ones a round that need math-verify (repeats would come
from the cache of the pool).
Contenders take turns in every round; medians over rounds, with the spread.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import scoreboard

from omni_fast.errors import UserError
from omni_fast.rewards.code import Case, CodeVerifier, Tests
from omni_fast.rewards.math import MathVerifier
from omni_fast.rewards.sandbox import Job, Sandbox

SOURCE = "def total(n):\n    result = 0\n    for i in range(n):\n        result += i\n    return result\n"
TESTS = Tests("total", tuple(Case((n,), n * (n - 1) // 2) for n in range(10)))
TARGETS = {"bwrap jobs/s": 300, "exact checks/s": 50_000, "pool checks/s, short formulas": 300}


def bare_processes(count: int) -> None:
    """One interpreter a sample, one at a time a core would do no better: start-up is all processor time."""
    program = SOURCE + "print([total(n) for n in range(10)])"
    for _ in range(count):
        subprocess.run([sys.executable, "-I", "-S", "-c", program], stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    options, figures = scoreboard.options(__doc__, rounds=5), scoreboard.Figures()
    boxes: dict[str, Sandbox] = {}
    for name in ("bwrap", "monty"):
        try:
            boxes[name] = Sandbox(backends=(name,)).start()
        except UserError as error:
            print(f"without {name}: {error}")
    numbers = [f"we add and get #### {n}" for n in range(20_000)]
    golds = [str(n if n % 3 else n + 1) for n in range(20_000)]

    job = Job(SOURCE, "total", [case.args for case in TESTS.cases])

    with MathVerifier() as exact, MathVerifier() as pool:
        pool.score(["\\boxed{x}"] * 2, ["y", "z"])  # starts the workers
        for turn in range(options.rounds):
            for name, box in boxes.items():
                verifier = CodeVerifier(box)
                sources = [f"{SOURCE}# {turn}.{number}\n" for number in range(400)]  # equal ones would run once
                figures.rate(f"{name} jobs/s", 400, verifier.score, sources, [TESTS] * 400)
                alone = scoreboard.median_seconds(partial(box.run, [job]), 200)
                figures.note(f"{name} median ms", 1e3 * alone)
            figures.rate("bare process jobs/s", 40, bare_processes, 40)
            figures.rate("exact checks/s", 20_000, exact.score, numbers, golds)
            for kind, answers, golds_of_kind in ordinary_formulas(turn):
                figures.rate(f"pool checks/s, {kind}", 300, pool.score, answers, golds_of_kind)
    for box in boxes.values():
        box.close()

    figures.show({name: f"target {target:,}" for name, target in TARGETS.items()})
    figures.save(options.output)


def ordinary_formulas(turn: int) -> Iterator[tuple[str, list[str], list[str]]]:
    """What reaches math-verify in practice: a few symbols around a number, and one that has to be multiplied out."""
    numbers = range(2 + 1000 * turn, 302 + 1000 * turn)
    short = ("{n}\\sqrt{{2}}", "\\frac{{{n}\\pi}}{{4}}", "(1,{n})", "x={n}", "{n}\\text{{ cm}}", "{n}x+1")
    others = ("{n}\\sqrt{{3}}", "\\frac{{\\pi {n}}}{{4}}", "({n},1)", "{n}", "{n}", "1+{n}x")
    answers = ["\\boxed{" + short[n % 6].format(n=n) + "}" for n in numbers]
    yield "short formulas", answers, [others[n % 6].format(n=n) for n in numbers]
    products = [f"\\boxed{{(x+{n})^2}}" for n in numbers]
    yield "products", products, [f"x^2 + {2 * n}x + {n * n}" for n in numbers]


if __name__ == "__main__":
    main()
