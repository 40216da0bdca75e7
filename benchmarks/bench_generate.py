"""How fast does the local engine generate, against transformers' `generate` and against the machine's limit?

    python benchmarks/bench_generate.py [--model FOLDER] [--threads 2] [--rounds 5] [--output benchmarks/results/generate.json]

Without --model the weights are random, in the shape of SmolLM2-135M. Contenders take turns inside one run on one model,
bf16, the same threads; `seconds` is the median. transformers pads on the left, gets the prompts repeated, and
returns tokens only; the engine also returns log-probs. Every sample has all its new tokens (no stop token).
The limit is a lower bound on time: the GEMMs' arithmetic at the best rate measured here or the weights read once per
step at the copy bandwidth measured here, whichever is longer. It counts each prompt token once.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scoreboard  # noqa: E402
from benchmarks.scoreboard import Contender, Run  # noqa: E402
from benchmarks.train.case import Limits  # noqa: E402
from omni_fast.rollout.engine import Prompt, Sampling  # noqa: E402
from omni_fast.rollout.local import LocalEngine  # noqa: E402

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

    @property
    def batch(self) -> int:
        return self.prompts * self.samples


CASES = (
    Case("6x8 samples, 46-token prompts, 16 new", 6, 8, 16, 46, 46, 0, 1.0),
    Case("6x8 samples, 46-token prompts, 48 new", 6, 8, 48, 46, 46, 0, 1.0),
    Case("6x8 samples, 30-62-token prompts, 48 new", 6, 8, 48, 30, 62, 0, 1.0),
    Case("128x1 greedy, 20-120-token prompts, 48 new", 128, 1, 48, 20, 120, 0, 0.0),
    Case("128x1 greedy, 50-120, 40 common, 48 new", 128, 1, 48, 50, 120, 40, 0.0),
)


def load(folder: str | None) -> LlamaForCausalLM:
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config).bfloat16()
    model.generation_config.eos_token_id = None
    return model.eval()


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
        max_new_tokens=case.new, min_new_tokens=case.new, pad_token_id=0, do_sample=case.temperature > 0,
        temperature=case.temperature or None, top_k=0 if case.temperature else None,
    )  # fmt: skip
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


def measure(
    model: LlamaForCausalLM, engine: LocalEngine, case: Case, rounds: int, threads: int
) -> list[dict[str, object]]:
    """The rows of one case; contenders take turns."""
    limits = Limits.measured()  # just before the case: a shared machine changes its speed
    print(f"GEMM {limits.gemm / 1e12:.2f} TFLOP/s, copy {limits.copy / 1e9:.0f} GB/s", flush=True)
    prompts = make_prompts(case, model.config.vocab_size)
    contenders = [
        Contender("local", "ours", lambda asked: Run(partial(run_engine, engine, case, asked))),
        Contender(PEER, "peer", lambda asked: Run(partial(run_peer, model, case, asked))),
    ]
    known = scoreboard.versions("torch", "transformers") | {"threads": str(threads)}
    found, failed = scoreboard.compete("generate", prompts, case.name, "bfloat16", contenders, rounds, known)
    scoreboard.show(found)
    if failed:
        raise SystemExit(1)
    prompt_rows, tokens = case.common + sum(len(prompt) - case.common for prompt in prompts), case.batch * case.new
    limit = limits.generating(case, model.config, prompt_rows, tokens)
    more = {"new_tokens": tokens, "steps": case.new, "prompt_rows": prompt_rows, "machine": scoreboard.machine()}
    return [
        asdict(row) | more | {"tokens_per_s": tokens / row.seconds, "ratio_to_limit": limit / row.seconds}
        for row in found
    ]


def main() -> None:
    parser = scoreboard.parser(__doc__)
    parser.add_argument("--model", help="folder or id of a transformers model; random weights without it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))), help="numbers of the cases")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model)
    engine = LocalEngine(model)
    print(f"sync {scoreboard.median_seconds(partial(engine.sync, 1), 3):.3f} s")
    for number in options.cases:
        rows = measure(model, engine, CASES[number], options.rounds, options.threads)
        for row in rows:
            print(f"  {row['contender']}: {row['tokens_per_s']:.1f} tokens/s, {row['ratio_to_limit']:.3f} of the limit")
        if options.output:  # after each case: a run cut short keeps what it has
            scoreboard.save(rows, options.output)
    engine.close()


if __name__ == "__main__":
    main()
