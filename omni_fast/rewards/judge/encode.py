"""Mean-pooled hidden states of a frozen language model: what the embedded judge looks at.

Only the lower layers are copied: fluency and word order are all there by an eighth of the depth (the held-out AUC is
the same at layers 4, 8, 12 and 16 of SmolLM2-135M), and the cost and memory are a fraction of the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.utils.rnn import pad_sequence

from omni_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 160  # of a text
BATCH_TOKENS = 2048

Encode = Callable[[Sequence[str]], torch.Tensor]  # n texts -> [n, H] float32


def frozen_lower_layers(model: PreTrainedModel, layers: int) -> torch.nn.Module:
    """A copy of the model's body with its first `layers` layers, without gradient; the model is left as it was."""
    body = model.base_model
    full = body.get_submodule("layers")
    if not isinstance(full, torch.nn.ModuleList):
        raise UserError(f"{type(body).__name__} has no list of layers to cut; use another judge than embedded")
    body.layers = full[:layers]
    try:
        copied = copy.deepcopy(body)
    finally:
        body.layers = full
    cast("PreTrainedModel", copied).config.num_hidden_layers = min(layers, len(full))
    return copied.requires_grad_(False).eval()


def pooled_encoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: int = 4, dtype: torch.dtype | None = None
) -> Encode:
    """An `Encode` over the model as it is now: later training does not move it.

    dtype: of the copy, None keeps the model's; bf16 is 3 to 5 times as fast where the processor multiplies it.
    Texts are cut at `MAX_TOKENS`; an empty text becomes zeros. The result depends on the texts of the call alone.
    """
    body = frozen_lower_layers(model, layers).to(dtype)
    device = next(body.parameters()).device
    width = int(model.config.hidden_size)

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> torch.Tensor:
        result_NH = torch.zeros(len(texts), width)
        ids = [
            tokenizer(text, add_special_tokens=False, truncation=True, max_length=MAX_TOKENS)["input_ids"]
            for text in texts
        ]
        order = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: len(ids[i]))
        while order:
            size = max(1, BATCH_TOKENS // len(ids[order[-1]]))
            batch, order = order[-size:], order[:-size]
            rows = [torch.tensor(ids[i]) for i in batch]
            tokens_BT = pad_sequence(rows, batch_first=True).to(device)
            mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
            hidden_BTH = body(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
            weight_BT1 = mask_BT[..., None].float()
            result_NH[batch] = ((hidden_BTH.float() * weight_BT1).sum(1) / weight_BT1.sum(1)).cpu()
        return result_NH

    return encode
