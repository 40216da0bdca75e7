"""Attention over prefix trees laid out flat: each row attends to its ancestors and itself.

The rows are cut into blocks of at most `BLOCK_ROWS`; a block's columns are the ancestors of any of its rows, so a
prompt is read by all blocks below it and siblings never see each other's columns. Blocks of like shape form a bucket,
and a bucket is one batched call with a mask. Only these small attention products are padded (to the bucket's shape),
never a linear layer.

Registered with transformers as the attention implementation `omni_fast_tree`; a model's forward takes the layout as
keyword argument `tree`. Limits: causal softmax attention with grouped heads; no window, sink, soft cap or dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface

from omni_kernels.decoder import TreeBlocks, tree_blocks

NAME = "omni_fast_tree"
BLOCK_ROWS = 64
KEEP_COLUMNS = 1024
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
    blocks: TreeBlocks | None = None


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
        tensors = [torch.from_numpy(array).to(device) for array in (all_rows.ravel(), all_columns.ravel(), mask)]
        buckets.append(Bucket(*tensors))
    return TreeLayout(
        tuple(buckets), torch.from_numpy(place).to(device), tree_blocks(whole) if device.type == "cpu" else None
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
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, KV, T, D] -> [1, T, H, D], as transformers calls an attention function."""
    if dropout or softcap is not None or sliding_window is not None or s_aux is not None:
        raise ValueError(
            "tree attention has no dropout, soft cap, window or sinks; this model's attention needs one of them"
        )
    q_THD, k_TKD, v_TKD = (part[0].transpose(0, 1) for part in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _fused if query.is_cuda else _Direct.apply
    return attend(q_THD, k_TKD, v_TKD, tree, scale)[None], None


def _fused(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, tree: TreeLayout, scale: float) -> Tensor:
    """One fused kernel of PyTorch per bucket."""
    outputs = []
    for bucket in tree.buckets:
        blocks = bucket.shape[0]
        q, k, v = (
            states.index_select(0, index).unflatten(0, (blocks, -1)).transpose(1, 2)
            for states, index in ((q_THD, bucket.rows), (k_TKD, bucket.columns), (v_TKD, bucket.columns))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.mask, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, tree.place)


class _Direct(torch.autograd.Function):
    """The products as they stand, for CPUs: there PyTorch's fused kernel takes 2.5 times as long on blocks this small.

    Scores are rounded to the working dtype before the softmax, as in transformers' eager attention (log-probs of
    SmolLM2 in bf16 are no further from fp32 than with the fused kernel); gradients of keys and values are summed over
    blocks in fp32. Probabilities of buckets of up to `KEEP_COLUMNS` columns are kept for the backward pass, wider
    ones are computed again, so that memory stays linear in the length.
    """

    @staticmethod
    def forward(ctx, q_THD, k_TKD, v_TKD, tree, scale):
        outputs: list[Tensor] = []
        kept: list[Tensor] = []
        for bucket in tree.buckets:
            parts = _attend(q_THD, k_TKD, v_TKD, bucket, scale)
            outputs.append(_to_rows(torch.bmm(parts[3], parts[2]), bucket, k_TKD.shape[1]))
            if bucket.shape[2] <= KEEP_COLUMNS:
                kept += parts
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, *kept)
        ctx.tree, ctx.scale = tree, scale
        return torch.cat(outputs).index_select(0, tree.place)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THD):
        q_THD, k_TKD, v_TKD, *kept = ctx.saved_tensors
        wide = torch.float32 if k_TKD.dtype in (torch.bfloat16, torch.float16) else k_TKD.dtype
        kv_heads = k_TKD.shape[1]
        dk, dv = torch.zeros_like(k_TKD, dtype=wide), torch.zeros_like(v_TKD, dtype=wide)
        grad = grad_THD.new_zeros(sum(len(bucket.rows) for bucket in ctx.tree.buckets), *grad_THD.shape[1:])
        grad[ctx.tree.place] = grad_THD
        dq, start = [], 0
        for bucket in ctx.tree.buckets:
            if bucket.shape[2] <= KEEP_COLUMNS:
                (q, k, v, p), kept = kept[:4], kept[4:]
            else:
                q, k, v, p = _attend(q_THD, k_TKD, v_TKD, bucket, ctx.scale)
            blocks = bucket.shape[0]
            do = _by_head(grad[start : start + len(bucket.rows)], blocks, kv_heads)
            start += len(bucket.rows)
            dp = torch.bmm(do, v.transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            dq.append(_to_rows(torch.bmm(ds, k), bucket, kv_heads))
            for total, part in ((dk, torch.bmm(ds.transpose(1, 2), q)), (dv, torch.bmm(p.transpose(1, 2), do))):
                flat = part.unflatten(0, (blocks, kv_heads)).transpose(1, 2).flatten(0, 1)
                total.index_add_(0, bucket.columns, flat.to(wide))
        return torch.cat(dq).index_select(0, ctx.tree.place), dk.to(k_TKD.dtype), dv.to(v_TKD.dtype), None, None


def _by_head(rows: Tensor, blocks: int, kv_heads: int) -> Tensor:
    """[B*R, H, D] -> [B*KV, (H/KV)*R, D]: the heads that share keys become rows of one product."""
    split = rows.unflatten(0, (blocks, -1)).unflatten(2, (kv_heads, -1))  # [B, R, KV, H/KV, D]
    return split.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def _to_rows(products: Tensor, bucket: Bucket, kv_heads: int) -> Tensor:
    """The inverse of `_by_head`."""
    blocks, height, _ = bucket.shape
    split = products.view(blocks, kv_heads, -1, height, products.shape[-1])
    return split.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bucket: Bucket, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bucket's queries, keys and values by head, and the probabilities [B*KV, (H/KV)*R, C]."""
    blocks, height, width = bucket.shape
    kv_heads = k_TKD.shape[1]
    q = _by_head(q_THD.index_select(0, bucket.rows), blocks, kv_heads)
    k, v = (_by_head(states.index_select(0, bucket.columns), blocks, kv_heads) for states in (k_TKD, v_TKD))
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    scores.view(blocks, -1, height, width).masked_fill_(~bucket.mask, -torch.inf)
    return q, k, v, torch.softmax(scores, dim=-1)


AttentionInterface.register(NAME, tree_attention)
