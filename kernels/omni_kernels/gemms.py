"""The GEMMs of a head: logits = x W^T of some rows at a time; dX = dz W and dW += dz^T x as their gradients come.

dW is accumulated in fp32 over chunks of rows and rounded once; or else dX is, over parts of the vocabulary, and dW made
part by part. GEMMs run in the dtype of hidden, on one of two paths:

own     for the C++ backend, where `products.multiplies`; in bf16 H is even, for dX V too. W is packed block by block on
        the way. A bf16 dW needs no fp32 matrix: the upper halves of the sum are in dW itself, the lower ones in `low`
        until the last chunk. A row's bits do not depend on the other rows.
torch   everything else. A CPU's product is rounded to bf16 before it is added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_kernels import products

_PANEL_BYTES = 4 << 20  # of fp32 dW


class Matrices:
    """The operands of the GEMMs, and the gradients as they grow chunk by chunk.

    chunk_rows: most rows at a time; 0: all of them, and some columns (`add_columns`). A fresh large tensor costs a CPU as
    much in page faults as the GEMM that fills it, so all chunks share one buffer of logits: those of the last call are gone.
    into: an fp32 [V, H] tensor to add dW * scale to.  own: use our own products where they are to be had.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int,
        needs: tuple[bool, bool, bool] = (False, False, False), tile_rows: int = 0, into: Tensor | None = None,
        scale: float = 1.0, own: bool = False,
    ) -> None:  # fmt: skip
        self.hidden, self.tile_rows, self.scale = hidden, tile_rows, scale
        self.weight = weight.to(hidden.dtype)
        self.own = own and takes(hidden, self.weight)
        self.bias = None if bias is None else bias.to(hidden.dtype)
        self.need_dx, self.need_dw, self.need_db = needs
        self.chunk_rows, self.buffer = chunk_rows, hidden.new_empty(0)
        sums = hidden.dtype if chunk_rows else wide_of(hidden.dtype)
        self.dx = torch.zeros(hidden.shape, dtype=sums, device=hidden.device) if self.need_dx else None
        self.dw: Tensor | None = into
        self.low: Tensor | None = None
        self.dw_dtype = hidden.dtype if hidden.dtype == weight.dtype else wide_of(hidden.dtype)
        self.keeps_dw = self.need_dw and into is None
        self.db: Tensor | None = None

    @property
    def wanted(self) -> bool:
        return self.need_dx or self.need_dw or self.need_db

    def logits(self, rows: Tensor | slice, columns: slice = slice(None)) -> Tensor:
        """[C, columns] of some rows, in the shared buffer."""
        x, weight = self.hidden[rows], self.weight[columns]
        width = len(weight)
        # On a GPU rows start at multiples of 32 bytes whatever the vocabulary: kernels and GEMMs take whole vectors then, and
        # a row's bits do not depend on its place.
        pitch = -(-width // 16) * 16 if x.is_cuda else width
        if self.buffer.numel() < (size := (self.chunk_rows or len(x)) * pitch):
            del self.buffer
            self.buffer = x.new_empty(size)
        logits = self.buffer[: len(x) * pitch].view(len(x), pitch)[:, :width]
        if self.own:
            products.linear(x, weight, logits, transposed=True)
        else:
            self._product(x, weight.t(), logits)
        return logits if self.bias is None else logits.add_(self.bias[columns])

    def add(
        self,
        dlogits: Tensor,
        rows: Tensor | slice,
        last: bool,
        factor: Tensor | None = None,
        live: Tensor | None = None,
    ) -> None:
        """Takes dlogits [C, V] of some rows, times factor [C], into dX, dW and the bias gradient. last: no others follow.

        live: bool [C]; the other rows of dlogits, or those of factor 0, are 0, and what hidden holds there (NaN, say) is not used.
        """
        x = self.hidden[rows]
        if self.dx is not None:
            if factor is not None:
                self.dx[rows] = _wide_product(dlogits, self.weight).mul_(factor[:, None]).to(x.dtype)
            else:
                out = self.dx[rows] if isinstance(rows, slice) else torch.empty_like(x)
                if self.own and dlogits.shape[1] % products.unit(x.dtype) == 0:
                    products.linear(dlogits, self.weight, out)
                else:
                    self._product(dlogits, self.weight, out)
                if not isinstance(rows, slice):
                    self.dx[rows] = out
        if factor is not None:  # in a sum over rows it goes with the other operand
            x, live = (x * factor[:, None]).to(x.dtype), factor != 0
        if live is not None:
            x = torch.where(live[:, None], x, 0)
        if self.need_dw:
            self._add_dw(dlogits, x, last)
        if self.need_db:
            if factor is None:
                total = dlogits.sum(0, dtype=wide_of(dlogits.dtype))
            else:
                total = _wide_product(dlogits.t(), factor[:, None].to(x.dtype))[:, 0]
            self.db = total if self.db is None else self.db.add_(total)

    def add_columns(self, dlogits: Tensor, columns: slice) -> None:
        """Takes dlogits [N, columns] of all rows into dX, and makes dW and the bias gradient of these columns."""
        x, weight = self.hidden, self.weight[columns]
        if self.dx is not None:
            if self.own and dlogits.shape[1] % products.unit(x.dtype) == 0:
                products.linear(dlogits, weight, self.dx, add=True)
            elif x.dtype == self.dx.dtype:
                self.dx.addmm_(dlogits, weight)
            else:
                self.dx.add_(_wide_product(dlogits, weight))
        if self.need_dw:
            if self.dw is None:
                self.dw = self.weight.new_empty(self.weight.shape, dtype=self.dw_dtype)
            self._write_dw(self.dw[columns], dlogits, x, not self.keeps_dw)
        if self.need_db:
            if self.db is None:
                self.db = x.new_empty(len(self.weight), dtype=wide_of(x.dtype))
            self.db[columns] = dlogits.sum(0, dtype=self.db.dtype)

    def rounded_dw(self) -> Tensor | None:
        """dW, where it has not gone `into` another tensor; None: no rows came. A last chunk without a gradient leaves halves."""
        if self.low is not None:
            self._add_dw(
                self.hidden.new_zeros(1, len(self.weight)), self.hidden.new_zeros(1, self.hidden.shape[1]), True
            )
        return self.dw

    def _add_dw(self, dlogits: Tensor, x: Tensor, last: bool) -> None:
        first = self.dw is None
        if self.dw is None:
            summed = not last and not self.own  # where halves do not stand for it
            self.dw = x.new_empty(self.weight.shape, dtype=wide_of(x.dtype) if summed else self.dw_dtype)
            if self.dw.dtype != wide_of(x.dtype) and not last:
                self.low = torch.empty(self.dw.shape, dtype=torch.uint16)
        if self.low is None:
            self._write_dw(self.dw, dlogits, x, not first)
            return
        products.weight_gradient(dlogits, products.pack(x), self.dw, add=not first, low=self.low, last=last)
        self.low = None if last else self.low

    def _write_dw(self, dw: Tensor, dlogits: Tensor, x: Tensor, add: bool) -> None:
        """dlogits^T x into rows of dW, or, times `scale`, added to what they hold."""
        if self.own and dw.is_contiguous():
            products.weight_gradient(dlogits, products.pack(x), dw, add=add, scale=self.scale)
        elif dw.dtype == x.dtype:
            if add:
                dw.addmm_(dlogits.t(), x, alpha=self.scale)
            else:
                torch.mm(dlogits.t(), x, out=dw)
        elif x.is_cuda and add:
            dw.add_(_wide_product(dlogits.t(), x), alpha=self.scale)
        elif x.is_cuda:
            torch.mm(dlogits.t(), x, out_dtype=dw.dtype, out=dw)
        else:
            self._write_dw_by_panels(dw, dlogits, x, add)

    def _write_dw_by_panels(self, dw: Tensor, dlogits: Tensor, x: Tensor, add: bool) -> None:
        """A CPU GEMM rounds its result to bf16; the sum over chunks is fp32. Panels of it stay in cache on the way."""
        height = min(len(dw), max(1, _PANEL_BYTES // (4 * x.shape[1])))
        part, wide = x.new_empty(height, x.shape[1]), dw.new_empty(height, x.shape[1])
        for start in range(0, len(dw), height):
            rows = slice(start, min(len(dw), start + height))
            count = rows.stop - rows.start
            torch.mm(dlogits[:, rows].t(), x, out=part[:count])
            if not add:
                dw[rows] = part[:count]
            else:  # add_ of bf16 to fp32 is not vectorised, copy_ is
                dw[rows].add_(wide[:count].copy_(part[:count]), alpha=self.scale)

    def _product(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        tile = self.tile_rows
        if tile == 0:
            return torch.mm(left, right, out=out)
        for start in range(0, len(left), tile):
            part = left[start : start + tile]
            count = len(part)
            if count < tile:  # with rows as far apart, as GEMMs are chosen by that too
                padded = left.new_zeros(tile, max(left.stride(0), left.shape[1]))[:, : left.shape[1]]
                padded[:count] = part
                part = padded
            out[start : start + count] = torch.mm(part, right)[:count]
        return out


def takes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether our own products apply: they then sum dW of a bf16 weight in halves."""
    fits = (
        hidden.shape[1] % products.unit(hidden.dtype) == 0 and products.has_rows(hidden) and products.has_rows(weight)
    )
    return fits and products.multiplies(hidden, weight)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """The product in fp32 (fp64); a CPU rounds it to the operands' dtype first."""
    wide = wide_of(left.dtype)
    if left.is_cuda and left.dtype != wide:
        return torch.mm(left, right, out_dtype=wide)
    return torch.mm(left, right).to(wide)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """Of sums over rows of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
