"""Generation on the compiled kernels of the CPU: the decoder's layers written out, each prompt's keys held once.

Norms with the residual's sum, q/k/v and gate/up as one product each, rotation in place, attention that reads a prompt once
for all rows that go on from it. The prefill is one tree: the prompts' common beginning, then each prompt's own rows. Heads
of another size than the kernels' multiples of 32 are filled up with zeros for attention.

Weights are packed once a weight version: layers of one input as one product, an adapter merged into its layer. omni_kernels
lays them out where its products are faster than torch's, else oneDNN. They take as much memory as the weights.

Limits: the layer classes in `KINDS` with linear layers (or LoRA, merged) and SiLU, full attention, bf16 or fp32; everything
else runs through its modules (decode.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from omni_kernels import decoder, products

KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
BLOCK_ROWS = 64
ROWS = 64  # of the input, that oneDNN lays weights out for; any other number works as well


def fits(model: PreTrainedModel) -> bool:
    """Whether this model runs here."""
    body: Any = model.get_decoder()
    return (
        torch.backends.mkldnn.is_available()
        and getattr(model.config, "sliding_window", None) is None
        and is_linear(model.get_output_embeddings())
        and all(
            type(layer).__name__ in KINDS
            and "SiLU" in type(layer.mlp.act_fn).__name__
            and all(is_linear(linear) for linears in _products(layer) for linear in linears)
            and decoder.native(layer.input_layernorm.weight, layer.mlp.gate_proj.weight)
            for layer in body.layers
        )
    )


def _products(layer: Any) -> tuple[tuple[nn.Module, ...], ...]:
    """The linear layers of each product."""
    heads, mlp = layer.self_attn, layer.mlp
    return (heads.q_proj, heads.k_proj, heads.v_proj), (heads.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


class PackedLinear:
    """One or more linear layers of the same input as one product; `read` takes their weights."""

    def __init__(self) -> None:
        self.packed: products.Packed | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def read(self, *sources: nn.Module) -> None:
        """The layers' weights as they are now; over those of the last call, never beside them."""
        weights = [weight_of(source).contiguous() for source in sources]
        biases = [bias for source in sources if isinstance(bias := source.bias, Tensor)]
        self.bias = torch.cat(biases).detach() if biases else None
        if products.multiplies(*weights) and weights[0].shape[1] % products.unit(weights[0].dtype) == 0:
            self.weight = None
            if self.packed is not None and self.packed.panels.dtype != weights[0].dtype:
                self.packed = None  # given back before there is another
            self.packed = products.pack(*weights, transposed=True, into=self.packed)
        else:
            self.packed = self.weight = None
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        y = products.linear(x, self.packed)
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


class PackedModel:
    """A model's products, packed as they were at the last `read`; embedding and norms are its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.body: Any = model.get_decoder()
        self.products = [[PackedLinear() for _ in _products(layer)] for layer in self.body.layers]
        self.head = PackedLinear()

    @torch.no_grad()
    def read(self) -> None:
        """Take over the weights as they are now."""
        for layer, own in zip(self.body.layers, self.products, strict=True):
            for product, sources in zip(own, _products(layer), strict=True):
                product.read(*sources)
        self.head.read(self.model.get_output_embeddings())


class SharedWave:
    """Rows that decode in lockstep: `samples[g]` rows for prompt g, then up to `new` tokens each."""

    def __init__(self, model: PackedModel, prompts: Sequence[Sequence[int]], samples: Sequence[int], new: int) -> None:
        self.model = model
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
        config, layers = model.model.config, model.body.layers
        self.size = layers[0].self_attn.head_dim
        self.filling = -self.size % 32
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.cache = decoder.DecodeCache(
            columns, owners, len(layers), self.heads[1], self.size + self.filling, new, model.model.dtype
        )
        self.positions = torch.tensor(positions)
        self.next = torch.tensor([len(prompt) for prompt in prompts])[self.prompt_of_row]

    def prefill(self) -> Tensor:
        """Logits of each prompt's next token, [prompts, vocabulary]."""
        hidden = self._forward(torch.tensor(self.tokens), self.positions, prefill=True)
        return self.model.head(hidden[torch.tensor(self.last)])

    def step(self, token_R: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after one token more of each row."""
        self.cache.advance()
        hidden = self._forward(token_R, self.next, prefill=False)
        self.next = self.next + 1
        return self.model.head(hidden)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep `rows`, in that order."""
        self.cache.keep(rows)
        self.next = self.next[torch.tensor(rows)]

    def _forward(self, tokens: Tensor, positions: Tensor, prefill: bool) -> Tensor:
        body = self.model.body
        stream = body.embed_tokens(tokens)
        cos, sin = body.rotary_emb(stream, position_ids=positions[None])
        added: Tensor | None = None
        for number, (layer, (qkv, o, both, down)) in enumerate(zip(body.layers, self.model.products, strict=True)):
            norm, attention = layer.input_layernorm, layer.self_attn
            stream, x, _ = decoder.rms_norm(stream, norm.weight, norm.variance_epsilon, added)
            states = qkv(x).unflatten(1, (-1, self.size))
            queries, keys, _ = states.split(self.heads, dim=1)
            if hasattr(attention, "q_norm"):
                for part, own in ((queries, attention.q_norm), (keys, attention.k_norm)):
                    part.copy_(decoder.rms_norm(part, own.weight, own.variance_epsilon)[1])
            turned = states[:, : -self.heads[2]]
            decoder.rotate(turned, cos[0], sin[0], turned)
            q, k, v = (F.pad(states, (0, self.filling)) if self.filling else states).split(self.heads, dim=1)
            if prefill:
                assert self.blocks is not None
                out, _ = decoder.attend(q, k, v, self.blocks, attention.scaling)
                self.cache.store(number, k, v)
            else:
                out = self.cache.decode(number, q, k, v, attention.scaling)
            norm = layer.post_attention_layernorm
            stream, x, _ = decoder.rms_norm(
                o(out[..., : self.size].flatten(1)), norm.weight, norm.variance_epsilon, stream
            )
            added = down(decoder.gate(both(x)))
        return decoder.rms_norm(stream, body.norm.weight, body.norm.variance_epsilon, added)[1]


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    return min(len(commonprefix([*map(list, prompts)])), min(map(len, prompts)) - 1)


def _blocks(start: int, end: int, common: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows [start, end), each of which sees the `common` first rows and its own before it."""
    blocks = []
    for first in range(start, end, BLOCK_ROWS):
        rows = torch.arange(first, min(first + BLOCK_ROWS, end))
        columns = torch.cat((torch.arange(common), torch.arange(start, int(rows[-1]) + 1)))
        blocks.append((rows, columns, columns <= rows[:, None]))
    return blocks
