"""Drawing one token a row, so that a draw depends on its own row alone.

Each sample has a stream of uniforms of its own (Philox4x64, a counter-based generator: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), keyed by (seed, prompt key) and positioned by the sample's number. Token t uses the
t-th of them through the inverse of the cumulative distribution, so neither the batch nor the order matters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 128  # columns summed together in the two-level search for the quantile
_WORD = (1 << 64) - 1


def uniforms(seed: int, key: int, number: int, count: int) -> Tensor:
    """The first `count` uniforms in [0, 1) of sample `number` of the prompt `key`. [count] float64, CPU.

    A longer stream starts with the shorter one.
    """
    words = np.array([seed & _WORD, key & _WORD], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=words, counter=[0, 0, 0, number & _WORD]))
    return torch.from_numpy(generator.random(count))


def draw(logits_RV: Tensor, uniform_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob under the distribution it was drawn from.

    logits_RV: any float dtype. uniform_R: float64 in [0, 1). temperature 0 takes the largest logit, and the log-prob is
    then that of temperature 1. Returns tokens [R] int64, logprobs [R] float32 (nats).
    """
    R, V = logits_RV.shape
    scores_RV = logits_RV.float()
    if temperature not in (0.0, 1.0):
        scores_RV = scores_RV / temperature
    top_R, best_R = scores_RV.max(dim=-1)
    weight_RV = torch.exp(scores_RV - top_R[:, None])
    if temperature == 0.0:
        return best_R, -weight_RV.sum(-1).log()
    # Two levels: cumulative weights of blocks, then inside the one block that holds the quantile.
    blocks = V // BLOCK
    head_RBC = weight_RV[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    sums_RB = head_RBC.sum(-1)
    if blocks * BLOCK < V:
        sums_RB = torch.cat((sums_RB, weight_RV[:, blocks * BLOCK :].sum(-1, keepdim=True)), dim=1)
    upto_RB = sums_RB.double().cumsum(-1)
    total_R = upto_RB[:, -1]
    target_R = uniform_R * total_R
    block_R = torch.searchsorted(upto_RB, target_R[:, None], right=True).squeeze(1).clamp_(max=sums_RB.shape[1] - 1)
    before_R = (upto_RB - sums_RB.double()).gather(1, block_R[:, None])
    columns_RC = block_R[:, None] * BLOCK + torch.arange(BLOCK, device=logits_RV.device)
    inside_RC = weight_RV.gather(1, columns_RC.clamp(max=V - 1)) * (columns_RC < V)
    upto_RC = before_R + inside_RC.double().cumsum(-1)
    # The last column of weight > 0 bounds the search: rounding must never pick a token of probability 0.
    last_R = torch.where(inside_RC > 0, torch.arange(BLOCK, device=logits_RV.device), 0).amax(-1)
    column_R = torch.searchsorted(upto_RC, target_R[:, None], right=True).squeeze(1).minimum(last_R)
    token_R = block_R * BLOCK + column_R
    chosen_R = scores_RV.gather(1, token_R[:, None]).squeeze(1)
    return token_R, (chosen_R.double() - top_R.double() - total_R.log()).float()
