"""The backend `cuda` with a head's first GEMM of its own, which leaves exponentials in place of logits: 3 GEMMs a loss.

The GEMM folds its logits, unrounded, into log-probs and entropies while they are accumulators, and writes e^z in bf16. That
is the gradient already, but for the targets' entries and a factor a row, where the loss asks for multiples of p: no pass over
[N, V] lies between the GEMM and the products that make dX and dW, to which the factors go. An entropy bonus or a softcap
costs one such pass, as do logits over 44 nats from 0 for their rows. The idea of scaled exponentials is QuACK's
(linear_cross_entropy, SM90).

Limits: where `cuda.linear_forward` cannot, and for batch-invariant products, it is the backend `cuda`. A probability below
2^-62 of the row's largest is 0, and the entropy's gradient knows log p to as many digits as bf16 has of p. By name only,
until a results file shows it right and faster (`cuda.VALIDATED`).
"""

from __future__ import annotations

from torch import device

from omni_kernels.backends import cuda
from omni_kernels.backends.cuda import (
    linear_exponentials,
    reason_unavailable,
    rows_backward_,
    rows_forward,
    rows_policy_loss_,
)

__all__ = ["linear_exponentials", "reason_unavailable", "rows_backward_", "rows_forward", "rows_policy_loss_"]


def is_validated(place: device) -> bool:
    """Whether it is to run by default on this device."""
    return cuda.is_validated(place, (*cuda.ROW_FUNCTIONS, "linear_exponentials"))
