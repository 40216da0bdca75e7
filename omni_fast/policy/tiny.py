"""A from-scratch chat model of under a million parameters, for smoke runs and end-to-end tests.

A byte-level BPE tokenizer and a four-layer Llama, warmed up by supervised learning on demonstrations of which about
half are wrong on purpose: the model then knows the form of every task and is right about half of the time, so that
nearly every group of samples has something to learn from. Seeded, cached by a hash of the demonstrations and the
recipe. Limits: it knows nothing but its demonstrations; any text encodes (bytes), few make sense to it.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from omni_fast.policy.cache import cached
from omni_fast.policy.model import chat_tokens, load

Row = tuple[str, str, str]  # prompt, reply, wrong reply

VOCABULARY = 640
HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 96, 4, 4, 2, 256
STEPS = 500
BATCH = 64
PEAK_RATE = 4e-3
WARMUP_STEPS = 30
WRONG_SHARE = 0.5
PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MODEL = (VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, INNER)
RECIPE = ("1", *MODEL, BATCH, PEAK_RATE, WARMUP_STEPS, WRONG_SHARE, TEMPLATE)


def tiny_model(
    rows: Sequence[Row], *, seed: int, steps: int = STEPS, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The warmed-up model (fp32, eval mode) and its tokenizer; built at the first call with these arguments.

    rows: demonstrations (prompt, reply, wrong reply), at least one. steps: of the warm-up, about 60 ms each on two
    cores.
    """
    if not rows:
        raise ValueError("tiny_model got no demonstrations; give at least one (prompt, reply, wrong reply)")
    key = hashlib.sha256(json.dumps([RECIPE, seed, steps, list(rows)]).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        print(f"preparing the tiny model (once): {steps} warm-up steps", file=sys.stderr, flush=True)
        tokenizer = _tokenizer(rows)
        model = _warm_up(rows, tokenizer, seed, steps)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return load(str(cached(f"tiny-{key}", build)), dtype=torch.float32, device=device)


def _tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [  # a digit and a sign are tokens of their own; a word takes its leading space along
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text for row in rows for text in row), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _warm_up(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> LlamaForCausalLM:
    """Next-token learning on the replies; each visit of a row draws anew whether it shows the wrong one."""
    end, pad = tokenizer.vocab[END], tokenizer.vocab[PAD]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    pairs = []
    for prompt, reply, wrong in rows:
        start = chat_tokens(tokenizer, "", prompt, "")
        full = [chat_tokens(tokenizer, "", prompt, text) for text in (reply, wrong)]
        pairs.append((len(start), [tokens + [end] for tokens in full]))
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    order: list[int] = []
    for step in range(steps):
        while len(order) < BATCH:
            order += draw.sample(range(len(pairs)), len(pairs))
        chosen, order = order[:BATCH], order[BATCH:]
        inputs, labels = _batch([(pairs[i][0], pairs[i][1][draw.random() < WRONG_SHARE]) for i in chosen])
        warm, decay = (step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(warm, decay)
        optimizer.zero_grad()
        model(input_ids=inputs, labels=labels).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def _batch(samples: Sequence[tuple[int, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens and labels [B, L]; the prompt and the padding (which causal attention never reads) count not."""
    inputs = [torch.tensor(tokens) for _, tokens in samples]
    labels = [torch.tensor([-100] * start + tokens[start:]) for start, tokens in samples]
    return pad_sequence(inputs, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
