"""A small random projection of a gradient, whose dot products estimate those of the gradients themselves.

Each tensor is cut into rows of `size` numbers; rows are summed with random signs. Two numbers that fall into the same
place come from different rows, whose signs are independent, so the sketch's dot product is unbiased (Charikar et al.
2002, count sketch) with a relative spread of about 1 / sqrt(size). One pass over the gradient, nothing stored but the
signs of a tensor's rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from omni_fast.curriculum.scores import Floats


def gradient_sketch(gradients: Iterable[tuple[str, Tensor]], *, size: int = 1024, seed: int = 0) -> Floats:
    """The sketch [size] of named gradients; seed and names fix the projection, in every step and process."""
    total = torch.zeros(size, dtype=torch.float64)
    for name, gradient in gradients:
        flat = gradient.detach().reshape(-1)
        rows = -(-flat.numel() // size)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        signs = torch.from_numpy(rng.integers(0, 2, rows).astype(np.float32) * 2 - 1).to(flat.device)
        shift = int(rng.integers(0, size))  # short tensors must not all land in the first places
        whole = flat.numel() // size
        part = torch.zeros(size, dtype=torch.float32, device=flat.device)
        if whole:
            part += signs[:whole] @ flat[: whole * size].view(whole, size).float()
        if rows > whole:
            tail = flat[whole * size :].float()
            part[: tail.numel()] += signs[-1] * tail
        total += torch.roll(part, shift).double().cpu()
    return total.numpy()
