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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from omni_fast.rewards.qa import QaMatcher, normalise
from omni_fast.rewards.score import Score
from omni_fast.tasks.base import Item, Json, Split, texts_of
from omni_fast.tasks.splits import BuiltIn, Level, Sizes, partition

CANDIDATES = 4
CONTINENTS = ("Africa", "Americas", "Asia", "Europe", "Oceania")
_MIN_POPULATION = 200_000
_MAX_CHARS = 20  # of an answer: longer ones are official names nobody writes
_SIZES = Sizes()
_TINY_SIZES = Sizes(train=64, select=12, test=24)


KINDS = {  # the question, which has {options} and {subject}, and the reply's opening, which has {subject}
    "capital": ("{options}: which is the capital of {subject}?", "The capital of {subject} is"),
    "continent": ("{options}: where is {subject}?", "{subject} is in"),
    "country": ("{options}: which country has the capital {subject}?", "{subject} is the capital of"),
}


@dataclass(frozen=True, slots=True)
class Country:
    name: str
    capital: str
    continent: str


@cache
def countries() -> tuple[Country, ...]:
    """Countries with a capital and a continent, by name."""
    entries = (entry for entry in (resources.files("countryinfo") / "data").iterdir() if entry.name.endswith(".json"))
    rows = [json.loads(entry.read_text(encoding="utf-8")) for entry in entries]
    known = {
        row["name"]: Country(row["name"], row.get("capital") or "", row.get("region") or "")
        for row in rows
        if (row.get("population") or 0) >= _MIN_POPULATION
    }
    return tuple(country for _, country in sorted(known.items()) if _askable(country))


def _askable(country: Country) -> bool:
    """Short names without punctuation, a known continent, and a capital that does not give the country away."""
    names = (country.name, country.capital)
    plain = all(0 < len(text) <= _MAX_CHARS and not set(text) & set(".,;:()'") for text in names)
    words, capital = (set(normalise(text).split()) for text in names)
    return plain and country.continent in CONTINENTS and not words & capital


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
    if kind == "country":
        return country.capital, country.name
    return country.name, country.capital if kind == "capital" else country.continent


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
    question, opening = (text.format(options=", ".join(shown), subject=subject) for text in KINDS[kind])
    return Item(f"{kind}/{country.name}/{epoch}", question, {"gold": gold, "candidates": candidates}, opening)


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


def matcher(answer: Mapping[str, Json]) -> QaMatcher:
    """Of a gold answer with its aliases and candidates, where it has any."""
    return QaMatcher(str(answer["gold"]), texts_of(answer, "aliases"), texts_of(answer, "candidates"))


class QaTask(BuiltIn):
    """Part `correct`: 1 when the reply is the gold answer and names no other candidate. The metric is the same."""

    kind = "qa"
    part = "correct"
    levels = {"default": Level(_SIZES, "Choose one option.", _pools), "tiny": Level(_TINY_SIZES, "", _tiny_pools)}

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        return [
            Score({"correct": matcher(item.answer).score(completion.removeprefix(item.prefix))})
            for item, completion in zip(items, completions, strict=True)
        ]

    @staticmethod
    def demonstrate(item: Item, items: Sequence[Item], rng: random.Random) -> tuple[str, str]:
        gold = str(item.answer["gold"])
        return gold, rng.choice([other for other in texts_of(item.answer, "candidates") if other != gold])
