"""The oracle: the same quantities in float64, one sequence after another, differentiated by autograd.

Written for reading, from the papers' definitions, sharing no formula with `losses.py`. Tests and benchmarks judge every
backend against it. Slow, and it holds all logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_kernels.spec import IGNORE, LossSpec, Tokens

_BOUND = 20.0


def logprob(
    logits: Tensor, targets: Tensor, inv_temperature: float | Tensor = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse) float64 [N] of logits [N, V] in any dtype; 0 where the target is IGNORE."""
    used = targets != IGNORE
    z = logits.double()[used]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z * (inv_temperature.double()[used, None] if isinstance(inv_temperature, Tensor) else inv_temperature)
    log_p = torch.log_softmax(z, dim=-1)
    picked = log_p.gather(-1, targets[used, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    nothing = torch.zeros(len(targets), dtype=torch.float64, device=logits.device)
    logp, h, lse = (nothing.masked_scatter(used, v) for v in (picked, entropy, torch.logsumexp(z, dim=-1)))
    return logp, h, lse


def head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(logp, entropy, lse) float64 [N] of a language-model head, the logits unrounded."""
    logits = hidden.double() @ weight.double().T
    return logprob(logits if bias is None else logits + bias.double(), targets, inv_temperature, softcap)


def policy_loss(
    logp: Tensor, entropy: Tensor | None, tokens: Tokens, spec: LossSpec, lse: Tensor | None = None
) -> Tensor:
    """The loss, scalar; its gradient in logp, entropy and lse is autograd's."""
    old = logp.detach() if tokens.old is None else tokens.old
    members = _sequences(tokens)
    seen = None if entropy is None else entropy.detach()
    kept, weight = _corrections(logp.detach(), seen, old, members, tokens, spec)
    total = logp.new_zeros(())
    counted_tokens = counted_sequences = 0
    for index in members:
        a, keep, w = tokens.advantages[index].to(logp.dtype), kept[index], weight[index]
        counted = keep if spec.denominator == "kept" else torch.ones_like(keep)
        current = logp[index]
        log_ratio = current - old[index]
        terms = w * keep * _policy(current, log_ratio, a, spec)
        if spec.beta:
            assert tokens.reference is not None
            terms = terms + spec.beta * _kl(current, log_ratio, tokens.reference[index], spec)
        if spec.entropy_coef:
            assert entropy is not None
            terms = terms - spec.entropy_coef * entropy[index]
        if spec.z_loss:
            assert lse is not None
            terms = terms + spec.z_loss * lse[index] ** 2
        size = int(counted.sum())
        if size:
            counted_tokens, counted_sequences = counted_tokens + size, counted_sequences + 1
            summed = (terms * counted).sum()
            total = total + (summed / size if spec.aggregation == "sequence" else summed)
    n = tokens.denominator
    if n is None:
        n = max(1, counted_tokens if spec.normaliser == "tokens" else counted_sequences) * spec.length_constant
    return total / n


def _sequences(tokens: Tokens) -> list[Tensor]:
    """Indices of the trained tokens of each sequence that has any."""
    trained = tokens.trained()
    ids = torch.zeros_like(tokens.targets) if tokens.sequences is None else tokens.sequences
    found = [((ids == k) & trained).nonzero()[:, 0] for k in ids.unique()]
    return [index for index in found if len(index)]


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_BOUND, _BOUND).exp()


def _policy(current: Tensor, log_ratio: Tensor, a: Tensor, spec: LossSpec) -> Tensor:
    """Per-token policy term of one sequence."""
    ratio = _bounded_exp(log_ratio if spec.level == "token" else log_ratio.mean().expand_as(log_ratio))
    low, high = 1 - spec.eps_low, 1 + spec.eps_high
    if spec.policy == "clip":
        gain = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
        if spec.dual_clip is not None:
            gain = torch.where(a < 0, torch.maximum(gain, spec.dual_clip * a), gain)
        return -gain
    if spec.policy == "cispo":
        return -ratio.clamp(max=spec.cispo_max).detach() * a * current
    if spec.policy == "sapo":
        tau = torch.where(a > 0, torch.full_like(a, spec.sapo_tau_positive), spec.sapo_tau_negative)
        return -a * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    if spec.policy == "vespo":
        whole = _bounded_exp(log_ratio.sum()).detach()
        up = whole ** spec.vespo_positive[0] * torch.exp(spec.vespo_positive[1] * (1 - whole))
        down = whole ** spec.vespo_negative[0] * torch.exp(spec.vespo_negative[1] * (1 - whole))
        return -torch.where(a >= 0, up, down) * a * current
    if spec.policy == "gmpo":
        ratio = _bounded_exp(log_ratio)
        pessimistic = torch.where(a > 0, ratio.clamp(max=high), ratio.clamp(min=low))
        return -a * pessimistic.log().mean().exp()
    return -a * current


def _kl(current: Tensor, log_ratio: Tensor, reference: Tensor, spec: LossSpec) -> Tensor:
    """Per-token KL estimate of one sequence."""
    gap = (reference - current).clamp(-_BOUND, _BOUND)
    value = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - 1 - gap}[spec.kl]
    if spec.kl_correction:
        value = value * _bounded_exp(log_ratio if spec.level == "token" else log_ratio.mean())
    return value


def _corrections(
    logp: Tensor, entropy: Tensor | None, old: Tensor, members: list[Tensor], tokens: Tokens, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """(kept bool [N], weight [N]) of all corrections and masks."""
    kept, weight, rollout = torch.ones(len(logp), dtype=torch.bool), torch.ones_like(logp), tokens.rollout
    if spec.rollout is not None:
        assert rollout is not None
        kept = rollout.isfinite()
        for index in members:
            index = index[rollout[index].isfinite()]
            gap = old[index] - rollout[index]
            if spec.rollout_level != "token" and len(index):
                gap = (gap.sum() if spec.rollout_level == "sequence" else gap.mean()).expand_as(gap)
            w = _bounded_exp(gap)
            if spec.rollout == "truncate":
                weight[index] = w.clamp(max=spec.rollout_max)
            else:
                kept[index] = (w >= spec.rollout_min) & (w <= spec.rollout_max)
                weight[index] = w if spec.rollout == "mask" else torch.ones_like(w)
    whole = torch.cat(members) if members else torch.zeros(0, dtype=torch.int64)
    behind = old if rollout is None else rollout
    if spec.off_policy_threshold is not None:
        for index in members:
            gap = torch.where(behind[index].isfinite(), behind[index] - logp[index], 0)
            if gap.mean() > spec.off_policy_threshold:
                kept[index] &= tokens.advantages[index] >= 0
    if spec.top_entropy < 1:
        assert entropy is not None
        by_entropy = sorted(whole.tolist(), key=lambda i: (-float(entropy[i]), i))
        kept[by_entropy[-(-int(1e9 * spec.top_entropy * len(whole)) // 10**9) :]] = False
    if spec.drop_covariance > 0:
        a = tokens.advantages
        covariance = (logp - logp[whole].mean()) * (a - a[whole].mean())
        by_covariance = sorted(whole.tolist(), key=lambda i: (-float(covariance[i]), i))
        kept[by_covariance[: -(-int(1e9 * spec.drop_covariance * len(whole)) // 10**9)]] = False
    return kept, weight
