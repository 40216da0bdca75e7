"""A small policy, servers with other weights of its shapes, and an engine over them; not a test module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from fake_sglang import FakeSGLang, random_weights, serving
from transformers import LlamaConfig, LlamaForCausalLM

from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.fleet import Fleet
from omni_fast.rollout.sglang import SGLangEngine
from omni_fast.sync import WeightSync
from omni_fast.sync.plan import tensors

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "tie_word_embeddings": True,
}  # fmt: skip
TRANSPORTS = ["disk", "tensor", "distributed"]
SAMPLING = Sampling(max_new_tokens=4)
PROMPTS = [Prompt([1, 2, place], place) for place in range(6)]


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes))  # type: ignore[arg-type]


def fake(model: torch.nn.Module, **options: object) -> FakeSGLang:
    return FakeSGLang(random_weights(model), vocabulary=64, **options)  # type: ignore[arg-type]


@contextmanager
def engine(
    model: LlamaForCausalLM, folder: Path, *fakes: FakeSGLang, transport: str = "disk", **options: object
) -> Iterator[SGLangEngine]:
    with ExitStack() as stack:
        stack.enter_context(serving(*fakes))
        said: list[str] = []
        fleet = Fleet([one.url for one in fakes], say=said.append)
        stack.callback(fleet.close)
        weights = WeightSync(fleet, model, folder / "engine", transport=transport, **{"compared": None} | options)  # type: ignore[arg-type]
        stack.callback(weights.close)
        made = SGLangEngine(fleet, weights, request_s=5, wait_s=5, adapter=transport == "adapter")
        made.said = said  # type: ignore[attr-defined]
        yield made


def move(model: torch.nn.Module) -> None:
    """An optimiser step, as far as the sync can tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def check_equal(model: torch.nn.Module, server: FakeSGLang) -> None:
    for name, value in tensors(model):  # type: ignore[arg-type]
        assert torch.equal(server.weights[name], value), name
