"""A small decoder and batches that share prefixes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from omni_fast.policy.pack import Trajectory

VOCABULARY = 23


def _build_model(tied: bool = True, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _build_batch(seed: int, groups: int = 3, samples: int = 4, zero_groups: int = 0) -> list[Trajectory]:
    """`zero_groups` of the groups have advantage 0 throughout."""
    draw = random.Random(seed)
    batch = []
    for group in range(groups):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 7))]
        for number in range(samples):
            completion = [draw.randrange(3) for _ in range(draw.randint(1, 6))]
            advantage = 0.0 if group < zero_groups else math.sin(1.0 + seed + group + 2.3 * number)
            logprobs = [-draw.uniform(0.5, 4.0) for _ in completion]
            batch.append(Trajectory(prompt, completion, logprobs, advantage, group, f"task{group % 2}"))
    return batch


@pytest.fixture(scope="session")
def build_model() -> Callable[..., LlamaForCausalLM]:
    return _build_model


@pytest.fixture(scope="session")
def build_batch() -> Callable[..., list[Trajectory]]:
    return _build_batch


@pytest.fixture
def model() -> LlamaForCausalLM:
    return _build_model()
