"""What to compute: `LossSpec` names the loss, `Tokens` holds the batch, `LossOutput` the answer.

No maths here; `losses.py` has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # target of a token that is not trained on; its row is never read


@dataclass(frozen=True)
class LossSpec:
    """Which loss. Dimensionless unless a unit is given. Hashable, so it can key caches.

    policy: "clip" (PPO, arXiv 1707.06347; GRPO, 2402.03300; with level="sequence" GSPO, 2507.18071), "cispo"
        (2506.13585), "sapo" (2511.20347), "vespo" (2602.10693), "gmpo" (2507.20673), "reinforce" (-A logp).
    level: the importance ratio is the token's, or its sequence's geometric mean; "gmpo" and "vespo" have their own.
    aggregation: "token" sums tokens; "sequence" takes each sequence's mean first.
    normaliser: what `normaliser_count` counts; `length_constant` multiplies it (Dr. GRPO, 2503.20783: the maximum
        completion length in tokens).
    denominator: "kept": a token that a correction or mask drops leaves the loss, the KL, the entropy bonus and the
        count; "all": it only loses its policy term (as in TRL).
    eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high]; unequal as in DAPO (2503.14476).
    dual_clip: upper bound of the ratio where A < 0 (1912.09729), at least 1 + eps_high; None: no bound.
    cispo_max: upper bound of the detached ratio of "cispo".
    sapo_tau_positive, sapo_tau_negative: gate temperatures for A > 0 and A <= 0.
    vespo_positive, vespo_negative: (k, lambda) of phi(W) = W^k exp(lambda (1 - W)) for A >= 0 and A < 0.
    beta, kl: weight and estimator of the KL to the reference: k1, k2, k3 (Schulman, "Approximating KL divergence").
    kl_correction: multiply k3 by the importance ratio of `level` (DeepSeek-V3.2, 2512.02556), gradient included.
    entropy_coef: c_e, weight of the entropy bonus, per nat.  z_loss: lambda, weight of lse^2.
    rollout: correction of the old policy against the sampler by w = exp(old - rollout): "truncate" caps w at
        rollout_max (TIS), "mask" keeps w inside [rollout_min, rollout_max] and drops tokens outside (IcePop,
        2510.18855), "reject" drops like "mask" with w = 1. Tokens with a non-finite rollout log-prob are dropped.
    rollout_level: w of the token, the product over its sequence, or its geometric mean.
    off_policy_threshold: drop sequences with A < 0 whose mean of (rollout, else old) - current exceeds this, in nats
        (2512.02556).
    top_entropy: fraction of tokens, those of highest entropy, that keep their policy term (2506.01939); 1 = all.
    drop_covariance: fraction of tokens, those of highest covariance of logp and A, that are dropped (2505.22617).
    encoded: all of the above as a string, made by the constructor.
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
    encoded: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                options = ", ".join(map(repr, allowed))
                raise ValueError(f"LossSpec.{name} is {getattr(self, name)!r}; use one of {options}")
        for f in fields(self):
            value, kind = getattr(self, f.name), str(f.type)
            if "float" not in kind or (value is None and "None" in kind):
                continue
            pair = "tuple" in kind
            numbers = value if pair and isinstance(value, tuple | list) else (value,)
            if len(numbers) != 1 + pair or not all(isinstance(v, Real) and v == v for v in numbers):
                raise ValueError(f"LossSpec.{f.name} is {value!r}; use {'two numbers' if pair else 'a number'}")
            plain = tuple(float(v) for v in numbers)
            object.__setattr__(self, f.name, plain if pair else plain[0])
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
        values = asdict(self)
        del values["encoded"]
        object.__setattr__(self, "encoded", json.dumps(values))

    @staticmethod
    @lru_cache(maxsize=64)
    def decode(encoded: str) -> LossSpec:
        """The spec of `LossSpec.encoded`: how a spec passes through a torch operator, which takes no objects."""
        return LossSpec(**json.loads(encoded))

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
    def couples_tokens(self) -> bool:
        """Whether the policy term of a token looks at the log-probs of its whole sequence."""
        return self.policy in ("gmpo", "vespo") or (self.level == "sequence" and self.policy != "reinforce")

    @property
    def needs_length(self) -> bool:
        """Whether the mean over a sequence is taken somewhere other than in the aggregation."""
        corrected = self.kl_correction and self.level == "sequence" and self.beta != 0
        return self.couples_tokens or corrected or self.off_policy_threshold is not None


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

_MEAN_OF_SEQUENCES: Mapping[str, object] = {"aggregation": "sequence", "normaliser": "sequences"}
PRESETS: Mapping[str, Mapping[str, object]] = {
    "grpo": _MEAN_OF_SEQUENCES,
    "bnpo": {},
    "dapo": {"eps_high": 0.28},
    "dr_grpo": {"normaliser": "sequences"},  # give length_constant
    "cispo": {"policy": "cispo"},
    "sapo": {**_MEAN_OF_SEQUENCES, "policy": "sapo"},
    "gspo": {**_MEAN_OF_SEQUENCES, "level": "sequence", "eps_low": 3e-4, "eps_high": 4e-4},
    "luspo": {"level": "sequence", "normaliser": "sequences", "eps_low": 3e-4, "eps_high": 4e-4},  # 2602.05261
    "vespo": {"policy": "vespo"},
    "gmpo": {**_MEAN_OF_SEQUENCES, "policy": "gmpo", "eps_low": 0.33, "eps_high": 0.49},
    "reinforce": {"policy": "reinforce"},
}


@dataclass(frozen=True)
class Tokens:
    """The batch, flat: N tokens of any number of sequences, in any order; every tensor is [N], all on one device.

    targets: int64, the sampled token; IGNORE (-100) marks a token that is not trained on (same as mask = False).
    advantages: float.
    mask: bool; None trains on every token with a target.
    sequences: int64 in [0, N), the sequence of each token, for whatever looks at sequences; None: all are one.
    old: log-prob before this update, nats; None means on-policy: old is the current log-prob.
    reference: log-prob of the frozen reference, nats; needed when beta != 0, else only measured.
    rollout: log-prob that the sampler reported, nats; needed by `LossSpec.rollout`, else only measured.
    denominator: the global normaliser n, `normaliser_count` summed over all micro-batches and ranks, a number or a tensor
        of one; None: this call's. 0 is right where no token counts.
    rows: int64 [R], the tokens that enter the head, from `head_rows`; the others are as if absent. Saves a GPU the host
        sync of counting them; None: all trained tokens.
    """

    targets: Tensor
    advantages: Tensor
    mask: Tensor | None = None
    sequences: Tensor | None = None
    old: Tensor | None = None
    reference: Tensor | None = None
    rollout: Tensor | None = None
    denominator: Tensor | float | None = None
    rows: Tensor | None = None

    def trained(self) -> Tensor:
        """bool [N]: the tokens that count."""
        trained = self.targets != IGNORE
        return trained if self.mask is None else trained & self.mask


class LossOutput(NamedTuple):
    """loss: scalar, differentiable.  metrics: float64 [len(METRICS)], sums: add them over micro-batches and ranks, then
    `finalise`.  logp, entropy: fp32 [N] nats, detached, where asked for; 0 on tokens that are not trained on."""

    loss: Tensor
    metrics: Tensor
    logp: Tensor | None = None
    entropy: Tensor | None = None


def check(tokens: Tokens, spec: LossSpec) -> None:
    """Raises ValueError where the tensors do not fit each other or the spec."""
    n = tokens.targets.shape
    if len(n) != 1 or tokens.targets.dtype != torch.int64:
        raise ValueError(f"Tokens.targets is {tokens.targets.dtype} {list(n)}; give int64 [N], flat")
    for name in ("advantages", "mask", "sequences", "old", "reference", "rollout"):
        value = getattr(tokens, name)
        if value is not None and (value.shape != n or value.device != tokens.targets.device):
            given, wanted = f"{list(value.shape)} on {value.device}", f"{list(n)} on {tokens.targets.device}"
            raise ValueError(f"Tokens.{name} is {given}; give {wanted} like targets")
    if tokens.mask is not None and tokens.mask.dtype != torch.bool:
        raise ValueError(f"Tokens.mask is {tokens.mask.dtype}; give bool")
    _check_places(tokens.sequences, "sequences", n[0])
    if tokens.rows is not None and (tokens.rows.ndim != 1 or tokens.rows.device != tokens.targets.device):
        given = f"{list(tokens.rows.shape)} on {tokens.rows.device}"
        raise ValueError(f"Tokens.rows is {given}; give places of tokens [R] on {tokens.targets.device}")
    _check_places(tokens.rows, "rows", n[0])
    total = tokens.denominator
    if total is not None and (total.numel() != 1 if isinstance(total, Tensor) else not total >= 0):
        shown = list(total.shape) if isinstance(total, Tensor) else total
        raise ValueError(f"Tokens.denominator is {shown}; give one number >= 0, or None for this call's own count")
    if spec.beta != 0 and tokens.reference is None:
        raise ValueError(f"LossSpec.beta is {spec.beta} but Tokens.reference is None; give its log-probs, or beta=0")
    if spec.rollout is not None and tokens.rollout is None:
        raise ValueError(f"LossSpec.rollout is {spec.rollout!r} but Tokens.rollout is None; give sampler log-probs")


def _check_places(ids: Tensor | None, name: str, n: int) -> None:
    if ids is None:
        return
    if ids.dtype != torch.int64:
        raise ValueError(f"Tokens.{name} is {ids.dtype}; give int64")
    # A GPU is not waited for, and where shapes alone are traced there is nothing to look at.
    if type(ids) is Tensor and ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"Tokens.{name} holds {low if low < 0 else high}; give numbers in [0, N) = [0, {n})")
