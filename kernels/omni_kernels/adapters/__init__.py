"""The operators in other people's trainers: `adapters.trl` (TRL's GRPOTrainer), `adapters.verl`, `adapters.hf`.

Each module imports its trainer when it is itself imported; this one needs torch only.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor


class HeadOptions(TypedDict):
    """Keyword arguments of the linear operators."""

    inv_temperature: float | Tensor
    softcap: float | None


def head_options(inv_temperature: float | Tensor, scale: float, softcap: float | None) -> HeadOptions:
    """Options for a head whose logits are multiplied by `scale` (> 0) before the softcap.

    The operators have no such factor, and need none: cap tanh(s u / cap) = s c tanh(u / c) with c = cap / s.
    """
    return {"inv_temperature": inv_temperature * scale, "softcap": None if softcap is None else softcap / scale}


def as_autocast(hidden: Tensor) -> Tensor:
    """hidden in the dtype that GEMMs would have under the current autocast."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden
