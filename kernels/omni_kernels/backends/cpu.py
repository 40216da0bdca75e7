"""The C++ row kernels as a backend: AVX-512, AVX2 or portable, chosen at run time; bf16 and fp32 logits, fp32 maths.

The functions are those of `rows.NativeRows`. `omni_kernels._native_cpu` works on torch's own OpenMP threads
(`torch.get_num_threads()` of them) without the GIL. Rows are independent, so results do not depend on the thread count.

Limits: CPU tensors; the native module must have been built (`reason_unavailable` says why not). A row with a NaN or +inf
logit, or with nothing but -inf, gives NaN log-prob, entropy and gradient; -inf elsewhere is a probability of 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omni_kernels.backends.rows import DTYPES, NativeRows

if TYPE_CHECKING:
    from omni_kernels._native_cpu import How

try:
    import omni_kernels._native_cpu as native
except ImportError as error:
    native = None  # type: ignore[assignment]
    _reason = f"omni_kernels._native_cpu is not importable ({error}); reinstall with a C++17 compiler"

OWN_PRODUCTS = True  # the GEMMs of a head too, where `products.multiplies`
ISA = "auto"  # or one of `native.instruction_sets()`


def reason_unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return _reason if native is None else None


@lru_cache(maxsize=1)
def best() -> str:
    """The best instruction set here; empty without the module."""
    return native.instruction_sets()[0] if reason_unavailable() is None else ""


def takes(*tensors: Tensor) -> bool:
    """Whether the C++ kernels are built and take these tensors: on the CPU, all fp32 or all bf16."""
    kind = tensors[0].dtype
    return bool(best()) and kind in DTYPES and all(t.dtype == kind and t.device.type == "cpu" for t in tensors)


@lru_cache(maxsize=8)
def _how(threads: int, isa: str) -> How:
    return native.How(threads, isa)


def how() -> How:
    """Which kernels, on how many threads: what the native functions end with."""
    return _how(torch.get_num_threads(), ISA)


_rows = NativeRows("cpu", native, reason_unavailable(), lambda _: (how(),))
rows_forward, rows_backward_, rows_policy_loss_ = _rows.rows_forward, _rows.rows_backward_, _rows.rows_policy_loss_
