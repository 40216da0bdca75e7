"""The CUDA kernels as a backend, for compute capability 9.0: a row of logits stays on chip between read and write.

The functions on rows are those of `rows.NativeRows`: they hand addresses and the current stream to
`omni_kernels._native_cuda` (csrc/cuda). Nothing looks at a tensor's values or waits for the GPU, and all memory is torch's: calls
can be captured into CUDA graphs. Rows are independent and their sums have a fixed order, so results repeat bit by bit and do
not depend on the other rows; only a row that starts at another offset from a 16-byte boundary (an odd vocabulary) is grouped differently.

Limits: bf16 or fp32 CUDA tensors; a row of at most 900,000 bf16 or 450,000 fp32 logits; the module must have been built
(`pip install -C cmake.define.OMNI_CUDA=ON .`; `reason_unavailable` says why not). A target outside the vocabulary makes its
row NaN. So does a NaN or +inf logit, or nothing but -inf; -inf elsewhere is a probability of 0. `linear_forward` is for
callers that ask for it by name, `linear_exponentials` for those of the backend `cuda_exp`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni_kernels.backends.rows import NativeRows, Rows, check_vector, outputs, pointer, scalar_or_rows

_reason = None
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


def reason_unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    if _reason is not None:
        return _reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"its kernels are for compute capability 9.0, the GPU has {capability}"


def is_validated(device: torch.device, functions: tuple[str, ...] = ROW_FUNCTIONS) -> bool:
    """Whether all of these are to run by default on this device."""
    card = torch.cuda.get_device_name(device)
    return all((card, function) in VALIDATED for function in functions)


class _CudaRows(NativeRows):
    def rows(self, logits: Tensor, targets: Tensor, inv_temperature: float | Tensor, softcap: float | None) -> Rows:
        rows = super().rows(logits, targets, inv_temperature, softcap)
        if self.native.row_plan(rows.vocab, 0 if logits.dtype == torch.float32 else 1)[0] == 0:
            raise ValueError(f"a row of {rows.vocab} {logits.dtype} logits does not fit on chip; use backend='triton'")
        return rows


def _place(rows: Tensor) -> tuple[int, int]:
    """(device, stream)."""
    device = rows.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream


_rows = _CudaRows("cuda", native, _reason, _place)
rows_forward, rows_backward_, rows_policy_loss_ = _rows.rows_forward, _rows.rows_backward_, _rows.rows_policy_loss_


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

        Returns factor, fp32 [C]. Without b and softcap only the targets' values change: the gradient is a multiple
        of p, and of p - 1 there. Else the values are read and written once. Rows without gradient have factor 0.
        """
        factor = torch.empty_like(a)
        scale, scale_rows = scalar_or_rows(self.inv_temperature, "inv_temperature", self.values)
        for name, vector in (("a", a), ("b", b), ("z_loss", z_loss)):
            if vector is not None:
                check_vector(vector, name, torch.float32, self.values)
        native.linear_gradient(
            self.addresses, len(self.values), self.values.shape[1], self.targets.data_ptr(), scale, pointer(scale_rows),
            self.softcap or 0.0, a.data_ptr(), pointer(b), pointer(z_loss), factor.data_ptr(), *_place(a),
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
    scale, scale_rows = scalar_or_rows(inv_temperature, "inv_temperature", hidden)
    logp, entropy, lse = outputs(hidden, want_entropy)
    workspace = hidden.new_empty(native.linear_workspace_bytes(len(hidden), len(weight)), dtype=torch.uint8)
    native.linear_forward(
        hidden.data_ptr(), weight.data_ptr(), len(hidden), len(weight), weight.shape[1], pointer(wide_bias), targets.data_ptr(), scale,
        pointer(scale_rows), softcap or 0.0, workspace.data_ptr(), logp.data_ptr(), pointer(entropy), lse.data_ptr(),
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
    check_vector(targets, "targets", torch.int64, hidden)
