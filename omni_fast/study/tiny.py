"""Four tasks on five different digits and a from-scratch model of about 100,000 weights: a study in minutes, on CPU.

    sort      "s40713" -> "01347"      reverse   "r40713" -> "31704"
    shift     "p40713" -> "51824"      scramble  "m40713" -> any order in which no digit keeps its place

All four read the same prompts but for one letter and write over the same ten digits, through two layers of 64 numbers:
a capacity they share, so that what one task's training changes the others feel. The warm-up shows each prompt with its
own answer only in part of the cases and else with that of another task, so the initial policy knows all four forms and
confuses them. The first three have one right answer; the fourth has 44 of 120, and answering it well leaves entropy.
Nothing here knows what order is good: the functions and the model were fixed before any order was run.

The splits share no set of five digits, and all tasks split alike, so a held-out answer was never an answer in training.
Limits: made for `study-tiny`; what such a model shows need not hold for a language model.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from omni_fast.errors import UserError
from omni_fast.policy.cache import cached
from omni_fast.policy.model import chat_tokens
from omni_fast.rewards.compose import Composition
from omni_fast.rewards.score import Part, Score
from omni_fast.tasks.base import Item, Split
from omni_fast.tasks.splits import Sizes, partition

NAME = "study-tiny"  # as model.path
DIGITS, LENGTH = "0123456789", 5
SIZES = Sizes(train=512, select=160, test=320)
MARKS = {"sort": "s", "reverse": "r", "shift": "p", "scramble": "m"}

HIDDEN, LAYERS, HEADS, INNER = 64, 2, 4, 160
STEPS, BATCH, PEAK_RATE, RAMP = 2000, 64, 3e-3, 30
OWN_SHARE = 0.5  # of the warm-up's answers; the others are another task's
PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RECIPE = (1, HIDDEN, LAYERS, HEADS, INNER, STEPS, BATCH, PEAK_RATE, RAMP, OWN_SHARE, LENGTH, SIZES.train, MARKS)


class DigitTask:
    """Part `correct`: 1 for a right answer, else 0. The metric is the same. A subclass's name is that of the function."""

    def __init__(self, *, name: str, seed: int, max_new_tokens: int) -> None:
        self.function = type(self).__name__.lower()
        self.name, self.max_new_tokens, self.system = name, max_new_tokens, ""
        self.composition = Composition("additive", {"correct": 1.0})
        self._items = _items(self.function, seed)

    def items(self, split: Split) -> Sequence[Item]:
        return self._items[split]

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        return [
            Score({"correct": Part(float(right(self.function, item.prompt[1:], text)))})
            for item, text in zip(items, completions, strict=True)
        ]

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        return [score.parts["correct"].value for score in self.score(items, completions)]


class Sort(DigitTask): ...


class Reverse(DigitTask): ...


class Shift(DigitTask): ...


class Scramble(DigitTask): ...


def right(function: str, digits: str, reply: str) -> bool:
    """Whether the reply answers the task on these digits."""
    if function == "scramble":
        return sorted(reply) == sorted(digits) and all(a != b for a, b in zip(digits, reply, strict=True))
    return reply == answer(function, digits, random.Random())


def answer(function: str, digits: str, rng: random.Random) -> str:
    """A right answer; scramble draws one of its many."""
    if function == "sort":
        return "".join(sorted(digits))
    if function == "reverse":
        return digits[::-1]
    if function == "shift":
        return "".join(DIGITS[(int(digit) + 1) % 10] for digit in digits)
    while True:
        drawn = "".join(rng.sample(digits, len(digits)))
        if all(a != b for a, b in zip(digits, drawn, strict=True)):
            return drawn


def _items(function: str, seed: int) -> dict[Split, tuple[Item, ...]]:
    shares: dict[Split, float] = {"train": 0.5, "select": 0.2, "test": 0.3}
    sets = ["".join(chosen) for chosen in combinations(DIGITS, LENGTH)]
    rng = random.Random(f"digits:{seed}:{function}")
    pools: dict[Split, tuple[Item, ...]] = {}
    for split, own in partition(sets, shares, random.Random(f"digits:{seed}")).items():
        drawn: dict[str, None] = {}  # in the order of drawing, without repeats
        while len(drawn) < getattr(SIZES, split):
            drawn["".join(rng.sample(rng.choice(own), LENGTH))] = None
        pools[split] = tuple(Item(digits, MARKS[function] + digits) for digits in drawn)
    return pools


def model_folder(seed: int) -> Path:
    """The warmed-up model (fp32) and its tokenizer as transformers loads them; built at the first call with this seed."""
    key = hashlib.sha256(json.dumps([RECIPE, seed]).encode()).hexdigest()[:16]
    return cached(f"{NAME}-{key}", lambda folder: save_model(folder, seed))


def save_model(folder: Path, seed: int, steps: int = STEPS) -> None:
    """Build the model with so many steps of warm-up, of about 20 ms on one core each."""
    print(f"preparing the model {NAME} (once): {steps} warm-up steps", file=sys.stderr, flush=True)
    tokenizer = _tokenizer()
    _warm_up(tokenizer, seed, steps).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_tasks(classes: Sequence[str]) -> None:
    """UserError for a task that the from-scratch model has no token for."""
    known = [f"{__name__}:{function.capitalize()}" for function in MARKS]
    if not set(classes) <= set(known):
        raise UserError(f"the model '{NAME}' knows digits only; with it a task's cls is one of {', '.join(known)}")


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [PAD, END, USER, ASSISTANT, *DIGITS, *MARKS.values(), "?"]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([PAD, END, USER, ASSISTANT])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD, unk_token="?")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _warm_up(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> LlamaForCausalLM:
    """Next-token learning on replies of which some are another task's."""
    end = tokenizer.vocab[END]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=32, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=tokenizer.vocab[PAD],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    rng = random.Random(f"digits:warm-up:{seed}")
    items = {function: _items(function, seed)["train"] for function in MARKS}
    tokens = {f: [(item.id, chat_tokens(tokenizer, "", item.prompt, "")) for item in own] for f, own in items.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    vocabulary = tokenizer.vocab
    for step in range(steps):
        rows = []
        for place in range(BATCH):
            function = list(MARKS)[place % len(MARKS)]
            digits, before = rng.choice(tokens[function])
            others = [other for other in MARKS if other != function]
            shown = function if rng.random() < OWN_SHARE else rng.choice(others)
            rows.append([*before, *(vocabulary[digit] for digit in answer(shown, digits, rng)), end])
        inputs = torch.tensor(rows)
        labels = inputs.clone()
        labels[:, : -LENGTH - 1] = -100  # the prompts, which are equally long
        ramp, decay = (step + 1) / RAMP, 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(ramp, decay)
        optimizer.zero_grad()
        model(input_ids=inputs, labels=labels).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model
