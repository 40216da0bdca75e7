"""A gated MLP that keeps two of its four wide intermediates for the backward pass.

Written out in plain operations, down(silu(gate) * up) leaves gate, up, silu(gate) and the product to autograd: half of the
activations of SmolLM2-135M. The last two are one cheap operation each, so they are computed again, with the same roundings.

Limits: SiLU, and a plain linear layer without bias at the end; other MLPs (an adapter's, for example) stay as they are.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        opened = F.silu(gate)
        dw = None
        if ctx.needs_input_grad[2]:
            dw = grad.flatten(0, -2).t().mm((opened * up).flatten(0, -2))
        inner = grad.matmul(weight)
        dup = inner * opened
        return torch.ops.aten.silu_backward(inner.mul_(up), gate), dup, dw


def _forward(self: Any, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    if type(down) is not nn.Linear or down.bias is not None:
        return down(self.act_fn(gate) * up)
    return _GatedDown.apply(gate, up, down.weight)


def slim_gates(model: nn.Module) -> None:
    """Puts it into each MLP of the Llama family (`gate_proj`, `up_proj`, `down_proj`, SiLU as `act_fn`), in place."""
    for module in model.modules():
        if (
            all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
            and "SiLU" in type(getattr(module, "act_fn", None)).__name__
        ):
            module.forward = types.MethodType(_forward, module)
