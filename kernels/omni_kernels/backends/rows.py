"""What compiled backends ask of their tensors, and how the native modules are called: addresses, shapes, numbers.

No value on a GPU is looked at. Raises ValueError or TypeError on arguments that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from omni_kernels.backends.program import Recorded, record
from omni_kernels.losses import Prepared
from omni_kernels.spec import LossSpec

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as the native modules number them
_CPU_REGISTERS = 256


class Rows:
    """Logits [N, V], bf16 or fp32, unit column stride, with targets int64 [N] and inverse temperature, scalar or fp32 [N].

    backend: its name, for messages. kind: "cpu" or "cuda", where it takes tensors; None: anywhere.
    """

    def __init__(
        self, backend: str, kind: str | None, logits: Tensor, targets: Tensor, inv_temperature: float | Tensor,
        softcap: float | None,
    ) -> None:  # fmt: skip
        if logits.dtype not in DTYPES:
            raise TypeError(f"logits are {logits.dtype}; the {backend} backend takes float32 or bfloat16")
        if kind is not None and logits.device.type != kind:
            raise ValueError(f"logits are on {logits.device}; the {backend} backend takes {kind.upper()} tensors")
        if logits.dim() != 2 or logits.shape[1] < 1:
            given = f"logits have shape {tuple(logits.shape)}"
            raise ValueError(f"{given}; pass [tokens, vocabulary] with at least one column")
        self.logits, self.targets, self.device = logits, targets, logits.device
        self.count, self.vocab = logits.shape
        # That of a single row may mean nothing; where it does, kernels are compiled for it as for several.
        self.stride = logits.stride(0) if self.count > 1 else max(logits.stride(0), self.vocab)
        if self.count and (logits.stride(1) != 1 and self.vocab > 1 or self.stride < self.vocab):
            raise ValueError(
                f"logits have strides {logits.stride()}; pass rows with unit column stride: logits.contiguous()"
            )
        check_vector(targets, "targets", torch.int64, logits)
        self.scale, self.scale_rows = scalar_or_rows(inv_temperature, "inv_temperature", logits)
        self.softcap = softcap

    @property
    def address(self) -> tuple[int | float, ...]:
        """The arguments that the native functions begin with."""
        shape = (DTYPES[self.logits.dtype], self.count, self.vocab, self.stride)
        scale = (self.scale, pointer(self.scale_rows), self.softcap or 0.0)
        return self.logits.data_ptr(), *shape, self.targets.data_ptr(), *scale


class NativeRows:
    """The functions of a backend that is a native module: each checks its tensors and hands over addresses.

    native: the module, or None with the reason. kind: whose tensors it takes. how: of logits, what its functions end with.
    """

    def __init__(
        self, kind: str, native: ModuleType | None, reason: str | None, how: Callable[[Tensor], tuple[object, ...]]
    ) -> None:
        self.kind, self.module, self.reason, self.how = kind, native, reason, how

    @property
    def native(self) -> ModuleType:
        if self.module is None:
            raise RuntimeError(self.reason)
        return self.module

    def rows(self, logits: Tensor, targets: Tensor, inv_temperature: float | Tensor, softcap: float | None) -> Rows:
        return Rows(self.kind, self.kind, logits, targets, inv_temperature, softcap)

    def rows_forward(
        self, logits: Tensor, targets: Tensor, inv_temperature: float | Tensor = 1.0, softcap: float | None = None,
        want_entropy: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """Log-prob of the target, entropy and log-sum-exp of every row, in nats, in one read of the logits.

        logits [N, V] bf16 or fp32, unit column stride; targets int64 [N], -100 marks a row that is not read (its outputs are
        0); inv_temperature > 0, scalar or fp32 [N]. Returns fp32 [N] each; entropy is None unless wanted.
        Raises ValueError or TypeError on arguments that do not fit.
        """
        native, rows = self.native, self.rows(logits, targets, inv_temperature, softcap)
        logp, entropy, lse = outputs(logits, want_entropy)
        native.rows_forward(*rows.address, pointer(logp), pointer(entropy), pointer(lse), *self.how(logits))
        return logp, entropy, lse

    def rows_backward_(
        self, logits: Tensor, targets: Tensor, lse: Tensor, entropy: Tensor | None, a: Tensor, b: Tensor | None = None,
        inv_temperature: float | Tensor = 1.0, softcap: float | None = None, z_loss: float | Tensor = 0.0,
    ) -> None:  # fmt: skip
        """Overwrites logits [N, V] with dloss/dlogits, given a = dloss/dlogp, b = dloss/dentropy and the weight of lse^2, [N].

        lse and entropy are those of `rows_forward`; entropy is needed where b is given. One read and one write. Rows whose
        coefficients are all 0, and ignored ones, become 0 without being read. Rounded once, to the dtype of the logits.
        """
        native, rows = self.native, self.rows(logits, targets, inv_temperature, softcap)
        z, z_rows = scalar_or_rows(z_loss, "z_loss", logits)
        check_coefficients(rows, lse, entropy, a, b)
        vectors = (pointer(lse), pointer(entropy), pointer(a), pointer(b))
        native.rows_backward(*rows.address, *vectors, z, pointer(z_rows), *self.how(logits))

    def rows_policy_loss_(
        self, logits: Tensor, targets: Tensor, batch: Prepared, spec: LossSpec, inv_temperature: float | Tensor = 1.0,
        softcap: float | None = None, want_entropy: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """`rows_forward` and `rows_backward_` in one sweep: logits [N, V] become the gradient of the loss of `spec`, row by row.

        batch: `losses.prepare` of the same N tokens, row-wise (`losses.row_wise`). The loss itself and its metrics follow from
        the result: `losses.coefficients(logp, entropy, lse, batch, spec)`. One read and one write of the logits; a row's
        coefficients are computed from the recorded loss in between (`program.record`, NotImplementedError where that cannot be).
        """
        native, rows = self.native, self.rows(logits, targets, inv_temperature, softcap)
        recorded = record(batch, spec)
        columns = [getattr(batch, name).to(torch.float32).contiguous() for name in recorded.columns]
        for name, column in zip(recorded.columns, columns, strict=True):
            check_vector(column, name, torch.float32, logits)
        program = _compiled(native, recorded)
        logp, entropy, lse = outputs(logits, want_entropy or spec.needs_entropy)
        found = (pointer(logp), pointer(entropy), pointer(lse))
        native.rows_fused(*rows.address, *found, program, [pointer(c) for c in columns], *self.how(logits))
        return logp, entropy, lse


@lru_cache(maxsize=64)
def _compiled(native: ModuleType, recorded: Recorded) -> object:
    if 3 + len(recorded.columns) + len(recorded.code) > getattr(native, "MAX_REGISTERS", _CPU_REGISTERS):
        raise NotImplementedError(
            f"a coefficient program of {len(recorded.code)} instructions is too long for {native.__name__}"
        )
    codes = {name: code for code, name in enumerate(native.OPS)}
    code = [(codes[op], dst, x, y, z, value) for op, dst, x, y, z, value in recorded.code]
    return native.CoefficientProgram(code, len(recorded.columns), recorded.results)


def outputs(rows: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """logp, entropy, lse: fp32, one a row."""
    logp = rows.new_empty(len(rows), dtype=torch.float32)
    return logp, torch.empty_like(logp) if want_entropy else None, torch.empty_like(logp)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def check_coefficients(rows: Rows, lse: Tensor, entropy: Tensor | None, a: Tensor, b: Tensor | None) -> None:
    for name, vector in (("lse", lse), ("a", a), ("b", b), ("entropy", entropy)):
        if vector is not None:
            check_vector(vector, name, torch.float32, rows.logits)
    if b is not None and entropy is None:
        raise ValueError("entropy is None but b is given; pass the entropy that rows_forward returned")


def check_vector(vector: Tensor, name: str, dtype: torch.dtype, rows: Tensor) -> None:
    if vector.dtype != dtype:
        raise TypeError(f"{name} is {vector.dtype}; pass {dtype}")
    if vector.shape != rows.shape[:1] or vector.device != rows.device or not vector.is_contiguous():
        found = f"shape {tuple(vector.shape)}, strides {vector.stride()}, {vector.device}"
        raise ValueError(f"{name} has {found}; pass a contiguous vector of length {len(rows)} on {rows.device}")


def scalar_or_rows(value: float | Tensor, name: str, rows: Tensor) -> tuple[float, Tensor | None]:
    """(number, None) or (1, [N]); a 0-d tensor on a GPU is spread over the rows, as reading it would wait for the GPU."""
    if not isinstance(value, Tensor):
        return float(value), None
    if value.dim() == 0 and value.device.type == "cpu":
        return float(value), None
    if value.dim() == 0 and value.device == rows.device:
        value = value.to(torch.float32).repeat(len(rows))
    check_vector(value, name, torch.float32, rows)
    return 1.0, value
