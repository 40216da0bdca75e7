"""The contract every judge keeps.

A judge compares a reply with the reference reply to the same prompt and returns one `Part` for each: 1 for a win, 0.5
for a tie, 0 for a loss; a judge that can tell by how much may give values between. What the reply caused (a gate, an
attempt to talk to the judge) is 0 with the reason; what the judge caused (server down, no verdict after retries) is
invalid with a reason. A judge never raises for any text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from omni_fast.rewards.score import Part


@dataclass(frozen=True, slots=True)
class Reply:
    """A completion with what is needed to judge it.

    reference: a good reply to the same prompt. required: words the prompt demands, lower case, may be empty.
    """

    prompt: str
    completion: str
    reference: str
    required: tuple[str, ...] = ()


class Judge(Protocol):
    """Anything that prefers."""

    @property
    def name(self) -> str:
        """What a report calls it, with the model and the settings that matter."""
        ...

    def judge(self, replies: Sequence[Reply]) -> list[Part]:
        """One part per reply, in order."""
        ...
