"""The rotary embedding of a Llama-style attention in four operations a pass, on rows as they lie.

transformers rotates queries and keys as [heads, rows] views, with a negation and two slices that autograd undoes one by
one: a tenth of the update of SmolLM2-135M on two cores. Here each pass is one function on contiguous [rows, heads, size]
tensors that keeps nothing but the angles. The roundings are the same, forwards and backwards.

Limits: the attention layers of Llama, Mistral, Qwen2 and Qwen3 under tree attention; all else stays as it is.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from omni_fast.policy import tree_attention

LAYERS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")


class _Rotate(torch.autograd.Function):
    """x [T, H, D]; cos, sin [T, 1, D], the first half of sin negated."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (x * cos).add_(_swapped(x).mul_(sin))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return (grad * cos).add_(_swapped(grad * sin)), None, None


def _swapped(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], x[..., :half]), dim=-1)


def _forward(self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
    if self.config._attn_implementation != tree_attention.NAME:
        return type(self).forward(self, hidden_states, position_embeddings=position_embeddings, **kwargs)
    cos, sin = (part[0, :, None] for part in position_embeddings)
    half = sin.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    query, key, value = (
        layer(hidden_states)[0].unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)
    q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
    output, _ = tree_attention.tree_attention(self, q, k, v, scaling=self.scaling, **kwargs)
    return self.o_proj(output.flatten(2)), None


def slim_rotaries(model: nn.Module) -> None:
    """Puts it into each attention layer of a known kind, in place."""
    for module in model.modules():
        if type(module).__name__ in LAYERS:
            module.forward = types.MethodType(_forward, module)
