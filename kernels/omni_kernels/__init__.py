"""omni_kernels: GRPO-family losses on a language model's head, without its logits in memory.

    policy_loss          log-probs -> loss                    plain torch
    logits_logprob       logits -> log-prob, entropy          differentiable
    linear_logprob       hidden, weight -> log-prob, entropy  differentiable, 4 GEMMs, never the full logits
    linear_policy_loss   hidden, weight -> loss               differentiable, 3 GEMMs: gradients come with it

omni_kernels.decoder has what the layers below compute, for training and decoding on CPUs.

Needs torch, nothing else; compiled backends are used where they are present and fit the tensors.
"""

from omni_kernels.losses import head_rows, normaliser_count, policy_loss
from omni_kernels.metrics import METRICS, finalise
from omni_kernels.ops import (
    LogprobOutput,
    linear_logprob,
    linear_logprob_extras,
    linear_policy_loss,
    logits_logprob,
)
from omni_kernels.plan import Plan, plan
from omni_kernels.spec import IGNORE, PRESETS, LossOutput, LossSpec, Tokens

__all__ = [
    "IGNORE",
    "METRICS",
    "PRESETS",
    "LogprobOutput",
    "LossOutput",
    "LossSpec",
    "Plan",
    "Tokens",
    "finalise",
    "head_rows",
    "linear_logprob",
    "linear_logprob_extras",
    "linear_policy_loss",
    "logits_logprob",
    "normaliser_count",
    "plan",
    "policy_loss",
]
