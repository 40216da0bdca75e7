"""Products of matrices on CPUs, where torch's GEMMs are slower: bf16 or fp32 in, fp32 sums (csrc/cpu/product.h).

    multiplies                which matrices these kernels take, on which processors
    Packed, pack              the right-hand side in panels, once for many products
    linear, weight_gradient   x W and x W^T, packed or packed block by block on the way; grad^T x, added where it is summed

A row's bits do not depend on the other rows, nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni_kernels.backends import cpu
from omni_kernels.backends.rows import DTYPES, pointer


def multiplies(*tensors: Tensor) -> bool:
    """Whether products of these run in C++: where torch's GEMMs are slower.

    bf16: on a processor that multiplies it in AVX-512 and has no AMX. fp32: in AVX-512 on others than Intel's, where MKL
    keeps to AVX2.
    """
    if not cpu.takes(*tensors):
        return False
    if tensors[0].dtype == torch.bfloat16:
        return cpu.best() == "avx512_bf16" and not cpu.native.MATRIX_UNIT
    return cpu.best().startswith("avx512") and not cpu.native.INTEL


def unit(dtype: torch.dtype) -> int:
    """Of how many elements products take the inner dimension: bf16 in pairs."""
    return 2 if dtype == torch.bfloat16 else 1


@dataclass(frozen=True, slots=True)
class Packed:
    """The right-hand side of a product, in panels: `inner` rows (bf16: even) of `width` columns. Needs as much as its source."""

    panels: Tensor
    inner: int
    width: int


def pack(*matrices: Tensor, transposed: bool = False, into: Packed | None = None) -> Packed:
    """Matrices one below the other: [inner, width], or, transposed, [width, inner] as linear layers have their weights.

    bf16 or fp32, rows of unit stride. In bf16 all but the last have an even number of rows (transposed: of columns, all).
    into: what was packed of matrices of the same shapes, to be written over.
    """
    for matrix in matrices:
        _check_matrix(matrix, "matrix")
    panel, dtype = cpu.native.PANEL, matrices[0].dtype
    pair = unit(dtype)
    if transposed and any(len(matrix) % panel for matrix in matrices[:-1]):
        matrices = (torch.cat(matrices),)
    rows = sum(map(len, matrices))
    inner, width = (matrices[0].shape[1], rows) if transposed else (rows, matrices[0].shape[1])
    if any(matrix.shape[1] != matrices[0].shape[1] or matrix.dtype != dtype for matrix in matrices):
        given = [f"{m.shape[1]} columns in {m.dtype}" for m in matrices]
        raise ValueError(f"matrices of {given} cannot stand one below the other")
    if inner % pair if transposed else any(len(matrix) % pair for matrix in matrices[:-1]):
        raise ValueError(f"shapes {[tuple(m.shape) for m in matrices]} cannot be packed in pairs; pass even numbers")
    even = inner + inner % pair
    panels = torch.empty(-(-width // panel) * panel * even, dtype=dtype) if into is None else into.panels
    if into is not None and (into.inner, into.width, panels.dtype) != (even, width, dtype):
        raise ValueError(
            f"{width} columns of {even} rows in {dtype} do not fit into {into.width} of {into.inner} in {panels.dtype}"
        )
    start = panels.data_ptr()
    for matrix in matrices:
        count, columns = matrix.shape
        wide, deep = (count, columns) if transposed else (columns, count)
        cpu.native.pack(
            DTYPES[dtype], matrix.data_ptr(), _pitch(matrix), wide, deep, even // pair, transposed, start, cpu.how()
        )
        start += dtype.itemsize * count * (even if transposed else panel)
    return Packed(panels, even, width)


def linear(
    x: Tensor, weight: Packed | Tensor, out: Tensor | None = None, *, transposed: bool = False, add: bool = False
) -> Tensor:
    """x [..., inner] times a weight, both bf16 (inner even) or fp32: [..., width], into `out` if given.

    out: of x's dtype, or fp32. add: to what an fp32 `out` holds.
    weight: packed, or a matrix [inner, width] (transposed: [width, inner]) that is packed by the block on the way.
    """
    rows = _rows(x)
    _check_matrix(rows, "x")
    if isinstance(weight, Packed):
        inner, width, side = weight.inner, weight.width, (weight.panels.data_ptr(), 0, "packed")
        same = weight.panels.dtype == x.dtype
    else:
        _check_matrix(weight, "weight")
        inner, width = weight.shape[::-1] if transposed else weight.shape
        side = (weight.data_ptr(), _pitch(weight), "along" if transposed else "down")
        same = weight.dtype == x.dtype
    if rows.shape[1] != inner or inner % unit(x.dtype) or not same:
        raise ValueError(
            f"x has {rows.shape[1]} columns in {x.dtype} and the weight {inner} rows; pass one dtype and equal, even numbers"
        )
    shape = (*x.shape[:-1], width)
    out = x.new_empty(shape) if out is None else out
    flat, wide = out.flatten(0, -2), out.dtype == torch.float32
    fits = out.shape == shape and (wide or out.dtype == x.dtype and not add) and out.device == x.device
    if not fits or not has_rows(flat) or flat.data_ptr() != out.data_ptr():
        given = f"{out.dtype} {tuple(out.shape)}, strides {out.stride()}"
        raise ValueError(f"out is {given}; pass {torch.float32 if add else x.dtype} {shape}, rows equally far apart")
    deep = not wide and side[2] == "down" and inner > cpu.native.DEPTH
    low = torch.empty(len(rows), _pitch(flat), dtype=torch.uint16) if deep else None
    kind = "add" if add else "fp32" if wide else "rounded"
    _multiply((rows.data_ptr(), _pitch(rows), "along"), side, x.dtype, inner, flat, kind, low)
    return out


def weight_gradient(
    grad: Tensor, x: Packed, out: Tensor, *, add: bool, scale: float = 1.0, low: Tensor | None = None, last: bool = True
) -> Tensor:
    """grad^T x into `out` [grad's columns, x's], or added to it in fp32, times scale. grad: [rows, columns], of x's dtype.

    A sum of several products that ends as bf16 is kept as fp32 in two halves: the upper 16 bits in `out`, the others in
    `low`, uint16 of its shape; the last product rounds it.
    """
    _check_matrix(grad, "grad")
    rows, columns = grad.shape
    dtype = x.panels.dtype
    fits = rows + rows % unit(dtype) == x.inner and out.shape == (columns, x.width) and grad.dtype == dtype
    if not fits or out.dtype not in (dtype, torch.float32) or not out.is_contiguous():
        raise ValueError(
            f"grad {grad.dtype} {tuple(grad.shape)}, x of {x.inner} rows in {dtype} and out {out.dtype} {tuple(out.shape)} "
            "do not fit"
        )
    halves = out.dtype == torch.bfloat16 and (add or not last)
    if halves and (low is None or low.dtype != torch.uint16 or low.shape != out.shape or not low.is_contiguous()):
        raise TypeError(f"out is {out.dtype}; products are added in float32, or with `low`, uint16 {tuple(out.shape)}")
    if scale != 1 and not (add and out.dtype == torch.float32):
        raise ValueError(f"scale is {scale}; only what is added to float32 is scaled")
    if halves:
        kind = "halves" if not add else "round halves" if last else "add halves"
    else:
        kind = "rounded" if out.dtype == torch.bfloat16 else "add" if add else "fp32"
    side = (x.panels.data_ptr(), 0, "packed")
    _multiply((grad.data_ptr(), _pitch(grad), "down"), side, dtype, rows, out, kind, low if halves else None, scale)
    return out


_OUT = ("rounded", "fp32", "add", "halves", "add halves", "round halves")  # as product.h numbers them
_Side = tuple[int, int, str]


def _multiply(
    a: _Side, b: _Side, dtype: torch.dtype, inner: int, out: Tensor, kind: str, low: Tensor | None, scale: float = 1.0
) -> None:
    rows, width = out.shape
    cpu.native.multiply(
        DTYPES[dtype], a, b, rows, width, inner, out.data_ptr(), _pitch(out), _OUT.index(kind), pointer(low), scale, cpu.how()
    )  # fmt: skip


def has_rows(matrix: Tensor) -> bool:
    """Whether it is a matrix whose rows have unit stride and do not overlap: what products take."""
    if matrix.dim() != 2:
        return False
    rows, columns = matrix.shape
    return (columns < 2 or matrix.stride(1) == 1) and (rows < 2 or matrix.stride(0) >= columns)


def _pitch(matrix: Tensor) -> int:
    """From row to row; a single row's stride means nothing."""
    return max(matrix.stride(0), matrix.shape[1])


def _check_matrix(matrix: Tensor, name: str) -> None:
    if not multiplies(matrix):
        raise TypeError(
            f"{name} is {matrix.dtype} on {matrix.device}; products need bf16 CPU tensors and AVX512-BF16, or fp32 ones and "
            "AVX-512 on a processor that is not Intel's"
        )
    if not has_rows(matrix):
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}, strides {matrix.stride()}; pass rows of unit stride")


def _rows(x: Tensor) -> Tensor:
    """[..., width] as [rows, width] with unit column stride."""
    flat = x.flatten(0, -2)
    return flat if has_rows(flat) else flat.contiguous()
