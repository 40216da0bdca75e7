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
    scores_RV = logits_RV if temperature in (0.0, 1.0) else logits_RV.float() / temperature
    weight_RV = torch.softmax(scores_RV, dim=-1, dtype=torch.float32)
    if temperature == 0.0:
        best_R = logits_RV.max(dim=-1).indices
        return best_R, weight_RV.gather(1, best_R[:, None]).squeeze(1).log()
    # Two levels: cumulative weights of blocks, then inside the one block that holds the quantile.
    whole = V - V % BLOCK
    sums_RB = weight_RV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    if whole < V:
        sums_RB = torch.cat((sums_RB, weight_RV[:, whole:].sum(-1, keepdim=True)), dim=1)
    sums_RB = sums_RB.double()
    upto_RB = sums_RB.cumsum(-1)
    target_R1 = uniform_R[:, None] * upto_RB[:, -1:]  # float32 sums miss 1 by some 1e-7
    block_R1 = _first_above(upto_RB, target_R1, sums_RB)
    columns_C = torch.arange(BLOCK, device=logits_RV.device)
    inside_RC = weight_RV.gather(1, (block_R1 * BLOCK + columns_C).clamp(max=V - 1)).double()
    inside_RC.masked_fill_(block_R1 * BLOCK + columns_C >= V, 0.0)
    before_R1 = (upto_RB - sums_RB).gather(1, block_R1)
    token_R1 = block_R1 * BLOCK + _first_above(before_R1 + inside_RC.cumsum(-1), target_R1, inside_RC)
    return token_R1.squeeze(1), weight_RV.gather(1, token_R1).squeeze(1).log()


def _first_above(upto_RC: Tensor, target_R1: Tensor, weight_RC: Tensor) -> Tensor:
    """The first column where the cumulative weight exceeds the target, [R, 1].

    Rounding may leave the target beyond the end: the last column of weight > 0 bounds it, never one of probability 0.
    """
    columns_C = torch.arange(weight_RC.shape[1], device=weight_RC.device)
    last_R1 = torch.where(weight_RC > 0, columns_C, 0).amax(-1, keepdim=True)
    return torch.searchsorted(upto_RC, target_R1, right=True).minimum(last_R1)
