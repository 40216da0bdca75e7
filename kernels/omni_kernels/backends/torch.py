"""Row kernels in plain torch: any device, any float dtype; the fallback and the second opinion.

Maths in fp32 (fp64 for fp64 logits) over blocks of rows, so that temporaries stay near `BLOCK_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from omni_kernels.gemms import wide_of
from omni_kernels.spec import IGNORE

BLOCK_BYTES = {"cpu": 8 << 20}  # a few rows: temporaries that stay in cache
_DEVICE_BLOCK_BYTES = 256 << 20
_SMALLEST_EXPONENT = -128.0  # exp of it is 0 in fp32; keeps 0 * (-inf) out of the entropy


def reason_unavailable() -> str | None:
    return None


def rows_forward(
    logits: Tensor, targets: Tensor, inv_temperature: float | Tensor, softcap: float | None, want_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """logits [N, V], targets int64 [N] -> logp, entropy or None, logsumexp; fp32 [N] (fp64 for fp64 logits)."""
    n = len(targets)
    dtype = wide_of(logits.dtype)
    logp, lse = (torch.zeros(n, dtype=dtype, device=logits.device) for _ in range(2))
    entropy = torch.zeros_like(logp) if want_entropy else None
    for block in blocks(logits):
        used = targets[block] != IGNORE
        if not used.is_cuda and not used.any():
            continue
        z = scaled(logits[block], inv_temperature, softcap, block)
        peak = z.amax(-1, keepdim=True)
        peak = torch.where(peak == -torch.inf, 0, peak)
        picked = (z.gather(-1, _safe(targets[block])[:, None]) - peak)[:, 0]
        z.sub_(peak)
        floor = _SMALLEST_EXPONENT if dtype == torch.float32 else -1024.0
        e = z.clamp_(min=floor).exp()
        log_total = e.sum(-1).log()
        logp[block] = torch.where(used, picked - log_total, 0)
        lse[block] = torch.where(used, log_total + peak[:, 0], 0)
        if entropy is not None:
            mean = e.mul_(z).sum(-1) / log_total.exp()
            entropy[block] = torch.where(used, log_total - mean, 0)
    return logp, entropy, lse


def rows_backward_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    inv_temperature: float | Tensor,
    softcap: float | None,
    z_loss: float | Tensor = 0.0,
) -> None:
    """Overwrites logits [N, V] with dlogits; z_loss (scalar or [N]) weighs lse^2. Rows without gradient become 0."""
    for block in blocks(logits):
        z = scaled(logits[block], inv_temperature, softcap, block)
        slope: Tensor | None = None
        if softcap is not None:
            bound = _column(inv_temperature, block) * softcap
            slope = 1 - (z / bound).square()
        log_p = z.sub_(lse[block, None]).clamp_(min=-1024.0)
        p = log_p.exp()
        target = _safe(targets[block])[:, None]
        log_p_target, p_target = log_p.gather(-1, target), p.gather(-1, target)
        push = a[block, None]
        hit = -push * torch.expm1(log_p_target)
        scale = -push
        weight = _column(z_loss, block)
        pull: Tensor | None = None
        if isinstance(z_loss, Tensor) or z_loss != 0:
            pull = 2 * weight * lse[block, None]
            scale, hit = scale + pull, hit + pull * p_target
        if b is None:
            g = p.mul_(scale)
        else:
            assert entropy is not None
            spread = b[block, None]
            hit = hit - spread * p_target * (log_p_target + entropy[block, None])
            g = log_p.add_(entropy[block, None]).mul_(-spread).add_(scale).mul_(p)
        g.scatter_(-1, target, hit)
        g.mul_(_column(inv_temperature, block))
        if slope is not None:
            g.mul_(slope)
        used = (targets[block] != IGNORE) & ((a[block] != 0) if b is None else ((a[block] != 0) | (b[block] != 0)))
        if pull is not None:
            used = targets[block] != IGNORE
        logits[block] = torch.where(used[:, None], g, 0).to(logits.dtype)


def blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows, of about `BLOCK_BYTES` in fp32."""
    n, width = logits.shape
    limit = BLOCK_BYTES.get(logits.device.type, _DEVICE_BLOCK_BYTES)
    rows = max(1, math.floor(limit / (max(width, 1) * 4)))
    for start in range(0, n, rows):
        yield slice(start, min(n, start + rows))


def _safe(targets: Tensor) -> Tensor:
    return torch.where(targets == IGNORE, 0, targets)


def _column(value: float | Tensor, block: slice) -> float | Tensor:
    return value[block, None] if isinstance(value, Tensor) and value.ndim else value


def scaled(logits: Tensor, inv_temperature: float | Tensor, softcap: float | None, block: slice) -> Tensor:
    """z of some rows, a fresh wide tensor."""
    z = logits.to(wide_of(logits.dtype), copy=True)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if isinstance(inv_temperature, Tensor) or inv_temperature != 1:
        z.mul_(_column(inv_temperature, block))
    return z
