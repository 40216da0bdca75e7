"""Questions on countries, with candidates in the prompt and the answer as text.

Facts come from the package countryinfo (MIT). The gold answer stands among distractors of its own kind, in an order
that a seeded generator draws; the reply must be the answer's text and name no other candidate (`rewards.qa`).
Splits share no country: no country asked about in training is asked about in a held-out split. It may still be a
distractor there. Train items beyond one pass over the facts show the same facts with new distractors in a new order.
Limits: facts are as good as the package (capitals and continents of about 190 countries of more than 200,000 people).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from omni_fast.rewards.qa import QaMatcher, normalise
from omni_fast.rewards.score import Score
from omni_fast.tasks.base import Item, Json, Split
from omni_fast.tasks.splits import BuiltIn, Level, Sizes, partition

CANDIDATES = 4
CONTINENTS = ("Africa", "Americas", "Asia", "Europe", "Oceania")
_MIN_POPULATION = 200_000
_MAX_CHARS = 20  # of an answer: longer ones are official names nobody writes
_SIZES = Sizes()
_TINY_SIZES = Sizes(train=64, select=12, test=24)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question. question has {options} and {subject}; opening starts the reply and has {subject}."""

    question: str
    opening: str


KINDS = {
    "capital": Kind("{options}: which is the capital of {subject}?", "The capital of {subject} is"),
    "continent": Kind("{options}: where is {subject}?", "{subject} is in"),
    "country": Kind("{options}: which country has the capital {subject}?", "{subject} is the capital of"),
}


@dataclass(frozen=True, slots=True)
class Country:
    name: str
    capital: str
    continent: str


@cache
def countries() -> tuple[Country, ...]:
    """Countries with a capital and a continent, by name."""
    found = {}
    for entry in (resources.files("countryinfo") / "data").iterdir():
        if not entry.name.endswith(".json"):
            continue
        row = json.loads(entry.read_text(encoding="utf-8"))
        country = Country(row["name"], row.get("capital") or "", row.get("region") or "")
        if (row.get("population") or 0) >= _MIN_POPULATION and _askable(country):
            found[country.name] = country
    return tuple(found[name] for name in sorted(found))


def _askable(country: Country) -> bool:
    """Short names without punctuation, a known continent, and a capital that does not give the country away."""
    plain = all(
        0 < len(text) <= _MAX_CHARS and not set(text) & set(".,;:()'") for text in (country.name, country.capital)
    )
    if not plain or country.continent not in CONTINENTS:
        return False
    name, capital = set(normalise(country.name).split()), set(normalise(country.capital).split())
    return not name & capital


def _pools(seed: int) -> dict[Split, list[Item]]:
    rng = random.Random(f"qa:default:{seed}")
    pools: dict[Split, list[Item]] = {}
    for split, own in partition(countries(), {"train": 0.52, "select": 0.16, "test": 0.32}, rng).items():
        found: dict[str, Item] = {}  # by prompt: few candidates of a kind meet again in the same order
        epoch = 0
        while len(found) < getattr(_SIZES, split) and (split == "train" or epoch == 0):
            items = [_item(kind, country, epoch, seed) for kind in KINDS for country in own]
            random.Random(f"qa:order:{seed}:{split}:{epoch}").shuffle(items)
            for item in items:
                found.setdefault(item.prompt, item)
            epoch += 1
        pools[split] = list(found.values())
    return pools


def _fact(kind: str, country: Country) -> tuple[str, str]:
    """Subject and gold answer."""
    if kind == "capital":
        return country.name, country.capital
    if kind == "country":
        return country.capital, country.name
    return country.name, country.continent


@cache
def _answers(kind: str) -> tuple[str, ...]:
    """All answers of a kind, no two of which read the same."""
    return tuple(
        sorted({normalise(gold): gold for _, gold in (_fact(kind, country) for country in countries())}.values())
    )


def _item(kind: str, country: Country, epoch: int, seed: int) -> Item:
    subject, gold = _fact(kind, country)
    rng = random.Random(f"qa:{seed}:{kind}:{country.name}:{epoch}")
    others = [answer for answer in _answers(kind) if answer != gold]
    shown = [gold, *rng.sample(others, CANDIDATES - 1)]
    rng.shuffle(shown)
    candidates: list[Json] = list(shown)
    return Item(
        f"{kind}/{country.name}/{epoch}",
        KINDS[kind].question.format(options=", ".join(shown), subject=subject),
        {"gold": gold, "candidates": candidates},
        KINDS[kind].opening.format(subject=subject),
    )


# Level "tiny": closed-book capitals of a few countries. A model this small knows only what its warm-up told it, so here
# the splits share facts and differ in the wording of the question; it exercises the machinery and claims nothing.
_TINY_COUNTRIES = (
    "France", "Peru", "Japan", "Egypt", "Cuba", "Kenya", "Norway", "Italy", "Ghana", "Iran", "Chile", "Nepal", "Spain",
    "Qatar", "Latvia", "Angola", "Canada", "Poland", "Greece", "Sweden", "Germany", "Austria", "Uganda", "Finland",
    "Russia",
)  # fmt: skip
_TINY_WORDINGS = ("capital of {subject}?", "{subject} capital?", "{subject}: which city?", "city of {subject}?")


def _tiny_pools(seed: int) -> dict[Split, list[Item]]:
    own = [country for country in countries() if country.name in _TINY_COUNTRIES]
    candidates: list[Json] = [country.capital.lower() for country in own]
    items = [
        Item(
            f"{country.name}/{place}",
            wording.format(subject=country.name.lower()),
            {"gold": country.capital.lower(), "candidates": candidates},
        )
        for country in own
        for place, wording in enumerate(_TINY_WORDINGS)
    ]
    return partition(items, {"train": 0.64, "select": 0.12, "test": 0.24}, random.Random(f"qa:tiny:{seed}"))


class QaTask(BuiltIn):
    """Part `correct`: 1 when the reply is the gold answer and names no other candidate. The metric is the same."""

    kind = "qa"
    part = "correct"
    levels = {"default": Level(_SIZES, "Choose one option.", _pools), "tiny": Level(_TINY_SIZES, "", _tiny_pools)}

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        scores = []
        for item, completion in zip(items, completions, strict=True):
            gold, shown = str(item.answer["gold"]), item.answer["candidates"]
            assert isinstance(shown, list)
            matcher = QaMatcher(gold, candidates=[str(candidate) for candidate in shown])
            scores.append(Score({"correct": matcher.score(completion.removeprefix(item.prefix))}))
        return scores

    @staticmethod
    def demonstrate(item: Item, items: Sequence[Item], rng: random.Random) -> tuple[str, str]:
        gold, candidates = str(item.answer["gold"]), item.answer["candidates"]
        assert isinstance(candidates, list)
        return gold, rng.choice([str(other) for other in candidates if other != gold])
