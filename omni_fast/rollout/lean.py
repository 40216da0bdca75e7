"""The forward pass of a packed Llama-style decoder with as few operations as it has.

At the size of a decoding step most of transformers' forward pass is the overhead of many small operations, so the known
layers get a loop of their own: the rotary embedding once over queries and keys together, new keys written straight into the
cache, residuals and the gate in place. Every rounding is that of transformers' layer, in the same order.

Limits: layers of Llama, Mistral, Qwen2 and Qwen3 whose linear layers `packed_linear` has fused; others keep their forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from omni_fast.rollout.decode import Wave
from omni_fast.rollout.packed_linear import FirstPart, FusedRMSNorm, PackedLinear

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


class LeanDecoder:
    """Calls like `decoder` with `wave=`, for the hidden states alone."""

    def __init__(self, decoder: nn.Module) -> None:
        parts: Any = decoder
        self.embedding, self.rotary, self.norm = parts.embed_tokens, parts.rotary_emb, parts.norm
        self.layers = [_Layer(layer, number) for number, layer in enumerate(parts.layers)]

    def __call__(self, tokens: Tensor, positions: Tensor, wave: Wave) -> Tensor:
        """tokens, positions: int64 [row, token]. Returns [row, token, hidden]."""
        embedded = self.embedding(tokens)
        cos, sin = (part.flatten(0, 1)[:, None] for part in self.rotary(embedded, position_ids=positions))
        half = sin.shape[-1] // 2
        sin[..., :half].neg_()  # of the half that a rotation subtracts
        x_NH = embedded.flatten(0, 1)
        for layer in self.layers:
            x_NH = layer(x_NH, cos, sin, wave)
        return self.norm(x_NH).view(embedded.shape)


def lean_decoder(decoder: nn.Module) -> LeanDecoder | None:
    """None where one of its layers is not of a known kind or not packed."""
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(_known(layer) for layer in layers) or not isinstance(decoder.norm, FusedRMSNorm):
        return None
    return LeanDecoder(decoder)


def _known(layer: Any) -> bool:
    return (
        type(layer).__name__ in LAYERS
        and isinstance(layer.self_attn.q_proj, FirstPart)
        and isinstance(layer.self_attn.o_proj, PackedLinear)
        and isinstance(layer.mlp.gate_proj, FirstPart)
        and isinstance(layer.mlp.down_proj, PackedLinear)
    )


class _Layer:
    def __init__(self, layer: Any, number: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.number = number
        self.size: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv, self.output = attention.q_proj.fused, attention.o_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.gate_up, self.down, self.activation = mlp.gate_proj.fused, mlp.down_proj, mlp.act_fn
        self.heads, self.kv_heads = self.qkv.sizes[0] // self.size, self.qkv.sizes[1] // self.size

    def __call__(self, x_NH: Tensor, cos: Tensor, sin: Tensor, wave: Wave) -> Tensor:
        """cos, sin: [N, 1, head size], the first half of sin negated. Overwrites x."""
        qkv = self.qkv(self.before_attention(x_NH)).view(len(x_NH), -1, self.size)
        both = self.heads + self.kv_heads
        qk, value = qkv[:, :both], qkv[:, both:]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : self.heads]), self.k_norm(qk[:, self.heads :])), dim=1)
        half = self.size // 2
        turned = torch.cat((qk[..., half:], qk[..., :half]), dim=-1).mul_(sin)
        straight = qk * cos
        query = straight[:, : self.heads] + turned[:, : self.heads]
        key = (straight[:, self.heads :], turned[:, self.heads :])
        if wave.prefilling:
            q, k, v = (part.transpose(0, 1)[None] for part in (query, key[0] + key[1], value))
            mixed = wave.prefill(self.number, q, k, v, self.scaling)
        else:
            keys, values = wave.places(self.number)
            torch.add(*key, out=keys)
            values.copy_(value)
            mixed = wave.attend(self.number, query, self.scaling)
        x_NH.add_(self.output(mixed.reshape(len(x_NH), -1)))
        gate, up = self.gate_up(self.before_mlp(x_NH)).split(self.gate_up.sizes, dim=-1)
        return x_NH.add_(self.down(self.activation(gate).mul_(up)))
