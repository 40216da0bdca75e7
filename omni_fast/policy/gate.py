"""A gated MLP as two autograd functions that keep its input and the two halves before the gate.

Written out in plain operations, down(silu(gate) * up) leaves gate, up, silu(gate) and the product to autograd: half of the
activations of SmolLM2-135M. The last two are computed again, in the pass over memory that makes their gradients.

Limits: SiLU, and plain linear layers without bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_fast.policy import products
from omni_kernels import decoder


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(both, down)
        return products.forward(decoder.gate(both), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both, down = ctx.saved_tensors
        grad = grad.contiguous()
        dboth, inner = decoder.gate_backward(products.backward(grad, down), both)
        return dboth, *products.weight_gradients(grad, inner, [down], ctx.needs_input_grad[1:])


def gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """The output of an MLP of plain linear layers."""
    both = products.product(x.flatten(0, -2), mlp.gate_proj.weight, mlp.up_proj.weight)
    return _GatedDown.apply(both, mlp.down_proj.weight).view(x.shape)
