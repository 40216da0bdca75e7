"""Decoder layers on the compiled kernels against transformers' own forward pass: values, gradients, and what is kept."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from omni_fast.policy import layer
from omni_fast.policy.pack import Share, Trajectory
from omni_fast.policy.update import Policy
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.local import LocalEngine
from omni_kernels import LossSpec, backends
from omni_kernels.backends import cpu

if backends.reason_unavailable("cpu") is not None:
    pytest.skip(str(backends.reason_unavailable("cpu")), allow_module_level=True)


def make_model(kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=90, hidden_size=64, intermediate_size=104, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
            num_key_value_heads=kv_heads, initializer_range=0.1, tie_word_embeddings=True,
        )
    )  # fmt: skip


def batch() -> list[Trajectory]:
    draw = random.Random(1)
    samples = []
    for group, length in enumerate((3, 20, 75)):
        prompt = [draw.randrange(90) for _ in range(length)]
        for _ in range(4):
            completion = [draw.randrange(3) for _ in range(draw.randrange(1, 12))]
            samples.append(Trajectory(prompt, completion, [-1.0] * len(completion), draw.gauss(0, 1), group))
    return samples


def gradients(
    model: LlamaForCausalLM, dtype: torch.dtype, share: Share = "tree", budget: int = 4096
) -> dict[str, Tensor]:
    policy = Policy(
        copy.deepcopy(model), loss=LossSpec(), learning_rate=0.0, dtype=dtype, share=share, tokens_per_microbatch=budget
    )
    policy.update(batch())
    return {slot.name: slot.grad.clone() for slot in policy.slots}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    apart = sum(float((found[name] - exact[name]).double().square().sum()) for name in exact)
    return (apart / sum(float(value.double().square().sum()) for value in exact.values())) ** 0.5


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Gradients of the unshared samples by transformers' layers in fp32, of weights that bf16 holds."""
    with monkeypatch.context() as plain:
        plain.setattr(layer, "_fits", lambda *given: False)
        return gradients(make_model().bfloat16().float(), torch.float32, share="none")


@pytest.mark.parametrize("budget", [4096, 100])
def test_gradients_in_fp32_are_the_unshared_ones(reference: dict[str, Tensor], budget: int) -> None:
    assert distance(gradients(make_model().bfloat16().float(), torch.float32, budget=budget), reference) < 3e-6


def test_gradients_in_bf16_are_no_further_from_them_than_torch_is(
    reference: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = distance(gradients(make_model(), torch.bfloat16), reference)
    monkeypatch.setattr(layer, "_fits", lambda *given: False)
    monkeypatch.setattr(cpu, "best", lambda: "")
    assert ours < 1.2 * distance(gradients(make_model(), torch.bfloat16), reference) < 0.1


def test_frozen_weights_get_no_gradient() -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name or "down_proj" in name)
    found = gradients(model, torch.bfloat16)
    assert len(found) == 6 and all(float(value.norm()) > 0 for value in found.values())


def test_a_bias_or_another_head_size_stays_with_transformers() -> None:
    model = make_model()
    hidden = torch.zeros(1, 4, 64)
    assert layer._fits(model.model.layers[0], hidden)
    assert not layer._fits(model.model.layers[0], hidden.double())
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 128)
    assert not layer._fits(model.model.layers[0], hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_lie_by_columns(dtype: torch.dtype) -> None:
    model, turned = make_model(), make_model()
    for weight in (turned.model.layers[0].mlp.down_proj.weight, turned.model.embed_tokens.weight):
        weight.data = weight.data.t().contiguous().t()
    asked = ([Prompt([1, 2, 3], 0)], 2, Sampling(4, 1.0, (), 0))
    assert LocalEngine(turned).generate(*asked) == LocalEngine(model).generate(*asked)
    assert distance(gradients(turned, dtype), gradients(model, dtype)) == 0


def test_checkpointing_gives_the_same() -> None:
    model = make_model()
    plain = gradients(model, torch.float32)
    policy = Policy(
        copy.deepcopy(model), loss=LossSpec(), learning_rate=0.0, dtype=torch.float32, gradient_checkpointing=True
    )
    policy.update(batch())
    assert distance({slot.name: slot.grad for slot in policy.slots}, plain) < 1e-6
