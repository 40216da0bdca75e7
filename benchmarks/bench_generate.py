"""How fast does the local engine generate, against transformers' `generate` and against the machine's limit?

    python benchmarks/bench_generate.py [--model FOLDER] [--threads 2] [--repeats 5] [--output benchmarks/results/generate.json]

Without --model the weights are random, in the shape of SmolLM2-135M. Contenders take turns inside one run on one model,
the same dtype and threads; `seconds` is the median. transformers pads on the left, gets the prompts repeated, and
returns tokens only; the engine also returns log-probs. Every sample has all its new tokens (no stop token).
The limit is a lower bound on time: the GEMMs' arithmetic at the best rate measured here or the weights read once per
step at the copy bandwidth measured here, whichever is longer. It counts each prompt token once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.local import LocalEngine

PEER = f"transformers {transformers.__version__} generate"


@dataclass(frozen=True)
class Case:
    """`prompts` prompts of `shortest` to `longest` tokens, the first `common` of them the same in all prompts."""

    name: str
    prompts: int
    samples: int
    new: int
    shortest: int
    longest: int
    common: int
    temperature: float


CASES = (
    Case("6x8 samples, 46-token prompts, 16 new", 6, 8, 16, 46, 46, 0, 1.0),
    Case("6x8 samples, 46-token prompts, 48 new", 6, 8, 48, 46, 46, 0, 1.0),
    Case("6x8 samples, 30-62-token prompts, 48 new", 6, 8, 48, 30, 62, 0, 1.0),
    Case("128x1 greedy, 20-120-token prompts, 48 new", 128, 1, 48, 20, 120, 0, 0.0),
    Case("128x1 greedy, 50-120, 40 common, 48 new", 128, 1, 48, 50, 120, 40, 0.0),
)


def load(folder: str | None, dtype: torch.dtype) -> LlamaForCausalLM:
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()  # the dtype of a config does not reach random weights


def make_prompts(case: Case, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(case.shortest, case.longest, case.prompts).long()[
        torch.randperm(case.prompts, generator=generator)
    ]
    common = torch.randint(3, vocabulary, (case.common,), generator=generator).tolist()
    own = [int(length) - case.common for length in lengths]
    return [common + torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in own]


def run_peer(model: LlamaForCausalLM, case: Case, prompts: list[list[int]]) -> None:
    width = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(case.samples)]
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = GenerationConfig(
        max_new_tokens=case.new,
        min_new_tokens=case.new,
        pad_token_id=0,
        do_sample=case.temperature > 0,
        temperature=case.temperature or None,
        top_k=0 if case.temperature else None,
    )
    with torch.inference_mode():
        # transformers types `self` of generate as a protocol that its own models do not meet
        output = model.generate(ids, attention_mask=mask, generation_config=settings)  # type: ignore[misc]
    assert isinstance(output, torch.Tensor) and output.shape == (len(rows), width + case.new)


def run_engine(engine: LocalEngine, case: Case, prompts: list[list[int]]) -> None:
    results = engine.generate(
        [Prompt(tokens, key) for key, tokens in enumerate(prompts)],
        case.samples,
        Sampling(case.new, temperature=case.temperature),
    )
    assert all(len(sample.tokens) == case.new for samples in results for sample in samples)


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def machine_limits(dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large GEMM, bytes/s of a copy, reads and writes counted) with the threads in use."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    out = torch.empty(2048, 2048, dtype=dtype)
    torch.mm(a, b, out=out)
    rate = 2 * 2048**3 / median_seconds(lambda: torch.mm(a, b, out=out), 9)
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    target.copy_(source)
    return rate, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 9)


def prompt_rows(case: Case, prompts: list[list[int]]) -> int:
    """Prompt tokens, what they have in common once."""
    return case.common + sum(len(prompt) - case.common for prompt in prompts)


def limit_seconds(model: LlamaForCausalLM, case: Case, prompts: list[list[int]], limits: tuple[float, float]) -> float:
    rate, bandwidth = limits
    head = model.config.vocab_size * model.config.hidden_size
    tables = 1 if model.config.tie_word_embeddings else 2
    layers = sum(parameter.numel() for parameter in model.parameters()) - tables * head
    bytes_a_step = (layers + head) * model.dtype.itemsize
    tokens = prompt_rows(case, prompts)
    rows = case.prompts * case.samples
    prefill = 2 * (layers * tokens + head * case.prompts) / rate
    step = 2 * (layers + head) * rows / rate
    return max(prefill, bytes_a_step / bandwidth) + (case.new - 1) * max(step, bytes_a_step / bandwidth)


def measure(
    model: LlamaForCausalLM, engine: LocalEngine, case: Case, limits: tuple[float, float], repeats: int, skip_peer: bool
) -> list[dict[str, object]]:
    """The rows of one case; contenders take turns, after one round that warms up."""
    prompts = make_prompts(case, model.config.vocab_size)
    contenders: dict[str, Callable[[], None]] = {"local": partial(run_engine, engine, case, prompts)}
    if not skip_peer:
        contenders[PEER] = partial(run_peer, model, case, prompts)
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(repeats + 1):
        for contender, function in contenders.items():
            start = time.perf_counter()
            function()
            if repeat:
                times[contender].append(time.perf_counter() - start)
    medians = {contender: statistics.median(values) for contender, values in times.items()}
    limit = limit_seconds(model, case, prompts, limits)
    return [
        {
            "question": "generate",
            "case": case.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "contender": contender,
            "new_tokens": case.prompts * case.samples * case.new,
            "steps": case.new,
            "prompt_rows": prompt_rows(case, prompts),
            "seconds": round(seconds, 4),
            "spread": [round(min(times[contender]), 4), round(max(times[contender]), 4)],
            "tokens_per_s": round(case.prompts * case.samples * case.new / seconds, 1),
            "ratio_to_best_peer": round(medians[PEER] / seconds, 3) if PEER in medians else None,
            "ratio_to_limit": round(limit / seconds, 3),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": f"{machine_name()}, {torch.get_num_threads()} threads",
        }
        for contender, seconds in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or id of a transformers model; random weights without it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))), help="numbers of the cases")
    parser.add_argument("--skip-peer", action="store_true", help="time the engine alone")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, object]] = []
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        model = load(arguments.model, dtype)
        model.generation_config.eos_token_id = None
        engine = LocalEngine(model)
        sync = median_seconds(partial(engine.sync, 1), 3)
        for number in arguments.cases:
            limits = machine_limits(dtype)  # just before the case: a shared machine changes its speed
            print(
                f"{name}: GEMM {limits[0] / 1e12:.2f} TFLOP/s, copy {limits[1] / 1e9:.0f} GB/s, sync {sync:.3f} s",
                flush=True,
            )
            for row in measure(model, engine, CASES[number], limits, arguments.repeats, arguments.skip_peer):
                rows.append(row)
                print(
                    f"{row['case']:44} {row['contender']:32} {row['seconds']:7} s {row['tokens_per_s']:8} tokens/s  "
                    f"x{row['ratio_to_best_peer']} of the peer  {row['ratio_to_limit']} of the limit",
                    flush=True,
                )
            if arguments.output is not None:  # after each case: a run cut short keeps what it has
                arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
        engine.close()


def machine_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
        flags = next((line for line in lines if line.startswith("flags")), "")
        features = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags.split()]
        return f"{model} ({features[0] if features else platform.machine()})"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
