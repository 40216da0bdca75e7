"""A trained parameter with its fp32 truth, gradient sum and moments; and the clock of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor
from torch.distributed.tensor import DTensor


@dataclass(slots=True)
class Slot:
    """A trained parameter: what the model reads, the fp32 truth, the gradient sum, AdamW's moments (None: not stepped).

    `master`, `grad` and the moments are this process's part of it.
    """

    name: str
    working: Tensor
    master: Tensor
    grad: Tensor = field(init=False)
    filled: bool = False  # whether `grad` holds anything of this step
    mean: Tensor | None = None
    square: Tensor | None = None

    def __post_init__(self) -> None:
        self.grad = torch.empty_like(self.master)

    @property
    def shape(self) -> Size:
        """Of the whole parameter."""
        return self.working.shape

    def sum(self) -> Tensor:
        """The gradient sum, to be added to."""
        into, filled = self.place()
        return into if filled else into.zero_()

    def place(self) -> tuple[Tensor, bool]:
        """Where a gradient in fp32 goes, and whether it is added to what is there."""
        before, self.filled = self.filled, True
        return self.grad, before

    def drain(self, parameter: Tensor) -> None:
        """A hook: takes the gradient that autograd has just given the parameter, unless it has its place already."""
        if parameter.grad is None:
            return
        grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        into, filled = self.place()
        into.add_(grad) if filled else into.copy_(grad)
        parameter.grad = None


class Clock:
    """Seconds by part of the step."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.started = self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        total = {"seconds/update": time.perf_counter() - self.started}
        return {f"seconds/{part}": value for part, value in self.parts.items()} | total
