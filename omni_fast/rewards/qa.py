"""Question answering: exact match of an extracted answer, and multiple choice turned into answers as text.

Why not "contains": a reply that lists every capital contains the right one. Here one answer is extracted from the
reply, it must equal the gold answer under the normalisation, and the reply must name no other known candidate. More
than one candidate named, a negation, or an echo of the candidate list scores 0. Reasoning (<think>) is not read.
Normalisation: NFKC, case, accents, articles, punctuation, numerals (after SQuAD, arXiv 1606.05250, and tighter).
Limits: English frames ("the answer is ..."); answers up to 12 words; the first 2,000 characters of a reply.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from omni_fast.errors import UserError
from omni_fast.rewards.score import Part
from omni_fast.rewards.text_checks import FUNCTION_WORDS, strip_reasoning

MAX_CHARS = 2_000
MAX_ANSWER_WORDS = 12

_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_NUMBER = dict(zip([*_UNITS, *_TENS], [*range(20), *range(20, 100, 10)], strict=True))
_ARTICLES = frozenset(("a", "an", "the"))
_TOKEN = re.compile(r"(?<!\w)[-−]?\d+(?:[.,]\d+)*|[^\W\d_]+|[%€$£+°]")
_TAGGED = (  # the last match of the first kind that matches is the answer
    re.compile(r"<answer>(.{0,400}?)</answer>", re.IGNORECASE | re.DOTALL),
    re.compile(r"\\boxed\{(?:\\text\{)?([^{}]{0,400})\}"),
    re.compile(r"####\s*([^\n]{1,400})"),
    re.compile(r"\banswer\s*(?:is\s*:?|:|=)\s*([^\n]{1,400})", re.IGNORECASE),
)
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|none|no|wrong|incorrect|false|except|excluding|cannot|anything but|other than"
    r"|instead of|rather than"
    r"|\w+n't)\b",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(
    r"^(?:(?:it|that|this)['’]s|(?:i|we) (?:think|believe|know|guess)(?: that)?(?: it(?: is|['’]s))?)\s+", re.IGNORECASE
)
_COPULA = re.compile(r"\s+(?:is|are|was|were)\b\s*:?\s*", re.IGNORECASE)
_ILL_POSED = re.compile(
    r"\b(?:which|what|who|where|all|one|any|none|both|each|some|select|choose|pick) (?:one |ones )?(?:of |from |among )"
    r"(?:the |these |those )|\b(?:the )?following\b"
    r"|\b(?:these|those|the|above|below|given|listed) (?:options?|choices?|answers?|statements?)\b"
    r"|\ball (?:but|except)\b|\bexcept\b|\bbest (?:describes|completes|explains)\b|\b(?:above|below)\b|\bodd one "
    r"out\b|\([A-E]\)",
    re.IGNORECASE,
)
_META_OPTION = re.compile(
    r"\b(?:all|none|both|neither|any|two|some) of (?:the |these |them|those )|^(?:both|neither) [a-e]\b|\b[a-e] "
    r"(?:and|or) [a-e]\b"
    r"|^(?:all|none|both|neither|other|not enough information|cannot be determined)$",
    re.IGNORECASE,
)


def _fold(text: str) -> str:
    """NFKC, case and accents folded; invalid surrogates replaced."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return "".join(ch for ch in text if not unicodedata.combining(ch))


def _number(token: str) -> str:
    """One spelling of a numeral: no thousands commas, no zeros that carry nothing. The sign stays."""
    sign, size = "-" * (token[0] in "-−"), token.lstrip("-−")
    if re.fullmatch(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", size):
        whole, _, decimals = size.replace(",", "").partition(".")
        size = ".".join(filter(None, (whole.lstrip("0") or "0", decimals.rstrip("0"))))
    return size if size == "0" else sign + size


def tokens(text: str) -> list[str]:
    """The normalised tokens of a text; equal answers have equal lists."""
    folded = re.sub(  # initials, with or without blanks between them
        r"\b(?:[^\W\d_]\. ?)+[^\W\d_]\.", lambda match: re.sub("[. ]", "", match[0]), _fold(text[: 4 * MAX_CHARS])
    )
    folded = folded.replace("&", " and ").replace("'", "").replace("’", "").replace("ʻ", "").replace("`", "")
    found = _TOKEN.findall(folded)
    result: list[str] = []
    for token in found:
        value = _NUMBER.get(token)
        if value is not None and 0 < value < 10 and result and result[-1] in _TENS_TEXT:
            result[-1] = str(int(result[-1]) + value)  # twenty one -> 21
        elif token not in _ARTICLES:
            result.append(_number(token) if value is None else str(value))
    return ["a"] if found == ["a"] else result  # alone it is no article: the letter of a choice


_TENS_TEXT = frozenset(str(_NUMBER[word]) for word in _TENS)


def normalise(text: str) -> str:
    """One string for all ways of writing the same answer: `"The U.S.A."` -> `"usa"`, `"twenty-one"` -> `"21"`."""
    return " ".join(tokens(text))


def _first_sentence(text: str) -> str:
    return re.split(r"(?<!\b[A-Za-z])(?<!\b(?:St|Mr|Ms|Dr|Mt))(?<!\bMrs)[.!?;](?:\s|$)", text, maxsplit=1)[0]


def extract_answers(completion: str) -> list[str]:
    """What the reply gives as its answer: one text, or the two sides of "X is Y" where either may be it.

    A marked answer (tag, box, ####, "the answer is") wins, the last one; otherwise the first sentence of the first
    line.
    """
    text = completion[:MAX_CHARS]
    for pattern in _TAGGED:
        found = pattern.findall(text)
        if found:
            return [_first_sentence(found[-1])]
    if not text.strip():
        return []
    first = _LEAD_IN.sub("", _first_sentence(text.strip().splitlines()[0].strip()))
    sides = _COPULA.split(first)
    return [first, sides[0], sides[-1]] if len(sides) == 2 else [first]


class QaMatcher:
    """Grades replies to one question.

    gold, aliases: the accepted answers. candidates: every answer of the same kind that is known, shown in the prompt or
    not, gold included or not; naming one that is not accepted makes a reply wrong.
    Raises UserError when gold normalises to nothing, or two candidates cannot be told apart under the normalisation.
    """

    def __init__(self, gold: str, aliases: Sequence[str] = (), candidates: Sequence[str] = ()) -> None:
        self.accepted = {normalise(text) for text in (gold, *aliases)} - {""}
        if not normalise(gold):
            raise UserError(f"the gold answer {gold!r} has no letter or digit; correct or remove the item")
        others = [normalise(text) for text in candidates if text != gold]
        if len({*others, *self.accepted, ""}) <= len(others) + len(self.accepted):
            raise UserError(
                f"two candidates of {list(candidates)} read the same as each other or as {gold!r}; remove one"
            )
        self._rivals = bool(others)
        self._named = sorted(((text.split(), text) for text in {*self.accepted, *others}), key=lambda row: -len(row[0]))

    def named(self, text: str) -> set[str]:
        """The candidates (normalised) that occur in a text as whole words; the longest wins where they overlap."""
        left: list[str | None] = list(tokens(text))
        found = set()
        for words, name in self._named:
            for start in range(len(left) - len(words) + 1):
                if left[start : start + len(words)] == words:
                    found.add(name)
                    left[start : start + len(words)] = [None] * len(words)
        return found

    def score(self, completion: str) -> Part:
        """1 or 0, never invalid. Reasons of 0: no_answer, too_many (candidates named), negated, too_long, wrong."""
        completion = strip_reasoning(completion)
        answers = extract_answers(completion)
        if not answers:
            return Part(0.0, "no_answer")
        names = self.named(completion[:MAX_CHARS])
        if names - self.accepted:
            return Part(0.0, "too_many" if names & self.accepted else "wrong")
        given = [normalise(answer) for answer in answers]
        if not any(given):
            return Part(0.0, "no_answer")
        if not self.accepted.intersection(given):
            return Part(0.0, "too_long" if len(given[-1].split()) > MAX_ANSWER_WORDS else "wrong")
        if (
            not self._rivals
            and given[0] not in self.accepted
            and any(_bare(side) for side in answers[1:] if normalise(side) not in self.accepted)
        ):
            return Part(0.0, "too_many")
        if _NEGATION.search(_without(completion[:MAX_CHARS], self.accepted)):
            return Part(0.0, "negated")
        return Part(1.0)


def _bare(side: str) -> bool:
    """Whether the other side of "X is Y" could be a second answer: "Rome is Paris", not "The capital is Paris"."""
    words = _fold(side).replace("’", "'").split()
    return 0 < len(words) <= 3 and not any(word in FUNCTION_WORDS or word.endswith("'s") for word in words)


def _without(text: str, accepted: set[str]) -> str:
    """The folded reply without the accepted answers, so that an answer "Trinidad and No-Name" is no negation."""
    folded = " ".join(re.findall(r"[\w']+", _fold(text).replace("’", "'")))
    for answer in sorted(accepted, key=len, reverse=True):
        folded = re.sub(rf"\b{re.escape(answer)}\b", " ", folded)
    return folded


@dataclass(frozen=True, slots=True)
class Choice:
    """A multiple-choice item. kind: what sort of thing the options are; distractors are of the same kind."""

    stem: str
    options: tuple[str, ...]
    gold: int
    kind: str = ""

    def refusal(self) -> str:
        """Why it makes no question with an answer as text, or ""."""
        names = [normalise(option) for option in self.options]
        if not 0 <= self.gold < len(names):
            return "bad_gold"
        if any(_META_OPTION.search(option.strip()) for option in self.options):
            return "meta_option"
        if _ILL_POSED.search(self.stem):
            return "ill_posed"
        if len({*names, ""}) <= len(names):
            return "collision"
        return "gold_in_stem" if f" {names[self.gold]} " in f" {normalise(self.stem)} " else ""


def to_text_answers(
    choices: Sequence[Choice], candidates: int = 8, seed: int = 0
) -> tuple[list[dict[str, str | list[str]]], Counter[str]]:
    """Multiple choice -> rows with `question`, `answer` (a text) and `candidates`; what was dropped, by reason.

    Own options come first, then answers of other items of the same kind that look alike, sorted at the end, so that the
    order tells nothing. Dropped: ill_posed (the stem makes no sense without its options), meta_option (an option speaks
    about the others), gold_in_stem, collision (two options read the same), bad_gold, too_few (not even two candidates).
    """
    if candidates < 2:
        raise UserError(f"candidates must be at least 2, got {candidates}")
    pools: dict[str, set[str]] = {}
    for choice in choices:
        pools.setdefault(choice.kind, set()).update(choice.options)
    rows: list[dict[str, str | list[str]]] = []
    dropped: Counter[str] = Counter()
    for choice in choices:
        if reason := choice.refusal():
            dropped[reason] += 1
            continue
        gold, rng = choice.options[choice.gold], random.Random(f"{seed}:{choice.stem}")
        own = [option for option in choice.options if option != gold]
        pool = sorted(option for option in pools[choice.kind] if not _META_OPTION.search(option.strip()))
        rng.shuffle(own)
        rng.shuffle(pool)
        pool.sort(key=lambda option: _likeness(gold, option))
        taken = {normalise(option): option for option in [gold, *own[: candidates - 1]]}
        known, stem = {normalise(option) for option in own}, f" {normalise(choice.stem)} "
        for other in pool:
            name = normalise(other)
            if len(taken) < candidates and name and name not in known and f" {name} " not in stem:
                taken.setdefault(name, other)
        if len(taken) < 2:
            dropped["too_few"] += 1
        else:
            rows.append({"question": choice.stem, "answer": gold, "candidates": sorted(taken.values())})
    return rows, dropped


def _likeness(gold: str, other: str) -> tuple[bool, bool, int]:
    """Sort key: numbers with numbers, one word with one word, then length."""
    digits, single = (any(ch.isdigit() for ch in text) for text in (gold, other)), (" " in gold) != (" " in other)
    return len({*digits}) > 1, single, abs(len(gold) - len(other))
