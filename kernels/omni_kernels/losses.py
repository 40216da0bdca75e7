"""The loss, once: per-token vectors in, loss, its gradient coefficients and metrics out.

Every policy loss here is a function of O(N) vectors (log-prob, entropy, advantage, ...). All that a kernel needs to
know of it are two numbers a token, a = dLoss/dlogp and b = dLoss/dentropy. They are written in closed form next to the
value, so that the eager path and all kernels share them; the tests hold them against autograd in float64.

    loss = sum_t share_t * (w_t policy_t + beta kl_t - c_e entropy_t + lambda lse_t^2)        share_t = m_t c_t / n

m is the mask, n the global normaliser, w the rollout weight; c_t is 1 ("token" aggregation) or 1 over the length of the
token's sequence ("sequence"). Nothing is normalised locally unless `Tokens.denominator` is None, so a split into
micro-batches that keeps sequences whole changes nothing. Masked entries are replaced before any exp, never after.

Log-ratios are clamped to +-20 nats; beyond that a term is constant and its gradient 0.
Limits: quantile masks (`top_entropy`, `drop_covariance`) see only the tokens of one call. Gradients are first order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_kernels.metrics import pack
from omni_kernels.spec import LossOutput, LossSpec, Tokens, check

LOG_RATIO_BOUND = 20.0  # nats


@dataclass(frozen=True)
class Prepared:
    """A batch and all that is known of it before its own current log-probs are; every tensor is [N]."""

    trained: Tensor  # bool: m
    share: Tensor  # m c / n
    advantages: Tensor
    kept: Tensor  # bool: passed the corrections and masks
    weight: Tensor | None  # rollout weight w, 0 where dropped; None: 1
    sequences: Tensor | None
    length: Tensor | None  # trained tokens of the own sequence
    old: Tensor | None
    reference: Tensor | None
    rollout: Tensor | None
    slope: Tensor | None  # share * w * dpolicy/dlogp where it is known beforehand (on-policy)

    def rows(self, index: Tensor | slice) -> Prepared:
        """The batch restricted to some rows; for row-wise losses only.

        Those look across a sequence only when on-policy, where its log-ratios are 0: the ids are not needed.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sequences"}
        cut = {name: value[index] for name, value in values.items() if value is not None}
        return replace(self, **cut, sequences=None)


@dataclass(frozen=True)
class Coefficients:
    """loss (scalar), a = dloss/dlogp, b = dloss/dentropy, z = the weight of lse^2 (None: 0), and metric sums."""

    loss: Tensor
    a: Tensor
    b: Tensor | None
    z: Tensor | None
    metrics: Tensor


def policy_loss(
    logp: Tensor, entropy: Tensor | None, tokens: Tokens, spec: LossSpec, lse: Tensor | None = None
) -> LossOutput:
    """The loss of log-probs [N] and, where the spec or a metric wants them, entropies [N], in nats.

    lse: logsumexp [N] of the logits, needed only for `spec.z_loss`. Differentiable in all three. Any device.
    """
    if spec.needs_entropy and entropy is None:
        raise ValueError("policy_loss: entropy is None but the spec uses it; pass the entropy [N]")
    if spec.z_loss != 0 and lse is None:
        raise ValueError("policy_loss: lse is None but spec.z_loss is not 0; pass logsumexp of the logits [N]")
    for name, value in (("logp", logp), ("entropy", entropy), ("lse", lse)):
        if value is not None and value.shape != tokens.targets.shape:
            raise ValueError(f"policy_loss: {name} is {list(value.shape)}; give {list(tokens.targets.shape)}")
    check(tokens, spec)
    with torch.no_grad():
        wide = logp.dtype if logp.dtype == torch.float64 else torch.float32
        seen = [None if v is None else v.detach().to(wide) for v in (logp, entropy, lse)]
        assert seen[0] is not None
        known = coefficients(seen[0], seen[1], seen[2], prepare(tokens, spec, wide, seen[0], seen[1]), spec)
        lse_slope = None if known.z is None or lse is None else 2 * lse * known.z
    loss = _Attach.apply(known.loss, logp, known.a, entropy, known.b, lse, lse_slope)
    return LossOutput(loss, known.metrics)


class _Attach(torch.autograd.Function):
    """Gives a known scalar its known gradients: apply(loss, x1, dloss/dx1, x2, dloss/dx2, ...)."""

    @staticmethod
    def forward(ctx, loss, *pairs):
        ctx.save_for_backward(*pairs[1::2])
        ctx.dtypes = [None if x is None else x.dtype for x in pairs[::2]]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        grads: list[Tensor | None] = [None]
        for slope, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1::2], strict=True):
            grads += [(upstream * slope).to(dtype) if needed and slope is not None else None, None]
        return tuple(grads)


def row_wise(tokens: Tokens, spec: LossSpec) -> bool:
    """Whether (a, b) of a token follow from its own log-prob, given `prepare` of the whole batch.

    Then a fused kernel can make the gradient chunk by chunk, in the forward pass.
    """
    on_policy = tokens.old is None
    if spec.off_policy_threshold is not None or spec.top_entropy < 1 or spec.drop_covariance > 0:
        return False
    if spec.kl_correction and spec.level == "sequence" and spec.beta != 0:
        return False
    if spec.rollout is not None and on_policy:  # w needs the current log-prob
        shrinks = spec.rollout != "truncate" and spec.denominator == "kept"
        return spec.rollout_level == "token" and not spec.couples_tokens and not shrinks
    return on_policy or not spec.couples_tokens


def prepare(
    tokens: Tokens, spec: LossSpec, dtype: torch.dtype, logp: Tensor | None = None, entropy: Tensor | None = None
) -> Prepared:
    """All that is known before the rows are looked at or, given current `logp` and `entropy`, after.

    tokens: checked. dtype: float32 or float64, of the arithmetic.
    """
    trained = tokens.trained()

    def clean(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(trained, values.detach().to(dtype), 0)

    advantages = torch.where(trained, tokens.advantages.detach().to(dtype), 0)
    old, reference, rollout, logp, entropy = map(clean, (tokens.old, tokens.reference, tokens.rollout, logp, entropy))
    sequences = tokens.sequences
    length = segment_sum(trained.to(dtype), sequences).clamp(min=1) if spec.needs_length else None

    kept, weight = trained, None
    if spec.rollout is not None and rollout is not None:
        kept = kept & rollout.isfinite()
        behind = logp if old is None else old
        if behind is not None:
            weight, kept = rollout_weight(behind, rollout, kept, sequences, spec)
    if logp is not None:
        kept = kept & _undisturbed(logp, entropy, advantages, trained, length, old, rollout, sequences, spec)

    counted = kept if spec.denominator == "kept" else trained
    share = counted.to(dtype)
    if spec.aggregation == "sequence":
        share = share / segment_sum(share, sequences).clamp(min=1)
    n = tokens.denominator
    share = share / (_count(counted, sequences, spec).clamp(min=1) if n is None else n)
    share = torch.where(counted, share, 0).to(dtype)  # nothing counts: n is 0 too
    deferred = spec.rollout is not None and old is None and logp is None  # w comes with the current log-prob
    if kept is not trained and not deferred:
        weight = kept.to(dtype) if weight is None else torch.where(kept, weight, 0)

    batch = Prepared(trained, share, advantages, kept, weight, sequences, length, old, reference, rollout, None)
    if logp is None and old is None and spec.couples_tokens:
        nothing = torch.zeros_like(advantages)
        return replace(batch, slope=_policy(nothing, nothing, batch, spec)[1])
    return batch


def normaliser_count(tokens: Tokens, spec: LossSpec) -> Tensor:
    """This call's part of the global normaliser (float64 scalar).

    Sum it over all micro-batches and ranks of the step and give the sum to each of them as `Tokens.denominator`.
    Raises ValueError where the kept tokens depend on the current log-probs: then give denominator = 1 and divide the
    gradients by the summed `kept` metric, or set LossSpec.denominator = "all".
    """
    check(tokens, spec)
    if spec.denominator == "all":
        return _count(tokens.trained(), tokens.sequences, spec)
    if not row_wise(tokens, replace(spec, policy="reinforce", beta=0.0)):
        raise ValueError(
            "the count of kept tokens depends on the current log-probs; set LossSpec.denominator='all', or give "
            "Tokens.denominator=1 and divide the gradients by the summed 'kept' metric"
        )
    batch = prepare(replace(tokens, denominator=1.0), spec, torch.float32)
    return _count(batch.kept, tokens.sequences, spec)


def head_rows(tokens: Tokens, spec: LossSpec, skip_zero_advantage: bool = True) -> Tensor:
    """int64 [R]: the tokens that can change the loss, for `Tokens.rows`. Made where the batch is packed, on the host.

    skip_zero_advantage: also leave out tokens whose advantage is 0, where that alone makes their gradient 0 (no KL,
    entropy bonus or z-loss; no coupling of tokens). They then leave the metrics too, but not the normaliser.
    """
    used = tokens.trained()
    only_policy = not (spec.beta or spec.entropy_coef or spec.z_loss)
    if skip_zero_advantage and only_policy and row_wise(tokens, spec) and not spec.couples_tokens:
        used = used & (tokens.advantages != 0)
    return used.nonzero()[:, 0]


def coefficients(
    logp: Tensor, entropy: Tensor | None, lse: Tensor | None, batch: Prepared, spec: LossSpec
) -> Coefficients:
    """Loss, (a, b, z) and metric sums of prepared tokens; logp, entropy, lse: [N], detached, nats."""
    logp = torch.where(batch.trained, logp, 0)
    old = logp if batch.old is None else batch.old
    log_ratio = logp - old
    if spec.rollout is not None and batch.weight is None and batch.rollout is not None:  # on-policy, row-wise
        weight, kept = rollout_weight(logp, batch.rollout, batch.kept, None, spec)
        batch = replace(batch, weight=weight, kept=kept)

    value, slope, ratio = _policy(logp, log_ratio, batch, spec)
    a = slope if batch.slope is None else batch.slope
    loss = (value * batch.share).sum(dtype=torch.float64)
    if spec.beta != 0:
        kl, kl_slope = _kl(logp, log_ratio, batch, spec)
        loss = loss + spec.beta * (kl * batch.share).sum(dtype=torch.float64)
        a = a + spec.beta * kl_slope
    b = z = None
    active = a != 0
    if entropy is not None:
        entropy = torch.where(batch.trained, entropy, 0)
    if spec.entropy_coef != 0:
        assert entropy is not None
        loss = loss - spec.entropy_coef * (entropy * batch.share).sum(dtype=torch.float64)
        b = -spec.entropy_coef * batch.share
        active = active | (b != 0)
    if spec.z_loss != 0:
        assert lse is not None
        z = spec.z_loss * batch.share
        loss = loss + (torch.where(batch.trained, lse, 0).square() * z).sum(dtype=torch.float64)
        active = active | (z != 0)
    metrics = pack({"loss": loss, "active": active} | _measured(logp, old, entropy, ratio, batch, spec))
    return Coefficients(loss.to(logp.dtype), a, b, z, metrics)


def segment_sum(values: Tensor, sequences: Tensor | None) -> Tensor:
    """The sum over each token's sequence, given back to every token [N]. In float64, in a fixed order."""
    wide = values.double()
    if sequences is None:
        return wide.sum().expand_as(values).to(values.dtype)
    total = torch.zeros_like(wide)
    if wide.is_cuda:
        total.index_put_((sequences,), wide, accumulate=True)  # sorts; index_add_ would be atomic there
    else:
        total.index_add_(0, sequences, wide)
    return total[sequences].to(values.dtype)


def rollout_weight(
    old: Tensor, rollout: Tensor, kept: Tensor, sequences: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """(w, kept) of the correction against the sampler, [N] each; w is 0 where the token is dropped."""
    gap = torch.where(kept, old - rollout, 0)
    if spec.rollout_level != "token":
        gap = segment_sum(gap, sequences)
    if spec.rollout_level == "geometric":
        gap = gap / segment_sum(kept.to(gap.dtype), sequences).clamp(min=1)
    weight = gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if spec.rollout == "truncate":
        weight = weight.clamp(max=spec.rollout_max)
    else:
        kept = kept & (weight >= spec.rollout_min) & (weight <= spec.rollout_max)
        if spec.rollout == "reject":
            weight = torch.ones_like(weight)
    return torch.where(kept, weight, 0), kept


def _ratio(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the clamped log-ratio, and its derivative."""
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    return ratio, torch.where(log_ratio.abs() > LOG_RATIO_BOUND, 0, ratio)  # NaN stays, here and below


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    return torch.where(condition, torch.full_like(like, yes), no)  # of two numbers, where makes fp32


def _policy(logp: Tensor, log_ratio: Tensor, batch: Prepared, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(w policy, share w dpolicy/dlogp, the ratio that bounds apply to), [N] each.

    A term is a function of a ratio; `slope` is its derivative with respect to the log of that ratio. Where the ratio
    belongs to the sequence, every token of it has 1 / length of the sum of slopes.
    """
    advantages, sequences, length = batch.advantages, batch.sequences, batch.length
    low, high = 1 - spec.eps_low, 1 + spec.eps_high
    coupled, passes = spec.couples_tokens, batch.trained
    if spec.policy == "vespo":
        log_total = segment_sum(log_ratio, sequences).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        ratio = log_total.exp()
        rising, falling = spec.vespo_positive, spec.vespo_negative
        k, rate = (_choose(advantages >= 0, rising[i], falling[i], ratio) for i in range(2))
        slope = -(rate + k * log_total - rate * ratio).exp() * advantages
        value, coupled = slope * logp, False
    elif spec.policy == "gmpo":
        assert length is not None
        ratio, _ = _ratio(log_ratio)
        beyond = torch.where(advantages > 0, ratio > high, ratio < low)
        bounded = torch.where(beyond, _choose(advantages > 0, high, low, ratio), ratio)
        value = slope = -advantages * (segment_sum(bounded.log(), sequences) / length).exp()
        passes = passes & ~(beyond | (log_ratio.abs() > LOG_RATIO_BOUND))
    else:
        if coupled:
            assert length is not None
            log_ratio = segment_sum(log_ratio, sequences) / length
        ratio, ratio_slope = _ratio(log_ratio)
        if spec.policy == "clip":
            value = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
            dead = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
            if spec.dual_clip is not None:
                over = (advantages < 0) & (ratio > spec.dual_clip)
                value = torch.where(over, -advantages * spec.dual_clip, value)
                dead = dead | over
            slope = torch.where(dead, 0, -advantages * ratio_slope)
        elif spec.policy == "sapo":
            tau = _choose(advantages > 0, spec.sapo_tau_positive, spec.sapo_tau_negative, ratio)
            gate = torch.sigmoid(tau * (ratio - 1))
            value = -advantages * 4 / tau * gate
            slope = -advantages * ratio_slope * 4 * gate * (1 - gate)
        else:  # a detached factor times logp
            slope = -advantages * (ratio.clamp(max=spec.cispo_max) if spec.policy == "cispo" else 1)
            value, coupled = slope * logp, False

    weight = batch.share if batch.weight is None else batch.share * batch.weight
    slope = slope * weight
    if coupled:
        assert length is not None
        slope = torch.where(passes, segment_sum(slope, sequences) / length, 0)
    return value if batch.weight is None else value * batch.weight, slope, ratio


def _kl(logp: Tensor, log_ratio: Tensor, batch: Prepared, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """(KL estimate, share dKL/dlogp), [N] each."""
    assert batch.reference is not None
    gap = batch.reference - logp
    beyond = gap.abs() > LOG_RATIO_BOUND
    gap = gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if spec.kl == "k1":
        value, slope = -gap, torch.ones_like(gap)
    elif spec.kl == "k2":
        value, slope = gap.square() / 2, -gap
    else:
        value, slope = torch.expm1(gap) - gap, -torch.expm1(gap)
    slope = torch.where(beyond, 0, slope) * batch.share
    if not spec.kl_correction:
        return value, slope
    if spec.level == "token":
        ratio, ratio_slope = _ratio(log_ratio)
        return ratio * value, ratio * slope + ratio_slope * value * batch.share
    assert batch.length is not None
    ratio, ratio_slope = _ratio(segment_sum(log_ratio, batch.sequences) / batch.length)
    through_ratio = segment_sum(value * batch.share, batch.sequences) * ratio_slope / batch.length
    return ratio * value, ratio * slope + torch.where(batch.trained, through_ratio, 0)


def _undisturbed(
    logp: Tensor, entropy: Tensor | None, advantages: Tensor, trained: Tensor, length: Tensor | None,
    old: Tensor | None, rollout: Tensor | None, sequences: Tensor | None, spec: LossSpec,
) -> Tensor:  # fmt: skip
    """bool [N]: what the masks that look at current log-probs and entropies keep."""
    kept = trained
    behind = old if rollout is None else rollout
    if spec.off_policy_threshold is not None and behind is not None:
        assert length is not None
        drift = segment_sum(torch.where(trained & behind.isfinite(), behind - logp, 0), sequences) / length
        kept = kept & ((advantages >= 0) | (drift <= spec.off_policy_threshold))
    if spec.top_entropy < 1:
        assert entropy is not None
        kept = kept & (_rank(entropy, trained) < spec.top_entropy * trained.sum())
    if spec.drop_covariance > 0:
        count = trained.sum().clamp(min=1)
        covariance = (logp - logp.sum() / count) * (advantages - advantages.sum() / count)
        kept = kept & (_rank(covariance, trained) >= spec.drop_covariance * trained.sum())
    return kept


def _rank(values: Tensor, trained: Tensor) -> Tensor:
    """Rank [N] of each trained value, 0 = the largest; ties by position."""
    order = torch.where(trained, values, -torch.inf).argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def _count(counted: Tensor, sequences: Tensor | None, spec: LossSpec) -> Tensor:
    """float64 scalar: tokens, or sequences with at least one of them, times the length constant."""
    if spec.normaliser == "tokens":
        return counted.sum(dtype=torch.float64) * spec.length_constant
    size = counted.double()
    return (size / segment_sum(size, sequences).clamp(min=1)).sum().round() * spec.length_constant


def _measured(
    logp: Tensor, old: Tensor, entropy: Tensor | None, ratio: Tensor, batch: Prepared, spec: LossSpec
) -> dict[str, Tensor]:
    """What `metrics.pack` sums. Clipping is counted on the ratio before any bound."""
    trained, positive, negative = batch.trained, batch.advantages > 0, batch.advantages < 0
    ratio = torch.where(trained, ratio, 0)
    dual = torch.inf if spec.dual_clip is None else spec.dual_clip
    result = {
        "tokens": trained,
        "kept": batch.kept,
        "logp": logp,
        "ratio": ratio,
        "ratio_sq": ratio.square(),
        "clip_low": negative & (ratio < 1 - spec.eps_low),
        "clip_high": positive & (ratio > 1 + spec.eps_high),
        "clip_dual": negative & (ratio > dual),
        "old_kl_k1": logp - old,
        "old_kl_k3": _k3(old - logp),
    }
    if entropy is not None:
        result |= {"entropy": entropy, "entropy_tokens": trained}
    if batch.reference is not None:
        gap = batch.reference - logp
        result |= {"reference_tokens": trained, "reference_kl_k1": -gap}
        result |= {"reference_kl_k2": gap.square() / 2, "reference_kl_k3": _k3(gap)}
    if batch.rollout is not None:
        finite = trained & batch.rollout.isfinite()
        gap = torch.where(finite, old - batch.rollout, 0)
        weight = finite.to(logp.dtype) if batch.weight is None else torch.where(finite, batch.weight, 0)
        result |= {"rollout_tokens": finite, "rollout_gap": gap.abs(), "rollout_kl_k3": _k3(gap)}
        result |= {"rollout_weight": weight, "rollout_weight_sq": weight.square()}
    return result


def _k3(gap: Tensor) -> Tensor:
    gap = gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.expm1(gap) - gap
