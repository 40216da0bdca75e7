"""What a reward is: a named vector of parts, each a number or invalid with a reason.

The rule that decides between the two: what the sample caused (time limit, crash, over-complex answer, injection into the
judge) scores 0; what the infrastructure caused (judge down, worker lost) is invalid and leaves the group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One component of a reward.

    value: in the range the verifier states (0..1 unless it says otherwise); None means invalid, and so does a number that is
    not finite, which becomes None with the reason "not_finite".
    reason: a short snake_case word that is counted in metrics: "ok", "wrong", "timeout", "no_answer", "judge_down", ...
    """

    value: float | None
    reason: str = "ok"

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            object.__setattr__(self, "value", None)
            object.__setattr__(self, "reason", "not_finite")

    @property
    def valid(self) -> bool:
        return self.value is not None


@dataclass(frozen=True, slots=True)
class Score:
    """The parts of one sample's reward, in a fixed order per task (for example `correct`, `format`)."""

    parts: Mapping[str, Part]

    @property
    def valid(self) -> bool:
        """A score is valid when each of its parts is."""
        return all(part.valid for part in self.parts.values())
