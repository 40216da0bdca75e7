"""Head and loss together: hidden [N, H] and weight [V, H] in; log-probs, entropies or a loss out; never all logits at once.

Rows go through in chunks that fit a workspace. Per chunk: logits = x W^T, row kernels, dX = dz W, dW += dz^T x.

`linear_policy_loss` needs 3 GEMMs: (a, b) of a token follow from its own log-prob, so dz is made while the chunk's logits are
there. Losses that couple tokens of different chunks (see `losses.row_wise`) cost a fourth GEMM, unless one chunk holds all rows.
Rows that are not trained on never enter; rows whose coefficients turn out 0 (clipped) leave before dX and dW.
dW is accumulated in fp32 over chunks and rounded once, to the dtype of the weight. GEMMs run in the dtype of hidden: a weight in
another dtype (an fp32 master copy under bf16 activations) is cast for them and gets its gradient unrounded.

Limits: gradients are first order. Chunking, and so the last bits of dX and dW, depends on the number of trained rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_kernels import backends
from omni_kernels.losses import IGNORE, Coefficients, LossOutput, LossSpec, Tokens, coefficients, prepare, row_wise

WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of logits
_COMPACT_BELOW = 0.9  # share of rows with a gradient below which copying them together pays


def logits_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target and entropy of each row, in nats.

    logits [N, V] (row stride may exceed V), targets int64 [N], IGNORE (-100) gives 0 and a zero gradient; inv_temperature scalar
    or [N]. Returns fp32 [N] tensors, differentiable in the logits under any upstream gradients. in_place: the backward pass
    overwrites the logits with their gradient, and can run once.
    """
    _check_rows(logits, targets, inv_temperature, "logits")
    head = _Head(backends.select(logits.device, logits.dtype, backend), inv_temperature, softcap)
    return _LogitsLogprob.apply(logits, targets, head, want_entropy, in_place)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target and entropy of each row, in nats: `logits_logprob` of hidden @ weight.T + bias in chunks.

    hidden [N, H], weight [V, H], targets int64 [N], bias [V]; inv_temperature scalar or [N]. Returns fp32 [N] tensors,
    differentiable in hidden, weight and bias under any upstream gradients; the backward pass computes the logits again (4 GEMMs).
    Rows whose target is IGNORE (-100) cost nothing and give 0. workspace_bytes bounds the logits held at a time.
    """
    _check_head(hidden, weight, bias)
    _check_rows(hidden, targets, inv_temperature, "hidden")
    head = _head(hidden, weight, inv_temperature, softcap, workspace_bytes, backend)
    return _LinearLogprob.apply(hidden, weight, bias, targets, head, want_entropy)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tokens,
    spec: LossSpec,
    *,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
    return_tokens: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> LossOutput:
    """The policy loss of a language-model head, with its gradient made in the forward pass (3 GEMMs).

    hidden [N, H], weight [V, H] (tied or not), bias [V]; inv_temperature scalar or [N]; `tokens` aligned with the rows of hidden.
    want_entropy: measure the entropy even where the loss does not need it; off, it costs nothing.
    return_tokens: also return log-probs (and entropies), detached.
    The loss is differentiable in hidden, weight and bias; whichever does not require a gradient costs no GEMM.
    """
    _check_head(hidden, weight, bias)
    _check_rows(hidden, tokens.targets, inv_temperature, "hidden")
    head = _head(hidden, weight, inv_temperature, softcap, workspace_bytes, backend)
    want_entropy = want_entropy or spec.needs_entropy
    loss, metrics, logp, entropy = _LinearPolicyLoss.apply(hidden, weight, bias, tokens, spec, head, want_entropy)
    if not return_tokens:
        return LossOutput(loss, metrics)
    return LossOutput(loss, metrics, logp, entropy)


@dataclass(frozen=True)
class _Head:
    """How logits become probabilities, and how many rows of them may exist at a time."""

    rows: ModuleType
    inv_temperature: float | Tensor
    softcap: float | None
    chunk_rows: int = 0

    def at(self, index: Tensor | slice) -> _Head:
        """The head of some of the rows."""
        t = self.inv_temperature
        return replace(self, inv_temperature=t[index]) if isinstance(t, Tensor) and t.ndim else self

    def forward(self, logits: Tensor, targets: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        return self.rows.rows_forward(logits, targets, self.inv_temperature, self.softcap, want_entropy)

    def backward_(
        self, logits: Tensor, targets: Tensor, lse: Tensor, entropy: Tensor | None, a: Tensor, b: Tensor | None, z: Tensor | None
    ) -> None:
        z_loss = 0.0 if z is None else z
        self.rows.rows_backward_(logits, targets, lse, entropy, a, b, self.inv_temperature, self.softcap, z_loss)


class _Matrices:
    """The operands of the three GEMMs, and the gradients as they grow chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> None:
        self.hidden, self.bias = hidden, bias
        self.weight = weight if weight.dtype == hidden.dtype else weight.to(hidden.dtype)
        self.need_dx, self.need_dw, self.need_db = needs
        self.dx = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if self.need_dx else None
        self.dw: Tensor | None = None
        self.db: Tensor | None = None
        self.dw_dtype, self.db_dtype = weight.dtype, None if bias is None else bias.dtype

    @property
    def wanted(self) -> bool:
        return self.need_dx or self.need_dw or self.need_db

    def logits(self, rows: Tensor | slice) -> Tensor:
        x = self.hidden[rows]
        if self.bias is None:
            return torch.mm(x, self.weight.t())
        return torch.addmm(self.bias.to(x.dtype), x, self.weight.t())

    def add(self, dlogits: Tensor, rows: Tensor | slice) -> None:
        """Takes one chunk of dlogits [C, V] into dX, dW and the bias gradient."""
        if self.dx is not None:
            self.dx[rows] = torch.mm(dlogits, self.weight)
        if self.need_dw:
            part = torch.mm(dlogits.t(), self.hidden[rows])
            if self.dw is None:
                self.dw = part
            else:
                if self.dw.dtype not in (torch.float32, torch.float64):
                    self.dw = self.dw.float()
                self.dw += part
        if self.need_db:
            total = dlogits.sum(0, dtype=torch.float32)
            self.db = total if self.db is None else self.db + total

    def gradients(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dw, db = self.dw, self.db
        if self.need_dw:
            dw = torch.zeros_like(weight) if dw is None else dw.to(weight.dtype)
        if self.need_db and bias is not None:
            db = torch.zeros_like(bias) if db is None else db.to(bias.dtype)
        return self.dx, dw, db


def _run_backward(
    m: _Matrices, head: _Head, logits: Tensor | None, targets: Tensor, lse: Tensor, entropy: Tensor | None,
    known: tuple[Tensor, Tensor | None, Tensor | None], rows: Tensor,
) -> None:  # fmt: skip
    """One chunk of the gradient. `rows` are its rows of hidden; logits [C, V] are consumed, or computed again when None."""
    a, b, z = known
    head = head.at(rows)
    if not a.is_cuda:  # on a GPU the count of live rows would cost a host sync
        live = a != 0
        for other in (b, z):
            live = live if other is None else live | (other != 0)
        count = int(live.sum())
        if count == 0:
            return
        if count < _COMPACT_BELOW * len(a):
            index = live.nonzero()[:, 0]
            rows, targets, lse, a = rows[index], targets[index], lse[index], a[index]
            entropy, b, z = (None if v is None else v[index] for v in (entropy, b, z))
            head = head.at(index)
            logits = None if logits is None else logits[index]
    if logits is None:
        logits = m.logits(rows)
    head.backward_(logits, targets, lse, entropy, a, b, z)
    m.add(logits, rows)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, spec, head, want_entropy):  # type: ignore[no-untyped-def]
        m = _Matrices(hidden, weight, bias, ctx.needs_input_grad[:3])
        rows = _trained_rows(tokens.trained())
        targets = tokens.targets[rows]
        shape = dict(dtype=torch.float32 if hidden.dtype != torch.float64 else torch.float64, device=hidden.device)
        logp, lse = torch.zeros(len(rows), **shape), torch.zeros(len(rows), **shape)
        entropy = torch.zeros(len(rows), **shape) if want_entropy else None

        def forward(chunk: slice) -> Tensor:
            logits = m.logits(rows[chunk])
            logp[chunk], part, lse[chunk] = head.at(rows[chunk]).forward(logits, targets[chunk], want_entropy)
            if entropy is not None:
                entropy[chunk] = part
            return logits

        def backward(chunk: slice, logits: Tensor | None, known: Coefficients, at: slice) -> None:
            if m.wanted:
                picked = tuple(None if v is None else v[at] for v in (known.a, known.b, known.z))
                part = None if entropy is None else entropy[chunk]
                _run_backward(m, head, logits, targets[chunk], lse[chunk], part, picked, rows[chunk])

        chunks = list(_chunks(len(rows), head.chunk_rows))
        if row_wise(tokens, spec):
            batch = prepare(tokens, spec)
            outputs = []
            for chunk in chunks or [slice(0, 0)]:
                logits = forward(chunk)
                part = None if entropy is None else entropy[chunk]
                known = coefficients(logp[chunk], part, lse[chunk], batch.rows(rows[chunk]), spec)
                backward(chunk, logits, known, slice(None))
                outputs.append((known.loss, known.metrics))
                del logits
            loss = torch.stack([loss for loss, _ in outputs]).sum()
            metrics = torch.stack([metrics for _, metrics in outputs]).sum(0)
        else:
            stash: list[Tensor | None] = [_keep_if(len(chunks) == 1, forward(chunk)) for chunk in chunks]
            scatter = torch.zeros(len(tokens.targets), **shape)
            full = [None if v is None else scatter.index_copy(0, rows, v) for v in (logp, entropy, lse)]
            known = coefficients(*full, prepare(tokens, spec, full[0], full[1]), spec)
            picked = replace(known, a=known.a[rows], b=_pick(known.b, rows), z=_pick(known.z, rows))
            for chunk, logits in zip(chunks, stash, strict=True):
                backward(chunk, logits, picked, chunk)
            loss, metrics = known.loss, known.metrics

        dx, dw, db = m.gradients(weight, bias)
        ctx.save_for_backward(dx, dw, db)
        outputs_logp = torch.zeros(len(tokens.targets), **shape).index_copy_(0, rows, logp)
        outputs_entropy = None
        if entropy is not None:
            outputs_entropy = torch.zeros(len(tokens.targets), **shape).index_copy_(0, rows, entropy)
            ctx.mark_non_differentiable(outputs_entropy)
        ctx.mark_non_differentiable(metrics, outputs_logp)
        return loss, metrics, outputs_logp, outputs_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
        grads = ctx.saved_tensors
        if upstream.is_cuda or upstream.item() != 1:
            grads = [None if g is None else g * upstream.to(g.dtype) for g in grads]
        return (*grads, None, None, None, None)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head, want_entropy):  # type: ignore[no-untyped-def]
        m = _Matrices(hidden, weight, bias, (False, False, False))
        rows = _trained_rows(targets != IGNORE)
        parts = []
        for chunk in _chunks(len(rows), head.chunk_rows):
            index = rows[chunk]
            parts.append(head.at(index).forward(m.logits(index), targets[index], want_entropy))
        dtype = torch.float32 if hidden.dtype != torch.float64 else torch.float64
        logp, lse = (torch.zeros(len(targets), dtype=dtype, device=hidden.device) for _ in range(2))
        entropy = torch.zeros_like(logp) if want_entropy else None
        if parts:
            logp[rows], lse[rows] = torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])
            if entropy is not None:
                entropy[rows] = torch.cat([p[1] for p in parts])
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy, rows)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):  # type: ignore[no-untyped-def]
        hidden, weight, bias, targets, lse, entropy, rows = ctx.saved_tensors
        m = _Matrices(hidden, weight, bias, ctx.needs_input_grad[:3])
        a = torch.zeros_like(lse) if grad_logp is None else grad_logp.to(lse.dtype)
        b = None if grad_entropy is None else grad_entropy.to(lse.dtype)
        for chunk in _chunks(len(rows), ctx.head.chunk_rows):
            i = rows[chunk]
            _run_backward(m, ctx.head, None, targets[i], lse[i], _pick(entropy, i), (a[i], _pick(b, i), None), i)
        return (*m.gradients(weight, bias), None, None, None)


class _LogitsLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, head, want_entropy, in_place):  # type: ignore[no-untyped-def]
        logp, entropy, lse = head.forward(logits, targets, want_entropy)
        ctx.save_for_backward(logits, targets, lse, entropy)
        ctx.head, ctx.in_place = head, in_place
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):  # type: ignore[no-untyped-def]
        logits, targets, lse, entropy = ctx.saved_tensors
        gradient = logits if ctx.in_place else logits.clone()
        a = torch.zeros_like(lse) if grad_logp is None else grad_logp.to(lse.dtype).contiguous()
        b = None if grad_entropy is None else grad_entropy.to(lse.dtype).contiguous()
        ctx.head.backward_(gradient, targets, lse, entropy, a, b, None)
        return gradient, None, None, None, None


def _pick(values: Tensor | None, index: Tensor) -> Tensor | None:
    return None if values is None else values[index]


def _keep_if(keep: bool, logits: Tensor) -> Tensor | None:
    return logits if keep else None


def _trained_rows(trained: Tensor) -> Tensor:
    """int64 indices of the rows that enter the head; on a GPU all of them, as counting would cost a host sync."""
    return torch.arange(len(trained), device=trained.device) if trained.is_cuda else trained.nonzero()[:, 0]


def _chunks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` of n rows, as even as can be."""
    count = -(-n // size)
    for k in range(count):
        yield slice(n * k // count, n * (k + 1) // count)


def _head(
    hidden: Tensor, weight: Tensor, inv_temperature: float | Tensor, softcap: float | None, workspace_bytes: int | None,
    backend: str | None,
) -> _Head:  # fmt: skip
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES.get(hidden.device.type, 64 << 20)
    chunk_rows = max(1, workspace_bytes // (len(weight) * hidden.element_size()))
    return _Head(backends.select(hidden.device, hidden.dtype, backend), inv_temperature, softcap, chunk_rows)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} do not fit; give [N, H] and [V, H], V >= 1")
    if not hidden.is_floating_point() or hidden.device != weight.device:
        raise ValueError(f"hidden is {hidden.dtype} on {hidden.device}, weight on {weight.device}; give floats on one device")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; give [V] = {list(weight.shape[:1])}")


def _check_rows(rows: Tensor, targets: Tensor, inv_temperature: float | Tensor, name: str) -> None:
    if rows.ndim != 2 or targets.shape != rows.shape[:1] or targets.dtype != torch.int64 or targets.device != rows.device:
        raise ValueError(
            f"targets is {targets.dtype} {list(targets.shape)} on {targets.device} for {name} {list(rows.shape)} on {rows.device}; "
            "give int64 [N] on the same device"
        )
    if isinstance(inv_temperature, Tensor) and inv_temperature.ndim and inv_temperature.shape != targets.shape:
        raise ValueError(f"inv_temperature is {list(inv_temperature.shape)}; give a number or [N] = {list(targets.shape)}")
