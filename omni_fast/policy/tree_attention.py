"""Attention over prefix trees laid out flat: each row attends to its ancestors and itself.

The rows are cut into blocks of at most `BLOCK_ROWS`; a block's columns are the ancestors of any of its rows, so a
prompt is read by all blocks below it and siblings never see each other's columns. The compiled kernels of the CPU take the
blocks as they are. Elsewhere blocks of like shape form a bucket, and a bucket is one call of PyTorch's attention with a mask:
only these small products are padded (to the bucket's shape), never a linear layer.

Registered with transformers as the attention implementation `omni_fast_tree`; a model's forward takes the layout as
keyword argument `tree`. Limits: causal softmax attention with grouped heads; no window, sink, soft cap or dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface

from omni_kernels import decoder

NAME = "omni_fast_tree"
BLOCK_ROWS = 64
COLUMN_STEP = 32  # columns are rounded up to this, so that a few buckets hold all blocks


@dataclass(frozen=True, slots=True)
class Bucket:
    """B blocks of R rows and C columns. rows: int64 [B*R], columns: int64 [B*C] (padding: row 0, masked).

    mask: bool [B, 1, R, C]; True: attends. A padded row attends to one column so that its softmax is finite.
    """

    rows: Tensor
    columns: Tensor
    mask: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, R, C)"""
        blocks, _, rows, columns = self.mask.shape
        return blocks, rows, columns


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """All buckets of a micro-batch. place: int64 [T], where each row is in the buckets' concatenated outputs.

    blocks: the same blocks for the compiled kernels, on the CPU where those are built.
    """

    buckets: tuple[Bucket, ...]
    place: Tensor
    blocks: decoder.TreeBlocks | None = None


def tree_layout(spans: Sequence[tuple[int, int]], parents: Sequence[Sequence[int]], device: torch.device) -> TreeLayout:
    """The layout of trees at rows [start, end) each, given every row's parent within its tree (-1: none)."""
    shapes: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    whole = []
    for (start, end), tree in zip(spans, parents, strict=True):
        count = end - start
        sees = np.zeros((count, count), dtype=bool)
        for row, parent in enumerate(tree):
            if parent >= 0:
                sees[row] = sees[parent]
            sees[row, row] = True
        blocks = -(-count // BLOCK_ROWS)
        own = []
        for number in range(blocks):
            rows = np.arange(count * number // blocks, count * (number + 1) // blocks)
            columns = np.flatnonzero(sees[rows].any(axis=0))
            height, width = -(-len(rows) // 8) * 8, -(-len(columns) // COLUMN_STEP) * COLUMN_STEP
            block = (rows + start, columns + start, sees[np.ix_(rows, columns)])
            shapes.setdefault((height, width), []).append(block)
            own.append((torch.from_numpy(block[0]), torch.from_numpy(block[1]), torch.from_numpy(block[2])))
        whole.append((start, end, own))
    place = np.empty(spans[-1][1], dtype=np.int64)
    buckets = []
    offset = 0
    for (height, width), members in sorted(shapes.items()):
        all_rows = np.zeros((len(members), height), dtype=np.int64)
        all_columns = np.zeros((len(members), width), dtype=np.int64)
        mask = np.zeros((len(members), 1, height, width), dtype=bool)
        for index, (rows, columns, sees) in enumerate(members):
            all_rows[index, : len(rows)] = rows
            all_columns[index, : len(columns)] = columns
            mask[index, 0, : len(rows), : len(columns)] = sees
            mask[index, 0, len(rows) :, 0] = True
            place[rows] = offset + index * height + np.arange(len(rows))
        offset += all_rows.size
        arrays = (all_rows.ravel(), all_columns.ravel(), mask)
        buckets.append(Bucket(*(torch.from_numpy(array).to(device) for array in arrays)))
    return TreeLayout(
        tuple(buckets), torch.from_numpy(place).to(device), decoder.tree_blocks(whole) if device.type == "cpu" else None
    )


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: TreeLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **other: object,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, KV, T, D] -> [1, T, H, D], as transformers calls an attention function."""
    if dropout or any(other.get(name) is not None for name in ("softcap", "sliding_window", "s_aux")):
        raise ValueError(
            "tree attention has no dropout, soft cap, window or sinks; this model's attention needs one of them"
        )
    q_THD, k_TKD, v_TKD = (part[0].transpose(0, 1) for part in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if tree.blocks is None or not decoder.native(q_THD, k_TKD, v_TKD):
        return _fused(q_THD, k_TKD, v_TKD, tree, scale)[None], None
    heads = [part.shape[1] for part in (q_THD, k_TKD, v_TKD)]
    filling = (0, -query.shape[-1] % 32)  # the kernels' heads are multiples of 32
    states_TSD = F.pad(torch.cat((q_THD, k_TKD, v_TKD), dim=1), filling)
    return compiled(states_TSD, heads, tree.blocks, scale)[None, ..., : query.shape[-1]], None


def compiled(
    states_TSD: Tensor, heads: Sequence[int], blocks: decoder.TreeBlocks, scale: float,
    turn_TD: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attention of `states`, queries, keys and values side by side, so many `heads` of each: [T, heads, D].

    turn: cosines and sines of a rotary embedding, by which queries and keys are rotated in place before.
    """
    return _Compiled.apply(states_TSD, *(turn_TD or (None, None)), heads, blocks, scale)


class _Compiled(torch.autograd.Function):
    """On the compiled kernels: keeps `states` and one number a row and head."""

    @staticmethod
    def forward(
        ctx: Any, states_TSD: Tensor, cos_TD: Tensor | None, sin_TD: Tensor | None, heads: list[int],
        blocks: decoder.TreeBlocks, scale: float,
    ) -> Tensor:  # fmt: skip
        _turn(states_TSD, heads, cos_TD, sin_TD)
        q_THD, k_TKD, v_TKD = states_TSD.split(heads, dim=1)
        out, lse = decoder.attend(q_THD, k_TKD, v_TKD, blocks, scale)
        ctx.save_for_backward(states_TSD, lse, cos_TD, sin_TD)
        ctx.heads, ctx.blocks, ctx.scale = heads, blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        states_TSD, lse, cos_TD, sin_TD = ctx.saved_tensors
        dstates = torch.empty_like(states_TSD)
        (q, k, v), (dq, dk, dv) = (each.split(ctx.heads, dim=1) for each in (states_TSD, dstates))
        decoder.attend_backward(grad_THD, q, k, v, lse, ctx.blocks, ctx.scale, (dq, dk, dv))
        _turn(dstates, ctx.heads, cos_TD, sin_TD, backward=True)
        return dstates, None, None, None, None, None


def _turn(
    states_TSD: Tensor, heads: Sequence[int], cos_TD: Tensor | None, sin_TD: Tensor | None, backward: bool = False
) -> None:
    if cos_TD is not None and sin_TD is not None:
        turned = states_TSD[:, : -heads[2]]
        decoder.rotate(turned, cos_TD, sin_TD, turned, backward=backward)


def _fused(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, tree: TreeLayout, scale: float) -> Tensor:
    """One fused kernel of PyTorch per bucket. Heads that share keys go as more rows of those: PyTorch 2.11's kernel with a mask
    on GPUs knows no grouped heads, and the next best would keep all scores."""
    outputs = []
    kv_heads = k_TKD.shape[1]
    groups = q_THD.shape[1] // kv_heads
    for bucket in tree.buckets:
        blocks, rows, _ = bucket.shape
        q = q_THD.index_select(0, bucket.rows).unflatten(1, (kv_heads, groups)).unflatten(0, (blocks, rows))
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
        k, v = (
            states.index_select(0, bucket.columns).unflatten(0, (blocks, -1)).transpose(1, 2)
            for states in (k_TKD, v_TKD)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.mask.repeat(1, 1, groups, 1), scale=scale)
        outputs.append(out.unflatten(2, (groups, rows)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1))
    return torch.cat(outputs).index_select(0, tree.place)


AttentionInterface.register(NAME, tree_attention)
