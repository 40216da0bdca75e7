"""A decoder prepared for inference: the same modules and parameters, with its linear layers packed for the CPU.

`inference_copy` makes a second module tree over the policy's own parameters (nothing is copied but the tree) and swaps in
what generation gains from: on CPU, linear layers whose weight is laid out once per weight version (by omni_kernels where
the processor multiplies bf16 in AVX-512, else by oneDNN), with q/k/v and gate/up as one GEMM each and LoRA merged; everywhere, PyTorch's RMSNorm and an attention function of our own.
The forward passes of the layers stay those of transformers.

Limits: decoders with the Llama layout of names (`q_proj`, `k_proj`, `v_proj`, `gate_proj`, `up_proj`), called in that
order on one input, as Llama, Qwen2, Qwen3 and Mistral do. The packed weights need as much memory as the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from omni_kernels import decoder

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedLinear(nn.Module):
    """One or more linear layers of the same input as one GEMM, with weights packed for it: ours in bf16, else oneDNN's.

    The sources are read by `read`; a LoRA layer's adapter is merged into its weight. Inference only.
    """

    def __init__(self, sources: Sequence[nn.Module], rows: int) -> None:
        """`rows`: the number of input rows to lay the weights out for (any other number works as well)."""
        super().__init__()
        self.sources, self.rows = tuple(sources), rows  # a tuple: not registered
        self.sizes = [len(weight_of(source)) for source in sources]
        self.packed: decoder.Packed | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.read()

    def read(self) -> None:
        """Take over the sources' weights as they are now."""
        weights = [weight_of(source) for source in self.sources]
        biases = [bias for source in self.sources if isinstance(bias := source.bias, Tensor)]
        self.bias = torch.cat(biases).detach() if biases else None
        if decoder.multiplies(*weights) and weights[0].shape[1] % 2 == 0:
            self.packed, self.weight = decoder.pack(*weights, transposed=True, into=self.packed), None
        else:
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            self.packed, self.weight = None, None  # given back before there is another
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, self.rows)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        y = decoder.linear(x, self.packed)
        return y if self.bias is None else y.add_(self.bias)


def _is_linear(module: nn.Module) -> bool:
    """A plain linear layer, or peft's LoRA around one."""
    return type(module) is nn.Linear or (
        hasattr(module, "get_delta_weight") and type(getattr(module, "base_layer", None)) is nn.Linear
    )


def weight_of(module: nn.Module) -> Tensor:
    """What the layer multiplies by: with an active adapter, its product is added in float32 and rounded once."""
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    adapted: Any = module  # peft's layer, which is not imported for a model without one
    base = adapted.base_layer.weight.detach()
    if adapted.disable_adapters or adapted.merged:
        return base
    deltas = [adapted.get_delta_weight(name).detach().float() for name in adapted.active_adapters]
    return torch.stack([base.float(), *deltas]).sum(0).to(base.dtype)


class FirstPart(nn.Module):
    """Runs the fused GEMM and returns the first part of its output; the others fetch theirs from here."""

    def __init__(self, fused: PackedLinear) -> None:
        super().__init__()
        self.fused = fused
        self.parts: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        first, *self.parts = self.fused(x).split(self.fused.sizes, dim=-1)
        return first


class LaterPart(nn.Module):
    """The next part of what `FirstPart` has just computed of the same input."""

    def __init__(self, first: FirstPart) -> None:
        super().__init__()
        self.first = (first,)  # not registered twice

    def forward(self, x: Tensor) -> Tensor:
        return self.first[0].parts.pop(0)


class FusedRMSNorm(nn.Module):
    """RMSNorm in one call, over the original's weight."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def inference_copy(model: PreTrainedModel, attention: str, rows: int) -> PreTrainedModel:
    """A module tree over `model`'s parameters for generation, in eval mode, using the registered `attention`.

    rows: how many rows a decode step has, for the layout of packed weights.
    """
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    fast = copy.deepcopy(model, shared).eval()
    fast.config._attn_implementation = attention
    for name, module in list(fast.named_modules()):
        module.__dict__.pop("forward", None)  # training's own, and a cycle that would keep the packed weights alive
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            fast.set_submodule(name, FusedRMSNorm(module.weight, module.variance_epsilon))
    if model.device.type == "cpu" and torch.backends.mkldnn.is_available():
        _pack_linears(fast, rows)
    return fast


@torch.no_grad()
def read_again(fast: PreTrainedModel) -> bool:
    """Packs the parameters as they are now, in place; False where only a new copy would do (adapters, whose state it has)."""
    packed = [module for module in fast.modules() if isinstance(module, PackedLinear)]
    if not packed or any(type(source) is not nn.Linear for linear in packed for source in linear.sources):
        return False
    for linear in packed:
        linear.read()
    return True


@torch.no_grad()
def _pack_linears(module: nn.Module, rows: int) -> None:
    for names in FUSED:
        parts = [getattr(module, name, None) for name in names]
        linears = [part for part in parts if part is not None and _is_linear(part)]
        if len(linears) == len(names) and len({part.bias is None for part in linears}) == 1:
            first = FirstPart(PackedLinear(linears, rows))
            setattr(module, names[0], first)
            for name in names[1:]:
                setattr(module, name, LaterPart(first))
    for name, child in list(module.named_children()):
        if _is_linear(child):
            setattr(module, name, PackedLinear([child], rows))
        else:
            _pack_linears(child, rows)
