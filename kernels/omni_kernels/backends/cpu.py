"""The C++ row kernels as a backend: AVX-512, AVX2 or portable, chosen at run time; bf16 and fp32 logits, fp32 maths.

Each function checks its tensors and hands addresses to `omni_kernels._native_cpu`, which works on torch's own OpenMP threads
(`torch.get_num_threads()` of them) without the GIL. Rows are independent, so results do not depend on the thread count.

Limits: CPU tensors; the native module must have been built (`reason_unavailable` says why not). A row with a NaN or +inf
logit, or with nothing but -inf, gives NaN log-prob, entropy and gradient; -inf elsewhere is a probability of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_kernels.backends.rows import Rows, backward_, forward, policy_loss_
from omni_kernels.losses import Prepared
from omni_kernels.spec import LossSpec

try:
    import omni_kernels._native_cpu as native
except ImportError as error:
    native = None  # type: ignore[assignment]
    _reason = f"omni_kernels._native_cpu is not importable ({error}); reinstall with a C++17 compiler"


def reason_unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return _reason if native is None else None


def rows_forward(
    logits: Tensor,
    targets: Tensor,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
    isa: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob of the target, entropy and log-sum-exp of every row, in nats, in one read of the logits.

    logits [N, V] bf16 or fp32, unit column stride; targets int64 [N], -100 marks a row that is not read (its outputs are 0);
    inv_temperature > 0, scalar or fp32 [N]. isa: "auto", or one of `_native_cpu.instruction_sets()`.
    Returns fp32 [N] each; entropy is None unless wanted. Raises ValueError or TypeError on arguments that do not fit.
    """
    rows = _rows(logits, targets, inv_temperature, softcap)
    return forward(native, rows, want_entropy, torch.get_num_threads(), isa)


def rows_backward_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    a: Tensor,
    b: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float | Tensor = 0.0,
    isa: str = "auto",
) -> None:
    """Overwrites logits [N, V] with dloss/dlogits, given a = dloss/dlogp, b = dloss/dentropy and the weight of lse^2, [N].

    lse and entropy are those of `rows_forward`; entropy is needed where b is given. Rows whose coefficients are all 0, and
    ignored ones, become 0 without being read. The gradient is rounded once, to the dtype of the logits.
    """
    rows = _rows(logits, targets, inv_temperature, softcap)
    backward_(native, rows, lse, entropy, a, b, z_loss, torch.get_num_threads(), isa)


def rows_policy_loss_(
    logits: Tensor,
    targets: Tensor,
    batch: Prepared,
    spec: LossSpec,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
    isa: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`rows_forward` and `rows_backward_` in one sweep: logits [N, V] become the gradient of the loss of `spec`, row by row.

    batch: `losses.prepare` of the same N tokens, row-wise (`losses.row_wise`). The loss itself and its metrics follow from the
    result: `losses.coefficients(logp, entropy, lse, batch, spec)`. One read and one write of the logits; a row's coefficients
    are computed from the recorded loss between the two (`program.record`, NotImplementedError where that cannot be).
    """
    rows = _rows(logits, targets, inv_temperature, softcap)
    return policy_loss_(native, rows, batch, spec, want_entropy, torch.get_num_threads(), isa)


def _rows(logits: Tensor, targets: Tensor, inv_temperature: float | Tensor, softcap: float | None) -> Rows:
    if native is None:
        raise RuntimeError(_reason)
    return Rows("cpu", "cpu", logits, targets, inv_temperature, softcap)
