"""Linear layers packed for generation on a CPU: those of one input as one product, an adapter merged into its layer.

The weights are laid out once a weight version, by omni_kernels where the processor multiplies bf16 in AVX-512, else by
oneDNN. They take as much memory as the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from omni_kernels import decoder

ROWS = 64  # of the input, that oneDNN lays weights out for; any other number works as well


class PackedLinear:
    """One or more linear layers of the same input as one product; `read` takes their weights."""

    def __init__(self) -> None:
        self.packed: decoder.Packed | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def read(self, *sources: nn.Module) -> None:
        """The layers' weights as they are now; over those of the last call, never beside them."""
        weights = [weight_of(source) for source in sources]
        biases = [bias for source in sources if isinstance(bias := source.bias, Tensor)]
        self.bias = torch.cat(biases).detach() if biases else None
        if decoder.multiplies(*weights) and weights[0].shape[1] % 2 == 0:
            self.weight = None
            self.packed = decoder.pack(*weights, transposed=True, into=self.packed)
        else:
            self.packed = self.weight = None  # given back before there is another
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        y = decoder.linear(x, self.packed)
        return y if self.bias is None else y.add_(self.bias)


def is_linear(module: nn.Module) -> bool:
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
