"""The verifier of math tasks: one final answer, compared in stages from cheap to dear.

1. Extract one answer: the last of \\boxed{}, `####` or <answer></answer>; else the formula after "answer is", else the
   last number in the text (not in a gold answer).
2. Equal as normalised strings, or as exact numbers (integers, decimals, fractions): microseconds, mostly enough.
3. Else math-verify, in worker processes (`math_pool`), for what is short and shallow enough to be an honest answer.
   Its own guard is an alarm signal, which works in main threads only.

Where the gold answer is a number, the answer has to be one number, worked out: math-verify alone pays `17+25` for 42, the
question said again, and `41=42`, two guesses.
What the sample causes (no answer, too long, too complex, time limit) scores 0; a lost worker is invalid.
Units are compared by name where both sides have a known one: 42 km is neither 42 cm nor, without conversion, 42,000 m.
Limits: a `$` alone and a degree sign mean nothing, and a percentage equals its number with and without the sign.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Literal

from omni_fast.rewards.math_pool import MathWorker, Verdict
from omni_fast.rewards.score import Part
from omni_fast.rewards.workers import Workers

# unit: another one than the gold answer's. Of the worker's verdicts "worker_lost" is invalid
Reason = Verdict | Literal["unit", "no_answer", "several", "unfinished", "too_long", "too_complex"]

MAX_CHARS = 200  # an honest final answer is shorter
MAX_DEPTH = 12  # brackets within brackets; the grammar's time grows exponentially with empty ones
DECIMALS = 6  # how many decimals count when one side is a decimal number; what math-verify does by default
TAIL_CHARS = 1000  # where a last number is looked for

_NUMBER = r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+"
_PLAIN = re.compile(  # perhaps with a whole number before its fraction: "2 1/2"
    rf"([-+]?)(?:([0-9]+)(?: (?=[0-9]+/)|(?=\\)))?"
    rf"(?:((?:{_NUMBER})(?:[eE][-+]?[0-9]{{1,2}})?)(?:/({_NUMBER}))?|\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}})"
)
_LAST = re.compile(
    rf"(?:(?<![0-9A-Za-z_.)\]}}])[-+])?(?:(?:(?<![0-9.])[0-9]+ ?)?\\[dt]?frac\{{-?(?:{_NUMBER})\}}\{{(?:{_NUMBER})\}}"
    rf"|(?<![0-9.])(?:[0-9]+ (?=[0-9]+/))?(?:{_NUMBER})(?:/(?:{_NUMBER}))?(?:\s*\\?%)?)"
)
_FORMULA = re.compile(
    r"(?i:answer)(?:\s+is)?\s*:?\s*(?:\$|\\\()((?:[^$\n\\]|\\.){1,200}?)(?:\$|\\\))"
)  # "the answer is $x+1$"
_SPACE = re.compile(r"\\[!,;: ]")
# all white space but what keeps two numbers apart: "1 234" is one, "4 2" is not
_DROP = re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|(?<![0-9])\s+|\s++(?![0-9])|\s+(?=[0-9]{3}(?![0-9]))")
_POWER = r"\s*(?:\^|\*\*)[\s{(+-]*"
# factorials; numbers to a power to a power; three nested exponents; exponents of five digits, or three on a bracket
_COSTLY = re.compile(
    rf"!|[0-9][)}}]*{_POWER}[0-9]+\}}?{_POWER}|(?:\^\s*\{{[^{{}}^]{{0,20}}){{2}}\^|{_POWER}[0-9]{{5,}}|\){_POWER}[0-9]{{3,}}"
)
# not within brackets: "P(X=2)"
_RELATION = re.compile(r"(?::?=|\\(?:to|rightarrow|Rightarrow|implies|equiv|approx|simeq)(?![a-z])|[→⇒≡≈])(?![^()]*\))")
_MODULUS = re.compile(r"\\pmod\s*(?:[0-9]|\{[0-9]+\})")
# what a number may be set equal to: a variable or f(3), or the sum that was asked
_SIDE = re.compile(
    r"[A-Za-z](?:_\{[0-9A-Za-z]{1,3}\}|_?\{?[0-9A-Za-z]\}?)?(?:\([^()=]*\))?"
    r"|(?:[-+*/^(){}.0-9×÷]|\\times|\\cdot|\\div|\\frac)+"
)
# what may stand beside a number: a text without another one, degrees, "base ten"; and a power of ten
_TEXT = (
    r"\\(?:text|mathrm|textbf|operatorname)\{(?!(?:or|and)\})"
    r"(?:[^{}0-9^]|\^\{?-?[0-9]\}?|(?:(?<=m)|(?<=ft))[23]|(?:(?<=mod)|(?<=outof))[0-9]+)*\}(?:\^\{?-?[0-9]\}?)?"
)
_UNIT = re.compile(rf"{_TEXT}|\^\{{?\\circ\}}?|_\{{?10\}}?(?![0-9])")
_BEHIND = re.compile(rf"(?<=[0-9}}]){_TEXT}|^\\text(?:bf|rm)?\{{\([A-E]\)\}}")  # or a letter of a choice before it
_BESIDE = re.compile(rf"{_UNIT.pattern}|(?:^-?|\\times|\\cdot|×|\*)10\^\{{?[-+]?[0-9]+\}}?")
_BASE = re.compile(r"[0-9]_\{?([0-9]+)\}?$")
_OPERATION = re.compile(r"[0-9)}%](?:[-+*/^×÷]|\\times|\\cdot|\\div|\\pm|\\bmod|\\mod)[-+(.{\\0-9]")
_FUNCTIONS = r"\\(?:sqrt|log|ln|exp|sin|cos|tan|gcd|lcm|max|min|[lr]floor|[lr]ceil|pi)"
_FUNCTION = re.compile(rf"{_FUNCTIONS}(?![a-z])|\|")
_FORMULA_OF_ONE = re.compile(
    rf"(?:[-+*/^(){{}}0-9.×÷u ]|\\sqrt\[[0-9]\]|(?:\\(?:frac|cdot|times|div)|{_FUNCTIONS})(?![a-z]))+"
)
_FRACTION = r"\\frac(?:\{[^{}]*\}|[0-9]){2}"
# numbers that only name or count: an index, an exponent, an argument; a number by itself; a formula around numbers
_NAMING = re.compile(r"(?:[_^]|\\angle)(?:\{[^{}]*\}|\\[a-z]+|[0-9A-Za-z])|(?<=[A-Za-z}'])\([^()]*\)")
_ALONE = re.compile(rf"[-+({{]*(?:{_NUMBER})[)}}]*[A-Za-z]*")
_EXPRESSION = re.compile(
    r"(?:(?!or|and)[A-Za-z]|[-+*/^(){}\[\]0-9.×÷!|%']|,(?=[0-9]{3})|(?<=[-+*/(])\$|\\%"
    rf"|\\(?:frac|binom|cdot|times|div)|{_FUNCTIONS} ?)+"
)
_PIECE = re.compile(r"[0-9\\]|\b[A-Zb-z]\b")
_UNFINISHED = re.compile(r"\\(?:i?int|oint|sum|prod|lim|[dt]?binom)(?![a-z])")

_METRIC = dict(
    metre="m", meter="m", gram="g", litre="l", liter="l", second="s", watt="W", joule="J", newton="N", volt="V",
    hertz="Hz", pascal="Pa", byte="B", ton="t", tonne="t",
)  # fmt: skip
_SCALE = {"": "", "kilo": "k", "centi": "c", "milli": "m", "deci": "d", "mega": "M"}
_NAMED = (  # the name that all of a line are compared by, then the others
    "in inch inche", "ft foot feet", "yd yard", "mi mile", "lb pound", "oz ounce", "gal gallon", "acre", "ha hectare",
    "s sec", "min minute", "h hr hour", "day", "week", "month", "year yr", "mi/h mph", "km/h kmh kmph kph", "am", "pm",
    "cent", "dollar", "euro", "C celsius", "F fahrenheit", "K kelvin", "/ per",
)  # fmt: skip
UNITS = (
    {alias: line.split()[0] for line in _NAMED for alias in line.split()}
    | {long + name: short + symbol for long, short in _SCALE.items() for name, symbol in _METRIC.items()}
    | {short + symbol: short + symbol for short in _SCALE.values() for symbol in _METRIC.values()}
)
_WRAP = re.compile(r"\\(?:text|mathrm|textbf|operatorname|rm|left|right)(?![a-z])|\\[^A-Za-z]|\bdegrees?\b|[~^{}()$]")
# up to the first letter of an answer that belongs to no command of LaTeX's but a wrapper
_VALUE = re.compile(r"(?:[^A-Za-z\\]|\\(?!(?:text|mathrm|textbf|operatorname|rm)(?![a-z]))(?:[A-Za-z]++|.))*+")
_SQUARED = re.compile(r"\b(?:(?:sq|square|(cubic))\s+([A-Za-z]+)|([A-Za-z]+)\s+(?:squared|(cubed)))\b")
# of letters over letters, which are variables, only m/s
_PER = re.compile(
    r"\\[dt]?frac(?!(?!\{m\}\{s)\{[A-Za-z]\}\{[A-Za-z])"
    + 2 * r"\{((?=[A-Za-z\\])(?:[A-Za-z\\ ^23]|\{[A-Za-z23 ]*\})+)\}"
)
_SENTENCE = re.compile(r"[,;:!?\n]|\.(?![A-Za-z])")
_IN = re.compile(r"\s*in\s+(?!per\b)(?=[A-Za-z])")  # "42 (in meters)"
# one letter right behind its number, to a power, or before another one: "-16t^2", "2C", "3 s^2", "6 s t"; but "42 m^2" and
# "12 N m" have units
_VARIABLE = re.compile(
    r"(?<=[0-9)}])[A-Za-z](?![A-Za-z/])|(?!m)[A-Za-z]\s*\^|(?![NJW]\s+[msh](?![A-Za-z]))[A-Za-z]\s+[A-Za-z](?![A-Za-z])"
)
_SAME = (("\\$", "$"), ("€", "$"), ("£", "$"), ("{,}", ","), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"))
# words behind a number, perhaps of several: "18 eggs", "3/4 of the cake"
_WORDS = re.compile(  # the first of them three letters long with a vowel, or "of", none of them a variable or a count
    r"(?<=[0-9}])(?:\s+|/)(?=of |(?=[A-Za-z]{3})[A-Za-z]*[aeiou])"
    r"(?:(?!(?:[b-zA-Z]|or|and|to|plus|minus|over|mod|pi|percent|squared|cubed|factorial|half|halves|dozens?|tenths?"
    r"|(?:hundred|thousand|[mbtr]+illion)(?:s|ths?)?|divided|multiplied)\b)[A-Za-z]++[ '/-]*+)++(?=\.?$)"
)
# instead of an answer, what it is compared with
_COMPARED = re.compile(r"[<>≤≥≠¬]|!=|\\(?:n?[lg](?:t|eq?q?(?:slant)?)|neq?|not|neg|lnot|in|sim|propto)(?![a-z])")
_ENDS = {"####": "\n", "<answer>": "</answer>"}
_MARKS = ("\\boxed", "\\fbox", *_ENDS)


def extract_answer(text: str, lenient: bool = True) -> str | None:
    """The final answer a text commits to, or None. Linear in the text's length."""
    start, mark = max((text.rfind(mark), mark) for mark in _MARKS)
    if start >= 0:
        rest = text[start + len(mark) :][: 2 * MAX_CHARS]
        if mark in _ENDS:  # without the marks of bold and code that chat models write
            return rest.split(_ENDS[mark], 1)[0].strip().strip(" *`") or None
        return (_braced(text, text.find("{", start, start + 10)) or "").strip() or None
    if not lenient:
        return None
    tail = _hyphens(text[-TAIL_CHARS:])
    formulas = _FORMULA.findall(tail) if "$" in tail or "\\(" in tail else ()
    numbers = formulas or _LAST.findall(tail)
    return numbers[-1].strip() if numbers else None


def _hyphens(text: str) -> str:
    """Minus signs and dashes as hyphens. Not `translate`, which looks at every character."""
    return text.replace("\u2212", "-").replace("\u2013", "-")


def _braced(text: str, start: int) -> str | None:
    """The content of the brace that opens at `start`; None when it never closes within what an answer may be long."""
    if start < 0:
        return None
    inside = text[start : start + 2 * MAX_CHARS]
    depths = accumulate((character == "{") - (character == "}") for character in inside)
    end = next((place for place, depth in enumerate(depths) if depth == 0), None)
    return inside[1:end] if end or len(inside) == 2 * MAX_CHARS else None


@lru_cache(maxsize=16384)
def normalise(answer: str) -> str:
    """The same answer without mathematical spacing, dollar signs and other things that carry no meaning."""
    text = _hyphens(_DROP.sub("", _SPACE.sub(" ", answer[: 2 * MAX_CHARS])))
    for form, plain in _SAME:
        text = text.replace(form, plain)
    text = text.rstrip(".").strip("$")
    text = "-" + text[2:] if text.startswith("-$") else text
    text = re.sub(r"(?<=[0-9}])(?:\\text\{)?percent\}?$", r"\%", text) if "percent" in text else text
    return text[2:-2] if text.startswith("\\(") and text.endswith("\\)") else text


@lru_cache(maxsize=4096)
def unit(answer: str) -> tuple[str, str]:
    """An answer without its unit, and the unit's name ("km", "m/s", "cm2"); "" where it has none that is known.

    What stands behind the unit ("km away") is no part of it, and then the answer stays as it is.
    """
    left, equals, side = answer[: 2 * MAX_CHARS].rpartition("=")
    side = _PER.sub(r"\1/\2", side)
    match = _VALUE.match(side)
    assert match is not None  # it may be empty
    if _VARIABLE.match(side, match.end()):
        return answer, ""
    text = _WRAP.sub(" ", unicodedata.normalize("NFKC", side[match.end() :]).replace("^", "").replace("}", ""))
    text = re.sub(r"(?<=[A-Za-z])\.", "", _IN.sub("", text, count=1) if _IN.match(text) else text)  # "a.m.", "sq. ft."
    text = _SQUARED.sub(lambda found: (found[2] or found[3]) + ("3" if found[1] or found[4] else "2"), text)
    names = ["dollar"] if side.lstrip().startswith("\\$") else []
    for word, power in re.findall(r"([A-Za-z]+|\S)([23]?)", text if match[0].strip() else ""):
        forms = (word, word.removesuffix("s"), word.lower(), word.lower().removesuffix("s"))
        name = next((UNITS[form] for form in forms if form in UNITS), None)
        if name is None:
            last = names[-1:] in (["in"], ["/"])  # "42 m in total"
            return answer, "".join(names[:-1] if last else names) if word.isalpha() else ""
        if names[-1:] != [name + power]:  # "\\$5 dollars"
            names.append(name + power)
    return left + equals + match[0], "".join(names)


def bare(answer: str) -> str:
    """A normalised answer; where it is a number with a known unit or a text, the number."""
    text = normalise(answer)
    if number(text):
        return text
    values = (normalise(unit(answer)[0]), _BEHIND.sub("", text))
    return next((value for value in values if number(value)), text)


def same_unit(gold: str, given: str) -> bool:
    """Whether two units may be the same: either side may leave out what is counted, or per what ("$12 per hour")."""
    parts = zip(gold.partition("/"), given.partition("/"), strict=True)
    return all(one == other or not one or not other for one, other in parts)


def in_place(text: str, answer: str) -> str:
    """An answer with what follows it in its sentence, where its unit may stand: "\\boxed{42} km"."""
    text, answer = _hyphens(text), _hyphens(answer)
    start = max(map(text.rfind, _MARKS))
    _, found, after = text[start:].partition(answer) if start >= 0 else text.rpartition(answer)
    return answer + _SENTENCE.split(after[:40], maxsplit=1)[0] if found else answer


@lru_cache(maxsize=16384)
def number(text: str) -> tuple[Fraction, bool] | None:
    """A normalised answer as an exact number, and whether it has a decimal point; None when it is no number."""
    match = _PLAIN.fullmatch(text) if len(text) <= MAX_CHARS else None
    if match is None:
        return None
    sign, whole, top, bottom, top2, bottom2 = match.groups()
    top, bottom = (top or top2).replace(",", ""), (bottom or bottom2 or "1").replace(",", "")
    denominator = Fraction(bottom)
    if denominator == 0:
        return None
    value = Fraction(top) / denominator
    if whole:
        value += int(whole)
    return -value if sign == "-" else value, not top.isdigit()


def compare_fast(gold: str, answer: str) -> bool | None:
    """Stages 1 and 2 on normalised answers: True or False where exact means decide, None where they do not.

    Two words are texts: as products of letters, "cat" would equal "act".
    """
    if gold == answer:
        return bool(gold)
    if gold.isalpha() and answer.isalpha() and min(len(gold), len(answer)) > 2:
        return gold.casefold() == answer.casefold()
    bases = [found[1] for found in map(_BASE.search, (gold, answer)) if found]
    if len({*bases}) > 1:
        return False
    shares = [text.endswith("%") for text in (gold, answer)]
    if any(shares):  # equal to their numbers with and without the sign
        found = compare_fast(gold.rstrip("\\%"), answer.rstrip("\\%"))
        return found if found or all(shares) else compare_fast(_plain(gold), _plain(answer))
    left, right = number(gold), number(answer)
    if left is None or right is None:
        return None
    if not left[1] and not right[1]:
        return left[0] == right[0]
    if 0 < abs(left[0]) < Fraction(1, 10**DECIMALS):  # rounded, it would equal 0
        return abs(left[0] - right[0]) <= abs(left[0]) / 10**DECIMALS
    return round(left[0], DECIMALS) == round(right[0], DECIMALS)


def one_number(gold: str, answer: str) -> Literal["several", "unfinished", ""]:
    """What is wrong with an answer where the gold answer is a number, perhaps with a unit, both normalised: "several",
    "unfinished" or "".

    unfinished: what was asked, left to be worked out: a sum, a product, a power, a quotient of integers for an integer;
    for a gold answer without decimals also a root or another function. Units, powers of ten and mixed numbers may stand.
    """
    wanted, given = gold_number(gold), number(answer)
    if wanted is None:
        return ""
    if given is not None:
        whole = wanted[0].denominator == 1 and "%" not in gold
        return "unfinished" if whole and re.search(r"/(?!1$)|frac(?!.*\{1\}$)", answer) else ""
    body = _BESIDE.sub("u", answer)
    if _FUNCTION.search(body) and (not wanted[1] or _FORMULA_OF_ONE.fullmatch(body)):
        return "" if wanted[1] else "unfinished"
    if _OPERATION.search(body):
        return "unfinished"
    body = re.sub(_FRACTION, " 1 ", re.sub(rf"(?<=[0-9]){_FRACTION}", "", body))
    return "several" if len(re.findall(_NUMBER, body)) > 1 else ""


def gold_number(gold: str) -> tuple[Fraction, bool] | None:
    """The number that a normalised gold answer is, with its unit or behind `x=`; None when it is none."""
    *others, last = gold.split("=")
    if not all(map(_SIDE.fullmatch, others)):
        return None
    return number(_BESIDE.sub("", last).rstrip("\\%"))


def last_side(answer: str) -> str | None:
    r"""The side of an equation like `x = 42`, `42 = 6 \cdot 7` or `A = s^2 = 42` that is the answer: the last number if
    only a name or a sum follows it, else the last side. None when another side is, or may hold, another answer.
    """
    sides = _RELATION.split(_MODULUS.sub("", answer))
    texts = [bare(side) for side in sides]
    place = max((place for place, side in enumerate(texts) if number(_plain(side))), default=-1)
    if not all(map(_SIDE.fullmatch, texts[place + 1 :])):
        place = -1
    others = [side for side in texts if side != texts[place]]
    return None if any(_second_answer(side, texts[place]) for side in others) else sides[place]


def _plain(side: str) -> str:
    """A normalised answer without its unit, a percentage as a number."""
    return re.sub(r"\\?%$", "e-2", _UNIT.sub("", side))


def _second_answer(side: str, last: str) -> bool:
    """Whether a side of an equation says another answer than the last one: a number, or one beside something else than
    arithmetic ("12 or x"). Indices, exponents and arguments are no answers.
    """
    plain = _plain(side)
    if number(plain):
        return not compare_fast(_plain(last), plain)
    rest = _UNIT.sub("", _NAMING.sub("", side))
    if not re.search("[0-9]", rest):
        return False
    return _ALONE.fullmatch(plain) is not None or not _EXPRESSION.fullmatch(rest)


def too_complex(answer: str, gold: str = "") -> bool:
    """Whether an answer is refused unread: deep nesting, factorials, towers of exponents, huge exponents.

    So is an integral, sum, product, limit or binomial that the answer leaves to be worked out and the gold does not.
    """
    if _UNFINISHED.search(answer) and not _UNFINISHED.search(gold):
        return True
    depths = accumulate((character in "([{") - (character in ")]}") for character in answer)
    return max(depths, default=0) > MAX_DEPTH or _COSTLY.search(answer) is not None


class MathVerifier(AbstractContextManager["MathVerifier"]):
    """Part `correct` of a score: 1 when the final answer equals the gold answer, else 0."""

    def __init__(self, workers: int = 2, timeout_s: float = 2.0) -> None:
        """Workers start when an answer first needs them."""
        self._workers = Workers([MathWorker(timeout_s) for _ in range(workers)], "math")

    def score(self, completions: Sequence[str], golds: Sequence[str]) -> list[Part]:
        """One part per completion. Never raises for any text.

        A gold answer may be bare ("72") or a solution that ends in a marked answer ("... #### 72").
        The reasons are those of `Reason`.
        """
        found = [_decide(completion, gold) for completion, gold in zip(completions, golds, strict=True)]
        pairs = list(dict.fromkeys(one for one in found if isinstance(one, tuple)))
        verdicts = dict(zip(pairs, self._workers.run(MathWorker.check, pairs), strict=True))
        reasons: list[Reason] = [verdicts[one] if isinstance(one, tuple) else one for one in found]
        values: dict[Reason, float | None] = {"ok": 1.0, "worker_lost": None}  # else 0
        return [Part(values.get(reason, 0.0), reason) for reason in reasons]

    def __exit__(self, *error: object) -> None:
        """End the worker processes."""
        for worker in self._workers.close():
            worker.stop()


def _decide(completion: str, gold: str) -> Reason | tuple[str, str]:
    """A verdict, or the gold answer and the answer that math-verify has to compare."""
    answer, (gold, measure) = extract_answer(completion), _bare_gold(gold)
    if answer is None:
        return "no_answer"
    if len(answer) > MAX_CHARS:
        return "too_long"
    stated, answer = answer, _worded(answer)
    if measure:
        sides = answer.split("=")
        units = [unit(side)[1] for side in sides]
        if all(units) and units.count(measure) == 1:  # of "5 m = 500 cm" the one that was asked for
            answer = sides[units.index(measure)]
        elif not same_unit(measure, unit(in_place(completion, stated))[1]):
            return "unit"
    wanted, given = bare(gold), bare(answer)
    if wanted == given:
        return "ok" if wanted else "wrong"
    if _COMPARED.match(given) and not _COMPARED.match(wanted):
        return "wrong"  # math-verify would take "\\geq 18" for 18
    if "$" in given and sum(_PIECE.search(piece) is not None for piece in re.split(r"(?<!\\)\$", answer)) > 1:
        return "several"  # math-verify would take the last formula
    if gold_number(wanted) and not number(given):
        side = last_side(answer)
        if side is None:
            return "several"
        answer, given = side, bare(side)
    equal = compare_fast(wanted, given)
    if equal is None and len(gold) > MAX_CHARS:
        return "too_long"
    if equal is None and (too_complex(answer, gold) or too_complex(gold, gold)):
        return "too_complex"
    if equal is False:
        return "wrong"
    return one_number(wanted, given) or ("ok" if equal else (gold, answer))


@lru_cache(maxsize=16384)
def _bare_gold(gold: str) -> tuple[str, str]:
    """The gold answer alone, and its unit."""
    answer = extract_answer(gold, lenient=False) or gold.strip()
    return _worded(answer), unit(in_place(gold, answer))[1] if answer else ""


def _worded(answer: str) -> str:
    """Plain words behind a number as text, which math-verify would multiply: "18 eggs"."""
    return _WORDS.sub(lambda found: rf"\text{{{found[0]}}}", answer)
