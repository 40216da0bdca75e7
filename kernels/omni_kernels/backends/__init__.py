"""Row kernels behind one interface, and the one function that picks among them.

A backend is a module with these functions; logits are [N, V], bf16 or fp32, rows contiguous (row stride >= V):

    reason_unavailable() -> str | None
    rows_forward(logits, targets, inv_temperature, softcap, want_entropy) -> (logp, entropy | None, lse), fp32 [N]
    rows_backward_(logits, targets, lse, entropy, a, b, inv_temperature, softcap, z_loss=0.0)    logits become dlogits

and, where they have them, `rows_policy_loss_` (both in one sweep) and `linear_exponentials` (the head's first GEMM as well).
Rows whose target is -100 are never read: their outputs and gradients are 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from types import ModuleType

from torch import bfloat16, device, dtype, float16, float32, float64  # `torch` here is the backend of that name

# The CUDA ones: on the cards of `cuda.VALIDATED` only, or by name.
_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda_exp", "cuda", "triton", "torch")}
_COMPILED = (float32, bfloat16)
_DTYPES: Mapping[str, tuple[dtype, ...]] = {
    "torch": (*_COMPILED, float16, float64), "cpu": _COMPILED, "triton": _COMPILED, "cuda": _COMPILED, "cuda_exp": _COMPILED,
}  # fmt: skip


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, why not)."""
    if name not in _DTYPES:
        return None, "there is no such backend"
    module = importlib.import_module(f"{__name__}.{name}")
    reason = module.reason_unavailable()
    return (None, reason) if reason else (module, None)


def reason_unavailable(name: str) -> str | None:
    """Why a backend cannot be used here, in a sentence; None if it can."""
    return _load(name)[1]


def select(place: device, kind: dtype, name: str | None = None) -> ModuleType:
    """The row backend for tensors of this place and kind: the fastest one available, or the one named.

    Raises ValueError when the named one is absent, with the reason, and for a dtype that none takes.
    """
    if name is not None:
        module, reason = _load(name)
        if module is None:
            raise ValueError(f"backend {name!r} is not available: {reason}; use backend='torch'")
        return module
    for candidate in _PREFERENCE.get(place.type, ("torch",)):
        module, _ = _load(candidate)
        if module is None or kind not in _DTYPES[candidate]:
            continue
        if not candidate.startswith("cuda") or module.is_validated(place):
            return module
    raise ValueError(f"tensors are {kind}; give float32, bfloat16, float16 or float64")
