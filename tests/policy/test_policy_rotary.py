"""The slim attention layer against transformers' own, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from omni_fast.policy import tree_attention
from omni_fast.policy.rotary import slim_rotaries

SIZES = dict(
    vocab_size=11, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=4,
)  # fmt: skip
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3(Qwen3Config(**SIZES)),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return KINDS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_same_bits(model: PreTrainedModel, dtype: torch.dtype) -> None:
    plain = model.to(dtype)
    slim = copy.deepcopy(plain)
    slim_rotaries(slim)
    layout = tree_attention.tree_layout([(0, 5), (5, 8)], [[-1, 0, 1, 1, 0], [-1, 0, 1]], torch.device("cpu"))
    positions = torch.tensor([[0, 1, 2, 2, 1, 0, 1, 2]])
    x = torch.randn(1, 8, 24).to(dtype)
    results = []
    for each in (plain, slim):
        each.config._attn_implementation = tree_attention.NAME
        leaf = x.clone().requires_grad_()
        out = each.model(inputs_embeds=leaf, position_ids=positions, use_cache=False, tree=layout).last_hidden_state
        out.square().sum().backward()
        wanted = [parameter.grad for parameter in each.model.layers.parameters()]
        results.append([out.detach(), leaf.grad, *wanted])
    for ours, expected in zip(results[1], results[0], strict=True):
        assert ours is not None and expected is not None and torch.equal(ours, expected)


def test_other_attention_keeps_its_own_forward(model: PreTrainedModel) -> None:
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    slim_rotaries(model)
    assert torch.equal(model(ids).logits, expected)
    model.generation_config.eos_token_id = None
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)
