"""How close to the machine's limits, and how far from the peers, are the loss kernels?

    python benchmarks/bench_kernels.py [--questions C1 C2] [--cases 0 1] [--small] [--rounds 5] [--threads N] [--without BACKEND]
                                       [--output results.json]

On a CPU     C1: logits -> loss and dlogits, against a copy of the logits.  C2: hidden, head -> loss, dX, dW, against three GEMMs.
On a GPU     T1: logits -> log-prob and entropy.  T2: as C1.  T3: hidden, head -> log-prob and entropy.  T4: as C2.
             T5: half of the rows inactive.  T6: the smallest workspace.  T7: batch-invariant.
Each of our backends is also run once for its gradient: one that does not agree with float64 is named and not timed, and the
exit status is 1.
Peers that are not installed are named and left out; `pip install --no-deps trl liger-kernel cut-cross-entropy` adds them.
With --small and no GPU the T questions run on the CPU, with the contenders that can: it shows that the benchmark runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scoreboard  # noqa: E402
from benchmarks.kernels import linear_contenders, logits_contenders  # noqa: E402
from benchmarks.kernels.linear_contenders import LinearCase, LinearData  # noqa: E402
from benchmarks.kernels.logits_contenders import LogitsCase, LogitsData  # noqa: E402
from benchmarks.scoreboard import Contender, Unavailable  # noqa: E402
from omni_kernels import backends, linear_policy_loss, reference  # noqa: E402

CaseT, DataT = TypeVar("CaseT", LogitsCase, LinearCase), TypeVar("DataT", LogitsData, LinearData)
F32, BF16 = torch.float32, torch.bfloat16
GPU = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Question(Generic[CaseT, DataT]):
    """cases, small: what is measured / what shows in a second that it runs. backends: whose gradient is checked first."""

    contenders: Sequence[Contender[DataT]]
    cases: Sequence[CaseT]
    small: Sequence[CaseT]
    make: Callable[[CaseT], DataT]
    check: Callable[[DataT, str], None]
    backends: tuple[str, ...]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for name in ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "verl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if backends.reason_unavailable("cpu") is None:
        from omni_kernels.backends import cpu

        found["instruction set"] = cpu.native.instruction_sets()[0]
    return found


def check_logits(data: LogitsData, backend: str) -> None:
    """A backend's gradient against float64, on a few rows: a fast wrong answer is no answer."""
    run = logits_contenders.in_backend(backend)(data)
    run.reset()
    run.call()
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
    assert error < (5e-3 if data.logits.dtype == BF16 else 1e-5), f"the gradient of {backend} is off by {error:.1e}"


def check_linear(data: LinearData, backend: str) -> None:
    """A backend's gradients against those of the torch one, which the tests hold against float64."""
    logits_contenders.require(backend)
    x, w = data.hidden.detach().requires_grad_(), data.weight.detach().requires_grad_()
    grads = []
    for name in (backend, "torch"):
        loss = linear_policy_loss(x, w, data.tokens, logits_contenders.SPEC, backend=name).loss
        grads.append(torch.autograd.grad(loss, (x, w)))
    for mine, theirs in zip(*grads, strict=True):
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < (1e-2 if x.dtype == BF16 else 1e-4), f"the gradients of {backend} are off by {error:.1e}"


def _logits(
    contenders: Sequence[Contender[LogitsData]], cases: Sequence[LogitsCase], checked: tuple[str, ...]
) -> Question[LogitsCase, LogitsData]:
    small = [LogitsCase(128, 8192, dtype, cases[0].device) for dtype in (F32, BF16)]
    return Question(contenders, cases, small, logits_contenders.make, check_logits, checked)


def _linear(
    contenders: Sequence[Contender[LinearData]], cases: Sequence[LinearCase], checked: tuple[str, ...]
) -> Question[LinearCase, LinearData]:
    small = [LinearCase(256, 128, 8192, dtype, cases[0].device) for dtype in (F32, BF16)]
    return Question(contenders, cases, small, linear_contenders.make, check_linear, checked)


_PAPER_LOGITS = [LogitsCase(8192, 151936, BF16, GPU)]  # Qwen's vocabulary
_PAPER_HEAD = [LinearCase(8192, 4096, 151936, BF16, GPU)]
_ON_GPU = ("triton", "cuda")
QUESTIONS: dict[str, Question] = {
    "C1": _logits(
        logits_contenders.C1,
        [LogitsCase(1024, 49152, F32), LogitsCase(1024, 49152, BF16), LogitsCase(1024, 151936, BF16)],
        ("cpu",),
    ),
    "C2": _linear(
        linear_contenders.C2,
        [LinearCase(2048, 576, 49152, BF16), LinearCase(1024, 576, 49152, F32), LinearCase(1024, 1536, 151936, BF16)],
        ("cpu",),
    ),
    "T1": _logits(logits_contenders.T1, _PAPER_LOGITS, _ON_GPU),
    "T2": _logits(logits_contenders.T2, _PAPER_LOGITS, _ON_GPU),
    "T3": _linear(linear_contenders.T3, _PAPER_HEAD, _ON_GPU),
    "T4": _linear(linear_contenders.T4, _PAPER_HEAD, (*_ON_GPU, "cuda_exp")),
    "T5": _linear(linear_contenders.T5, _PAPER_HEAD, ("triton",)),
    "T6": _linear(linear_contenders.T6, _PAPER_HEAD, ("triton",)),
    "T7": _linear(linear_contenders.T7, _PAPER_HEAD, ("triton",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", default=["C1", "C2"], choices=list(QUESTIONS))
    parser.add_argument("--cases", nargs="+", type=int, help="indices of the cases of each question; default: all")
    parser.add_argument("--small", action="store_true", help="cases of a second, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="+", default=[], help="backends to leave out")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<machine>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logits_contenders.LEFT_OUT |= dict.fromkeys(arguments.without, "left out by --without")
    wrong = False
    on_gpu = [q for q in arguments.questions if q.startswith("T")]
    if on_gpu and GPU == "cpu" and not arguments.small:
        parser.error(f"{' '.join(on_gpu)} need an NVIDIA GPU, and torch sees none; C1 and C2 run on this machine")
    known = versions()
    for name in arguments.questions:
        question = QUESTIONS[name]
        cases = question.small if arguments.small else question.cases
        for case in cases if arguments.cases is None else [cases[i] for i in arguments.cases]:
            data = question.make(case)
            for backend in question.backends:
                try:
                    question.check(data, backend)
                except Unavailable:
                    continue  # said where it would be timed
                except Exception as error:  # whatever it is, the other backends are still worth measuring
                    logits_contenders.LEFT_OUT[backend] = reason = f"{type(error).__name__}: {error}"[:600]
                    print(f"  backend {backend}: {reason}", file=sys.stderr)
                    wrong = True
            dtype = str(case.dtype).removeprefix("torch.")
            rows, failed = scoreboard.compete(
                name, data, case.name, dtype, question.contenders, arguments.rounds, known
            )
            wrong |= any(c.name in failed and c.role == "ours" for c in question.contenders)
            scoreboard.show(rows)
            if not arguments.small or arguments.output:  # case by case: a stopped run keeps what it has
                print(f"  -> {scoreboard.save(rows, arguments.output)}", flush=True)
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
