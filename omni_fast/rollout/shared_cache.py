"""A wave on the compiled kernels of the CPU: the decoder's forward pass for generation, each prompt's keys held once.

The layers are those of `inference_copy`, called without their modules: norms with the residual's sum, q/k/v and gate/up as
one product each, rotation in place, attention that reads a prompt once for all rows that go on from it. The prefill is one
tree: the prompts' common beginning, then each prompt's own rows.

Limits: the layer classes in `KINDS` with plain linear layers and no bias (or LoRA merged into them), heads of a multiple
of 32, bf16 or fp32; everything else runs as a `Wave` (decode.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omni_fast.rollout.decode import common_length
from omni_fast.rollout.packed_linear import FirstPart, FusedRMSNorm, PackedLinear
from omni_kernels import decoder

KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
BLOCK_ROWS = 64


def fits(model: PreTrainedModel) -> bool:
    """Whether this inference copy runs here."""
    body: Any = model.get_decoder()
    return all(
        type(layer).__name__ in KINDS
        and isinstance(layer.input_layernorm, FusedRMSNorm)
        and isinstance(layer.self_attn.q_proj, FirstPart)
        and isinstance(layer.mlp.gate_proj, FirstPart)
        and "SiLU" in type(layer.mlp.act_fn).__name__
        and layer.self_attn.head_dim % 32 == 0
        and all(linear.bias is None for linear in _linears(layer))
        and decoder.native(layer.input_layernorm.weight)
        for layer in body.layers
    )


def _linears(layer: Any) -> list[PackedLinear]:
    return [layer.self_attn.q_proj.fused, layer.self_attn.o_proj, layer.mlp.gate_proj.fused, layer.mlp.down_proj]


class SharedWave:
    """Rows that decode in lockstep: `samples[g]` rows for prompt g, then up to `new` tokens each."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], samples: Sequence[int], new: int
    ) -> None:
        self.body: Any = model.get_decoder()
        config = model.config
        common = common_length(prompts)
        self.tokens = list(prompts[0][:common])
        positions = list(range(common))
        columns, blocks = [], _blocks(0, common, 0) if common else []
        self.last = []
        for prompt in prompts:
            start = len(self.tokens)
            self.tokens += prompt[common:]
            positions += range(common, len(prompt))
            columns.append([*range(common), *range(start, len(self.tokens))])
            blocks += _blocks(start, len(self.tokens), common)
            self.last.append(len(self.tokens) - 1)
        self.blocks = decoder.tree_blocks([(0, len(self.tokens), [block]) for block in blocks])
        owners = [prompt for prompt, count in enumerate(samples) for _ in range(count)]
        self.prompt_of_row = torch.tensor(owners)
        self.size = self.body.layers[0].self_attn.head_dim
        self.widths = [config.num_attention_heads * self.size, *[config.num_key_value_heads * self.size] * 2]
        self.cache = decoder.DecodeCache(
            columns, owners, len(self.body.layers), config.num_key_value_heads, self.size, new, model.dtype
        )
        self.positions = torch.tensor(positions)
        self.next = torch.tensor([len(prompt) for prompt in prompts])[self.prompt_of_row]

    def prefill(self) -> Tensor:
        """Hidden states of each prompt's last token, [prompts, hidden]."""
        hidden = self._forward(torch.tensor(self.tokens), self.positions, prefill=True)
        return hidden[torch.tensor(self.last)]

    def step(self, token_R: Tensor) -> Tensor:
        """Hidden states [rows, hidden] after one token more of each row."""
        self.cache.advance()
        hidden = self._forward(token_R, self.next, prefill=False)
        self.next = self.next + 1
        return hidden

    def keep(self, rows: Sequence[int]) -> None:
        """Keep `rows`, in that order."""
        self.cache.keep(rows)
        self.next = self.next[torch.tensor(rows)]

    def _forward(self, tokens: Tensor, positions: Tensor, prefill: bool) -> Tensor:
        stream = self.body.embed_tokens(tokens)
        cos, sin = self.body.rotary_emb(stream, position_ids=positions[None])
        added: Tensor | None = None
        for number, layer in enumerate(self.body.layers):
            qkv, o, both, down = _linears(layer)
            norm, attention = layer.input_layernorm, layer.self_attn
            stream, x, _ = decoder.rms_norm(stream, norm.weight, norm.eps, added)
            q, k, v = (part.unflatten(1, (-1, self.size)) for part in qkv(x).split(self.widths, dim=1))
            decoder.rotate(q, cos[0], sin[0], q)
            decoder.rotate(k, cos[0], sin[0], k)
            if prefill:
                assert self.blocks is not None
                out, _ = decoder.attend(q, k, v, self.blocks, attention.scaling)
                self.cache.store(number, k, v)
            else:
                out = self.cache.decode(number, q, k, v, attention.scaling)
            norm = layer.post_attention_layernorm
            stream, x, _ = decoder.rms_norm(o(out.flatten(1)), norm.weight, norm.eps, stream)
            added = down(decoder.gate(both(x)))
        norm = self.body.norm
        return decoder.rms_norm(stream, norm.weight, norm.eps, added)[1]


def _blocks(start: int, end: int, common: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows [start, end), each of which sees the `common` first rows and its own before it."""
    blocks = []
    for first in range(start, end, BLOCK_ROWS):
        rows = torch.arange(first, min(first + BLOCK_ROWS, end))
        columns = torch.cat((torch.arange(common), torch.arange(start, int(rows[-1]) + 1)))
        blocks.append((rows, columns, columns <= rows[:, None]))
    return blocks
