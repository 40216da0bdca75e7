"""What both trainers are asked to do: prompts, reward, settings, and the least time this machine could need for it.

The prompts ask for stories, so that completions seldom end before their limit. The reward is the share of short words in
the completion: cheap, deterministic, dense, and learned within some twenty steps.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from benchmarks import scoreboard
from omni_fast.policy.model import chat_tokens

SHORT_WORD = 3  # letters
NOUNS = (
    "river dog king tower garden letter clock ship forest baker mirror horse storm teacher stone island lamp wolf "
    "market bridge sailor violin winter castle orange doctor window farmer dragon train"
).split()
ASK = "Write a story about a {} and a {}."
BEFORE = "Here is what happened before:"
FILLER = (
    "the people of the town had heard about it long before and they told the story in many ways when the evening came "
    "some said that it was only a dream but others were sure because they had seen it with their own eyes near the old "
    "mill where the road turns to the hills and the water runs slow under the trees"
).split()


@dataclass(frozen=True)
class Case:
    """One comparison. prompt_tokens: the exact length of each prompt with its template; None: as the question comes.

    rows_per_pass: omni_fast's `tokens_per_microbatch`; None: what ours.py says.
    """

    question: str
    prompt_tokens: int | None
    new_tokens: int
    steps: int
    prompts: int = 6
    samples: int = 8
    learning_rate: float = 2e-5
    threads: int = 2
    device: str = "cpu"
    model: str = "SmolLM2-135M-Instruct"
    rows_per_pass: int | None = None

    @property
    def name(self) -> str:
        length = "short prompts" if self.prompt_tokens is None else f"{self.prompt_tokens}-token prompts"
        return f"{self.prompts}x{self.samples} samples, {length}, {self.new_tokens} new"

    @property
    def batch(self) -> int:
        return self.prompts * self.samples


CASES = {
    case.question: case
    for case in (
        Case("TRL small", None, 16, steps=24),
        Case("TRL long", 200, 48, steps=20),
    )
}
# What both are given; AdamW in fp32 in both, where TRL's setting keeps fp32 weights.
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
MAX_GRAD_NORM = 1.0
EPSILON = 0.2
STD_FLOOR = 1e-4  # TRL's: advantage = (reward - mean) / (std + 1e-4), sample standard deviation


def questions(case: Case, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[str]]:
    """For each step the user messages of its prompts, all different."""
    draw = random.Random(seed)
    pairs = draw.sample([(a, b) for a in NOUNS for b in NOUNS if a != b], case.steps * case.prompts)
    texts = [_question(case, tokenizer, *pair, draw) for pair in pairs]
    return [texts[step * case.prompts : (step + 1) * case.prompts] for step in range(case.steps)]


def _question(case: Case, tokenizer: PreTrainedTokenizerBase, first: str, second: str, draw: random.Random) -> str:
    ask = ASK.format(first, second)
    if case.prompt_tokens is None:
        return ask
    start, words = draw.randrange(len(FILLER)), 0
    text = ask
    while missing := max(0, case.prompt_tokens - len(prompt_tokens(tokenizer, text))):
        words += max(1, missing // 2)  # a word can be two tokens
        filler = " ".join(FILLER[(start + number) % len(FILLER)] for number in range(words))
        text = f"{ask} {BEFORE} {filler}"
    assert len(prompt_tokens(tokenizer, text)) == case.prompt_tokens
    return text


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return chat_tokens(tokenizer, "", text, "")


def reward(text: str) -> float:
    """The share of words of at most three letters; 0 for an empty text."""
    words = text.split()
    return sum(len(word.strip(".,;:!?\"'()*-")) <= SHORT_WORD for word in words) / len(words) if words else 0.0


def advantages(rewards: list[float]) -> list[float]:
    """Of one group, by TRL's formula."""
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(value - mean) / (std + STD_FLOOR) for value in rewards]


class Asked(Protocol):
    """How much is generated. batch: samples of all prompts."""

    @property
    def prompts(self) -> int: ...
    @property
    def batch(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """gemm: FLOP/s of a bf16 product of 2,048 cubed (on a GPU 8,192). copy: bytes/s, reads and writes counted."""

    gemm: float
    copy: float

    @classmethod
    def measured(cls, device: str = "cpu") -> Limits:
        size = 8192 if device == "cuda" else 2048
        a, b = torch.randn(2, size, size, device=device).bfloat16()
        out = torch.empty_like(a)
        source = torch.ones(1 << 26, device=device)
        target = torch.empty_like(source)
        return cls(
            2 * size**3 / scoreboard.median_seconds(lambda: torch.mm(a, b, out=out)),
            2 * source.nbytes / scoreboard.median_seconds(lambda: target.copy_(source)),
        )

    def seconds(
        self, case: Case, model: PretrainedConfig, prompt_rows: int, rows: int, tokens: int
    ) -> dict[str, float]:
        """A lower bound on a step's time by phase: arithmetic at the GEMM's rate or bytes at the copy's, the longer.

        prompt_rows: prompt tokens of the step, each prompt once. rows: what the update has to compute, prompts once.
        tokens: sampled ones. Attention's products, the softmax over the vocabulary and the norms count nothing.
        """
        head = model.vocab_size * model.hidden_size
        layers = parameters(model) - head
        learn = 6 * (layers * rows + head * tokens) / self.gemm
        # AdamW reads weight, gradient and two moments and writes three of them, fp32; and the bf16 weight.
        optimise = 30 * (layers + head) / self.copy
        return {"generate": self.generating(case, model, prompt_rows, tokens), "update": learn + optimise}

    def generating(self, case: Asked, model: PretrainedConfig, prompt_rows: int, tokens: int) -> float:
        """Its part of `seconds`."""
        head = model.vocab_size * model.hidden_size
        layers = parameters(model) - head
        read = 2 * (layers + head) / self.copy  # bf16 weights, once a decoding step
        step = max(2 * (layers + head) * case.batch / self.gemm, read)
        first = max(2 * (layers * prompt_rows + head * case.prompts) / self.gemm, read)
        return first + (tokens / case.batch - 1) * step

    def record(self) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def parameters(model: PretrainedConfig) -> int:
    """Of a Llama-style decoder with tied embeddings, biases left out."""
    hidden = model.hidden_size
    size = getattr(model, "head_dim", None) or hidden // model.num_attention_heads
    attention = 2 * hidden * size * (model.num_attention_heads + model.num_key_value_heads)
    layer = attention + 3 * hidden * model.intermediate_size + 2 * hidden
    return model.vocab_size * hidden + model.num_hidden_layers * layer + hidden


@dataclass(frozen=True)
class Work:
    """Arithmetic of one step in FLOPs: products with weights, and those of attention over what a row sees."""

    generate: float
    update: float

    @classmethod
    def of(cls, case: Case, model: PretrainedConfig, prompt_rows: int, tokens: int, rows: int, shared: bool) -> Work:
        """prompt_rows: prompt tokens of the step, each prompt once. tokens: sampled ones. rows: of the update's forward pass.

        shared: each prompt is computed once, not once a sample. Lengths are taken as equal.
        """
        head = model.vocab_size * model.hidden_size
        layers = parameters(model) - head
        copies = case.prompts if shared else case.batch
        prompt, completion = prompt_rows / case.prompts, tokens / case.batch
        pairs = copies * prompt**2 / 2 + case.batch * completion * (prompt + completion / 2)
        size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        attention = 4 * pairs * model.num_hidden_layers * model.num_attention_heads * size
        return cls(
            2 * (layers * (copies * prompt + tokens) + head * tokens) + attention,
            3 * (2 * (layers * rows + head * tokens) + attention),
        )


def settle(device: str) -> None:
    """Waits for what the device is still doing: clocks are read after that."""
    if device == "cuda":
        torch.cuda.synchronize()
