"""Merging of single-task policies: the baseline that needs no further training.

    linear           mean of theta_i                                              (Wortsman et al. 2022)
    task_arithmetic  theta_0 + scale * mean of tau_i,  tau_i = theta_i - theta_0  (Ilharco et al. 2023)
    ties             theta_0 + scale * mean of the trimmed tau_i that agree in sign  (Yadav et al. 2023)
    dare             task_arithmetic with each tau_i dropped out and rescaled   (Yu et al. 2024)
    dare_ties        drop-out and rescaling in place of the trim, then the sign election of ties

Weights are dicts of tensors with the same names and shapes; arithmetic is in float32, the result has the base's dtypes.
Tensors that are not floating point (counters, masks) are taken from the base. Trimming is per tensor, which bounds
memory and is what mergekit does; the TIES paper trims over the whole vector.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Method = Literal["linear", "task_arithmetic", "ties", "dare", "dare_ties"]


def merge(
    method: Method,
    base: Weights,
    models: Sequence[Weights],
    *,
    scale: float = 1.0,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Merge single-task models, whose tensors have the base's names and shapes.

    scale: of the merged task vector (not for linear).
    density: share of each task vector that is kept, above 0 (ties, dare).   seed: of the drop-out (dare).
    """
    merged: dict[str, Tensor] = {}
    for name, start in base.items():
        if not start.is_floating_point():
            merged[name] = start.clone()
            continue
        origin = start.float()
        deltas = [model[name].float() - origin for model in models]
        if method in ("dare", "dare_ties"):
            deltas = [_drop(delta, density, seed, f"{number}:{name}") for number, delta in enumerate(deltas)]
        if method == "ties":
            deltas = [_trim(delta, density) for delta in deltas]
        stack = torch.stack(deltas)
        change = _elect(stack) if method in ("ties", "dare_ties") else stack.mean(dim=0)
        merged[name] = (origin + (1.0 if method == "linear" else scale) * change).to(start.dtype)
    return merged


def _trim(delta: Tensor, density: float) -> Tensor:
    """Keep the largest `density` of the entries by magnitude, 0 elsewhere; ties at the threshold are kept."""
    keep = max(1, round(density * delta.numel()))
    threshold = delta.abs().reshape(-1).kthvalue(delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= threshold, delta, torch.zeros_like(delta))


def _drop(delta: Tensor, density: float, seed: int, key: str) -> Tensor:
    """Keep each entry with probability `density`, divided by it: the expectation is unchanged."""
    # the CPU generator reads the low 32 bits of a seed alone, so both parts go through one hash
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept.to(delta.device), delta / density, torch.zeros_like(delta))


def _elect(deltas_M: Tensor) -> Tensor:
    """Per entry the sign of the sum, then the mean of the non-zero entries that have that sign."""
    agree_M = (torch.sign(deltas_M) == torch.sign(deltas_M.sum(dim=0))) & (deltas_M != 0)
    return (agree_M * deltas_M).sum(dim=0) / agree_M.sum(dim=0).clamp(min=1)
