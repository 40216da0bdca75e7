"""The slim gated MLP against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from omni_fast.policy.layer import slim


def make(dtype: torch.dtype = torch.float32) -> LlamaMLP:
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=56, num_attention_heads=2)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients(dtype: torch.dtype, tolerance: float, frozen: bool) -> None:
    plain = make(dtype)
    plain.down_proj.weight.requires_grad_(not frozen)
    slimmed = copy.deepcopy(plain)
    slim(slimmed)
    assert "forward" in vars(slimmed) and vars(copy.deepcopy(slimmed))["forward"].__self__ is not slimmed
    x, grad = torch.randn(2, 7, 24, dtype=dtype), torch.randn(2, 7, 24, dtype=dtype)
    results = []
    for mlp in (plain, slimmed):
        leaf = x.clone().requires_grad_()
        out = mlp(leaf)
        wanted = [leaf, *(parameter for parameter in mlp.parameters() if parameter.requires_grad)]
        results.append((out, *torch.autograd.grad(out, wanted, grad)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_it_keeps_the_two_halves_before_the_gate() -> None:
    mlp, kept = make(), []
    slim(mlp)
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        mlp(x)
    assert kept.count((5, 112)) == 1 and (5, 56) not in kept


def test_other_projections_keep_their_own_forward() -> None:
    mlp = make()
    mlp.down_proj = nn.Linear(56, 24)
    expected = mlp(torch.ones(3, 24))
    slim(mlp)
    assert torch.equal(mlp(torch.ones(3, 24)), expected)
