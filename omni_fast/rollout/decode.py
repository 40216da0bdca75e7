"""The key/value cache of a batch of rows in lockstep, and the attention function that reads and writes it.

A wave starts with its prompts, each computed once and flat (no padded token enters a GEMM), and goes on with one token
a row. All rows write the same column of the cache: prompts end at one column, so the columns before a shorter prompt are
masked. The cache is allocated once; a row that has finished is overwritten by the last one.

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


class Wave:
    """Rows that decode in lockstep: `samples` rows per prompt, prompts of `lengths` tokens, `new` columns after them.

    keys_values: [layer, 2, row, kv head, column, head size].
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
        self.column = int(max(lengths))  # columns filled so far
        self.uniform = min(lengths) == max(lengths)
        prompt_of_row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(samples)).to(device)
        self.prompt_of_row = prompt_of_row
        self.keys_values = torch.empty(
            (config.num_hidden_layers, 2, len(prompt_of_row), config.num_key_value_heads, self.column + new, size),
            dtype=dtype,
            device=device,
        )
        columns = torch.arange(self.column, device=device)
        # Token i of prompt g stands at start_g + i in the flat input, at i in `left`, and ends at the last column in `right`.
        starts = self.lengths.cumsum(0) - self.lengths
        left = starts[:, None] + columns
        right = left - (self.column - self.lengths)[:, None]
        inside = columns < self.lengths[:, None]
        total = int(self.lengths.sum())
        self.left = left.clamp(max=total - 1).flatten()
        self.right = right.maximum(starts[:, None]).flatten()
        self.flat = inside.flatten().nonzero().squeeze(1)
        self.starts = starts
        padding = torch.zeros((len(prompt_of_row), self.column + new), dtype=dtype, device=device)
        hidden = columns < (self.column - self.lengths)[prompt_of_row, None]
        padding[:, : self.column].masked_fill_(hidden, float("-inf"))
        self.padding = padding[:, None, None, :]
        self.prefilling = True

    def positions(self) -> Tensor:
        """Positions of the flat prompts, [1, tokens]."""
        total = int(self.lengths.sum())
        flat = torch.arange(total, device=self.lengths.device)
        return (flat - torch.repeat_interleave(self.starts, self.lengths))[None]

    def move(self, rows: Sequence[int]) -> None:
        """Keep `rows`, in that order. Rows already in their place are not touched."""
        target = [place for place, row in enumerate(rows) if place != row]
        source = [rows[place] for place in target]
        if target:
            self.keys_values[:, :, target, :, : self.column] = self.keys_values[:, :, source, :, : self.column]
            self.padding[target] = self.padding[source]

    def prefill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention inside each prompt; stores its keys and values for all its rows.

        query: [1, heads, tokens, size]; key, value: [1, kv heads, tokens, size]. Returns [1, tokens, heads, size].
        """
        prompts, columns = len(self.lengths), int(self.left.numel()) // len(self.lengths)

        def spread(flat: Tensor, index: Tensor) -> Tensor:
            padded = flat[0].transpose(0, 1)
            if not self.uniform:
                padded = padded.index_select(0, index)
            return padded.unflatten(0, (prompts, columns)).transpose(1, 2)  # [prompt, head, column, size]

        store = self.keys_values[layer, :, :, :, :columns]
        store[0].copy_(spread(key, self.right)[self.prompt_of_row])
        store[1].copy_(spread(value, self.right)[self.prompt_of_row])
        output = F.scaled_dot_product_attention(
            spread(query, self.left),
            spread(key, self.left),
            spread(value, self.left),
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output = output.transpose(1, 2).flatten(0, 1)
        return (output if self.uniform else output.index_select(0, self.flat))[None]

    def decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one new token a row over all its columns, after storing the token's own key and value.

        query: [row, heads, 1, size]; key, value: [row, kv heads, 1, size]. Returns [row, 1, heads, size].
        """
        rows, heads, _, size = query.shape
        end = self.column + 1
        keys, values = self.keys_values[layer, :, :rows, :, :end]
        keys[:, :, self.column] = key.squeeze(2)
        values[:, :, self.column] = value.squeeze(2)
        grouped = (query * scaling).reshape(rows, key.shape[1], -1, size)
        scores = torch.matmul(grouped, keys.transpose(2, 3))
        if not self.uniform:
            scores = scores + self.padding[:rows, :, :, :end]
        return torch.matmul(torch.softmax(scores, dim=-1), values).reshape(rows, 1, heads, size)


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
