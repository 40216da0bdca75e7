"""A decoder layer of the Llama family over prefix trees as two autograd functions and two norms, for CPUs.

Attention and MLP each are one function from normed rows to what the residual stream gets, made of the compiled kernels of
omni_kernels: q, k and v in one product, rotated in place, attention that keeps one number a row and head instead of
probabilities, the residual's sum and its norm in one pass. Of a row a layer keeps the residual stream twice, the inputs of
its products, q, k, v and the two halves before the gate.

Limits: layers of the classes in `KINDS` with plain linear layers and no bias, bf16 or fp32 on a CPU with the compiled
kernels, heads of a multiple of 32. Everything else runs transformers' own forward pass, with `tree_attention`.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from omni_fast.policy import products
from omni_fast.policy.gate import gated_mlp
from omni_fast.policy.tree_attention import TreeLayout
from omni_kernels import decoder

KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, cos: Tensor, sin: Tensor,
        blocks: decoder.TreeBlocks, size: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """x: [T, hidden]; q, k, v, o: the layers' weights; cos, sin: [T, size], the size of a head."""
        states = products.forward(x, q, k, v)
        parts = _by_head(states, q, k, size)
        for part in parts[:2]:
            decoder.rotate(part, cos, sin, part)
        out, lse = decoder.attend(*parts, blocks, scale)
        ctx.save_for_backward(x, states, out, lse, q, k, v, o, cos, sin)
        ctx.blocks, ctx.size, ctx.scale = blocks, size, scale
        return products.forward(out.flatten(1), o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, states, out, lse, q, k, v, o, cos, sin = ctx.saved_tensors
        grad = grad.contiguous()
        wanted = ctx.needs_input_grad
        (do,) = products.weight_gradients(grad, out.flatten(1), [o], wanted[4:5])
        dout = products.backward(grad, o).view(out.shape)
        dstates = torch.empty_like(states)
        parts, dparts = _by_head(states, q, k, ctx.size), _by_head(dstates, q, k, ctx.size)
        decoder.attend_backward(dout, *parts, lse, ctx.blocks, ctx.scale, dparts)
        for part in dparts[:2]:
            decoder.rotate(part, cos, sin, part, backward=True)
        dweights = products.weight_gradients(dstates, x, [q, k, v], wanted[1:4])
        dx = products.backward(dstates, q, k, v) if wanted[0] else None
        return dx, *dweights, do, None, None, None, None, None


def _by_head(states: Tensor, q: Tensor, k: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, heads, size], views of the product of their weights."""
    first, second = len(q), len(q) + len(k)
    queries, keys, values = states[:, :first], states[:, first:second], states[:, second:]
    return queries.unflatten(1, (-1, size)), keys.unflatten(1, (-1, size)), values.unflatten(1, (-1, size))


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    tree: TreeLayout | None = kwargs.get("tree")
    if tree is None or tree.blocks is None or not _fits(self, hidden_states):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    cos, sin = kwargs["position_embeddings"]
    attention, before, after = self.self_attn, self.input_layernorm, self.post_attention_layernorm
    stream = hidden_states[0]
    x = decoder.normed(stream, before.weight, before.variance_epsilon)
    heads = [getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    x = _Attention.apply(x, *heads, cos[0], sin[0], tree.blocks, attention.head_dim, attention.scaling)
    stream, x = decoder.add_normed(x, stream, after.weight, after.variance_epsilon)
    return (stream + gated_mlp(self.mlp, x))[None]


def _fits(layer: Any, hidden: Tensor) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        products.is_plain(*linears)
        and attention.head_dim % 32 == 0
        and len(hidden) == 1
        and decoder.native(hidden, layer.input_layernorm.weight, *(linear.weight for linear in linears))
    )


def slim_layers(model: nn.Module) -> None:
    """Puts it into each layer of `KINDS`, in place."""
    for module in model.modules():
        if type(module).__name__ in KINDS and "SiLU" in type(getattr(module.mlp, "act_fn", None)).__name__:
            module.forward = types.MethodType(_forward, module)
