"""The contract every judge keeps.

A judge compares a reply with the reference reply to the same prompt and returns one `Part` for each: 1 for a win, 0.5
for a tie, 0 for a loss; a judge that can tell by how much may give values between. What the reply caused (a gate, an
attempt to talk to the judge) is 0 with the reason; what the judge caused (server down, no verdict after retries) is
invalid with a reason. A judge never raises for any text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from omni_fast.rewards.score import Part
from omni_fast.rewards.text_checks import gate, strip_reasoning


@dataclass(frozen=True, slots=True)
class Reply:
    """A completion with what is needed to judge it.

    reference: a good reply to the same prompt. required: words the prompt demands, lower case, may be empty.
    """

    prompt: str
    completion: str
    reference: str
    required: tuple[str, ...] = ()

    def swapped(self) -> Reply:
        """The reference as a reply to be judged against this one."""
        return replace(self, completion=self.reference, reference=self.completion)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies of which something is known, as one judged against the other.

    kind: what `reply.completion` is: "pair" the better one, "length" the longer of two good ones, "hack" a hack.
    family: of the flaw of the worse one.
    """

    family: str
    reply: Reply
    kind: str = "pair"


class Judge(Protocol):
    """Anything that prefers."""

    @property
    def name(self) -> str:
        """What a report calls it, with the model and the settings that matter."""
        ...

    def judge(self, replies: Sequence[Reply]) -> list[Part]:
        """One part per reply, in order."""
        ...


def gated(replies: Sequence[Reply], judge: Callable[[Sequence[Reply]], Sequence[Part]]) -> list[Part]:
    """What a gate refuses scores 0 with its reason; the rest is judged in one call; both sides without their reasoning."""
    stripped = [
        replace(reply, completion=strip_reasoning(reply.completion), reference=strip_reasoning(reply.reference))
        for reply in replies
    ]
    refused = [gate(reply.prompt, reply.completion, reply.required) for reply in stripped]
    judged = iter(judge([reply for reply, reason in zip(stripped, refused, strict=True) if not reason]))
    return [Part(0.0, reason) if reason else next(judged) for reason in refused]
