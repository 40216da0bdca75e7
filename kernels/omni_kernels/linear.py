"""Head and loss together, without autograd: hidden [N, H] and weight [V, H] in; statistics, loss and gradients out.

Rows go through in chunks whose logits fit a workspace. Per chunk: logits = x W^T, row kernels, dX = dz W, dW += dz^T x.

`policy_head` needs 3 GEMMs: (a, b) of a token follow from its own log-prob, so dz is made while the chunk's logits are
there. Losses that couple tokens of different chunks (`losses.row_wise`) cost a fourth, unless one chunk holds all rows; so
does a workspace of few rows (`plan`). With the log-probs known, dz is made of all rows and some columns at a time where
the vocabulary is larger than the batch: dW of these columns is whole at once, and dX the sum. Not where a row's bits may
not depend on the others, nor where the weight gets no gradient.
A backend may own the first GEMM and leave exponentials instead of logits; a factor a row then goes with the products.
Rows that are not trained on never enter. On the CPU, rows whose coefficients turn out 0 (clipped, dropped) leave before
dX and dW; on a GPU counting them would cost a host sync.

Summed over chunks, dW is accumulated in fp32 and rounded once, to the dtype of the weight. GEMMs run in the dtype of hidden, under
autocast too: a weight of another dtype (an fp32 master copy under bf16 activations) is cast for them and gets its gradient
unrounded.
All sums have a fixed order, so results repeat bit by bit. A row's bits may depend on how many rows there are, as BLAS
picks its kernels by shape; `tile_rows` fixes the shape of what it sees, and with it log-probs, entropies and dX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from omni_kernels.backends.torch import blocks, scaled
from omni_kernels.gemms import Matrices, takes, wide_of
from omni_kernels.head import Finish, Gradient, Head, Stats, pick
from omni_kernels.losses import Coefficients, Prepared, coefficients, prepare, row_wise
from omni_kernels.metrics import METRICS
from omni_kernels.spec import IGNORE, LossSpec, Tokens, check

_P = ParamSpec("_P")
_R = TypeVar("_R")
_COLUMNS = 16  # parts of the vocabulary begin at multiples
_COMPACT_BELOW = 0.9  # share of rows with a gradient below which gathering them pays


@dataclass(frozen=True)
class PolicyResult:
    """Everything `policy_head` makes; dx, dw, db are those of the loss itself (upstream gradient 1)."""

    loss: Tensor
    metrics: Tensor
    stats: Stats  # [N]
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None


def _without_autocast(run: Callable[Concatenate[Tensor, _P], _R]) -> Callable[Concatenate[Tensor, _P], _R]:
    @wraps(run)
    def call(hidden: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.autocast(hidden.device.type, enabled=False):
            return run(hidden, *args, **kwargs)

    return call


@_without_autocast
def policy_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tokens, spec: LossSpec, head: Head, want_entropy: bool,
    needs: tuple[bool, bool, bool], into: Tensor | None = None, scale: float = 1.0,
) -> PolicyResult:  # fmt: skip
    """Loss, metrics and the wanted ones of (dX, dW, dbias)."""
    check(tokens, spec)
    n, dtype = len(hidden), wide_of(hidden.dtype)
    trained = tokens.trained()
    rows = _subset(trained) if tokens.rows is None and not trained.is_cuda else tokens.rows
    targets = torch.where(trained, tokens.targets, IGNORE)
    if rows is not None:
        hidden, targets, head = hidden[rows], targets[rows], head.at(rows)
    head.check_targets(targets, weight)
    by_row = row_wise(tokens, spec) and head.plan(hidden, weight, True, needs[1]).gemms == 3
    chunks = _chunks(hidden, weight, head, needs[1] and into is None)
    again = not by_row and len(chunks) > 1 and any(needs)  # gradients come when all log-probs are known
    now = (False, False, False) if again else needs
    m = Matrices(hidden, weight, bias, _most(chunks), now, head.tile_rows, into, scale, head.own_products)
    stats = _empty_stats(len(hidden), dtype, hidden.device, want_entropy)

    if by_row:
        batch = prepare(tokens, spec, dtype)
        batch = batch if rows is None else batch.rows(rows)
        metrics = torch.zeros(len(METRICS), dtype=torch.float64, device=hidden.device)
        for chunk in chunks:
            part = batch.rows(chunk)
            logits, finish = _forward(m, head, targets, stats, chunk, (part, spec) if m.wanted else None)
            known = _coefficients(stats[chunk], part, spec)
            metrics += known.metrics
            if m.wanted:
                _backward(m, head, logits, targets, stats, Gradient(known.a, known.b, known.z), chunk, finish)
            del logits, finish
    else:
        logits = None
        for chunk in chunks:
            logits, _ = _forward(m, head, targets, stats, chunk)
        full = _scattered(stats, rows, n)
        known = _coefficients(full, prepare(tokens, spec, dtype, full.logp, full.entropy), spec)
        metrics = known.metrics
        gradient = Gradient(known.a, known.b, known.z)
        gradient = gradient if rows is None else gradient[rows]
        if m.wanted:
            _backward(m, head, logits, targets, stats, gradient, chunks[0])
        del logits
    loss = metrics[METRICS.index("loss")].to(dtype, copy=True)
    if again:
        grads = logprob_backward(hidden, weight, bias, targets, stats, gradient, head, needs, into, scale, m)
        dx, dw, db = None if grads[0] is None else _scatter(grads[0], rows, n), *grads[1:]
    else:
        dx, dw, db = _gradients(m, weight, bias, rows, n)
    return PolicyResult(loss, metrics, _scattered(stats, rows, n), dx, dw, db)


@dataclass(frozen=True)
class Extras:
    """Of each row [N]: the k largest log-probs [N, k], their tokens int64 [N, k], and sum_j p_j^2 [N]."""

    top_logp: Tensor
    top_tokens: Tensor
    sum_p_squared: Tensor


@_without_autocast
def logprob_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, want_entropy: bool,
    top_k: int | None,
) -> tuple[Stats, Extras | None]:  # fmt: skip
    """Statistics of every row; top_k: also the extras."""
    n = len(hidden)
    head.check_targets(targets, weight)
    rows = None if targets.is_cuda else _subset(targets != IGNORE)
    if rows is not None:
        hidden, targets, head = hidden[rows], targets[rows], head.at(rows)
    chunks = _chunks(hidden, weight, head, False)
    m = Matrices(hidden, weight, bias, _most(chunks), tile_rows=head.tile_rows, own=head.own_products)
    stats = _empty_stats(len(hidden), wide_of(hidden.dtype), hidden.device, want_entropy)
    parts = []
    for chunk in chunks:
        logits, _ = _forward(m, head, targets, stats, chunk)
        if top_k is not None:
            parts.append(extras(logits, targets[chunk], stats.lse[chunk], head.at(chunk), top_k))
    extra = None
    if top_k is not None:
        joined = [torch.cat([getattr(p, f) for p in parts]) for f in ("top_logp", "top_tokens", "sum_p_squared")]
        extra = Extras(*(_scatter(v, rows, n) for v in joined))
    return _scattered(stats, rows, n), extra


@_without_autocast
def logprob_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, stats: Stats, gradient: Gradient, head: Head,
    needs: tuple[bool, bool, bool], into: Tensor | None = None, scale: float = 1.0, scratch: Matrices | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dX, dW, dbias), the wanted ones, of any upstream gradient; the logits are computed again, in the buffer of `scratch`."""
    n = len(hidden)
    rows = None if targets.is_cuda else _subset((targets != IGNORE) & gradient.live())
    if rows is not None:
        hidden, targets, stats, gradient, head = hidden[rows], targets[rows], stats[rows], gradient[rows], head.at(rows)
    chunks = _chunks(hidden, weight, head, False)
    by_columns = needs[1] and len(chunks) > 1 and len(hidden) <= len(weight) and not head.tile_rows
    if by_columns and targets.is_cuda:  # rows that are not trained on are still there, and may hold anything
        hidden = torch.where((gradient.live() & (targets != IGNORE))[:, None], hidden, 0)
    most = 0 if by_columns else _most(chunks)
    m = Matrices(hidden, weight, bias, most, needs, head.tile_rows, into, scale, head.own_products)
    if scratch is not None:
        m.buffer = scratch.buffer
        del scratch.buffer
    if by_columns:
        room = m.buffer.numel() or _most(chunks) * len(weight)
        width = max(_COLUMNS, room // len(hidden) // _COLUMNS * _COLUMNS)
        for start in range(0, len(weight), width):
            columns = slice(start, min(len(weight), start + width))
            logits = m.logits(slice(None), columns)
            head.beginning(start).backward_(logits, targets, stats, gradient)
            m.add_columns(logits, columns)
        del logits
    else:
        for chunk in chunks:
            _backward(m, head, None, targets, stats, gradient[chunk], chunk)
    return _gradients(m, weight, bias, rows, n)


def extras(logits: Tensor, targets: Tensor, lse: Tensor, head: Head, top_k: int) -> Extras:
    """Extras of logits [C, V] whose logsumexp [C] is known; rows without a target are 0."""
    top_logp = torch.zeros(len(logits), top_k, dtype=lse.dtype, device=logits.device)
    top_tokens = torch.zeros(len(logits), top_k, dtype=torch.int64, device=logits.device)
    squares = torch.zeros_like(lse)
    for block in blocks(logits):
        log_p = scaled(logits[block], head.inv_temperature, head.softcap, block).sub_(lse[block, None])
        used = targets[block, None] != IGNORE
        best = log_p.topk(top_k, dim=-1)
        top_logp[block] = torch.where(used, best.values, 0)
        top_tokens[block] = torch.where(used, best.indices, 0)
        squares[block] = torch.where(used[:, 0], log_p.mul_(2).exp_().sum(-1), 0)
    return Extras(top_logp, top_tokens, squares)


def _forward(
    m: Matrices, head: Head, targets: Tensor, stats: Stats, chunk: slice, loss: tuple[Prepared, LossSpec] | None = None
) -> tuple[Tensor, Finish | None]:
    """Fills in the statistics of a chunk; returns its logits [C, V], or what the backend made of them, and the rest of it.

    loss: the row-wise loss to make the gradient of.
    """
    want_entropy, finish = stats.entropy is not None, None
    head, targets = head.at(chunk), targets[chunk]
    made = None if loss is None else head.exponentials(m, chunk, targets, want_entropy)
    if made is not None:
        found, logits, finish = made
    else:
        logits = m.logits(chunk)
        swept = None if loss is None else head.policy_loss_(logits, targets, *loss, want_entropy)
        finish = None if swept is None else _finished
        found = head.forward(logits, targets, want_entropy) if swept is None else swept
    logp, entropy, lse = found
    stats.logp[chunk], stats.lse[chunk] = logp, lse
    if stats.entropy is not None and entropy is not None:
        stats.entropy[chunk] = entropy
    return logits, finish


def _finished(gradient: Gradient) -> None:
    """The matrix is the gradient already."""


def _backward(
    m: Matrices, head: Head, logits: Tensor | None, targets: Tensor, stats: Stats, gradient: Gradient, chunk: slice,
    finish: Finish | None = None,
) -> None:  # fmt: skip
    """Takes a chunk into the gradients. Its logits are consumed, or computed again where they are None."""
    rows: Tensor | slice = chunk
    factor = None if finish is None else finish(gradient)
    head, targets, stats = head.at(chunk), targets[chunk], stats[chunk]
    if not targets.is_cuda:
        live = gradient.live()
        count = int(live.sum())
        if count == 0:
            return
        if count < _COMPACT_BELOW * len(live):
            index = live.nonzero()[:, 0]
            rows = index + chunk.start
            head, targets, stats, gradient = head.at(index), targets[index], stats[index], gradient[index]
            logits, factor = pick(logits, index), pick(factor, index)
    if logits is None:
        logits = m.logits(rows)
    if finish is None:
        head.backward_(logits, targets, stats, gradient)
    # Rows that are not trained on are still there on a GPU, and may hold anything.
    used = gradient.live() & (targets != IGNORE) if targets.is_cuda else None
    m.add(logits, rows, chunk.stop == len(m.hidden), factor, used)


def _coefficients(stats: Stats, batch: Prepared, spec: LossSpec) -> Coefficients:
    return coefficients(stats.logp, stats.entropy, stats.lse, batch, spec)


def _gradients(
    m: Matrices, weight: Tensor, bias: Tensor | None, rows: Tensor | None, n: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    del m.buffer  # before dW is rounded into memory of its own
    dx = None if m.dx is None else _scatter(m.dx.to(m.hidden.dtype), rows, n)
    dw, db = m.rounded_dw() if m.keeps_dw else None, m.db
    if m.keeps_dw:
        dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if dw is None else dw.to(weight.dtype)
    if m.need_db and bias is not None:
        db = torch.zeros_like(bias) if db is None else db.to(bias.dtype)
    return dx, dw, db


def _empty_stats(n: int, dtype: torch.dtype, device: torch.device, want_entropy: bool) -> Stats:
    logp, lse = (torch.empty(n, dtype=dtype, device=device) for _ in range(2))
    return Stats(logp, torch.empty_like(logp) if want_entropy else None, lse)


def _subset(used: Tensor) -> Tensor | None:
    """int64 indices of the rows in use; None: all of them."""
    return None if bool(used.all()) else used.nonzero()[:, 0]


def _scatter(values: Tensor, rows: Tensor | None, n: int) -> Tensor:
    if rows is None:
        return values
    return values.new_zeros(n, *values.shape[1:]).index_copy_(0, rows, values)


def _scattered(stats: Stats, rows: Tensor | None, n: int) -> Stats:
    entropy = None if stats.entropy is None else _scatter(stats.entropy, rows, n)
    return Stats(_scatter(stats.logp, rows, n), entropy, _scatter(stats.lse, rows, n))


def _chunks(hidden: Tensor, weight: Tensor, head: Head, sums_dw: bool) -> list[slice]:
    """Slices of the rows whose logits fit the workspace; at least one, so that 0 rows have a loss too.

    sums_dw: in memory of its own. Where nobody set the workspace and the sum over chunks is kept in halves, whose lower
    ones take as much as the logits of H rows, all rows at once take less if they are not more than H / 2 beyond a chunk:
    half of it, since where rows are without a gradient the others leave by a copy.
    """
    n, width = hidden.shape
    size = head.plan(hidden, weight, True, sums_dw).chunk_rows
    in_halves = sums_dw and weight.dtype == torch.bfloat16 and takes(hidden, weight)
    if in_halves and head.may_take_all and n <= size + width // 2:
        size = max(n, 1)
    if hidden.is_cuda:  # chunks of vectors begin on 64 bytes: Triton compiles for what addresses are multiples of
        size = -(-size // 16) * 16 if head.workspace_bytes is None else size // 16 * 16 or size
    if head.tile_rows:
        size = max(head.tile_rows, size // head.tile_rows * head.tile_rows)
    return [slice(start, min(n, start + size)) for start in range(0, max(n, 1), size)]


def _most(chunks: list[slice]) -> int:
    return max(c.stop - c.start for c in chunks)
