"""The loss, once: per-token vectors in, loss, its gradient coefficients and metrics out.

Every policy loss here is a function of O(N) vectors (log-prob, entropy, advantage, ...). All that a kernel needs to know of
it are two numbers a token: a = dLoss/dlogp and b = dLoss/dentropy. They are written in closed form next to the value, so
that the eager path, the C++, Triton and CUDA kernels all share them; the tests hold them against autograd in float64.

    loss = sum_t share_t * (w_t * policy_t + beta * kl_t - c_e * entropy_t + lambda * lse_t^2),   share_t = m_t * c_t / n

m is the mask, n the global normaliser, c_t = 1 ("token" aggregation) or 1 / length of the token's sequence ("sequence"),
w the rollout weight. Nothing is normalised locally unless `Tokens.denominator` is None, so a split into micro-batches that
keeps sequences whole changes nothing. Log-ratios are clamped to +-20 nats; beyond that a term is constant, its gradient 0.

Limits: quantile masks (`top_entropy`, `drop_covariance`) see only the tokens of one call. The gradient is first order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

IGNORE = -100  # target of a token that is not trained on; its row is never read
LOG_RATIO_BOUND = 20.0  # nats

METRICS = (
    "loss", "tokens", "kept", "active", "logp", "entropy", "entropy_tokens", "ratio", "ratio_sq", "clip_low", "clip_high",
    "clip_dual", "old_kl_k1", "old_kl_k3", "reference_tokens", "reference_kl_k1", "reference_kl_k2", "reference_kl_k3",
    "rollout_tokens", "rollout_gap", "rollout_weight", "rollout_weight_sq",
)  # fmt: skip


@dataclass(frozen=True)
class LossSpec:
    """Which loss. Dimensionless unless a unit is given. Hashable, so it can key caches.

    policy: "clip" (PPO, arXiv 1707.06347; GRPO, 2402.03300; with level="sequence" GSPO, 2507.18071), "cispo" (2506.13585),
        "sapo" (2511.20347), "vespo" (2602.10693), "gmpo" (2507.20673), "reinforce" (-A logp).
    level: the importance ratio is the token's, or the sequence's geometric mean (GSPO). "gmpo" and "vespo" have their own.
    aggregation: "token" sums tokens; "sequence" takes each sequence's mean first.
    normaliser: what `normaliser_count` counts; `length_constant` multiplies it (Dr. GRPO, 2503.20783: maximum completion
        length in tokens).
    denominator: "kept": a token that a correction or mask drops leaves the loss, the KL, the entropy bonus and the count;
        "all": it only loses its policy term (as in TRL).
    eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high]; unequal as in DAPO (2503.14476).
    dual_clip: upper bound of the ratio where A < 0 (1912.09729), at least 1 + eps_high; None: no bound.
    cispo_max: upper bound of the detached ratio of "cispo".
    sapo_tau_positive, sapo_tau_negative: gate temperatures for A > 0 and A <= 0.
    vespo_positive, vespo_negative: (k, lambda) of phi(W) = W^k exp(lambda (1 - W)) for A >= 0 and A < 0.
    beta, kl: weight and estimator of the KL to the reference: k1, k2, k3 (Schulman, "Approximating KL divergence").
    kl_correction: multiply k3 by the importance ratio of `level` (DeepSeek-V3.2, 2512.02556), gradient included.
    entropy_coef: c_e, weight of the entropy bonus, per nat.  z_loss: lambda, weight of lse^2.
    rollout: correction of the old policy against the sampler by w = exp(old - rollout): "truncate" caps w at rollout_max
        (TIS), "mask" keeps w inside [rollout_min, rollout_max] and drops tokens outside (IcePop, 2510.18855), "reject"
        drops like "mask" with w = 1. Tokens with a non-finite rollout log-prob are dropped.
    rollout_level: w of the token, the product over its sequence, or its geometric mean.
    off_policy_threshold: drop sequences with A < 0 whose mean(rollout or old - current) exceeds this, in nats (2512.02556).
    top_entropy: fraction of tokens, those of highest entropy, that keep their policy term (2506.01939); 1 = all.
    drop_covariance: fraction of tokens, those of highest covariance of logp and A, that are dropped (2505.22617).
    """

    policy: Literal["clip", "cispo", "sapo", "vespo", "gmpo", "reinforce"] = "clip"
    level: Literal["token", "sequence"] = "token"
    aggregation: Literal["token", "sequence"] = "token"
    normaliser: Literal["tokens", "sequences"] = "tokens"
    length_constant: float = 1.0
    denominator: Literal["kept", "all"] = "kept"
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    cispo_max: float = 5.0
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    beta: float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_correction: bool = False
    entropy_coef: float = 0.0
    z_loss: float = 0.0
    rollout: Literal["truncate", "mask", "reject"] | None = None
    rollout_level: Literal["token", "sequence", "geometric"] = "token"
    rollout_min: float = 0.0
    rollout_max: float = 2.0
    off_policy_threshold: float | None = None
    top_entropy: float = 1.0
    drop_covariance: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"LossSpec.{name} is {getattr(self, name)!r}; use one of {', '.join(map(repr, allowed))}")
        if self.dual_clip is not None and self.dual_clip < 1 + self.eps_high:
            raise ValueError(f"LossSpec.dual_clip is {self.dual_clip}; use at least 1 + eps_high = {1 + self.eps_high}")
        if self.kl_correction and self.kl != "k3":
            raise ValueError(f"LossSpec.kl_correction is defined for kl='k3', not {self.kl!r}; turn one of them off")
        for name in ("eps_low", "eps_high", "cispo_max", "rollout_min", "rollout_max", "z_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"LossSpec.{name} is {getattr(self, name)}; use a number >= 0")
        for name in ("sapo_tau_positive", "sapo_tau_negative", "length_constant", "top_entropy"):
            if not getattr(self, name) > 0:
                raise ValueError(f"LossSpec.{name} is {getattr(self, name)}; use a number > 0")
        if not 0 <= self.drop_covariance < 1 or self.top_entropy > 1:
            raise ValueError("LossSpec.drop_covariance and top_entropy are fractions: use [0, 1) and (0, 1]")

    @classmethod
    def preset(cls, name: str, **changes: object) -> LossSpec:
        """A published loss by name, with `changes` on top. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"no loss preset {name!r}; use one of {', '.join(PRESETS)}")
        return replace(cls(), **{**PRESETS[name], **changes})  # type: ignore[arg-type]

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss itself depends on the entropy (metrics aside)."""
        return self.entropy_coef != 0 or self.top_entropy < 1

    @property
    def sequence_ratio(self) -> bool:
        """Whether the policy term couples the tokens of a sequence."""
        return self.policy in ("gmpo", "vespo") or (self.level == "sequence" and self.policy != "reinforce")


_CHOICES = {
    "policy": ("clip", "cispo", "sapo", "vespo", "gmpo", "reinforce"),
    "level": ("token", "sequence"),
    "aggregation": ("token", "sequence"),
    "normaliser": ("tokens", "sequences"),
    "denominator": ("kept", "all"),
    "kl": ("k1", "k2", "k3"),
    "rollout": ("truncate", "mask", "reject", None),
    "rollout_level": ("token", "sequence", "geometric"),
}

PRESETS: Mapping[str, Mapping[str, object]] = {
    "grpo": {"aggregation": "sequence", "normaliser": "sequences"},
    "bnpo": {},
    "dapo": {"eps_high": 0.28},
    "dr_grpo": {"normaliser": "sequences"},  # give length_constant
    "cispo": {"policy": "cispo"},
    "sapo": {"policy": "sapo", "aggregation": "sequence", "normaliser": "sequences"},
    "gspo": {"level": "sequence", "aggregation": "sequence", "normaliser": "sequences", "eps_low": 3e-4, "eps_high": 4e-4},
    "luspo": {"level": "sequence", "normaliser": "sequences", "eps_low": 3e-4, "eps_high": 4e-4},
    "vespo": {"policy": "vespo"},
    "gmpo": {"policy": "gmpo", "aggregation": "sequence", "normaliser": "sequences", "eps_low": 0.33, "eps_high": 0.49},
    "reinforce": {"policy": "reinforce"},
}


@dataclass(frozen=True)
class Tokens:
    """The batch, flat: N tokens of any number of sequences, in any order; every tensor is [N] on one device.

    targets: int64, the sampled token; IGNORE (-100) marks a token that is not trained on (same as mask = False).
    advantages: float.
    mask: bool; None trains on every token with a target.
    sequences: int64 in [0, N), the sequence of each token; needed by whatever looks at sequences; None: all one sequence.
    old: log-prob before this update, nats; None means on-policy: old is the current log-prob.
    reference: log-prob of the frozen reference, nats; needed when beta != 0, else only measured.
    rollout: log-prob that the sampler reported, nats; needed by `LossSpec.rollout`, else only measured.
    denominator: the global normaliser n, from `normaliser_count` summed over all micro-batches and ranks; None: count here.
    """

    targets: Tensor
    advantages: Tensor
    mask: Tensor | None = None
    sequences: Tensor | None = None
    old: Tensor | None = None
    reference: Tensor | None = None
    rollout: Tensor | None = None
    denominator: Tensor | float | None = None

    def trained(self) -> Tensor:
        """bool [N]: the tokens that count."""
        trained = self.targets != IGNORE
        return trained if self.mask is None else trained & self.mask


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar, differentiable. metrics: float64 [len(METRICS)], sums: add them over micro-batches and ranks, then
    `finalise`. logp, entropy: fp32 [N], detached, where asked for (0 on tokens that are not trained on)."""

    loss: Tensor
    metrics: Tensor
    logp: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Coefficients:
    """loss (scalar), a = dloss/dlogp, b = dloss/dentropy or None, z = weight of lse^2 or None (all [N]), metric sums."""

    loss: Tensor
    a: Tensor
    b: Tensor | None
    z: Tensor | None
    metrics: Tensor


@dataclass(frozen=True)
class Prepared:
    """A batch with everything computed that does not depend on the row's own current log-prob."""

    trained: Tensor  # bool [N]
    share: Tensor  # m c / n
    advantages: Tensor
    kept: Tensor  # bool [N]
    weight: Tensor | None  # rollout weight, 0 where dropped; None: 1
    sequences: Tensor | None
    length: Tensor | None  # tokens of the own sequence
    old: Tensor | None
    reference: Tensor | None
    rollout: Tensor | None
    slope: Tensor | None  # on-policy: d policy / dlogp, already times share and weight

    def rows(self, index: Tensor | slice) -> Prepared:
        """The batch restricted to some rows; valid for row-wise losses only.

        Those look across a sequence only when on-policy, where its log-ratios are 0: the ids are not needed.
        """
        cut = {f.name: getattr(self, f.name) for f in fields(self)} | {"sequences": None}
        return Prepared(**{name: None if value is None else value[index] for name, value in cut.items()})


def segment_sum(values: Tensor, sequences: Tensor | None) -> Tensor:
    """Sum of each token's sequence, given back to every token. Accumulates in float64, in a fixed order."""
    wide = values.double()
    if sequences is None:
        return wide.sum().expand_as(values).to(values.dtype)
    total = torch.zeros_like(wide)
    if wide.is_cuda:  # index_add_ is atomic there, index_put_ sorts
        total.index_put_((sequences,), wide, accumulate=True)
    else:
        total.index_add_(0, sequences, wide)
    return total[sequences].to(values.dtype)


def row_wise(tokens: Tokens, spec: LossSpec) -> bool:
    """Whether (a, b) of a token is known from its own log-prob alone, given `prepare` of the whole batch.

    Then a fused kernel can make the gradient chunk by chunk, in the forward pass.
    """
    on_policy = tokens.old is None
    if spec.off_policy_threshold is not None or spec.top_entropy < 1 or spec.drop_covariance > 0:
        return False
    if spec.kl_correction and spec.level == "sequence" and spec.beta != 0:
        return False
    if spec.rollout is not None and on_policy:  # w needs the current log-prob
        drops = spec.rollout != "truncate" and spec.denominator == "kept"
        return spec.rollout_level == "token" and not spec.sequence_ratio and not drops
    return on_policy or not spec.sequence_ratio


def prepare(tokens: Tokens, spec: LossSpec, logp: Tensor | None = None, entropy: Tensor | None = None) -> Prepared:
    """Everything about the batch that is known before the rows are looked at, or, with `logp` and `entropy`, after.

    Raises ValueError for missing or misshapen inputs.
    """
    _check(tokens, spec)
    trained = tokens.trained()
    dtype = tokens.advantages.dtype if logp is None else logp.dtype
    if dtype not in (torch.float32, torch.float64):
        dtype = torch.float32

    def clean(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(trained, values.detach().to(dtype), 0)

    advantages, old, reference, rollout = map(clean, (tokens.advantages, tokens.old, tokens.reference, tokens.rollout))
    assert advantages is not None
    sequences = tokens.sequences
    length = segment_sum(trained.to(dtype), sequences) if _uses_sequences(spec) else None

    kept, weight = trained, None
    if spec.rollout is not None and rollout is not None:
        kept = kept & rollout.isfinite()
        behind = old if old is not None else logp
        if behind is not None:
            weight, inside = rollout_weight(behind, rollout, kept, sequences, spec)
            kept = inside
    if logp is not None:
        kept = kept & _keep(logp, entropy, advantages, trained, length, old, rollout, sequences, spec)

    counted = kept if spec.denominator == "kept" else trained
    share = counted.to(dtype)
    if spec.aggregation == "sequence":
        share = share / segment_sum(share, sequences).clamp(min=1)
    n = tokens.denominator
    if n is None:
        n = _count(counted, sequences, spec).clamp(min=1)
    share = share / n
    if spec.denominator == "all" and kept is not trained:
        weight = kept.to(dtype) if weight is None else torch.where(kept, weight, 0)

    batch = Prepared(trained, share, advantages, kept, weight, sequences, length, old, reference, rollout, None)
    if logp is None and old is None and spec.sequence_ratio and row_wise(tokens, spec):
        zero = torch.zeros_like(advantages)
        return replace(batch, slope=_policy(zero, zero, batch, spec)[1])
    return batch


def normaliser_count(tokens: Tokens, spec: LossSpec) -> Tensor:
    """This call's part of the global normaliser (float64 scalar): sum it over all micro-batches and ranks of the step and give
    the sum to each as `Tokens.denominator`.

    Raises ValueError where the kept tokens depend on the current log-probs: then pass denominator = 1 and divide the
    gradients by the summed `kept` metric, or set LossSpec.denominator = "all".
    """
    if spec.denominator == "all":
        return _count(tokens.trained(), tokens.sequences, spec)
    if not row_wise(tokens, replace(spec, policy="reinforce", beta=0.0)):
        raise ValueError(
            "the count of kept tokens depends on the current log-probs; set LossSpec.denominator='all', or give denominator=1 "
            "and divide the gradients by the summed 'kept' metric"
        )
    return _count(prepare(replace(tokens, denominator=1.0), spec).kept, tokens.sequences, spec)


def coefficients(logp: Tensor, entropy: Tensor | None, lse: Tensor | None, batch: Prepared, spec: LossSpec) -> Coefficients:
    """Loss, (a, b, z) and metric sums of prepared tokens. logp, entropy, lse: [N], detached, nats."""
    logp = torch.where(batch.trained, logp, 0)
    old = logp if batch.old is None else batch.old
    log_ratio = logp - old
    weight = batch.weight
    if spec.rollout is not None and weight is None and batch.rollout is not None:  # on-policy, row-wise
        weight, kept = rollout_weight(old, batch.rollout, batch.kept, None, spec)
        batch = replace(batch, weight=torch.where(kept, weight, 0), kept=kept)

    value, slope, ratio = _policy(logp, log_ratio, batch, spec)
    a = slope if batch.slope is None else batch.slope
    loss = (value * batch.share).sum(dtype=torch.float64)
    if spec.beta != 0 and batch.reference is not None:
        kl, kl_slope = _kl(logp, log_ratio, batch, spec)
        loss = loss + spec.beta * (kl * batch.share).sum(dtype=torch.float64)
        a = a + spec.beta * kl_slope
    b = z = None
    if spec.entropy_coef != 0:
        assert entropy is not None
        loss = loss - spec.entropy_coef * (torch.where(batch.trained, entropy, 0) * batch.share).sum(dtype=torch.float64)
        b = -spec.entropy_coef * batch.share
    if spec.z_loss != 0:
        assert lse is not None
        z = spec.z_loss * batch.share
        loss = loss + (torch.where(batch.trained, lse, 0).square() * z).sum(dtype=torch.float64)
    active = a != 0
    if b is not None or z is not None:
        active = active | (batch.share != 0)
    metrics = _measure(loss, logp, entropy, ratio, active, batch, spec)
    return Coefficients(loss.to(logp.dtype), a, b, z, metrics)


def policy_loss(logp: Tensor, entropy: Tensor | None, tokens: Tokens, spec: LossSpec, lse: Tensor | None = None) -> LossOutput:
    """The loss of log-probs [N] (and entropies [N], in nats, where the spec or a metric wants them), differentiable in both.

    lse: logsumexp [N] of the logits, only for `spec.z_loss`. Any device; gradients are first order.
    """
    if spec.needs_entropy and entropy is None:
        raise ValueError("policy_loss: entropy is None but the spec has an entropy bonus or mask; pass the entropy [N]")
    if spec.z_loss != 0 and lse is None:
        raise ValueError("policy_loss: lse is None but spec.z_loss != 0; pass the logsumexp of the logits [N]")
    with torch.no_grad():
        wide = logp if logp.dtype == torch.float64 else logp.float()
        seen = None if entropy is None else entropy.to(wide.dtype)
        batch = prepare(tokens, spec, wide, seen)
        known = coefficients(wide, seen, None if lse is None else lse.to(wide.dtype), batch, spec)
        z = None if known.z is None or lse is None else 2 * lse * known.z
    loss = _Attach.apply(known.loss, logp, known.a, entropy, known.b, lse, z)
    return LossOutput(loss, known.metrics)


class _Attach(torch.autograd.Function):
    """Gives a known scalar its known gradients."""

    @staticmethod
    def forward(ctx, loss, *pairs):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*pairs[1::2])
        ctx.dtypes = [None if x is None else x.dtype for x in pairs[::2]]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        grads: list[Tensor | None] = [None]
        for slope, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1::2], strict=True):
            grads += [(upstream * slope).to(dtype) if needed and slope is not None else None, None]
        return tuple(grads)


def rollout_weight(
    old: Tensor, rollout: Tensor, kept: Tensor, sequences: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """(w, kept) of the correction against the sampler: [N] each; w is 0 where the token is dropped."""
    gap = torch.where(kept, old - rollout, 0)
    if spec.rollout_level != "token":
        gap_sum = segment_sum(gap, sequences)
        gap = gap_sum if spec.rollout_level == "sequence" else gap_sum / segment_sum(kept.to(gap.dtype), sequences).clamp(min=1)
    weight = gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if spec.rollout == "truncate":
        weight = weight.clamp(max=spec.rollout_max)
    else:
        kept = kept & (weight >= spec.rollout_min) & (weight <= spec.rollout_max)
        if spec.rollout == "reject":
            weight = torch.ones_like(weight)
    return torch.where(kept, weight, 0), kept


def finalise(metrics: Tensor) -> dict[str, float]:
    """Metric sums to what is logged: means over trained tokens, plus `tokens`, `loss`, and effective sample sizes in (0, 1].

    Entries without data (no reference, no entropy) are absent. One device-to-host copy.
    """
    sums = dict(zip(METRICS, metrics.tolist(), strict=True))
    result = {"loss": sums["loss"], "tokens": sums["tokens"]}
    counts = {"entropy": "entropy_tokens", "reference": "reference_tokens", "rollout": "rollout_tokens"}
    for name, total in sums.items():
        if name in result or name.endswith("_tokens") or name.endswith("_sq"):
            continue
        count = sums[counts.get(name.split("_")[0], "tokens")]
        if count > 0:
            result[name] = total / count
    for name, count_name in (("ratio", "tokens"), ("rollout_weight", "rollout_tokens")):
        if sums[f"{name}_sq"] > 0:
            result[f"{name}_ess"] = sums[name] ** 2 / (sums[count_name] * sums[f"{name}_sq"])
    return result


def _clamped_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the clamped log-ratio and its derivative."""
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    return ratio, torch.where(log_ratio.abs() <= LOG_RATIO_BOUND, ratio, 0)


def _policy(logp: Tensor, log_ratio: Tensor, batch: Prepared, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(w * policy value [N], its share-weighted gradient d/dlogp [N], the ratio that was clipped [N])."""
    advantages, sequences = batch.advantages, batch.sequences
    kept_ratio = None
    coupled = spec.sequence_ratio
    if spec.policy == "vespo":
        log_weight = segment_sum(log_ratio, sequences).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        ratio = log_weight.exp()
        k = torch.where(advantages >= 0, spec.vespo_positive[0], spec.vespo_negative[0])
        rate = torch.where(advantages >= 0, spec.vespo_positive[1], spec.vespo_negative[1])
        slope = -(rate + k * log_weight - rate * ratio).exp() * advantages
        value, coupled = slope * logp, False
    elif spec.policy == "gmpo":
        assert batch.length is not None
        ratio, _ = _clamped_exp(log_ratio)
        low, high = 1 - spec.eps_low, 1 + spec.eps_high
        kept_ratio = torch.where(advantages > 0, ratio <= high, ratio >= low) & (log_ratio.abs() <= LOG_RATIO_BOUND)
        clipped = torch.where(advantages > 0, ratio.clamp(max=high), ratio.clamp(min=low))
        value = -advantages * (segment_sum(clipped.log(), sequences) / batch.length.clamp(min=1)).exp()
        slope = value
    else:
        if coupled:
            assert batch.length is not None
            log_ratio = segment_sum(log_ratio, sequences) / batch.length.clamp(min=1)
        ratio, ratio_slope = _clamped_exp(log_ratio)
        if spec.policy == "clip":
            low, high = 1 - spec.eps_low, 1 + spec.eps_high
            value = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
            dead = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
            if spec.dual_clip is not None:
                over = (advantages < 0) & (ratio > spec.dual_clip)
                value = torch.where(over, -advantages * spec.dual_clip, value)
                dead = dead | over
            slope = torch.where(dead, 0, -advantages * ratio_slope)
        elif spec.policy == "sapo":
            tau = torch.where(advantages > 0, spec.sapo_tau_positive, spec.sapo_tau_negative)
            gate = torch.sigmoid(tau * (ratio - 1))
            value = -advantages * 4 / tau * gate
            slope = -advantages * ratio_slope * 4 * gate * (1 - gate)
        else:  # a detached factor times logp
            factor = ratio.clamp(max=spec.cispo_max) if spec.policy == "cispo" else torch.ones_like(ratio)
            slope = -advantages * factor
            value, coupled = slope * logp, False

    weighted = batch.share if batch.weight is None else batch.share * batch.weight
    if batch.weight is not None:
        value = value * batch.weight
    slope = slope * weighted
    if coupled:
        assert batch.length is not None
        slope = segment_sum(slope, sequences) / batch.length.clamp(min=1)
        slope = torch.where(batch.trained if kept_ratio is None else batch.trained & kept_ratio, slope, 0)
    return value, slope, ratio


def _kl(logp: Tensor, log_ratio: Tensor, batch: Prepared, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """(KL value [N], its share-weighted gradient d/dlogp [N])."""
    assert batch.reference is not None
    gap = batch.reference - logp
    inside = gap.abs() <= LOG_RATIO_BOUND
    gap = gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if spec.kl == "k1":
        value, slope = -gap, torch.ones_like(gap)
    elif spec.kl == "k2":
        value, slope = gap.square() / 2, -gap
    else:
        value, slope = torch.expm1(gap) - gap, -torch.expm1(gap)
    slope = torch.where(inside, slope, 0)
    if not spec.kl_correction:
        return value, slope * batch.share
    if spec.level == "token":
        ratio, ratio_slope = _clamped_exp(log_ratio)
        return ratio * value, (ratio * slope + ratio_slope * value) * batch.share
    assert batch.length is not None
    length = batch.length.clamp(min=1)
    ratio, ratio_slope = _clamped_exp(segment_sum(log_ratio, batch.sequences) / length)
    through = segment_sum(value * batch.share, batch.sequences) * ratio_slope / length
    return ratio * value, ratio * slope * batch.share + torch.where(batch.trained, through, 0)


def _keep(
    logp: Tensor, entropy: Tensor | None, advantages: Tensor, trained: Tensor, length: Tensor | None, old: Tensor | None,
    rollout: Tensor | None, sequences: Tensor | None, spec: LossSpec,
) -> Tensor:  # fmt: skip
    """bool [N]: what the masks that look at current log-probs and entropies keep."""
    kept = trained
    behind = rollout if rollout is not None else old
    if spec.off_policy_threshold is not None and behind is not None:
        assert length is not None
        gap = torch.where(trained & behind.isfinite(), behind - logp, 0)
        drift = segment_sum(gap, sequences) / length.clamp(min=1)
        kept = kept & ((advantages >= 0) | (drift <= spec.off_policy_threshold))
    if spec.top_entropy < 1:
        assert entropy is not None
        kept = kept & (_rank(entropy, trained) < spec.top_entropy * trained.sum())
    if spec.drop_covariance > 0:
        count = trained.sum().clamp(min=1)
        centred = torch.where(trained, logp - torch.where(trained, logp, 0).sum() / count, 0)
        covariance = centred * (advantages - advantages.sum() / count)
        kept = kept & (_rank(covariance, trained) >= spec.drop_covariance * trained.sum())
    return kept


def _rank(values: Tensor, trained: Tensor) -> Tensor:
    """Rank [N] of each trained value, 0 = largest, ties in order of position."""
    order = torch.where(trained, values, -torch.inf).argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _count(counted: Tensor, sequences: Tensor | None, spec: LossSpec) -> Tensor:
    if spec.normaliser == "tokens":
        return counted.sum(dtype=torch.float64) * spec.length_constant
    size = counted.to(torch.float64)
    size = size / segment_sum(size, sequences).clamp(min=1)  # a sequence's tokens sum to 1
    return size.sum().round() * spec.length_constant


def _uses_sequences(spec: LossSpec) -> bool:
    corrected = spec.kl_correction and spec.level == "sequence" and spec.beta != 0
    return spec.sequence_ratio or corrected or spec.off_policy_threshold is not None


def _measure(
    loss: Tensor, logp: Tensor, entropy: Tensor | None, ratio: Tensor, active: Tensor, batch: Prepared, spec: LossSpec
) -> Tensor:
    """Metric sums in the order of METRICS, float64. What was clipped is counted on the ratio before any bound."""
    trained, positive, negative = batch.trained, batch.advantages > 0, batch.advantages < 0
    nothing = torch.zeros((), dtype=logp.dtype, device=logp.device)
    old_gap = (logp if batch.old is None else batch.old) - logp
    old_k3 = torch.expm1(old_gap.clamp(max=LOG_RATIO_BOUND)) - old_gap
    dual = spec.dual_clip if spec.dual_clip is not None else torch.inf
    rows: dict[str, Tensor] = {
        "tokens": trained, "kept": batch.kept, "active": active, "logp": logp, "ratio": ratio * trained,
        "ratio_sq": ratio.square() * trained, "clip_low": negative & (ratio < 1 - spec.eps_low),
        "clip_high": positive & (ratio > 1 + spec.eps_high), "clip_dual": negative & (ratio > dual),
        "old_kl_k1": old_gap, "old_kl_k3": old_k3,
    }  # fmt: skip
    if entropy is not None:
        rows |= {"entropy": torch.where(trained, entropy, 0), "entropy_tokens": trained}
    if batch.reference is not None:
        gap = torch.where(trained, (batch.reference - logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), 0)
        k3 = torch.expm1(gap) - gap
        rows |= {"reference_tokens": trained, "reference_kl_k1": -gap, "reference_kl_k2": gap.square() / 2}
        rows |= {"reference_kl_k3": k3}
    if batch.rollout is not None:
        finite = trained & batch.rollout.isfinite()
        gap = torch.where(finite, (logp if batch.old is None else batch.old) - batch.rollout, 0)
        weight = finite.to(logp.dtype) if batch.weight is None else torch.where(finite, batch.weight, 0)
        rows |= {"rollout_tokens": finite, "rollout_gap": gap.abs(), "rollout_weight": weight}
        rows |= {"rollout_weight_sq": weight.square()}
    sums = [loss if name == "loss" else rows.get(name, nothing).sum(dtype=torch.float64) for name in METRICS]
    return torch.stack(sums)


def _check(tokens: Tokens, spec: LossSpec) -> None:
    n = tokens.targets.shape
    if len(n) != 1 or tokens.targets.dtype != torch.int64:
        raise ValueError(f"Tokens.targets is {tokens.targets.dtype} {list(n)}; give int64 [N], flat")
    for name in ("advantages", "mask", "sequences", "old", "reference", "rollout"):
        value = getattr(tokens, name)
        if value is not None and (value.shape != n or value.device != tokens.targets.device):
            raise ValueError(
                f"Tokens.{name} is {list(value.shape)} on {value.device}; give {list(n)} on {tokens.targets.device} like targets"
            )
    if tokens.mask is not None and tokens.mask.dtype != torch.bool:
        raise ValueError(f"Tokens.mask is {tokens.mask.dtype}; give bool")
    if spec.beta != 0 and tokens.reference is None:
        raise ValueError(f"LossSpec.beta is {spec.beta} but Tokens.reference is None; give the reference log-probs or beta=0")
    if spec.rollout is not None and tokens.rollout is None:
        raise ValueError(f"LossSpec.rollout is {spec.rollout!r} but Tokens.rollout is None; give the sampler's log-probs")
