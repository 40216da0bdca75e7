"""What a decoder layer computes, for training on CPUs: RMSNorm, gate, rotary embedding, tree attention.

Plain functions on tensors, forward and backward apart, that write an autograd function of any shape out of few passes over
memory. Each runs the C++ kernels (csrc/cpu/decoder.h) on torch's own threads where `native` says so, and the same formula
in torch operations otherwise, which is the reference of the tests. Everything is computed in fp32 and rounded where a
result is stored.

    rms_norm, rms_norm_backward      with the residual's sum in the same pass
    gate, gate_backward              silu(gate) * up, of two halves of one tensor
    rotate                           rotary embedding, and back
    TreeBlocks, attend, attend_backward   softmax attention over prefix trees

Limits of the C++ kernels: CPU; bf16 or fp32, one dtype a call; heads of a multiple of 32. Tensors
have unit stride in their last dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omni_kernels.backends import cpu
from omni_kernels.backends.rows import DTYPES, pointer

native = cpu.takes


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- RMSNorm -----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """weight * round(s / sqrt(mean(s^2) + eps)) of s = x + residual, rounded as transformers' Llama-style norms round.

    x, residual: [..., width]; weight: [width]. Returns s (x itself without a residual), the norm, and the fp32 factor
    [..., 1] that `rms_norm_backward` wants.
    """
    if not native(x, weight):
        s = x if residual is None else x + residual
        wide = _wide(s)
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        return s, weight * (wide * inverse).to(s.dtype), inverse
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    width = x.shape[-1]
    s = x if residual is None else torch.empty_like(x)
    y, inverse = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
    cpu.native.norm_forward(
        DTYPES[x.dtype], x.numel() // width, width, x.data_ptr(), pointer(residual), weight.data_ptr(), eps,
        0 if residual is None else s.data_ptr(), y.data_ptr(), inverse.data_ptr(), cpu.how(),
    )  # fmt: skip
    return s, y, inverse


def rms_norm_backward(
    grad: Tensor, s: Tensor, weight: Tensor, inverse: Tensor, grad_sum: Tensor | None = None, want_weight: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradient of s and, if wanted, of the weight (fp32), given that of the norm; grad_sum: what s got from elsewhere."""
    if not native(s, grad, weight):
        normal = _wide(s) * inverse
        dw = (grad * normal).flatten(0, -2).sum(0) if want_weight else None
        wide = _wide(grad * weight)
        dx = ((wide - normal * (wide * normal).mean(-1, keepdim=True)) * inverse).to(s.dtype)
        return (dx if grad_sum is None else dx + grad_sum), dw
    grad = grad.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    width = s.shape[-1]
    rows = s.numel() // width
    dx = torch.empty_like(s)
    parts = torch.empty(-(-rows // cpu.native.NORM_ROWS), width) if want_weight else None
    cpu.native.norm_backward(
        DTYPES[s.dtype], rows, width, s.data_ptr(), weight.data_ptr(), inverse.data_ptr(), grad.data_ptr(),
        pointer(grad_sum), dx.data_ptr(), pointer(parts), cpu.how(),
    )  # fmt: skip
    return dx, None if parts is None else parts.sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
        s, y, inverse = rms_norm(x, weight, eps, residual)
        ctx.save_for_backward(s, weight, inverse)
        return y if residual is None else (s, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        s, weight, inverse = ctx.saved_tensors
        grad_sum = grads[0] if len(grads) == 2 else None
        dx, dw = rms_norm_backward(grads[-1], s, weight, inverse, grad_sum, want_weight=ctx.needs_input_grad[2])
        return dx, None if grad_sum is None else dx, None if dw is None else dw.to(weight.dtype), None


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Differentiable RMSNorm; keeps x and one number a row."""
    return _RMSNorm.apply(x, None, weight, eps)


def add_normed(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Differentiable: x + residual, and its RMSNorm; keeps the sum and one number a row."""
    return _RMSNorm.apply(x, residual, weight, eps)


# -- gate and rotary embedding -----------------------------------------------------------------------------------------


def gate(both: Tensor) -> Tensor:
    """silu(gate) * up, silu rounded first. both: [..., 2 * width], the gate's half first. Returns [..., width]."""
    if not native(both):
        first, up = both.chunk(2, dim=-1)
        return F.silu(first) * up
    both = both.contiguous()
    width = both.shape[-1] // 2
    y = both.new_empty(*both.shape[:-1], width)
    _gate(both, y, None, None)
    return y


def gate_backward(grad: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `both` [..., 2 * width], and `gate(both)` again: whoever recomputes it needs no pass of its own."""
    if not native(both, grad):
        first, up = both.chunk(2, dim=-1)
        opened = F.silu(first)
        return torch.cat((torch.ops.aten.silu_backward(grad * up, first), grad * opened), dim=-1), opened * up
    both, grad = both.contiguous(), grad.contiguous()
    y, dboth = torch.empty_like(grad), torch.empty_like(both)
    _gate(both, y, grad, dboth)
    return dboth, y


def _gate(both: Tensor, y: Tensor, grad: Tensor | None, dboth: Tensor | None) -> None:
    width = y.shape[-1]
    step = width * both.element_size()
    start = pointer(dboth)
    cpu.native.gate(
        DTYPES[both.dtype], both.numel() // (2 * width), width, 2 * width, both.data_ptr(), both.data_ptr() + step,
        y.data_ptr(), pointer(grad), start, start + step if start else 0, cpu.how(),
    )  # fmt: skip


def rotate(
    x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, out: Tensor | None = None, *, backward: bool = False
) -> Tensor:
    """Rotary embedding of halves (RoFormer, 2104.09864): x cos + (-x2, x1) sin. backward: the gradient's way back.

    x: [rows, heads, size], heads side by side; out: the same shape, may be x itself.
    """
    if not native(x_THD, cos_TD, sin_TD):
        cos, sin = cos_TD[:, None], sin_TD[:, None]
        first, second = x_THD.chunk(2, dim=-1)
        if backward:
            turned = x_THD * sin
            first, second = turned.chunk(2, dim=-1)
            result = x_THD * cos + torch.cat((second, -first), dim=-1)
        else:
            result = x_THD * cos + torch.cat((-second, first), dim=-1) * sin
        return result if out is None else out.copy_(result)
    rows, heads, size = x_THD.shape
    out = torch.empty_like(x_THD, memory_format=torch.contiguous_format) if out is None else out
    cos_TD, sin_TD = cos_TD.contiguous(), sin_TD.contiguous()
    cpu.native.rotate(
        DTYPES[x_THD.dtype], rows, heads, size, _heads_stride(x_THD), _heads_stride(out), x_THD.data_ptr(),
        cos_TD.data_ptr(), sin_TD.data_ptr(), out.data_ptr(), backward, cpu.how(),
    )  # fmt: skip
    return out


def _heads_stride(x_THD: Tensor) -> int:
    """From row to row; ValueError where the heads of a row are not side by side."""
    _, heads, size = x_THD.shape
    if x_THD.stride(2) != 1 or (heads > 1 and x_THD.stride(1) != size):
        raise ValueError(
            f"heads have strides {x_THD.stride()}; pass [rows, heads, size] with a row's heads side by side"
        )
    return max(x_THD.stride(0), heads * size)


# -- attention over prefix trees ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TreeBlocks:
    """Blocks of rows with the columns that any of them sees: what `attend` works on. Made by `tree_blocks`."""

    native: Any


def tree_blocks(trees: Sequence[tuple[int, int, Sequence[tuple[Tensor, Tensor, Tensor]]]]) -> TreeBlocks | None:
    """Trees as (first row, one past the last, blocks); a block is its rows [R], its columns [C], and who sees whom [R, C].

    rows, columns: int32 numbers of rows, of that tree alone; sees: bool, at least one a row. None without C++ kernels.
    Raises ValueError where a block names a row outside its tree.
    """
    if not cpu.best():
        return None
    table: list[int] = []
    places: list[int] = []
    rows, columns, bias = [], [], []
    at_rows = at_columns = at_bias = 0
    for first, last, blocks in trees:
        table += [len(places) // 5, len(places) // 5 + len(blocks), first, last]
        for row, column, sees in blocks:
            width = -(-len(column) // 32) * 32
            places += [at_rows, len(row), at_columns, len(column), at_bias]
            rows.append(row)
            columns.append(column)
            hidden = torch.full((len(row), width), -math.inf, dtype=torch.bfloat16)
            hidden[:, : len(column)].masked_fill_(sees, 0.0)
            bias.append(hidden.flatten())
            at_rows, at_columns, at_bias = at_rows + len(row), at_columns + len(column), at_bias + hidden.numel()
    lists = (
        torch.tensor(table),
        torch.tensor(places),
        torch.cat(rows).int(),
        torch.cat(columns).int(),
        torch.cat(bias),
    )
    return TreeBlocks(cpu.native.TreeBlocks([(part.data_ptr(), part.numel()) for part in lists]))


def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, trees: TreeBlocks, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k) v of each row over the columns it sees: [rows, heads, size], and what backward wants of it.

    Rows of q, k and v may be apart (parts of one tensor); a row's heads are side by side. heads: a multiple of kv heads.
    """
    out, lse = q_THD.new_empty(q_THD.shape), torch.empty(q_THD.shape[:2])
    cpu.native.attend_forward(trees.native, _attended(q_THD, k_TKD, v_TKD, scale, lse), out.data_ptr(), cpu.how())
    return out, lse


def attend_backward(
    grad: Tensor, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lse: Tensor, trees: TreeBlocks, scale: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Gradients of q, k and v `into` tensors of their shapes, those of k and v equally far from row to row.

    Scores are computed again from `lse`; keys' gradients are summed in fp32 before they are rounded.
    """
    dq, dk, dv = into
    if dq.shape != q_THD.shape or dk.shape != k_TKD.shape or dv.shape != v_TKD.shape or dk.stride() != dv.stride():
        raise ValueError(f"gradients of shapes {[tuple(part.shape) for part in into]} do not fit q, k and v")
    grad = grad.contiguous()
    wide = torch.empty(2, *k_TKD.shape)
    cpu.native.attend_backward(
        trees.native, _attended(q_THD, k_TKD, v_TKD, scale, lse), grad.data_ptr(), dq.data_ptr(), _heads_stride(dq),
        dk.data_ptr(), dv.data_ptr(), _heads_stride(dk), wide[0].data_ptr(), wide[1].data_ptr(), cpu.how(),
    )  # fmt: skip


_Attended = tuple[int, int, int, int, int, int, int, int, int, int, int, float, int]


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float, lse: Tensor) -> _Attended:
    if not native(q, k, v):
        raise TypeError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype} on {q.device}; pass all fp32 or all bf16 CPU tensors"
        )
    rows, heads, size = q.shape
    if k.shape != v.shape or len(k) != rows or k.shape[2] != size:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [{rows}, kv heads, {size}], as q has it")
    return (
        DTYPES[q.dtype], rows, heads, k.shape[1], size, q.data_ptr(), _heads_stride(q), k.data_ptr(), _heads_stride(k),
        v.data_ptr(), _heads_stride(v), scale, lse.data_ptr(),
    )  # fmt: skip


# -- decoding ----------------------------------------------------------------------------------------------------------


class DecodeCache:
    """Keys and values of rows that decode in lockstep, of all layers: each prompt's once, each row's own tokens.

    A prompt's are packed for the product with all rows that go on from it, which read them together; a row's own are
    [row, kv head, token, size]. CPU with the C++ kernels; bf16 or fp32; heads of a multiple of 32.
    """

    def __init__(
        self, columns: Sequence[Sequence[int]], prompt_of_row: Sequence[int], layers: int, kv_heads: int, size: int, new: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """columns: for each prompt, the rows of the prefill's keys that it sees. new: how many tokens a row may make."""
        self.wave = cpu.native.Wave(columns, kv_heads, size)
        self.prompt_of_row = list(prompt_of_row)
        self.wave.assign(self.prompt_of_row)
        self.prompts = torch.empty(layers, 2, self.wave.numbers, dtype=dtype)
        self.own = torch.empty(layers, 2, len(self.prompt_of_row), kv_heads, new, size, dtype=dtype)
        self.capacity, self.filled = new, 0

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """The prompts' keys and values, of the prefill; rows of both equally far apart."""
        keys, values = self.prompts[layer]
        self.wave.store(
            DTYPES[keys.dtype], len(k_TKD), k_TKD.data_ptr(), v_TKD.data_ptr(), _same_stride(k_TKD, v_TKD),
            keys.data_ptr(), values.data_ptr(), cpu.how(),
        )  # fmt: skip

    def advance(self) -> None:
        """Open a column for one token more of each row; RuntimeError beyond `new`."""
        if self.filled == self.capacity:
            raise RuntimeError(f"the cache has room for {self.capacity} tokens a row")
        self.filled += 1

    def decode(self, layer: int, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor, scale: float) -> Tensor:
        """Keeps the token's key and value and attends over all that its row has: [row, heads, size]."""
        rows, heads, size = q_RHD.shape
        if rows != len(self.prompt_of_row) or len(k_RKD) != rows:
            raise ValueError(f"{rows} queries and {len(k_RKD)} keys for {len(self.prompt_of_row)} rows")
        keys, values = self.prompts[layer]
        own_keys, own_values = self.own[layer]
        out = q_RHD.new_empty(q_RHD.shape)
        self.wave.decode(
            DTYPES[keys.dtype], rows, heads, q_RHD.data_ptr(), k_RKD.data_ptr(), v_RKD.data_ptr(),
            _same_stride(q_RHD, k_RKD, v_RKD), keys.data_ptr(), values.data_ptr(), own_keys.data_ptr(),
            own_values.data_ptr(), self.capacity, self.filled, scale, out.data_ptr(), cpu.how(),
        )  # fmt: skip
        return out

    def keep(self, rows: Sequence[int]) -> None:
        """Keep `rows`, in that order; those already in their place are not touched."""
        target = [place for place, row in enumerate(rows) if place != row]
        if target:
            source = [rows[place] for place in target]
            for part in self.own.flatten(0, 1):
                part[target, :, : self.filled] = part[source, :, : self.filled]
        self.prompt_of_row = [self.prompt_of_row[row] for row in rows]
        self.wave.assign(self.prompt_of_row)


def _same_stride(*parts: Tensor) -> int:
    strides = {_heads_stride(part) for part in parts} if len(parts[0]) > 1 else {max(map(_heads_stride, parts))}
    if len(strides) > 1 or not native(*parts):
        raise ValueError(f"parts with strides {sorted(strides)}; pass views of one fp32 or bf16 tensor")
    return strides.pop()
