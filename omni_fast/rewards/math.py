"""The verifier of math tasks: one final answer, compared in stages from cheap to dear.

1. Extract one answer: the last of \\boxed{}, `####` or <answer></answer>; else the formula after "answer is", else the
   last number in the text (not in a gold answer).
2. Equal as normalised strings, or as exact numbers (integers, decimals, fractions): microseconds, mostly enough.
3. Else math-verify, in worker processes (`math_pool`), for what is short and shallow enough to be an honest answer.
   Its own guard is an alarm signal, which works in main threads only.

What the sample causes (no answer, too long, too complex, time limit) scores 0; a lost worker is invalid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Self

from omni_fast.rewards.math_pool import MathPool
from omni_fast.rewards.score import Part

MAX_CHARS = 200  # an honest final answer is shorter
MAX_DEPTH = 12  # brackets within brackets; the grammar's time grows exponentially with empty ones
DECIMALS = 6  # how many decimals count when one side is a decimal number; what math-verify does by default
TAIL_CHARS = 1000  # where a last number is looked for

_NUMBER = r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+"
_PLAIN = re.compile(rf"([-+]?)(?:({_NUMBER})(?:/({_NUMBER}))?|\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}})")
_LAST = re.compile(
    rf"(?:(?<![0-9A-Za-z_.)\]}}])[-+])?(?:\\[dt]?frac\{{-?(?:{_NUMBER})\}}\{{(?:{_NUMBER})\}}"
    rf"|(?<![0-9.])(?:{_NUMBER})(?:/(?:{_NUMBER}))?(?:\s*\\?%)?)"
)
_FORMULA = re.compile(
    r"(?i:answer)(?:\s+is)?\s*:?\s*(?:\$|\\\()((?:[^$\n\\]|\\.){1,200}?)(?:\$|\\\))"
)  # "the answer is $x+1$"
_DROP = re.compile(r"\\[!,;: ]|\\left|\\right|\s+|\\displaystyle")
_POWER = r"\s*(?:\^|\*\*)[\s{(+-]*"
# factorials; numbers to a power to a power; three nested exponents; exponents of five digits, or three on a bracket
_COSTLY = re.compile(
    rf"!|[0-9][)}}]*{_POWER}[0-9]+\}}?{_POWER}|(?:\^\s*\{{[^{{}}^]{{0,20}}){{2}}\^|{_POWER}[0-9]{{5,}}|\){_POWER}[0-9]{{3,}}"
)
_UNFINISHED = re.compile(r"\\(?:i?int|oint|sum|prod|lim|[dt]?binom)(?![a-z])")


def extract_answer(text: str, lenient: bool = True) -> str | None:
    """The final answer a text commits to, or None. Linear in the text's length."""
    start, mark = max((text.rfind(mark), mark) for mark in ("\\boxed", "\\fbox", "####", "<answer>"))
    if start >= 0:
        rest = text[start + len(mark) :][: 2 * MAX_CHARS]
        if mark == "####":
            return rest.lstrip(" \t").split("\n", 1)[0].strip() or None
        if mark == "<answer>":
            return rest.split("</answer>", 1)[0].strip() or None
        return (_braced(text, text.find("{", start, start + 10)) or "").strip() or None
    if not lenient:
        return None
    tail = text[-TAIL_CHARS:].replace("\u2212", "-")
    formulas = _FORMULA.findall(tail) if "$" in tail or "\\(" in tail else ()
    numbers = formulas or _LAST.findall(tail)
    return numbers[-1].strip() if numbers else None


def _braced(text: str, start: int) -> str | None:
    """The content of the brace that opens at `start`; None when it never closes within what an answer may be long."""
    if start < 0:
        return None
    depth = 0
    for position in range(start, min(len(text), start + 2 * MAX_CHARS)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position]
    return text[start + 1 : start + 2 * MAX_CHARS] if len(text) > start + 2 * MAX_CHARS else None


@lru_cache(maxsize=16384)
def normalise(answer: str) -> str:
    """The same answer without mathematical spacing, dollar signs and other things that carry no meaning."""
    text = _DROP.sub("", answer[: 2 * MAX_CHARS]).replace("\u2212", "-").replace("\\$", "$").replace("{,}", ",")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").rstrip(".").strip("$")
    if text.startswith("\\(") and text.endswith("\\)"):
        text = text[2:-2]
    return text


@lru_cache(maxsize=16384)
def number(text: str) -> tuple[Fraction, bool] | None:
    """A normalised answer as an exact number, and whether it has a decimal point; None when it is no number."""
    match = _PLAIN.fullmatch(text) if len(text) <= MAX_CHARS else None
    if match is None:
        return None
    sign, top, bottom, top2, bottom2 = match.groups()
    top, bottom = (top or top2).replace(",", ""), (bottom or bottom2 or "1").replace(",", "")
    denominator = Fraction(bottom)
    if denominator == 0:
        return None
    value = Fraction(top) / denominator
    return -value if sign == "-" else value, "." in top


def compare_fast(gold: str, answer: str) -> bool | None:
    """Stages 1 and 2 on normalised answers: True or False where exact means decide, None where they do not."""
    if gold == answer:
        return bool(gold)
    left, right = number(gold), number(answer)
    if left is None or right is None:
        return None
    if left[1] or right[1]:
        return round(left[0], DECIMALS) == round(right[0], DECIMALS)
    return left[0] == right[0]


def too_complex(answer: str, gold: str = "") -> bool:
    """Whether an answer is refused unread: deep nesting, factorials, towers of exponents, huge exponents.

    So is an integral, sum, product, limit or binomial that the answer leaves to be worked out and the gold does not.
    """
    if _UNFINISHED.search(answer) and not _UNFINISHED.search(gold):
        return True
    depth = 0
    for character in answer:
        if character in "([{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif character in ")]}":
            depth -= 1
    return _COSTLY.search(answer) is not None


class MathVerifier:
    """Part `correct` of a score: 1 when the final answer equals the gold answer, else 0."""

    def __init__(self, workers: int = 2, timeout_s: float = 2.0) -> None:
        """Workers start when an answer first needs them."""
        self._pool = MathPool(workers, timeout_s)

    def score(self, completions: Sequence[str], golds: Sequence[str]) -> list[Part]:
        """One part per completion. Never raises for any text.

        A gold answer may be bare ("72") or a solution that ends in a marked answer ("... #### 72").
        Reasons: "ok", "wrong", "no_answer", "too_long", "too_complex", "timeout", "memory", "crash"; "worker_lost" is
        invalid.
        """
        found = [_decide(completion, gold) for completion, gold in zip(completions, golds, strict=True)]
        open_pairs = [one for one in found if isinstance(one, tuple)]
        verdicts = iter(self._pool.check(open_pairs) if open_pairs else ())
        return [_part(next(verdicts) if isinstance(one, tuple) else one) for one in found]

    def close(self) -> None:
        """End the worker processes. May be called twice; a later score starts them again."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _decide(completion: str, gold: str) -> str | tuple[str, str]:
    """A verdict, or the gold answer and the answer that math-verify has to compare."""
    answer, gold = extract_answer(completion), _bare_gold(gold)
    if answer is None:
        return "no_answer"
    if len(answer) > MAX_CHARS:
        return "too_long"
    equal = compare_fast(normalise(gold), normalise(answer))
    if equal is not None:
        return "ok" if equal else "wrong"
    if len(gold) > MAX_CHARS:
        return "too_long"
    return "too_complex" if too_complex(answer, gold) or too_complex(gold, gold) else (gold, answer)


@lru_cache(maxsize=64)
def _part(verdict: str) -> Part:
    if verdict == "ok":
        return Part(1.0)
    return Part(None if verdict == "worker_lost" else 0.0, verdict)


@lru_cache(maxsize=16384)
def _bare_gold(gold: str) -> str:
    return extract_answer(gold, lenient=False) or gold.strip()
