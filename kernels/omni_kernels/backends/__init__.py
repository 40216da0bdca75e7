"""Row kernels behind one interface, and the one function that picks among them.

A backend is a module with these functions; logits are [N, V], bf16 or fp32, rows contiguous (row stride >= V):

    reason_unavailable() -> str | None
    rows_forward(logits, targets, inv_temperature, softcap, want_entropy) -> (logp, entropy | None, lse), fp32 [N]
    rows_backward_(logits, targets, lse, entropy, a, b, inv_temperature, softcap, z_loss=0.0)    logits become dlogits

Rows whose target is -100 are never read: their outputs and gradients are 0.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch

_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}
_DTYPES = {"torch": (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, why not)."""
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        return None, "there is no such backend"
    module = importlib.import_module(f"{__name__}.{name}")
    reason = module.reason_unavailable()
    return (None, reason) if reason else (module, None)


def select(device: torch.device, dtype: torch.dtype, name: str | None = None) -> ModuleType:
    """The row backend for tensors of this device and dtype: the fastest one available, or the one named.

    Raises ValueError when the named one is absent, with the reason.
    """
    if name is not None:
        module, reason = _load(name)
        if module is None:
            raise ValueError(f"backend {name!r} is not available: {reason}; use backend='torch'")
        return module
    for candidate in _PREFERENCE.get(device.type, ("torch",)):
        module, _ = _load(candidate)
        if module is not None and dtype in _DTYPES.get(candidate, (torch.float32, torch.bfloat16)):
            return module
    raise RuntimeError("unreachable: the torch backend is always available")
