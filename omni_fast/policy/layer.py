"""A decoder layer of the Llama family over prefix trees, of few autograd functions, for CPUs.

They are made of the compiled kernels of omni_kernels: q, k and v in one product, rotated in place, attention that keeps one
number a row and head instead of probabilities, the residual's sum and its norm in one pass. Of a row a layer keeps the residual stream twice, the inputs of
its products, q, k, v and the two halves before the gate.

Limits: layers of the classes in `KINDS` with plain linear layers and no bias, bf16 or fp32 on a CPU with the compiled
kernels, heads of a multiple of 32. Everything else runs transformers' own forward pass, with `tree_attention`.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

from omni_fast.policy.gate import gated_mlp
from omni_fast.policy.products import is_plain, product
from omni_fast.policy.tree_attention import TreeLayout, compiled
from omni_kernels import decoder

KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    tree: TreeLayout | None = kwargs.get("tree")
    if tree is None or tree.blocks is None or not _fits(self, hidden_states):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    cos, sin = kwargs["position_embeddings"]
    attention, before, after = self.self_attn, self.input_layernorm, self.post_attention_layernorm
    stream = hidden_states[0]
    x = decoder.normed(stream, before.weight, before.variance_epsilon)
    q, k, v, o = (getattr(attention, name).weight for name in HEADS)
    states = product(x, q, k, v).unflatten(1, (-1, attention.head_dim))
    heads = [len(part) // attention.head_dim for part in (q, k, v)]
    out = compiled(states, heads, tree.blocks, attention.scaling, (cos[0], sin[0]))
    x = product(out.flatten(1), o)
    stream, x = decoder.add_normed(x, stream, after.weight, after.variance_epsilon)
    return (stream + gated_mlp(self.mlp, x))[None]


def _fits(layer: Any, hidden: Tensor) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention, name) for name in HEADS]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        is_plain(*linears)
        and attention.head_dim % 32 == 0
        and len(hidden) == 1
        and decoder.native(hidden, layer.input_layernorm.weight, *(linear.weight for linear in linears))
    )


def slim_layers(model: nn.Module) -> None:
    """Puts it into each layer of `KINDS`, in place."""
    for module in model.modules():
        if type(module).__name__ in KINDS and "SiLU" in type(getattr(module.mlp, "act_fn", None)).__name__:
            module.forward = types.MethodType(_forward, module)
