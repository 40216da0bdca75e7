"""The run in plain sentences: what rose, what did not, whether the order is known, how good the forecast was.

Each sentence names the number it rests on, and "rose" is said only when the paired 95 % interval lies above 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from omni_fast.curriculum.scores import NOT_KNOWN, Estimate, ScoreDict

Json = Mapping[str, Any]  # result.json as `result.assemble` makes it; an unfinished run lacks sections
Tone = Literal["good", "bad", "open"]

NOT_SOLVED = {
    "reversed": "The solved order was run backwards.",
    "random": "The order was drawn at random, not solved.",
    "order": "The order was given by the user, not solved.",
    "joint": "All tasks were trained together; there was no order to solve.",
}


class Sentence(NamedTuple):
    """One finding. tone: good, bad, or open (the data cannot tell, or it is not there yet)."""

    tone: Tone
    text: str


def number(x: float | None) -> float:
    """NaN for null, which stands for "not measured"."""
    return math.nan if x is None else x


def points(x: float, signed: bool = True) -> str:
    """A score or a difference of scores with three decimals; an en dash when it is not known."""
    if not math.isfinite(x):
        return "–"
    x = round(x, 9)  # means of the same items in another order are told alike, halves of the last digit as well
    return f"{x:+.3f}".replace("-", "−") if signed else f"{x:.3f}"


def estimate(found: ScoreDict | None) -> Estimate:
    """A score of result.json."""
    if found is None:
        return NOT_KNOWN
    return Estimate(number(found["value"]), found["n"], number(found["low"]), number(found["high"]))


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
    average = estimate(result.get("intervals", {}).get("gain_average"))
    tone, count, done = direction(average), len(result["tasks"]), len(result.get("stages", ()))
    if tone is None:
        have = f"{done} of {len(result.get('order', ())) or count} stages are done" if done else "no stage is done yet"
        return Sentence("open", f"This run is not finished: {have}. What follows is what it has measured so far.")
    value, low_high = points(average.value), span(average)
    over = f"over {count} tasks" if count > 1 else "on the one task"
    told = {
        "good": f"rose by {value.lstrip('+')} (95 % interval {low_high})",
        "bad": f"fell by {value.lstrip('−')} (95 % interval {low_high})",
        "open": f"did not change beyond noise: {value} ({low_high})",
    }
    return Sentence(tone, f"The average test score {over} {told[tone]}.")


def sentences(result: Json) -> list[Sentence]:
    """The further findings, most important first."""
    return [*_tasks(result), *_order(result), *_memory(result), *_forecast(result), *_trust(result)]


def _tasks(result: Json) -> Iterator[Sentence]:
    by: dict[Tone | None, list[str]] = {"good": [], "open": [], "bad": [], None: []}
    for task, found in result.get("intervals", {"gain": {}})["gain"].items():
        gain = estimate(found)
        tone = direction(gain)
        by[tone].append(f"{task} {points(gain.value)} ({span(gain)})" if tone else task)
    told: dict[Tone | None, str] = {
        "good": f"Rose: {'; '.join(by['good'])}.",
        "open": f"Did not rise beyond noise: {'; '.join(by['open'])}. The interval of the change holds 0.",
        "bad": f"Fell: {'; '.join(by['bad'])}.",
        None: f"Not measured: {', '.join(by[None])} has no item that was scored before and after.",
    }
    yield from (Sentence(tone or "bad", told[tone]) for tone, tasks in by.items() if tasks)


def _order(result: Json) -> Iterator[Sentence]:
    if (method := result.get("order_method")) in NOT_SOLVED:
        yield Sentence("open", NOT_SOLVED[method])
    if "statement" in result:
        yield Sentence("good" if result.get("order_settled") else "open", typeset(result["statement"]))


def _memory(result: Json) -> Iterator[Sentence]:
    bwt = estimate(result.get("bwt"))
    if tone := direction(bwt):
        what = {
            "good": "later stages helped the tasks trained before them",
            "bad": "later stages cost the tasks trained before them",
            "open": "forgetting cannot be told from none",
        }[tone]
        yield Sentence(tone, f"Backward transfer is {points(bwt.value)} ({span(bwt)}): {what}.")


def _forecast(result: Json) -> Iterator[Sentence]:
    errors = result.get("forecast_error")
    if errors and (additive := errors["additive"]["mean_absolute"]) is not None:
        text = (
            f"The forecast was off by {points(additive, False)} per task and stage on average (with ratios instead of"
            f" differences: {points(errors['multiplicative']['mean_absolute'], False)})"
        )
        if (correlation := errors["additive"]["pearson"]) is not None:
            text += f"; within tasks its correlation with what was realised is {correlation:.2f}".replace("-", "−")
        yield Sentence("open", text + ".")


def _trust(result: Json) -> Iterator[Sentence]:
    """What limits every number above."""
    if listed := ", ".join(f"{task} {count}" for task, count in result.get("items_dropped", {}).items() if count):
        yield Sentence("bad", f"Items left out because a checkpoint has no score for them: {listed}.")
