"""On a GPU: how many times faster than TRL's GRPOTrainer is a training step, at which MFU, and which kernels make it so?

    python benchmarks/gpu_train.py [--questions "TRL gpu short" ...] [--budget-s 440] [--output FILE]     on a GPU
    python benchmarks/gpu_train.py --small                         a tiny model, on any machine: shows that it runs

TRL gpu short, TRL gpu long   a model in the shape of Qwen2.5-0.5B, random weights; both trainers in a process of their own
                              on the same GPU, taking turns step by step (train/race.py). Prompts, group size, lengths, loss and
                              AdamW are the same; TRL generates by transformers (vLLM is not compared), by its own `generate` and
                              by its paged engine, with Liger's layers where they are.
TRL gpu levers                the short case with each of omni_fast's savings taken away alone (train/levers.py).
TRL gpu kernels               the short case with what a GPU offers besides: FlexAttention, varlen attention of PyTorch and of
                              flash-attn, compiled layers, other sizes (train/gpu_levers.py).
TRL gpu served                the short case with rollouts of an SGLang server on the same GPU, beside the engine in the process;
                              only where OMNI_FAST_ENGINE_PYTHON names SGLang's Python. The server's memory is not counted.

Random weights hardly ever end a completion, so all have the same length: padding, which omni_fast has none of, is not measured.
MFU is arithmetic (6 per weight and row, attention by what a row sees) over time and the rate of a bf16 product of 8,192 cubed,
measured in the same run: by the rows that are computed, and by those that a trainer without shared prompts computes. Clocks wait
for the GPU at each phase. A contender that fails gets a row with the reason, TRL too where it is not installed; questions for which
no time is left are named. The file is written after each question; rows of questions that are not asked stay.
cuDNN's attention is PyTorch's last choice here, for all of them: in 2.11 it plans for about half a second at each new shape, so at
each token that TRL's `generate` samples.

Needs of Python packages: torch, triton, transformers, numpy, safetensors, tokenizers, jinja2, and omni_kernels built (scripts/gpu.sh).
For TRL besides: trl, datasets, accelerate, pandas, pyarrow, dill, multiprocess, xxhash, requests, httpx; liger-kernel and flash-attn
are used where they are installed. For the server besides: httpx, pydantic.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers.utils import is_liger_kernel_available

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scoreboard  # noqa: E402
from benchmarks.train import gpu_levers, levers, ours, random_model, trl_peer  # noqa: E402
from benchmarks.train.case import Case  # noqa: E402
from benchmarks.train.race import Row, contender, head, race, show  # noqa: E402
from benchmarks.train.trl_peer import Setting  # noqa: E402
from benchmarks.train.worker import Worker, message  # noqa: E402

SHORT, LONG, SERVED = "TRL gpu short", "TRL gpu long", "TRL gpu served"
LEVERS = {"TRL gpu levers": levers.savings, "TRL gpu kernels": gpu_levers.levers}
# In order of asking, with what share of the budget each has.
WEIGHTS = {SHORT: 5, "TRL gpu levers": 4, "TRL gpu kernels": 4, LONG: 4, SERVED: 7}
SHAPE = {False: "0.5B", True: "tiny"}
ANSWER_S = 150.0  # of a contender's start, and of each of its steps, which may compile
GRACE_S = 30.0  # for what is under way when a question's time is over
LEAST_S = {SERVED: 120.0}  # without which a question is not begun; a server takes a minute to start


def cases(small: bool) -> dict[str, Case]:
    """The short and the long one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = f"{SHAPE[small]}, random weights"
    if small:
        short = Case(SHORT, 24, 8, 3, 4, 4, threads=1, device=device, model=model, rows_per_pass=256)
        return {SHORT: short, LONG: replace(short, question=LONG, prompt_tokens=40, new_tokens=12)}
    short = Case(SHORT, 200, 128, 10, 64, 8, threads=8, device=device, model=model, rows_per_pass=16_384)
    return {SHORT: short, LONG: replace(short, question=LONG, prompt_tokens=1024, new_tokens=256, steps=6, prompts=32)}


def peers(case: Case) -> list[Setting]:
    """TRL's settings to race against: about as many rows a pass as ours, so that it has as much to do at once."""
    assert case.prompt_tokens is not None
    rows = case.rows_per_pass or 0
    samples = max(size for size in (1, 2, 4, 8, 16, 32, 64) if size * (case.prompt_tokens + case.new_tokens) <= rows)
    plain = Setting("bfloat16", min(samples, case.batch))
    if case.device == "cpu":
        return [plain]
    liger = [replace(plain, liger=True)] if is_liger_kernel_available() else []
    return [plain, *liger, replace(plain, continuous_batching=True)]


def answer(question: str, small: bool, model: str, end: float) -> list[Row]:
    """The rows of a question, measured before `end` on the monotonic clock."""
    case = replace(cases(small)[question if question == LONG else SHORT], question=question)
    try:
        return measured(case, model, end)
    except Exception as error:  # whatever it is, the other questions are still worth measuring
        traceback.print_exc()
        return [head(case, "all") | {"error": message(error)}]


def measured(case: Case, model: str, end: float) -> list[Row]:
    left = end - time.monotonic()
    if case.question in LEVERS:
        rows = Worker("levers", _levers, case, model, end, answer_s=left + 2 * GRACE_S).receive()
        assert isinstance(rows, list)
        return rows
    patience = min(ANSWER_S, left + GRACE_S)
    own = contender(ours.NAME, ours.run, case, model, answer_s=patience)
    if case.question == SERVED:
        from benchmarks.gpu_engine import server  # needs more packages than the rest does

        graphs = ("--cuda-graph-backend-prefill=disabled", "--cuda-graph-max-bs-decode", str(case.batch))
        flags = graphs if case.device == "cuda" else ()
        with server(Path(model), "bfloat16", *flags, memory="0.2", timeout_s=left - 45) as url:
            other = contender(f"{ours.NAME}, SGLang rollouts", ours.run, case, model, url, answer_s=patience)
            return race(case, [own, other], model, [0], end=end)
    others = [contender(peer.name, trl_peer.run, case, model, peer, answer_s=patience) for peer in peers(case)]
    return race(case, [own, *others], model, [0], end=end)


def _levers(connection: Connection, case: Case, model: str, end: float) -> None:
    connection.send(levers.measure(case, model, 3, LEVERS[case.question], end=end))


def main() -> None:
    parser = scoreboard.parser(__doc__)
    parser.add_argument("--questions", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    parser.add_argument("--budget-s", type=float, default=440.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.small and device == "cpu":
        raise SystemExit(
            "gpu_train.py measures a GPU, and PyTorch sees none here: --small runs a tiny model on any machine"
        )
    stop = time.monotonic() + options.budget_s
    questions = [name for name in WEIGHTS if name in options.questions]
    if SERVED in questions and "OMNI_FAST_ENGINE_PYTHON" not in os.environ:
        print(f"{SERVED}: left out, OMNI_FAST_ENGINE_PYTHON is not set", flush=True)
        questions.remove(SERVED)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model.write(SHAPE[options.small], Path(folder), device)
        for place, question in enumerate(questions):
            left = stop - time.monotonic()
            if left < LEAST_S.get(question, 30.0):
                print(f"{question}: left out, no time", flush=True)
                continue
            share = WEIGHTS[question] / sum(WEIGHTS[name] for name in questions[place:])
            print(f"== {question}, {share * left:.0f} s", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()  # the GPU is for the contenders
            rows = answer(question, options.small, model, time.monotonic() + share * left)
            if question not in LEVERS:  # which prints as it goes
                show(rows)
            if options.output:
                scoreboard.save(rows, options.output)


if __name__ == "__main__":
    main()
