"""The key/value cache of a batch of rows in lockstep, and the attention function that reads and writes it.

A wave starts with its prompts, each computed once and flat (no padded token enters a GEMM), and goes on with one token
a row. All rows write the same column of the cache: prompts end at one column, and the columns before a shorter prompt are
masked. Memory is allocated once. Batched GEMMs want dense operands, so the columns in use are laid out densely and the
layout is widened now and then, one layer at a time through one spare buffer; columns not yet filled are masked.

The function is registered with transformers as an attention implementation and receives the wave as a keyword
argument of the model's forward. Limits: full attention (no sliding window), head size of keys = that of values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

ATTENTION = "omni_wave"
WIDEN = 32  # columns: a softmax over bf16 rows of another multiple is three times as slow with AVX-512


class Wave:
    """Rows that decode in lockstep: `samples[g]` rows for prompt g, then `new` columns.

    Prompts enter the model flat and without their common beginning: its tokens once, then each prompt's remaining ones.
    Keys and values of a layer are [row, kv head, column, head size], dense over `width` columns, of which `column` are
    filled.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int],
        new: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        lengths = [len(prompt) for prompt in prompts]
        self.shape = (config.num_key_value_heads, size)
        self.group = heads // config.num_key_value_heads
        self.lengths = torch.tensor(lengths, device=device)
        self.prompt_of_row = torch.tensor([g for g, count in enumerate(samples) for _ in range(count)], device=device)
        self.rows = sum(samples)
        self.column = max(lengths)
        self.width = _round_up(self.column + 1)
        capacity = _round_up(self.column + new)
        numbers = self.rows * config.num_key_value_heads * capacity * size
        # Two buffers a layer and one spare, which the buffers take turns in being.
        self.buffers = [
            torch.empty(numbers, dtype=dtype, device=device) for _ in range(2 * config.num_hidden_layers + 1)
        ]
        self._lay_out_prompts(prompts)
        columns = torch.arange(capacity, device=device)
        before = columns < (self.column - self.lengths)[self.prompt_of_row, None]
        self.padding = torch.zeros((self.rows, capacity), dtype=dtype, device=device)
        self.padding.masked_fill_(before | (columns >= self.column), float("-inf"))
        self.prefilling = True
        self.bias = self.padding  # of this step's scores: set by `advance`

    def _lay_out_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """The flat input, and the indices between it and [prompt, column] with tokens at the left or the right end."""
        device = self.lengths.device
        self.common = common = common_length(prompts)
        tails = self.lengths - common
        starts = common + tails.cumsum(0) - tails
        flat = list(prompts[0][:common]) + [token for prompt in prompts for token in prompt[common:]]
        self.tokens = torch.tensor([flat], device=device)
        self.positions = torch.cat(
            [
                torch.arange(common, device=device),
                *(torch.arange(common, n, device=device) for n in self.lengths.tolist()),
            ]
        )[None]
        self.last = starts + tails - 1  # where each prompt's last token stands in the flat input
        self.columns = self.column - common  # of the padded tails
        columns = torch.arange(self.columns, device=device)
        self.even = len(flat) == common + len(prompts) * self.columns
        self.left = (starts[:, None] + columns).clamp(max=len(flat) - 1).flatten()
        self.flat = (columns < tails[:, None]).flatten().nonzero().squeeze(1)
        place = torch.arange(self.column, device=device) - (self.column - self.lengths)[:, None]
        right = torch.where(place < common, place.clamp(min=0), place - common + starts[:, None])
        self.right_of_row = right[self.prompt_of_row].flatten()
        # A tail's token sees the common tokens and those of its own tail up to itself.
        self.visible = torch.ones((self.columns, self.column), dtype=torch.bool, device=device).tril(common)

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
        width = self.width + WIDEN
        for number in range(len(self.buffers) - 1):
            old = self._view(number, self.width)
            self.buffers[number], self.buffers[-1] = self.buffers[-1], self.buffers[number]
            wide = self._view(number, width)
            wide[:, :, : self.width] = old
            wide[:, :, self.width :] = 0
        self.width = width

    def prefill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention inside each prompt; stores its keys and values for all its rows.

        query: [1, heads, tokens, size]; key, value: [1, kv heads, tokens, size]. Returns [1, tokens, heads, size].
        """
        prompts, common = len(self.lengths), self.common
        for number, states in ((2 * layer, key), (2 * layer + 1, value)):
            store = self._view(number, self.width).transpose(1, 2)
            filled = store[:, : self.column]
            filled.copy_(states[0].transpose(0, 1).index_select(0, self.right_of_row).view(filled.shape))
            store[:, self.column :] = 0  # masked, but memory as found could hold a NaN

        def tails(states: Tensor) -> Tensor:
            flat = states[0].transpose(0, 1)
            padded = flat[common:] if self.even else flat.index_select(0, self.left)
            return padded.unflatten(0, (prompts, self.columns)).transpose(1, 2)  # [prompt, head, column, size]

        def with_common(states: Tensor) -> Tensor:
            if common == 0:
                return tails(states)
            return torch.cat((states[:, :, :common].expand(prompts, -1, -1, -1), tails(states)), dim=2)

        gqa = self.group > 1
        output = F.scaled_dot_product_attention(
            tails(query),
            with_common(key),
            with_common(value),
            attn_mask=self.visible if common else None,
            is_causal=common == 0,
            scale=scaling,
            enable_gqa=gqa,
        )
        output = output.transpose(1, 2).flatten(0, 1)
        if not self.even:
            output = output.index_select(0, self.flat)
        if common == 0:
            return output[None]
        first = F.scaled_dot_product_attention(
            query[:, :, :common],
            key[:, :, :common],
            value[:, :, :common],
            is_causal=True,
            scale=scaling,
            enable_gqa=gqa,
        )
        return torch.cat((first.transpose(1, 2), output[None]), dim=1)

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


class ModuleWave:
    """A wave through the modules of an inference copy: prefill, then a token a row and step."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], samples: Sequence[int], new: int
    ) -> None:
        self.decoder = model.get_decoder()
        self.wave = Wave(model.config, prompts, samples, new, model.dtype, model.device)
        self.prompt_of_row = self.wave.prompt_of_row
        self.next = self.wave.lengths[self.prompt_of_row]

    def prefill(self) -> Tensor:
        """Hidden states of each prompt's last token, [prompts, hidden]."""
        return self._forward(self.wave.tokens, self.wave.positions)[0, self.wave.last]

    def step(self, token_R: Tensor) -> Tensor:
        """Hidden states [rows, hidden] after one token more of each row."""
        self.wave.advance()
        hidden = self._forward(token_R[:, None], self.next[:, None])[:, 0]
        self.next = self.next + 1
        return hidden

    def keep(self, rows: Sequence[int]) -> None:
        """Keep `rows`, in that order."""
        self.wave.keep(rows)
        self.next = self.next[torch.tensor(rows, device=self.next.device)]

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [row, token, hidden]; the keyword `wave` travels to the attention function."""
        return self.decoder(input_ids=tokens, position_ids=positions, use_cache=False, wave=self.wave).last_hidden_state


def _round_up(columns: int) -> int:
    return -(-columns // WIDEN) * WIDEN


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in dictionary order, the two that differ most
    limit = min(map(len, prompts)) - 1
    return next((place for place in range(limit) if first[place] != last[place]), limit)


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
    layer = module.layer_idx
    assert isinstance(layer, int)
    return step(layer, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, wave_attention)
