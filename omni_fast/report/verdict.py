"""The run in plain sentences: what rose, what did not, whether the order is known, how good the forecast was.

Each sentence names the number it rests on, and "rose" is said only when the paired 95 % interval lies above 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from omni_fast.curriculum.scores import Estimate

Json = Mapping[str, JsonValue]
Tone = Literal["good", "bad", "open"]

NOT_SOLVED = {
    "reversed": "The solved order was run backwards.",
    "random": "The order was drawn at random, not solved.",
    "order": "The order was given by the user, not solved.",
    "joint": "All tasks were trained together; there was no order to solve.",
}


@dataclass(frozen=True, slots=True)
class Sentence:
    """One finding. tone: good, bad, or open (the data cannot tell, or it is not there yet)."""

    tone: Tone
    text: str


def number(x: JsonValue) -> float:
    """A JSON value as a float; NaN for everything that is none."""
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else math.nan


def mapping(x: JsonValue) -> dict[str, JsonValue]:
    """A JSON object, {} for everything else: a partial result lacks sections, and a report is drawn all the same."""
    return x if isinstance(x, dict) else {}


def listing(x: JsonValue) -> list[JsonValue]:
    """A JSON list, [] for everything else."""
    return x if isinstance(x, list) else []


def names(x: JsonValue) -> list[str]:
    """The strings of a JSON list."""
    return [item for item in listing(x) if isinstance(item, str)]


def points(x: float, signed: bool = True) -> str:
    """A score or a difference of scores with three decimals; an en dash when it is not known."""
    if not math.isfinite(x):
        return "–"
    return f"{x:+.3f}".replace("-", "−") if signed else f"{x:.3f}"


def estimate(x: JsonValue) -> Estimate:
    """A score of result.json; NaN where it is not known."""
    found = mapping(x)
    value, n, low, high = (number(found.get(key)) for key in ("value", "n", "low", "high"))
    return Estimate(value, int(n) if math.isfinite(n) else 0, low, high)


def span(score: Estimate, digits: int = 3) -> str:
    """The interval as text, +0.011 to +0.083; "" when there is none."""
    known = math.isfinite(score.low) and math.isfinite(score.high)
    return f"{score.low:+.{digits}f} to {score.high:+.{digits}f}".replace("-", "−") if known else ""


def brief(score: Estimate) -> str:
    """The interval of a score with two decimals, for a cell."""
    return span(score, digits=2).replace("+", "").replace(" to ", "–")


def typeset(sentence: str) -> str:
    """A sentence of the decision with arrows and minus signs."""
    return re.sub(r"-(?=\d)", "−", sentence.replace("->", "→"))


def direction(gain: Estimate) -> Tone | None:
    """good: the whole interval above 0; bad: below 0; open: it holds 0; None: not measured."""
    if not (math.isfinite(gain.low) and math.isfinite(gain.high)):
        return None
    return "good" if gain.low > 0 else "bad" if gain.high < 0 else "open"


def headline(result: Json) -> Sentence:
    """The one sentence a reader takes away."""
    average = estimate(mapping(result.get("intervals")).get("gain_average"))
    tone = direction(average)
    count = len(names(result.get("tasks")))
    if tone is None:
        done = len(listing(result.get("stages")))
        have = (
            f"{done} of {len(names(result.get('order'))) or count} stages are done" if done else "no stage is done yet"
        )
        return Sentence("open", f"This run is not finished: {have}. What follows is what it has measured so far.")
    value, low_high = points(average.value), span(average)
    over = f"over {count} tasks" if count > 1 else "on the one task"
    if tone == "good":
        return Sentence(
            "good", f"The average test score {over} rose by {value.lstrip('+')} (95 % interval {low_high})."
        )
    if tone == "bad":
        return Sentence("bad", f"The average test score {over} fell by {value.lstrip('−')} (95 % interval {low_high}).")
    return Sentence("open", f"The average test score {over} did not change beyond noise: {value} ({low_high}).")


def sentences(result: Json) -> list[Sentence]:
    """The further findings, most important first."""
    return [*_tasks(result), *_order(result), *_memory(result), *_forecast(result), *_trust(result)]


def _tasks(result: Json) -> list[Sentence]:
    gains = mapping(mapping(result.get("intervals")).get("gain"))
    by: dict[Tone, list[str]] = {"good": [], "bad": [], "open": []}
    unknown = []
    for task in names(result.get("tasks")):
        gain = estimate(gains.get(task))
        tone = direction(gain)
        if tone is None:
            unknown.append(task)
        else:
            by[tone].append(f"{task} {points(gain.value)} ({span(gain)})")
    out = []
    if by["good"]:
        out.append(Sentence("good", f"Rose: {'; '.join(by['good'])}."))
    if by["open"]:
        out.append(
            Sentence("open", f"Did not rise beyond noise: {'; '.join(by['open'])}. The interval of the change holds 0.")
        )
    if by["bad"]:
        out.append(Sentence("bad", f"Fell: {'; '.join(by['bad'])}."))
    if unknown and gains:
        out.append(Sentence("bad", f"Not measured: {', '.join(unknown)} has no item that was scored before and after."))
    return out


def _order(result: Json) -> list[Sentence]:
    out = []
    method, statement = result.get("order_method"), result.get("statement")
    if isinstance(method, str) and method in NOT_SOLVED:
        out.append(Sentence("open", NOT_SOLVED[method]))
    if isinstance(statement, str) and statement:
        settled = result.get("order_settled") is True
        out.append(Sentence("good" if settled else "open", typeset(statement)))
    return out


def _memory(result: Json) -> list[Sentence]:
    bwt = estimate(result.get("bwt"))
    tone = direction(bwt)
    if tone is None:
        return []
    value, low_high = points(bwt.value), span(bwt)
    what = {
        "good": "later stages helped the tasks trained before them",
        "bad": "later stages cost the tasks trained before them",
        "open": "forgetting cannot be told from none",
    }[tone]
    return [Sentence(tone, f"Backward transfer is {value} ({low_high}): {what}.")]


def _forecast(result: Json) -> list[Sentence]:
    errors = mapping(result.get("forecast_error"))
    off = {form: number(mapping(errors.get(form)).get("mean_absolute")) for form in ("additive", "multiplicative")}
    if not math.isfinite(off["additive"]):
        return []
    text = f"The forecast was off by {points(off['additive'], signed=False)} per task and stage on average"
    if math.isfinite(off["multiplicative"]):
        text += f" (with ratios instead of differences: {points(off['multiplicative'], signed=False)})"
    correlation = number(mapping(errors.get("additive")).get("pearson"))
    if math.isfinite(correlation):
        text += f"; within tasks its correlation with what was realised is {correlation:.2f}".replace("-", "−")
    return [Sentence("open", text + ".")]


def _trust(result: Json) -> list[Sentence]:
    """What limits every number above."""
    out = []
    dropped = {t: int(number(n)) for t, n in mapping(result.get("items_dropped")).items() if number(n) > 0}
    if dropped:
        listed = ", ".join(f"{task} {count}" for task, count in dropped.items())
        out.append(Sentence("bad", f"Items left out because a checkpoint has no score for them: {listed}."))
    return out
