"""How close to the machine's limits, and how far from the peers, are the loss kernels?

    python benchmarks/bench_kernels.py [--questions C1 C2] [--cases 0 1] [--small] [--rounds 5] [--threads N] [--output results.json]

C1: logits -> loss and dlogits, against a copy of the logits.  C2: hidden, head -> loss, dX, dW, against three GEMMs.
Each contender is also run once for its gradient, which must agree with the float64 oracle before anything is timed.
Peers that are not installed are named and left out; `pip install --no-deps trl liger-kernel cut-cross-entropy` adds them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scoreboard  # noqa: E402
from benchmarks.kernels import linear_contenders, logits_contenders  # noqa: E402
from benchmarks.kernels.linear_contenders import LinearCase  # noqa: E402
from benchmarks.kernels.logits_contenders import LogitsCase  # noqa: E402
from omni_kernels import backends, linear_policy_loss, reference  # noqa: E402

CaseT = TypeVar("CaseT")
F32, BF16 = torch.float32, torch.bfloat16
C1 = [LogitsCase(1024, 49152, F32), LogitsCase(1024, 49152, BF16), LogitsCase(1024, 151936, BF16)]
C2 = [LinearCase(2048, 576, 49152, BF16), LinearCase(1024, 576, 49152, F32), LinearCase(512, 1536, 151936, BF16)]
SMALL_C1 = [LogitsCase(128, 8192, F32), LogitsCase(128, 8192, BF16)]
SMALL_C2 = [LinearCase(256, 128, 8192, F32), LinearCase(256, 128, 8192, BF16)]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for name in ("torch", "trl", "liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if backends.reason_unavailable("cpu") is None:
        from omni_kernels.backends import cpu

        found["instruction set"] = cpu.native.instruction_sets()[0]
    return found


def check_logits(data: logits_contenders.LogitsData) -> None:
    """The C++ sweep against float64, on a few rows: a fast wrong answer is no answer."""
    if backends.reason_unavailable("cpu") is not None:
        return
    logits_contenders.in_backend("cpu")(data).reset()
    logits_contenders.in_backend("cpu")(data).call()
    rows = slice(0, 8)
    exact = data.logits[rows].double().requires_grad_()
    targets, old = data.tokens.targets[rows], data.tokens.old
    assert old is not None
    logp, _, _ = reference.logprob(exact, targets)
    ratio, advantages = (logp - old[rows]).exp(), data.tokens.advantages[rows]
    spec = logits_contenders.SPEC
    bounded = ratio.clamp(1 - spec.eps_low, 1 + spec.eps_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages).sum() / len(data.logits)
    (gradient,) = torch.autograd.grad(loss, exact)
    error = (data.work[rows].double() - gradient).norm() / gradient.norm()
    assert error < (5e-3 if data.logits.dtype == BF16 else 1e-5), f"the gradient is off by {error:.1e}"


def check_linear(data: linear_contenders.LinearData) -> None:
    """The C++ path against torch's own, whose gradients the tests hold against float64."""
    x, w = data.hidden.detach().requires_grad_(), data.weight.detach().requires_grad_()
    grads = []
    for backend in ("cpu", "torch"):
        if backends.reason_unavailable(backend) is not None:
            return
        loss = linear_policy_loss(x, w, data.tokens, logits_contenders.SPEC, backend=backend).loss
        grads.append(torch.autograd.grad(loss, (x, w)))
    for mine, theirs in zip(*grads, strict=True):
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < (1e-2 if x.dtype == BF16 else 1e-4), f"the gradients differ by {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", default=["C1", "C2"], choices=["C1", "C2"])
    parser.add_argument("--cases", nargs="+", type=int, help="indices of the cases of each question; default: all")
    parser.add_argument("--small", action="store_true", help="cases of a second, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<machine>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    known = versions()
    for question in arguments.questions:
        logits_cases, linear_cases = (SMALL_C1, SMALL_C2) if arguments.small else (C1, C2)
        for case in _picked(logits_cases, arguments.cases) if question == "C1" else []:
            logits_data = logits_contenders.make(case)
            check_logits(logits_data)
            report(question, case, logits_data, logits_contenders.CONTENDERS, arguments, known)
        for head_case in _picked(linear_cases, arguments.cases) if question == "C2" else []:
            linear_data = linear_contenders.make(head_case)
            check_linear(linear_data)
            report(question, head_case, linear_data, linear_contenders.CONTENDERS, arguments, known)


def _picked(cases: list[CaseT], indices: list[int] | None) -> list[CaseT]:
    return cases if indices is None else [cases[i] for i in indices]


def report(
    question: str,
    case: LogitsCase | LinearCase,
    data: scoreboard.CaseT,
    contenders: list[scoreboard.Contender[scoreboard.CaseT]],
    arguments: argparse.Namespace,
    known: dict[str, str],
) -> None:
    """One case: run, print, save at once, so that a stopped run keeps what it has."""
    dtype = str(case.dtype).removeprefix("torch.")
    rows = scoreboard.compete(question, data, case.name, dtype, contenders, arguments.rounds, known)
    scoreboard.show(rows)
    if not arguments.small or arguments.output:
        print(f"  -> {scoreboard.save(rows, arguments.output)}")


if __name__ == "__main__":
    main()
