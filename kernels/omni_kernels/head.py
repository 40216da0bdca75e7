"""A head: how rows of hidden become probabilities, and of a loss's derivatives in them the gradient of the logits.

The whole vocabulary or a part of its columns; `linear.py` says which rows and columns come when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from omni_kernels.gemms import Matrices
from omni_kernels.losses import Prepared
from omni_kernels.plan import Plan, plan
from omni_kernels.spec import IGNORE, LossSpec

_LEAST_LOG_P = -1024.0  # nats: p is 0 long before, and p log p with it


@dataclass(frozen=True)
class Head:
    """How rows of hidden become probabilities. tile_rows: GEMMs see exactly so many rows at a time; 0: whole chunks.

    first: the token of the first column, where columns are a part of the vocabulary.
    """

    rows: ModuleType
    inv_temperature: float | Tensor = 1.0
    softcap: float | None = None
    workspace_bytes: int | None = None
    tile_rows: int = 0
    first: int | None = None

    @property
    def own_products(self) -> bool:
        """Whether the backend's GEMMs are `decoder`'s, where these take the operands, instead of torch's."""
        return getattr(self.rows, "OWN_PRODUCTS", False)

    @property
    def may_take_all(self) -> bool:
        """Whether all rows may go at once where that needs less memory than a sum over chunks."""
        return self.workspace_bytes is None and self.own_products

    def at(self, index: Tensor | slice) -> Head:
        """The head of some of the rows."""
        t = self.inv_temperature
        return replace(self, inv_temperature=t[index]) if isinstance(t, Tensor) and t.ndim else self

    def beginning(self, column: int) -> Head:
        """The head of the columns from here on."""
        return replace(self, first=column + (self.first or 0))

    def plan(self, hidden: Tensor, weight: Tensor, row_wise: bool, needs_dw: bool) -> Plan:
        """How many rows of logits to hold at a time, and whether to compute them again."""
        size = (len(hidden), hidden.shape[1], len(weight), hidden.element_size())
        return plan(*size, self.workspace_bytes, row_wise, hidden.device.type, needs_dw and not self.tile_rows)

    def check_targets(self, targets: Tensor, weight: Tensor) -> None:
        """Raises ValueError for tokens outside the vocabulary and temperatures that are none.

        On the CPU: looking would cost a GPU a host sync.
        """
        check_range(targets, len(weight), self.inv_temperature)

    def forward(self, logits: Tensor, targets: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """(logp, entropy, lse) [C] of logits [C, V]."""
        return self.rows.rows_forward(logits, targets, self.inv_temperature, self.softcap, want_entropy)

    def policy_loss_(
        self, logits: Tensor, targets: Tensor, batch: Prepared, spec: LossSpec, want_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """(logp, entropy, lse) [C], and logits [C, V] overwritten with the gradient of the loss, in one sweep.

        None, and nothing done, where the backend has no such sweep, or none for this loss.
        """
        sweep = getattr(self.rows, "rows_policy_loss_", None)
        if sweep is None:
            return None
        try:
            return sweep(logits, targets, batch, spec, self.inv_temperature, self.softcap, want_entropy)
        except NotImplementedError:
            return None

    def exponentials(
        self, m: Matrices, rows: slice, targets: Tensor, want_entropy: bool
    ) -> tuple[tuple[Tensor, Tensor | None, Tensor], Tensor, Finish] | None:
        """(logp, entropy, lse) [C], a matrix [C, V], and what makes it the gradient; there are no logits.

        None, and nothing done, where the backend leaves this GEMM to torch.
        """
        make = getattr(self.rows, "linear_exponentials", None)
        if make is None or self.tile_rows:
            return None
        try:
            found, exps = make(
                m.hidden[rows], m.weight, m.bias, targets, self.inv_temperature, self.softcap, want_entropy
            )
        except NotImplementedError:
            return None
        return found, exps.values, lambda gradient: exps.gradient_(gradient.a, gradient.b, gradient.z)

    def backward_(self, logits: Tensor, targets: Tensor, stats: Stats, gradient: Gradient) -> None:
        """Overwrites logits [C, V] with their gradient; V may be a part of the vocabulary, whose statistics `stats` are.

        Where the target is not among the columns, the first one stands in for it and is written again.
        """
        if self.first is None:
            self._backward_(logits, targets, stats, gradient)
            return
        local, owned = self.localised(logits, targets)
        u = logits[:, 0].to(stats.lse.dtype)
        bent = None if self.softcap is None else torch.tanh(u / self.softcap)
        scaled = u if bent is None or self.softcap is None else self.softcap * bent
        log_p = (scaled * self.inv_temperature - stats.lse).clamp(min=_LEAST_LOG_P)
        self._backward_(logits, local, stats, gradient)
        slope = -gradient.a
        if gradient.b is not None and stats.entropy is not None:
            slope = slope - gradient.b * (log_p + stats.entropy)
        if gradient.z is not None:
            slope = slope + 2 * gradient.z * stats.lse
        first = slope * log_p.exp() * self.inv_temperature * (1 if bent is None else 1 - bent.square())
        first = torch.where(gradient.live(), first, 0).to(logits.dtype)
        foreign = (targets != IGNORE) & ~owned
        logits[:, 0] = torch.where(foreign, first, logits[:, 0])

    def localised(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(targets as columns of logits, 0 for tokens of other columns; whether the token's column is here)."""
        column = targets - (self.first or 0)
        owned = (column >= 0) & (column < logits.shape[1]) & (targets != IGNORE)
        return torch.where(targets == IGNORE, IGNORE, torch.where(owned, column, 0)), owned

    def _backward_(self, logits: Tensor, targets: Tensor, stats: Stats, gradient: Gradient) -> None:
        """Of rows whose targets are among the columns.

        A backend knows the target's log-prob as z - lse, to the last bit of lse. That is too coarse for 1 - p of a
        sure target, so its entry is written again from the forward log-prob, which was formed from shifted logits.
        """
        a, b, z = gradient.a, gradient.b, gradient.z
        column = torch.where(targets == IGNORE, 0, targets)[:, None].clamp(
            0, logits.shape[1] - 1
        )  # a GPU's are not looked at
        scale = self.inv_temperature
        if self.softcap is not None:
            bent = torch.tanh(logits.gather(1, column)[:, 0].to(a.dtype) / self.softcap)
            scale = scale * (1 - bent.square())
        self.rows.rows_backward_(
            logits, targets, stats.lse, stats.entropy, a, b, self.inv_temperature, self.softcap, 0.0 if z is None else z
        )
        hit = -a * torch.expm1(stats.logp)
        if b is not None and stats.entropy is not None:
            hit = hit - b * stats.logp.exp() * (stats.logp.clamp(min=_LEAST_LOG_P) + stats.entropy)
        if z is not None:
            hit = hit + 2 * z * stats.lse * stats.logp.exp()
        hit = torch.where(gradient.live() & (targets != IGNORE), hit * scale, 0)
        rows = torch.arange(len(logits), device=logits.device)
        logits[rows, column[:, 0]] = hit.to(
            logits.dtype
        )  # on a CPU, scatter_ would take as long as a pass over all logits


@dataclass(frozen=True)
class Stats:
    """fp32 [N] each (fp64 for fp64 input), nats."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor

    def __getitem__(self, index: Tensor | slice) -> Stats:
        return Stats(self.logp[index], pick(self.entropy, index), self.lse[index])


@dataclass(frozen=True)
class Gradient:
    """dloss/dlogp, dloss/dentropy and the weight of lse^2, [N] each; None is 0."""

    a: Tensor
    b: Tensor | None = None
    z: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> Gradient:
        return Gradient(self.a[index], pick(self.b, index), pick(self.z, index))

    def live(self) -> Tensor:
        """bool [N]: rows with any gradient."""
        live = self.a != 0
        for other in (self.b, self.z):
            live = live if other is None else live | (other != 0)
        return live


Finish = Callable[[Gradient], Tensor | None]
"""Makes a matrix that a backend prepared the gradient dlogits, but for the factor [C] of its rows where it returns one."""


def pick(values: Tensor | None, index: Tensor | slice) -> Tensor | None:
    """Of what may not be there."""
    return None if values is None else values[index]


def check_range(targets: Tensor, vocab: int, inv_temperature: float | Tensor) -> None:
    """Raises ValueError for a target outside [0, vocab) other than IGNORE, or its inverse temperature; on the CPU only."""
    if targets.is_cuda or targets.numel() == 0:
        return  # looking would cost a host sync
    low, high = (int(v) for v in targets.aminmax())
    if high >= vocab or (low < 0 and bool(((targets < 0) & (targets != IGNORE)).any())):
        wrong = high if high >= vocab else low
        raise ValueError(f"targets holds {wrong}; give tokens in [0, {vocab}), or {IGNORE} for rows to leave out")
    if isinstance(inv_temperature, Tensor):
        off = (targets != IGNORE) & ~((inv_temperature > 0) & inv_temperature.isfinite())
        if bool(off.any()):
            raise ValueError(f"inv_temperature holds {float(inv_temperature[off][0])}; give finite numbers > 0")
