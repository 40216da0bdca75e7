"""A decoder layer of the Llama family over prefix trees, of few autograd functions, for CPUs.

They are made of the compiled kernels of omni_kernels: q, k and v in one product, rotated in place, attention that keeps one
number a row and head instead of probabilities, the residual's sum and its norm in one pass. Of a row a layer keeps the
residual stream twice, the inputs of its products, q, k, v and the two halves before the gate.

Norms and gated MLPs do the same where a layer as a whole cannot, and on GPUs: written out in plain operations, an RMSNorm in
bf16 leaves fp32 copies of its input to autograd, a sixth of the activations of SmolLM2-135M (35 KB per row and layer with
them, 30 without); this one keeps the input, which the residual stream holds anyway, and one number a row.

Limits: layers of the classes in `KINDS` with plain linear layers and no bias, bf16 or fp32 on a CPU with the compiled
kernels, heads of a multiple of 32. Everything else runs transformers' own forward pass, with `tree_attention`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni_fast.policy.products import gated_mlp, is_plain, product
from omni_fast.policy.tree_attention import TreeLayout, compiled
from omni_kernels import decoder

KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _layer(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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


def _mlp(self: Any, x: Tensor) -> Tensor:
    if torch.is_inference_mode_enabled() or not is_plain(self.gate_proj, self.up_proj, self.down_proj):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return gated_mlp(self, x)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    if torch.is_inference_mode_enabled():  # generation, which keeps nothing
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
    return decoder.normed(hidden_states, self.weight, self.variance_epsilon)


def slim(model: nn.Module) -> None:
    """Gives norms, MLPs of SiLU and layers of the Llama family forward passes that keep less for the backward pass."""
    for module in model.modules():
        kind, mlp = type(module).__name__, getattr(module, "mlp", module)
        forward: Callable[..., Tensor]
        gated = "SiLU" in type(getattr(mlp, "act_fn", None)).__name__
        if kind.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            forward = _norm
        elif kind in KINDS and gated:
            forward = _layer
        elif gated and mlp is module and all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
            forward = _mlp
        else:
            continue
        module.forward = types.MethodType(forward, module)
