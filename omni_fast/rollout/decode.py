"""The key/value cache of a batch of rows in lockstep, and the attention function that reads and writes it.

A wave starts with its prompts, each computed once and flat (no padded token enters a GEMM), and goes on with one token
a row. All rows write the same column of the cache: prompts end at one column, and the columns before a shorter prompt are
masked. Memory is allocated once. Batched GEMMs want dense operands, so the columns in use are laid out densely and the
layout is widened every few steps, one layer at a time through one spare buffer; columns not yet filled are masked.

The function is registered with transformers as an attention implementation and receives the wave as a keyword
argument of the model's forward. Limits: full attention (no sliding window), head size of keys = that of values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig

ATTENTION = "omni_wave"
WIDEN = 16  # columns: more means fewer copies of the cache, and more masked columns in each product


class Wave:
    """Rows that decode in lockstep: `samples[g]` rows for prompt g of `lengths[g]` tokens, then `new` columns.

    Keys and values of a layer are [row, kv head, column, head size], dense over `width` columns, of which `column` are
    filled.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        lengths: Sequence[int],
        samples: Sequence[int],
        new: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.lengths = torch.tensor(lengths, device=device)
        self.prompt_of_row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(samples)).to(device)
        self.rows = len(self.prompt_of_row)
        self.column = max(lengths)
        self.end = self.column + new
        self.width = self.column
        self.shape = (config.num_key_value_heads, size)
        self.group = heads // config.num_key_value_heads
        numbers = self.rows * config.num_key_value_heads * self.end * size
        # Two buffers a layer and one spare, which the buffers take turns in being.
        self.buffers = [
            torch.empty(numbers, dtype=dtype, device=device) for _ in range(2 * config.num_hidden_layers + 1)
        ]
        self.prefilling = True
        self._index_prompts()
        columns = torch.arange(self.end, device=device)
        before = columns < (self.column - self.lengths)[self.prompt_of_row, None]
        self.padding = torch.zeros((self.rows, self.end), dtype=dtype, device=device)
        self.padding.masked_fill_(before | (columns >= self.column), float("-inf"))
        self.bias = self.padding  # of this step's scores: set by `advance`

    def _index_prompts(self) -> None:
        """Indices between the flat prompts [token] and [prompt, column] with prompts at the left or the right end."""
        columns = torch.arange(self.column, device=self.lengths.device)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.total = int(self.lengths.sum())
        left = self.starts[:, None] + columns
        right = left - (self.column - self.lengths)[:, None]
        self.left = left.clamp(max=self.total - 1).flatten()
        self.right = right.maximum(self.starts[:, None]).flatten()
        self.flat = (columns < self.lengths[:, None]).flatten().nonzero().squeeze(1)

    def positions(self) -> Tensor:
        """Positions of the flat prompts, [1, tokens]."""
        flat = torch.arange(self.total, device=self.lengths.device)
        return (flat - torch.repeat_interleave(self.starts, self.lengths))[None]

    def advance(self) -> None:
        """Open the next column for one token a row."""
        self.prefilling = False
        if self.column == self.width:
            self._widen()
        self.padding[:, self.column] = 0
        self.column += 1
        bias = self.padding[: self.rows, None, None, : self.width].expand(-1, self.shape[0], self.group, -1)
        self.bias = bias.reshape(self.rows * self.shape[0], self.group, self.width)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep `rows`, in that order; those already in their place are not touched."""
        target = [place for place, row in enumerate(rows) if place != row]
        if target:
            source = [rows[place] for place in target]
            for number in range(len(self.buffers) - 1):
                buffer = self._view(number, self.width)
                buffer[target] = buffer[source]
            self.padding[target] = self.padding[source]
        self.rows = len(rows)

    def _view(self, number: int, width: int) -> Tensor:
        """Buffer `number` as dense [row, kv head, column, head size]."""
        heads, size = self.shape
        return self.buffers[number][: self.rows * heads * width * size].view(self.rows, heads, width, size)

    def _widen(self) -> None:
        width = min(self.width + max(WIDEN, self.width // 8), self.end)
        for number in range(len(self.buffers) - 1):
            old = self._view(number, self.width)
            self.buffers[number], self.buffers[-1] = self.buffers[-1], self.buffers[number]
            wide = self._view(number, width)
            wide[:, :, : self.width] = old
            wide[:, :, self.width :] = 0  # masked, but memory as found could hold a NaN
        self.width = width

    def prefill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention inside each prompt; stores its keys and values for all its rows.

        query: [1, heads, tokens, size]; key, value: [1, kv heads, tokens, size]. Returns [1, tokens, heads, size].
        """
        prompts = len(self.lengths)
        even = self.total == prompts * self.column

        def spread(flat: Tensor, index: Tensor) -> Tensor:
            padded = flat[0].transpose(0, 1)
            if not even:
                padded = padded.index_select(0, index)
            return padded.unflatten(0, (prompts, self.column)).transpose(1, 2)  # [prompt, head, column, size]

        for number, states in ((2 * layer, key), (2 * layer + 1, value)):
            torch.index_select(
                spread(states, self.right), 0, self.prompt_of_row, out=self._view(number, self.column)
            )
        output = F.scaled_dot_product_attention(
            spread(query, self.left),
            spread(key, self.left),
            spread(value, self.left),
            is_causal=True,
            scale=scaling,
            enable_gqa=self.group > 1,
        )
        output = output.transpose(1, 2).flatten(0, 1)
        return (output if even else output.index_select(0, self.flat))[None]

    def decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one new token a row over its columns, after storing the token's own key and value.

        query: [row, heads, 1, size]; key, value: [row, kv heads, 1, size]. Returns [row, 1, heads, size].
        """
        heads, size = self.shape
        keys = self._view(2 * layer, self.width)
        values = self._view(2 * layer + 1, self.width)
        keys[:, :, self.column - 1] = key[:, :, 0]
        values[:, :, self.column - 1] = value[:, :, 0]
        # The query heads of one kv head are the rows of its product: nothing is repeated.
        scores = torch.baddbmm(
            self.bias, query.reshape(-1, self.group, size), keys.flatten(0, 1).transpose(1, 2), alpha=scaling
        )
        output = torch.bmm(torch.softmax(scores, dim=-1), values.flatten(0, 1))
        return output.view(self.rows, 1, heads * self.group, size)


def wave_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    wave: Wave,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention implementation that transformers calls: reads and writes the cache of `wave`."""
    step = wave.prefill if wave.prefilling else wave.decode
    return step(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, wave_attention)
