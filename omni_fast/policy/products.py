"""The linear layers of a block as products written out, forward and backward; and the gated MLP of them.

Layers that read the same input are one product (`product`), which keeps that input alone. Where omni_kernels
multiplies faster than torch, the products are its own (fp32 sums, the weights packed as they are needed), and a weight's
gradient goes straight into the fp32 sum of its `Slot`; elsewhere they are torch's, and autograd takes the gradients on.

Written out in plain operations, down(silu(gate) * up) leaves gate, up, silu(gate) and the product to autograd: half of the
activations of SmolLM2-135M. `gated_mlp` keeps its input and the two halves before the gate; the last two are computed
again, in the pass over memory that makes their gradients.

Limits: linear layers without bias; of gates SiLU alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from omni_fast.policy.slots import Slot
from omni_kernels import decoder, products


def is_plain(*modules: object) -> bool:
    """Whether each is a linear layer without bias, and nothing else (no adapter around it)."""
    return all(type(module) is nn.Linear and module.bias is None for module in modules)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return forward(x, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        dweights = weight_gradients(grad, x, weights, ctx.needs_input_grad[1:])
        return backward(grad, *weights) if ctx.needs_input_grad[0] else None, *dweights


def product(x: Tensor, *weights: Tensor) -> Tensor:
    """`forward`, differentiable."""
    return _Product.apply(x, *weights)


def forward(x: Tensor, *weights: Tensor) -> Tensor:
    """x [T, inner] times each weight [width, inner] transposed, side by side: [T, sum of widths]."""
    if products.multiplies(x, *weights):
        return products.linear(x, products.pack(*weights, transposed=True))
    return F.linear(x, weights[0] if len(weights) == 1 else torch.cat(weights))


def backward(grad: Tensor, *weights: Tensor) -> Tensor:
    """The gradient of x, given that of `forward(x, *weights)`."""
    if products.multiplies(grad, *weights):
        return products.linear(grad, products.pack(*weights))
    return grad.matmul(weights[0] if len(weights) == 1 else torch.cat(weights))


def weight_gradients(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The weights' gradients for autograd; None where one is not wanted or went into its slot."""
    found: list[Tensor | None] = []
    packed = products.pack(x) if any(wanted) and products.multiplies(grad, x) else None
    for part, weight, want in zip(grad.split([len(weight) for weight in weights], dim=1), weights, wanted, strict=True):
        if not want:
            found.append(None)
        elif packed is None:
            found.append(part.t().mm(x))
        else:
            slot: Slot | None = getattr(weight, "slot", None)  # where it is trained as a whole by this process
            into, add = (torch.empty_like(weight), False) if slot is None else slot.place()
            products.weight_gradient(part, packed, into, add=add)
            found.append(into if slot is None else None)
    return tuple(found)


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(both, down)
        return forward(decoder.gate(both), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both, down = ctx.saved_tensors
        grad = grad.contiguous()
        dboth, inner = decoder.gate_backward(backward(grad, down), both)
        return dboth, *weight_gradients(grad, inner, [down], ctx.needs_input_grad[1:])


def gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """The output of an MLP of plain linear layers."""
    both = product(x.flatten(0, -2), mlp.gate_proj.weight, mlp.up_proj.weight)
    return _GatedDown.apply(both, mlp.down_proj.weight).view(x.shape)
