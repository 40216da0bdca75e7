"""A small head with all that a loss may look at, and the backends of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_kernels import IGNORE, Tokens, backends

BACKENDS = [name for name in ("torch", "cpu") if backends.reason_unavailable(name) is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def problem(
    n: int = 50, h: int = 24, v: int = 307, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, v, (n,), generator=g)
    targets[1::7] = IGNORE
    return {
        "hidden": torch.randn(n, h, generator=g).to(dtype).requires_grad_(),
        "weight": (torch.randn(v, h, generator=g) * 0.5).to(dtype).requires_grad_(),
        "targets": targets,
        "bias": torch.randn(v, generator=g).to(dtype).requires_grad_(),
        "row_scale": torch.rand(n, generator=g) + 0.5,
        "ga": torch.randn(n, generator=g),
        "gb": torch.randn(n, generator=g),
    }


def tokens_of(p: dict[str, Tensor], logp: Tensor, seed: int = 0, on_policy: bool = False) -> Tokens:
    g = torch.Generator().manual_seed(seed)
    n = len(logp)
    near = [logp.detach().float() + 0.3 * torch.randn(n, generator=g) for _ in range(3)]
    sequences = torch.randint(0, 5, (n,), generator=g)
    mask = torch.rand(n, generator=g) < 0.8
    old = None if on_policy else near[0]
    return Tokens(p["targets"], torch.randn(n, generator=g), mask, sequences, old, near[1], near[2])
