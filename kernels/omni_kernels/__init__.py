"""omni_kernels: GRPO-family losses on a language model's head, without its logits in memory.

    policy_loss          log-probs -> loss                    plain torch
    logits_logprob       logits -> log-prob, entropy          differentiable
    linear_logprob       hidden, weight -> log-prob, entropy  differentiable, 4 GEMMs, never the full logits
    linear_policy_loss   hidden, weight -> loss               differentiable, 3 GEMMs: the gradient is made in the forward pass

Needs torch, nothing else; compiled backends are used where they are present and fit the tensors.
"""

from omni_kernels.linear import linear_logprob, linear_policy_loss, logits_logprob
from omni_kernels.losses import (
    IGNORE,
    METRICS,
    LossOutput,
    LossSpec,
    Tokens,
    finalise,
    normaliser_count,
    policy_loss,
)

__all__ = [
    "IGNORE",
    "METRICS",
    "LossOutput",
    "LossSpec",
    "Tokens",
    "finalise",
    "linear_logprob",
    "linear_policy_loss",
    "logits_logprob",
    "normaliser_count",
    "policy_loss",
]
