"""What is measured on the way: float64 sums that add up over micro-batches and ranks, and their final form."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = (
    "loss", "tokens", "kept", "active", "logp", "entropy", "entropy_tokens", "ratio", "ratio_sq",
    "clip_low", "clip_high", "clip_dual", "old_kl_k1", "old_kl_k3",
    "reference_tokens", "reference_kl_k1", "reference_kl_k2", "reference_kl_k3",
    "rollout_tokens", "rollout_gap", "rollout_kl_k3", "rollout_weight", "rollout_weight_sq",
)  # fmt: skip


def pack(sums: dict[str, Tensor]) -> Tensor:
    """float64 [len(METRICS)]: each named tensor summed, 0 for what is absent."""
    zero = torch.zeros((), dtype=torch.float64, device=sums["loss"].device)
    return torch.stack([sums[name].sum(dtype=torch.float64) if name in sums else zero for name in METRICS])


def finalise(metrics: Tensor) -> dict[str, float]:
    """Metric sums to what is logged. One device-to-host copy.

    loss: the sum, as the normaliser is already in it.  tokens: how many were trained on.  All else is a mean over them:
    kept, active: share that passed the masks / has a non-zero gradient coefficient.
    logp, entropy: nats.  ratio: importance ratio before any bound.
    clip_low, clip_high, clip_dual: share with A < 0 below the range / A > 0 above it / A < 0 above the dual bound.
    old_kl_*, reference_kl_*: estimators of KL(current || old) and KL(current || reference), nats.
    rollout_gap: mean |old - rollout|, nats; rollout_kl_k3: KL(rollout || old); rollout_weight: mean correction weight.
    ratio_ess, rollout_weight_ess: effective sample size as a share of the tokens.
    Entries without data (no reference, no entropy, no tokens) are absent.
    """
    sums = dict(zip(METRICS, metrics.tolist(), strict=True))
    result = {"loss": sums["loss"], "tokens": sums["tokens"]}
    for name, total in sums.items():
        if name in result or name.endswith(("_tokens", "_sq")):
            continue
        group = f"{name.split('_')[0]}_tokens"
        count = sums.get(group, sums["tokens"])
        if count > 0:
            result[name] = total / count
            square = sums.get(f"{name}_sq", 0.0)
            if square > 0:
                result[f"{name}_ess"] = total**2 / (count * square)
    return result
