"""The CUDA kernels as a backend, for compute capability 9.0: a row of logits stays on chip between read and write.

Each function checks its tensors, without looking at their values, and hands addresses and the current stream to
`omni_kernels._native_cuda` (csrc/cuda). Nothing waits for the GPU, and all memory is torch's: calls can be captured into
CUDA graphs. Rows are independent and their sums have a fixed order, so results repeat bit by bit and do not depend on the
other rows; only a row that starts at another offset from a 16-byte boundary (an odd vocabulary) is grouped differently.

Limits: bf16 or fp32 CUDA tensors; a row of at most 900,000 bf16 or 450,000 fp32 logits; the module must have been built
(`pip install -C cmake.define.OMNI_CUDA=ON .`; `reason_unavailable` says why not). A target outside the vocabulary makes its
row NaN. So does a NaN or +inf logit, or nothing but -inf; -inf elsewhere is a probability of 0. `linear_forward` is for
callers that ask for it by name, `linear_exponentials` for those of the backend `cuda_exp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from omni_kernels.backends.program import Recorded, record
from omni_kernels.losses import Prepared
from omni_kernels.spec import LossSpec

try:
    import omni_kernels._native_cuda as native
except ImportError as error:
    native = None  # type: ignore[assignment]
    _reason = (
        f"omni_kernels._native_cuda is not importable ({error}); reinstall with -C cmake.define.OMNI_CUDA=ON and nvcc"
    )

# (card, function) pairs that `make gpu` has shown to be correct and faster than Triton: these run by default.
VALIDATED: frozenset[tuple[str, str]] = frozenset()
ROW_FUNCTIONS = ("rows_forward", "rows_backward_", "rows_policy_loss_")

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def reason_unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    if native is None:
        return _reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"its kernels are for compute capability 9.0, the GPU has {capability}"


def is_validated(device: torch.device, functions: tuple[str, ...] = ROW_FUNCTIONS) -> bool:
    """Whether all of these are to run by default on this device."""
    card = torch.cuda.get_device_name(device)
    return all((card, function) in VALIDATED for function in functions)


def rows_forward(
    logits: Tensor,
    targets: Tensor,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob of the target, entropy and log-sum-exp of every row, in nats, in one read of the logits.

    logits [N, V] bf16 or fp32, unit column stride; targets int64 [N], -100 marks a row that is not read (its outputs are 0);
    inv_temperature > 0, scalar or fp32 [N]. Returns fp32 [N] each; entropy is None unless wanted.
    Raises ValueError or TypeError on arguments that do not fit.
    """
    _check_rows(logits, targets)
    scale, scale_rows = _scalar_or_rows(inv_temperature, "inv_temperature", logits)
    logp, lse, entropy = _outputs(logits, want_entropy)
    native.rows_forward(
        *_address(logits), targets.data_ptr(), scale, _pointer(scale_rows), softcap or 0.0,
        logp.data_ptr(), _pointer(entropy), lse.data_ptr(), *_place(logits),
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
) -> None:
    """Overwrites logits [N, V] with dloss/dlogits, given a = dloss/dlogp, b = dloss/dentropy and the weight of lse^2, [N].

    lse and entropy are those of `rows_forward`; entropy is needed where b is given. One read and one write. Rows whose
    coefficients are all 0, and ignored ones, become 0 without being read. Rounded once, to the dtype of the logits.
    """
    _check_rows(logits, targets)
    scale, scale_rows = _scalar_or_rows(inv_temperature, "inv_temperature", logits)
    z, z_rows = _scalar_or_rows(z_loss, "z_loss", logits)
    for name, vector in (("lse", lse), ("a", a), ("b", b), ("entropy", entropy)):
        if vector is not None:
            _check_vector(vector, name, torch.float32, logits)
    if b is not None and entropy is None:
        raise ValueError("entropy is None but b is given; pass the entropy that rows_forward returned")
    native.rows_backward(
        *_address(logits), targets.data_ptr(), scale, _pointer(scale_rows), softcap or 0.0,
        lse.data_ptr(), _pointer(entropy), a.data_ptr(), _pointer(b), z, _pointer(z_rows), *_place(logits),
    )  # fmt: skip


def rows_policy_loss_(
    logits: Tensor,
    targets: Tensor,
    batch: Prepared,
    spec: LossSpec,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`rows_forward` and `rows_backward_` in one sweep: logits [N, V] become the gradient of the loss of `spec`, row by row.

    batch: `losses.prepare` of the same N tokens, row-wise (`losses.row_wise`). The loss itself and its metrics follow from the
    result: `losses.coefficients(logp, entropy, lse, batch, spec)`. One read and one write of the logits; a row's coefficients
    are computed from the recorded loss between the two (`program.record`, NotImplementedError where that cannot be).
    """
    _check_rows(logits, targets)
    scale, scale_rows = _scalar_or_rows(inv_temperature, "inv_temperature", logits)
    recorded = record(batch, spec)
    columns = [getattr(batch, name).to(torch.float32).contiguous() for name in recorded.columns]
    for name, column in zip(recorded.columns, columns, strict=True):
        _check_vector(column, name, torch.float32, logits)
    logp, lse, entropy = _outputs(logits, want_entropy or spec.needs_entropy)
    native.rows_fused(
        *_address(logits), targets.data_ptr(), scale, _pointer(scale_rows), softcap or 0.0,
        logp.data_ptr(), _pointer(entropy), lse.data_ptr(), _compiled(recorded),
        [column.data_ptr() for column in columns], *_place(logits),
    )  # fmt: skip
    return logp, entropy, lse


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`rows_forward` of hidden weight^T + bias, without logits in memory and without rounding them: one GEMM.

    hidden [N, H], weight [V, H] bf16, contiguous; bias [V] of any float dtype, used in fp32. Memory: about 1 KiB a token.
    A row's result depends on its own hidden state only, bit for bit. Raises NotImplementedError for operands that are not
    bf16, contiguous and 16-byte aligned, or an H that is no multiple of 64: the caller then makes the logits.
    """
    _check_linear(hidden, weight, bias, targets)
    return _linear(hidden, weight, bias, targets, inv_temperature, softcap, want_entropy, (0, 0, 0))


@dataclass(frozen=True)
class Exponentials:
    """What `linear_exponentials` keeps of C rows. values: bf16 [C, V], e^z of each logit times a number of its row."""

    values: Tensor
    references: Tensor
    folds: Tensor
    targets: Tensor
    inv_temperature: float | Tensor
    softcap: float | None

    @property
    def addresses(self) -> tuple[int, int, int]:
        return self.values.data_ptr(), self.references.data_ptr(), self.folds.data_ptr()

    def gradient_(self, a: Tensor, b: Tensor | None, z_loss: Tensor | None) -> Tensor:
        """Makes dloss/dlogits = factor[:, None] * values of a = dloss/dlogp, b = dloss/dentropy, the weight of lse^2, [C].

        Returns factor, fp32 [C]. Without b, z_loss and softcap only the targets' values change: the gradient is a multiple
        of p, and of p - 1 there. Else the values are read and written once. Rows without gradient have factor 0.
        """
        factor = torch.empty_like(a)
        scale, scale_rows = _scalar_or_rows(self.inv_temperature, "inv_temperature", self.values)
        for name, vector in (("a", a), ("b", b), ("z_loss", z_loss)):
            if vector is not None:
                _check_vector(vector, name, torch.float32, self.values)
        native.linear_gradient(
            self.addresses, len(self.values), self.values.shape[1], self.targets.data_ptr(), scale, _pointer(scale_rows), self.softcap or 0.0,
            a.data_ptr(), _pointer(b), _pointer(z_loss), factor.data_ptr(), *_place(a),
        )  # fmt: skip
        return factor


def linear_exponentials(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
) -> tuple[tuple[Tensor, Tensor | None, Tensor], Exponentials]:
    """`linear_forward` that keeps the exponentials it computes, of which the gradient is made: one GEMM, and two to come.

    Memory: 2 V bytes a token, V rounded up to 256. Raises as `linear_forward` does.
    """
    _check_linear(hidden, weight, bias, targets)
    pitch = native.linear_pitch(len(weight))
    exps = Exponentials(
        torch.empty(len(hidden), pitch, dtype=torch.bfloat16, device=hidden.device)[:, : len(weight)],
        hidden.new_empty(len(hidden), pitch // 256, dtype=torch.float32),
        hidden.new_empty(len(hidden), 4, dtype=torch.float32), targets, inv_temperature, softcap,
    )  # fmt: skip
    return _linear(hidden, weight, bias, targets, inv_temperature, softcap, want_entropy, exps.addresses), exps


def _linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, inv_temperature: float | Tensor,
    softcap: float | None, want_entropy: bool, exps: tuple[int, int, int],
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
    scale, scale_rows = _scalar_or_rows(inv_temperature, "inv_temperature", hidden)
    logp, lse, entropy = _outputs(hidden, want_entropy)
    workspace = hidden.new_empty(native.linear_workspace_bytes(len(hidden), len(weight)), dtype=torch.uint8)
    native.linear_forward(
        hidden.data_ptr(), weight.data_ptr(), len(hidden), len(weight), weight.shape[1], _pointer(wide_bias), targets.data_ptr(), scale,
        _pointer(scale_rows), softcap or 0.0, workspace.data_ptr(), logp.data_ptr(), _pointer(entropy), lse.data_ptr(),
        exps, *_place(hidden),
    )  # fmt: skip
    return logp, entropy, lse


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    if native is None:
        raise RuntimeError(_reason)
    depth = hidden.shape[1]
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if matrix.dtype != torch.bfloat16 or depth % 64 or not matrix.is_contiguous() or matrix.data_ptr() % 16:
            given = f"{name} is {matrix.dtype} {list(matrix.shape)}, strides {matrix.stride()}"
            raise NotImplementedError(f"{given}; linear_forward takes contiguous bfloat16 with H a multiple of 64")
        if matrix.device.type != "cuda" or matrix.device != targets.device or matrix.shape[1] != depth:
            raise ValueError(
                f"{name} is {list(matrix.shape)} on {matrix.device}; pass [., {depth}] on {targets.device}"
            )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
        raise ValueError(f"bias is {list(bias.shape)} on {bias.device}; pass {[len(weight)]} on {weight.device}")
    _check_vector(targets, "targets", torch.int64, hidden)


@lru_cache(maxsize=64)
def _compiled(recorded: Recorded) -> native.CoefficientProgram:
    if 3 + len(recorded.columns) + len(recorded.code) > native.MAX_REGISTERS:
        raise NotImplementedError(
            f"a coefficient program of {len(recorded.code)} instructions is too long for the cuda backend"
        )
    codes = {name: code for code, name in enumerate(native.OPS)}
    code = [(codes[op], dst, x, y, z, value) for op, dst, x, y, z, value in recorded.code]
    return native.CoefficientProgram(code, len(recorded.columns), recorded.results)


def _outputs(logits: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    logp = logits.new_empty(len(logits), dtype=torch.float32)
    return logp, torch.empty_like(logp), torch.empty_like(logp) if want_entropy else None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _address(logits: Tensor) -> tuple[int, int, int, int, int]:
    rows, vocab = logits.shape
    stride = logits.stride(0) if rows > 1 else vocab  # the stride of a single row means nothing
    return logits.data_ptr(), _DTYPES[logits.dtype], rows, vocab, stride


def _place(logits: Tensor) -> tuple[int, int]:
    """(device, stream)."""
    device = logits.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream


def _check_rows(logits: Tensor, targets: Tensor) -> None:
    if native is None:
        raise RuntimeError(_reason)
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits are {logits.dtype}; the cuda backend takes float32 or bfloat16")
    if logits.device.type != "cuda":
        raise ValueError(f"logits are on {logits.device}; the cuda backend takes CUDA tensors")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; pass [tokens, vocabulary] with at least one column")
    rows, vocab = logits.shape
    if rows and (logits.stride(1) != 1 and vocab > 1 or rows > 1 and logits.stride(0) < vocab):
        raise ValueError(
            f"logits have strides {logits.stride()}; pass rows with unit column stride: logits.contiguous()"
        )
    if native.row_plan(vocab, _DTYPES[logits.dtype])[0] == 0:
        raise ValueError(f"a row of {vocab} {logits.dtype} logits does not fit on chip; use backend='triton'")
    _check_vector(targets, "targets", torch.int64, logits)


def _check_vector(vector: Tensor, name: str, dtype: torch.dtype, logits: Tensor) -> None:
    if vector.dtype != dtype:
        raise TypeError(f"{name} is {vector.dtype}; pass {dtype}")
    if vector.shape != logits.shape[:1] or vector.device != logits.device or not vector.is_contiguous():
        found = f"shape {tuple(vector.shape)}, strides {vector.stride()}, {vector.device}"
        raise ValueError(f"{name} has {found}; pass a contiguous vector of length {len(logits)} on {logits.device}")


def _scalar_or_rows(value: float | Tensor, name: str, logits: Tensor) -> tuple[float, Tensor | None]:
    """(number, None) or (1, [N]); a 0-d tensor is spread over the rows, as reading it would wait for the GPU."""
    if not isinstance(value, Tensor):
        return float(value), None
    if value.dim() == 0:
        value = value.to(logits.device, torch.float32).repeat(len(logits))
    _check_vector(value, name, torch.float32, logits)
    return 1.0, value
