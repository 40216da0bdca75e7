"""The slim RMSNorm against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from omni_fast.policy.layer import slim


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    plain = LlamaRMSNorm(40).to(dtype)
    plain.weight.data.uniform_(0.5, 2.0)
    slimmed = copy.deepcopy(plain)
    slim(slimmed)
    assert "forward" in vars(slimmed) and "forward" in vars(copy.deepcopy(slimmed))
    x, grad = 3 * torch.randn(2, 7, 40, dtype=dtype), torch.randn(2, 7, 40, dtype=dtype)
    results = []
    for norm in (plain, slimmed):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        results.append((out, *torch.autograd.grad(out, (leaf, norm.weight), grad)))
    if dtype == torch.bfloat16:
        assert torch.equal(results[0][0], results[1][0])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_it_keeps_one_number_a_row() -> None:
    norm, kept = LlamaRMSNorm(64), []
    slim(norm)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        norm(x)
    assert sorted(tuple(shape) for shape in kept) == [(5, 1), (5, 64), (64,)]
