"""The slim RMSNorm and gated MLP against transformers' own: values, gradients, and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from omni_fast.policy import layer
from omni_fast.policy.layer import slim


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "norm":
        made = LlamaRMSNorm(24)
        made.weight.data.uniform_(0.5, 2.0)
        return made
    return LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=56, num_attention_heads=2))


NORM = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # transformers' own works in fp32
GATE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", NORM)
@pytest.mark.parametrize("kind", ["norm", "gate", "gate with a frozen layer"])
def test_values_and_gradients(kind: str, dtype: torch.dtype) -> None:
    plain, tolerance = make(kind).to(dtype), (NORM if kind == "norm" else GATE)[dtype]
    if "frozen" in kind:
        plain.down_proj.weight.requires_grad_(False)
    slimmed = copy.deepcopy(plain)
    slim(slimmed)
    assert "forward" in vars(slimmed) and vars(copy.deepcopy(slimmed))["forward"].__self__ is not slimmed
    x, grad = 3 * torch.randn(2, 7, 24, dtype=dtype), torch.randn(2, 7, 24, dtype=dtype)
    results = []
    for module in (plain, slimmed):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        wanted = [leaf, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        results.append((out, *torch.autograd.grad(out, wanted, grad)))
    if kind == "norm" and dtype == torch.bfloat16:
        assert torch.equal(results[0][0], results[1][0])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize(("kind", "least"), [("norm", [(5, 1), (5, 24)]), ("gate", [(5, 24), (5, 112)])])
def test_it_keeps_its_input_and_little_else(kind: str, least: list[tuple[int, int]]) -> None:
    """A number a row, and the two halves before the gate."""
    module, kept = make(kind), []
    slim(module)
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        module(x)
    assert sorted(shape for shape in kept if shape[0] == 5) == least


@pytest.mark.parametrize("kind", ["norm", "gate"])
def test_generation_computes_what_training_does_without_its_functions(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = make(kind), torch.randn(5, 24)
    slim(module)
    trained = module(x)
    monkeypatch.setattr(layer, "gated_mlp", None)  # puts gate and up together anew each time
    monkeypatch.setattr(layer.decoder, "normed", None)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), trained.detach(), rtol=1e-5, atol=1e-5)


def test_other_projections_keep_their_own_forward() -> None:
    mlp = make("gate")
    mlp.down_proj = nn.Linear(56, 24)
    expected = mlp(torch.ones(3, 24))
    slim(mlp)
    assert torch.equal(mlp(torch.ones(3, 24)), expected)
