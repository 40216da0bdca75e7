"""Parts that any task may add to its reward: cheap properties of the text alone, each in 0..1.

They are easy to earn: give them a small weight, gate them behind the hard part, or normalise each part by itself
(`compose`). Linear in the text's length, which is capped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from omni_fast.rewards.score import Part
from omni_fast.rewards.text_checks import MAX_CHARS, repeated_ngram_share, words

_MARKED = re.compile(r"\\boxed\{|^#### |<answer>|^```", re.MULTILINE)


def marked(text: str) -> Part:
    """1 when the answer is marked: \\boxed{}, `####` at the start of a line, <answer>, or a fenced block."""
    found = _MARKED.search(text[:MAX_CHARS]) is not None
    return Part(float(found), "ok" if found else "unmarked")


def unrepeated(text: str) -> Part:
    """1 minus the share of word triples that occurred before; 0 for a text without words."""
    tokens = words(text)
    return Part(1.0 - repeated_ngram_share(tokens, 3)) if tokens else Part(0.0, "empty")


EXTRA: Mapping[str, Callable[[str], Part]] = {"format": marked, "unrepeated": unrepeated}
