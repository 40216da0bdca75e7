"""`omni-fast judge audit`: how far a judge can be trusted, on a shipped set of pairs whose better side is known.

The set (`data/audit.jsonl`, made by `sentences`, `corrupt` and `hacks` with seeds of their own, and 24 pairs by hand):
pair    a good and a spoiled reply of equal length, the better one first
length  two good replies to one prompt, the longest of a dozen first and the shortest second
hack    a hack string first, a good reference second
Every figure comes with its count; shares with a 95 % Wilson interval.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import NamedTuple

from scipy.stats import binomtest

from omni_fast.rewards.judge.base import Judge, Pair, Reply
from omni_fast.rewards.judge.client import Failure
from omni_fast.rewards.judge.pairwise import Json, Verdict, combine
from omni_fast.rewards.judge.server import PairwiseJudge

Answers = list[tuple[Verdict, Verdict] | None]  # a pair asked as (first, second) and as (second, first)

MAX_HACKS = 0.02
_SAME = 0.02  # an absolute judge's values nearer than this are a tie
_ACCEPTED_SHARE = 0.9  # a hack is accepted that reaches this share of what the reference gets


class Share(NamedTuple):
    """k of n with a 95 % Wilson interval; value None without any."""

    value: float | None
    k: int
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:6.1%}  [{self.low:.1%}, {self.high:.1%}]  of {self.n}" if self.n else "     -  of 0"


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found. shares, by name:

    position_bias: the two orders name the same position. first_position: of those, the first.
    agreement: the better side wins in both orders; contradicted: the worse side does. ties: of the pairs.
    ties_good, longer_wins: of pairs of two good replies; of the decided ones 0.5 is no length bias.
    hacks_accepted. invalid: verdicts that never came.
    """

    judge: str
    shares: dict[str, Share]
    families: dict[str, Share]
    verdicts: int
    seconds: float

    @property
    def passed(self) -> bool:
        """At most 2 % of the hacks accepted, and the better side found more often than not."""
        hacks, agreement = self.shares["hacks_accepted"].value, self.shares["agreement"].value
        return hacks is not None and agreement is not None and hacks <= MAX_HACKS and agreement > 0.5

    def record(self) -> dict[str, Json]:
        """For --json."""
        return {
            "judge": self.judge,
            "passed": self.passed,
            **{name: share._asdict() for name, share in self.shares.items()},
            "families": {name: share._asdict() for name, share in self.families.items()},
            "verdicts": self.verdicts,
            "seconds": self.seconds,
            "seconds_per_verdict": self.seconds / max(1, self.verdicts),
        }

    def table(self) -> str:
        """For a terminal."""
        lines = [f"judge: {self.judge}", ""]
        lines += [f"{name.replace('_', ' '):<26}{share}" for name, share in self.shares.items()]
        lines += ["", "agreement by kind of flaw"]
        worst_first = sorted(self.families.items(), key=lambda row: row[1].value or 0)
        lines += [f"  {name:<24}{share}" for name, share in worst_first]
        cost = 1000 * self.seconds / max(1, self.verdicts)
        lines += ["", f"{self.verdicts} verdicts in {self.seconds:.1f} s, {cost:.1f} ms each"]
        lines += ["passed" if self.passed else "FAILED: do not train on this judge"]
        return "\n".join(lines)


def shipped_pairs() -> list[Pair]:
    """The audit set that comes with the package."""
    text = (files("omni_fast.rewards.judge") / "data" / "audit.jsonl").read_text(encoding="utf-8")
    rows = map(json.loads, text.splitlines())
    return [Pair(r["family"], Reply(r["prompt"], r["first"], r["second"], tuple(r["words"])), r["kind"]) for r in rows]


def audit(judge: Judge) -> Audit:
    """Measure a judge on the set. Never raises for what a judge's server does; its failures are counted as invalid."""
    pairs, start = shipped_pairs(), time.monotonic()
    compared = [pair for pair in pairs if pair.kind != "hack"]
    answers = _compare(judge, [pair.reply for pair in compared])
    accepted = _accepted(judge, [pair.reply for pair in pairs if pair.kind == "hack"])
    seconds = time.monotonic() - start

    both = [(pair, *answer) for pair, answer in zip(compared, answers, strict=True) if answer]
    known = [(pair, combine(a, b)) for pair, a, b in both if pair.kind == "pair"]
    length = [combine(a, b) for pair, a, b in both if pair.kind == "length"]
    names = dict.fromkeys(pair.family for pair, _ in known)
    shares = {
        "agreement": _share(value == 1.0 for _, value in known),
        "contradicted": _share(value == 0.0 for _, value in known),
        "ties": _share(value == 0.5 for _, value in known),
        "ties_good": _share(value == 0.5 for value in length),
        "position_bias": _share(a == b != "tie" for _, a, b in both),
        "first_position": _share(a == "A" for _, a, b in both if a == b != "tie"),
        "longer_wins": _share(value == 1.0 for value in length if value != 0.5),
        "hacks_accepted": _share(value for value in accepted if value is not None),
        "invalid": _share(answer is None for answer in (*answers, *accepted)),
    }
    families = {name: _share(value == 1.0 for pair, value in known if pair.family == name) for name in names}
    return Audit(judge.name, shares, families, 2 * len(compared) + len(accepted), seconds)


def _share(flags: Iterable[bool]) -> Share:
    values = list(flags)
    k, n = sum(values), len(values)
    low, high = map(float, binomtest(k, n).proportion_ci(method="wilson")) if n else (0.0, 1.0)
    return Share(k / n if n else None, k, n, low, high)


def _compare(judge: Judge, replies: Sequence[Reply]) -> Answers:
    """Raw verdicts of both orders. A judge without positions gives the mirrored answer."""
    if isinstance(judge, PairwiseJudge):
        asked = judge.both_orders(replies)
        return [None if isinstance(a, Failure) or isinstance(b, Failure) else (a, b) for a, b in asked]
    both = zip(judge.judge(replies), judge.judge([reply.swapped() for reply in replies]), strict=True)
    return [None if a.value is None or b.value is None else _mirrored(a.value - b.value) for a, b in both]


def _mirrored(difference: float) -> tuple[Verdict, Verdict]:
    if abs(difference) < _SAME:
        return "tie", "tie"
    return ("A", "B") if difference > 0 else ("B", "A")


def _accepted(judge: Judge, hacks: Sequence[Reply]) -> list[bool | None]:
    """Whether a hack got anything out of the judge: a tie is enough, or nearly what the reference itself gets."""
    bars = judge.judge([replace(hack, completion=hack.reference) for hack in hacks])
    return [
        None
        if part.value is None or bar.value is None
        else part.reason == "tie" or part.value >= _ACCEPTED_SHARE * bar.value > 0.0
        for part, bar in zip(judge.judge(hacks), bars, strict=True)
    ]
