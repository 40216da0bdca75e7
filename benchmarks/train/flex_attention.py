"""Attention over prefix trees by FlexAttention: one kernel for all rows of a micro-batch, in place of one per bucket.

Rows stand in depth-first order, so the rows below row k are those right after it, up to `end[k]`. Row q sees row k exactly
where k <= q < end[k]: one number a row is the whole tree, and blocks of rows are told to be empty, mixed or full from the
least and the greatest of their ends, without a mask of T x T. The block mask is made once a micro-batch, for all layers.

Takes the place of `tree_attention._fused` (same arguments, same result). Compiled on CUDA; on a CPU PyTorch's own loop, for
tests. Limits: heads of at least 16 numbers on CUDA. FlexAttention: Dong et al., 2412.05496.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from omni_fast.policy.tree_attention import TreeLayout

BLOCK_ROWS = 128
ROW_STEP = (
    2048  # rows are padded to a multiple of this: each number of rows is compiled, and PyTorch compiles 8 at most
)
_newest: list[tuple[TreeLayout, BlockMask]] = []  # of the micro-batch under way


def flex_rows(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, tree: TreeLayout, scale: float) -> Tensor:
    """Each row of `q_THD` over its ancestors and itself; [T, H, D]."""
    rows = len(q_THD)
    padding = -rows % ROW_STEP
    if not _newest or _newest[0][0] is not tree:
        alone = torch.arange(rows + 1, rows + padding + 1, device=q_THD.device)
        _newest[:] = [(tree, block_mask(torch.cat((ends(tree), alone))))]
    query, key, value = (
        F.pad(states, (0, 0, 0, 0, 0, padding)).transpose(0, 1)[None] for states in (q_THD, k_TKD, v_TKD)
    )
    out = _kernel(q_THD.is_cuda)(
        query, key, value, block_mask=_newest[0][1], scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out[0].transpose(0, 1)[:rows]


def ends(tree: TreeLayout) -> Tensor:
    """int64 [T]: one more than the last row below each row (or the row itself)."""
    found = torch.arange(1, len(tree.place) + 1, device=tree.place.device)
    for bucket in tree.buckets:
        blocks, height, _ = bucket.shape
        seen = torch.where(bucket.mask[:, 0], bucket.rows.view(blocks, height, 1) + 1, 0)
        found.scatter_reduce_(0, bucket.columns, seen.amax(1).flatten(), "amax")
    return found


def block_mask(end: Tensor) -> BlockMask:
    """end: int64 [T], T a multiple of `BLOCK_ROWS`; a block with a row that sees a row is computed, a full one unmasked."""
    least, most = end.view(-1, BLOCK_ROWS).amin(1), end.view(-1, BLOCK_ROWS).amax(1)
    first = torch.arange(0, len(end), BLOCK_ROWS, device=end.device)[:, None]
    below = first > first.T
    full = below & (least >= first + BLOCK_ROWS)
    mixed = (first == first.T) | below & (most > first) & ~full

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    return BlockMask.from_kv_blocks(
        *_listed(mixed), *_listed(full), BLOCK_SIZE=BLOCK_ROWS, mask_mod=sees, seq_lengths=(len(end), len(end))
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Q, K] as FlexAttention wants it: how many in each row int32 [1, 1, Q], and which of them first [1, 1, Q, K]."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


@cache
def _kernel(compiled: bool) -> Callable[..., Tensor]:
    kernel = cast("Callable[..., Tensor]", flex_attention)  # it returns more where more is asked for
    return torch.compile(kernel, dynamic=False) if compiled else kernel
