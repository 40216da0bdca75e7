"""The C++ row kernels as a backend: AVX-512, AVX2 or portable, chosen at run time; bf16 and fp32 logits, fp32 maths.

Each function checks its tensors and hands addresses to `omni_kernels._native_cpu`, which works on torch's own OpenMP threads
(`torch.get_num_threads()` of them) without the GIL. Rows are independent, so results do not depend on the thread count.

Limits: CPU tensors; the native module must have been built (`reason_unavailable` says why not). A row with a NaN or +inf
logit, or with nothing but -inf, gives NaN log-prob, entropy and gradient; -inf elsewhere is a probability of 0.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from omni_kernels.backends.program import Recorded, record
from omni_kernels.losses import Prepared
from omni_kernels.spec import LossSpec

try:
    import omni_kernels._native_cpu as native
except ImportError as error:
    native = None  # type: ignore[assignment]
    _reason = f"omni_kernels._native_cpu is not importable ({error}); reinstall with a C++17 compiler"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


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
    rows = _check_rows(logits, targets)
    scale, scale_rows = _scalar_or_rows(inv_temperature, "inv_temperature", rows)
    logp, lse = torch.empty(rows), torch.empty(rows)
    entropy = torch.empty(rows) if want_entropy else None
    native.rows_forward(
        *_address(logits), _pointer(targets), scale, _pointer(scale_rows), softcap or 0.0,
        _pointer(logp), _pointer(entropy), _pointer(lse), torch.get_num_threads(), isa,
    )  # fmt: skip
    return logp, entropy, lse


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
    rows = _check_rows(logits, targets)
    scale, scale_rows = _scalar_or_rows(inv_temperature, "inv_temperature", rows)
    z, z_rows = _scalar_or_rows(z_loss, "z_loss", rows)
    for name, vector in (("lse", lse), ("a", a), ("b", b), ("entropy", entropy)):
        if vector is not None:
            _check_vector(vector, name, torch.float32, rows)
    if b is not None and entropy is None:
        raise ValueError("entropy is None but b is given; pass the entropy that rows_forward returned")
    native.rows_backward(
        *_address(logits), _pointer(targets), scale, _pointer(scale_rows), softcap or 0.0,
        _pointer(lse), _pointer(entropy), _pointer(a), _pointer(b), z, _pointer(z_rows), torch.get_num_threads(), isa,
    )  # fmt: skip


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
    rows = _check_rows(logits, targets)
    scale, scale_rows = _scalar_or_rows(inv_temperature, "inv_temperature", rows)
    recorded = record(batch, spec)
    columns = [getattr(batch, name).to(torch.float32).contiguous() for name in recorded.columns]
    for name, column in zip(recorded.columns, columns, strict=True):
        _check_vector(column, name, torch.float32, rows)
    logp, lse = torch.empty(rows), torch.empty(rows)
    entropy = torch.empty(rows) if want_entropy or spec.needs_entropy else None
    native.rows_fused(
        *_address(logits), _pointer(targets), scale, _pointer(scale_rows), softcap or 0.0, _pointer(logp), _pointer(entropy),
        _pointer(lse), _compiled(recorded), [_pointer(column) for column in columns], torch.get_num_threads(), isa,
    )  # fmt: skip
    return logp, entropy, lse


@lru_cache(maxsize=64)
def _compiled(recorded: Recorded) -> native.CoefficientProgram:
    codes = {name: code for code, name in enumerate(native.OPS)}
    code = [(codes[op], dst, x, y, z, value) for op, dst, x, y, z, value in recorded.code]
    return native.CoefficientProgram(code, len(recorded.columns), recorded.results)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _address(logits: Tensor) -> tuple[int, int, int, int, int]:
    rows, vocab = logits.shape
    stride = logits.stride(0) if rows > 1 else vocab  # the stride of a single row means nothing
    return logits.data_ptr(), _DTYPES[logits.dtype], rows, vocab, stride


def _check_rows(logits: Tensor, targets: Tensor) -> int:
    if native is None:
        raise RuntimeError(_reason)
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits are {logits.dtype}; the cpu backend takes float32 or bfloat16")
    if logits.device.type != "cpu":
        raise ValueError(f"logits are on {logits.device}; the cpu backend takes CPU tensors")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; pass [tokens, vocabulary] with at least one column")
    rows, vocab = logits.shape
    if rows and (logits.stride(1) != 1 and vocab > 1 or rows > 1 and logits.stride(0) < vocab):
        raise ValueError(
            f"logits have strides {logits.stride()}; pass rows with unit column stride: logits.contiguous()"
        )
    _check_vector(targets, "targets", torch.int64, rows)
    return rows


def _check_vector(vector: Tensor, name: str, dtype: torch.dtype, rows: int) -> None:
    if vector.dtype != dtype:
        raise TypeError(f"{name} is {vector.dtype}; pass {dtype}")
    if vector.shape != (rows,) or vector.device.type != "cpu" or not vector.is_contiguous():
        found = f"shape {tuple(vector.shape)}, strides {vector.stride()}, {vector.device}"
        raise ValueError(f"{name} has {found}; pass a contiguous CPU vector of length {rows}")


def _scalar_or_rows(value: float | Tensor, name: str, rows: int) -> tuple[float, Tensor | None]:
    if not isinstance(value, Tensor):
        return float(value), None
    if value.dim() == 0:
        return float(value), None
    _check_vector(value, name, torch.float32, rows)
    return 1.0, value
