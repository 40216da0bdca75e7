"""Generation through a model's own modules, for whatever the compiled kernels (shared_cache.py) do not take, and on GPUs.

Each prompt is computed once, filled up on its left to the longest of the wave; its keys and values are then repeated for its
samples, which go on one token a row in transformers' cache. Attention, masks and windows are the model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class ModuleWave:
    """Rows that decode in lockstep: `samples[g]` rows for prompt g."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], samples: Sequence[int]) -> None:
        longest = max(map(len, prompts))
        gaps = [longest - len(prompt) for prompt in prompts]
        self.model, device = model, model.device
        self.tokens = torch.tensor([[0] * gap + [*own] for gap, own in zip(gaps, prompts, strict=True)], device=device)
        self.seen = torch.arange(longest, device=device) >= torch.tensor(gaps, device=device)[:, None]
        self.prompt_of_row = torch.arange(len(prompts)).repeat_interleave(torch.tensor(samples)).to(device)
        self.cache = DynamicCache(config=model.config)

    def prefill(self) -> Tensor:
        """Logits of each prompt's next token, [prompts, vocabulary]."""
        logits = self._forward(self.tokens)
        self._select(self.prompt_of_row)
        return logits

    def step(self, token_R: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after one token more of each row."""
        self.seen = torch.cat((self.seen, torch.ones_like(self.seen[:, :1])), dim=1)
        return self._forward(token_R[:, None])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep `rows`, in that order."""
        self._select(torch.tensor(rows, device=self.seen.device))

    def _select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.seen = self.seen[rows]

    def _forward(self, tokens: Tensor) -> Tensor:
        positions = (self.seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self.model(
            input_ids=tokens, position_ids=positions, attention_mask=self.seen, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
