"""TRL's GRPOTrainer on the linear operators, in two ways.

`LinearLogprobGRPOTrainer`: log-probs and entropies come from `linear_logprob`, everything else is TRL's, its loss first
of all. The method that computes both runs as TRL wrote it, with TRL's chunked projection of the head replaced for the
duration of the call: only positions of the completion enter the head, on a CPU too, and temperature, autocast, softcap,
logit scale, tied or frozen heads, PEFT adapters and images are as in TRL.

`LinearLossGRPOTrainer`: the loss too, by `linear_policy_loss`, whose gradient is made in the forward pass (3 GEMMs
instead of 4). `loss_spec` translates the configuration; what has no exact counterpart raises ValueError at construction.
TRL's own loss is still evaluated on the finished log-probs, O(tokens), for its value and its metrics.

Limits: written against trl 1.16.0, whose internals it enters by name. DeepSpeed ZeRO-3 is refused: the head's weight is
read again in the backward pass, after it has been split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from omni_kernels.adapters import as_autocast, head_options
from omni_kernels.ops import linear_logprob, linear_policy_loss
from omni_kernels.spec import LossSpec, Tokens

_TRIED = "1.16.0"
try:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils as _trl
except ImportError as error:
    raise ImportError(
        f"omni_kernels.adapters.trl needs trl (tried with {_TRIED}); pip install trl=={_TRIED} ({error})"
    ) from error
_SLOTS = ("_ChunkedLogProbFunction", "_use_triton")
if not all(hasattr(_trl, name) for name in _SLOTS):
    raise ImportError(f"this trl has no {' and '.join(_SLOTS)} in trl.trainer.utils; install trl=={_TRIED}")

# what TRL calls with (hidden [N, H], weight, bias, targets [N], temperature, chunk_size, softcap, scale, outputs)
_Projection = Callable[..., tuple[Tensor, Tensor | None, None, None, None]]
_TOKEN_SUMS = ("dapo", "bnpo", "dr_grpo", "cispo", "vespo", "luspo")  # loss types that do not take sequence means
_WINDOW_COUNTED = ("dapo", "cispo", "vespo")  # divided by the tokens of all micro-batches of the step


class LinearLogprobGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose log-probs and entropies come from `linear_logprob`; arguments and results are TRL's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if is_deepspeed_zero3_enabled():
            raise ValueError("DeepSpeed ZeRO-3 splits the head's weight before the backward pass; use stage 2 or FSDP2")

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with _projecting(_logprob):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class LinearLossGRPOTrainer(LinearLogprobGRPOTrainer):
    """GRPOTrainer whose gradient is made by `linear_policy_loss`; arguments, loss values and metrics are TRL's.

    Raises ValueError for a configuration without exact counterpart (see `loss_spec`).
    """

    args: GRPOConfig
    model: nn.Module
    max_completion_length: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._spec = loss_spec(self.args)
        self._problem: _Problem | None = None
        self._carrier: Tensor | None = None
        if self.args.top_entropy_quantile < 1 and self.accelerator.num_processes > 1:
            _refuse("top_entropy_quantile over several processes", "set it to 1.0")

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._problem = self._state(inputs)
        try:
            value = super()._compute_loss(model, inputs)
        finally:
            self._problem = None
        carrier, self._carrier = self._carrier, None
        assert carrier is not None
        return value + (carrier - carrier.detach())

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        problem = self._problem
        if problem is None:  # of the old or the reference policy
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with _projecting(problem.project):
            logps, entropies, aux_loss = GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)
        self._carrier = logps.sum() / max(1, len(problem.tokens.targets))
        return logps.detach(), entropies.detach(), aux_loss

    def _state(self, inputs: dict[str, Any]) -> _Problem:
        """The micro-batch as flat tokens: the completions' positions, row by row, which is how TRL hands over rows."""
        used = inputs["completion_mask"].bool()

        def flat(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.expand(used.shape)[used]

        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages
        if "importance_sampling_ratio" in inputs:  # every policy term is proportional to A for A of one sign
            advantages = advantages * inputs["importance_sampling_ratio"]
        trained = used if "tool_mask" not in inputs else used & inputs["tool_mask"].bool()
        mode_steps = self.current_gradient_accumulation_steps if self.model.training else 1
        n = self._denominator(inputs, trained, mode_steps)
        tokens = Tokens(
            targets=inputs["completion_ids"][used],
            advantages=advantages.expand(used.shape)[used],
            mask=trained[used],
            sequences=(used.any(1).cumsum(0) - 1)[:, None].expand(used.shape)[used],
            old=flat(inputs.get("old_per_token_logps")),
            reference=flat(inputs.get("ref_per_token_logps")),
            rollout=flat(inputs.get("sampling_per_token_logps")),
            denominator=n,
        )
        return _Problem(tokens, self._spec_of(trained, n, mode_steps))

    def _denominator(self, inputs: dict[str, Any], trained: Tensor, steps: int) -> Tensor | float:
        """What TRL divides the sum of this micro-batch by; `steps` micro-batches are accumulated."""
        sequences = len(trained)
        if self.loss_type in _WINDOW_COUNTED:
            n = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            return n * steps / self.args.steps_per_generation if self.model.training else n
        if self.loss_type == "bnpo":
            return trained.sum().clamp(min=1) * float(steps)
        return float(sequences * steps * (self.max_completion_length if self.loss_type == "dr_grpo" else 1))

    def _spec_of(self, trained: Tensor, n: Tensor | float, steps: int) -> LossSpec:
        """The spec with what depends on the micro-batch. TRL's entropy bonus is a mean over tokens, whatever n is."""
        spec, quantile = self._spec, self.args.top_entropy_quantile
        off = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        coefficient = 0.0 if off else self.entropy_coef
        if coefficient == 0 and quantile == 1:
            return spec
        count = int(trained.sum())
        if coefficient != 0:
            spec = replace(spec, entropy_coef=coefficient * float(n) / (max(1, count) * steps))
        if quantile < 1 and count:
            below = math.ceil(float(torch.tensor(1 - quantile, dtype=torch.float32) * (count - 1)))
            spec = replace(spec, top_entropy=(count - below - 0.5) / count)  # exactly count - below ranks are smaller
        return spec


def loss_spec(args: GRPOConfig) -> LossSpec:
    """The loss of a configuration, without what depends on the batch (normaliser, entropy bonus, entropy quantile).

    Raises ValueError that names the option for `delta` below 1 + epsilon_high with a clipped loss, an entropy bonus
    with a loss of sequence means ("grpo", "sapo") or with top_entropy_quantile, vLLM's correction with "vespo" (which
    has it inside an exponential), and unknown loss types and levels.
    Log-ratios beyond +-20 nats are constant here, in TRL only for "vespo", at -18.4 and +20.
    """
    kind, high = args.loss_type, args.epsilon if args.epsilon_high is None else args.epsilon_high
    bonus = args.entropy_coef != 0 or args.use_adaptive_entropy
    if bonus and kind not in _TOKEN_SUMS:
        _refuse(f"entropy_coef with loss_type {kind!r}", "use a loss that sums tokens, such as 'dapo'")
    if bonus and args.top_entropy_quantile < 1:
        _refuse("entropy_coef with top_entropy_quantile", "use one of them")
    if kind == "vespo" and args.use_vllm and args.vllm_importance_sampling_correction:
        _refuse("vllm_importance_sampling_correction with loss_type 'vespo'", "turn the correction off")
    if args.importance_sampling_level not in ("token", "sequence"):
        _refuse(f"importance_sampling_level {args.importance_sampling_level!r}", "use 'token' or 'sequence'")
    spec = LossSpec(
        level="sequence" if args.importance_sampling_level == "sequence" else "token",
        denominator="all",
        beta=args.beta,
        kl_correction=args.use_bias_correction_kl,
        off_policy_threshold=args.off_policy_mask_threshold,
    )
    if kind in ("grpo", "sapo"):
        spec = replace(spec, aggregation="sequence", normaliser="sequences")
    if kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        if args.delta is not None and args.delta < 1 + high:
            _refuse(f"delta {args.delta} below 1 + epsilon_high", f"use at least {1 + high}, or None")
        return replace(spec, eps_low=args.epsilon, eps_high=high, dual_clip=args.delta)
    if kind == "cispo":
        return replace(spec, policy="cispo", cispo_max=high)
    if kind == "sapo":
        gates = args.sapo_temperature_pos, args.sapo_temperature_neg
        return replace(spec, policy="sapo", sapo_tau_positive=gates[0], sapo_tau_negative=gates[1])
    if kind == "vespo":
        rising, falling = (args.vespo_k_pos, args.vespo_lambda_pos), (args.vespo_k_neg, args.vespo_lambda_neg)
        return replace(spec, policy="vespo", vespo_positive=rising, vespo_negative=falling)
    _refuse(f"loss_type {kind!r}", "use one of grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo, vespo")


@dataclass(frozen=True)
class _Problem:
    """A micro-batch and its loss."""

    tokens: Tokens
    spec: LossSpec

    def project(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        softcap: float | None, scale: float, outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor | None, None, None, None]:  # fmt: skip
        """The loss, carried by the log-probs that the model returns: its gradient arrives where theirs is expected,
        through whatever wraps the model."""
        out = linear_policy_loss(
            as_autocast(hidden), weight, self.tokens, self.spec, bias=bias, return_tokens=True,
            **head_options(1 / temperature, scale, softcap),
        )  # fmt: skip
        assert out.logp is not None
        return out.logp + (out.loss - out.loss.detach()), out.entropy, None, None, None


def _logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
    softcap: float | None, scale: float, outputs: tuple[str, ...],
) -> tuple[Tensor, Tensor | None, None, None, None]:  # fmt: skip
    logp, entropy = linear_logprob(
        as_autocast(hidden), weight, targets, bias=bias, want_entropy="entropy" in outputs,
        **head_options(1 / temperature, scale, softcap),
    )  # fmt: skip
    return logp, entropy, None, None, None


@contextmanager
def _projecting(project: _Projection) -> Iterator[None]:
    """Puts `project` where TRL's fused head calls its own function, and lets it gather the scored rows first."""
    before = [getattr(_trl, name) for name in _SLOTS]
    stand_in = type("Projection", (), {"apply": staticmethod(project)})
    try:
        for name, value in zip(_SLOTS, (stand_in, lambda device: True), strict=True):
            setattr(_trl, name, value)
        yield
    finally:
        for name, value in zip(_SLOTS, before, strict=True):
            setattr(_trl, name, value)


def _refuse(option: str, remedy: str) -> NoReturn:
    raise ValueError(f"{option} has no exact counterpart in the fused loss; {remedy}, or use LinearLogprobGRPOTrainer")
