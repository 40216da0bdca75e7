"""One sentence about a topic that uses two words, judged against a reference reply.

Reward: a judge's preference over the reference (`rewards.judge`), behind its gates. Metric: another judge, so that what
is reported is not what was optimised.
A length is asked for and checked before any judge is: without it training ends at the shortest sentence that mentions
everything ("A lake uses fire and a train.").
Splits share neither a topic nor a pair of words.
Limits: concrete nouns and one-sentence replies, which is what small models can do and small judges can tell.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

from omni_fast.config import TaskConfig
from omni_fast.rewards.judge.base import Judge, Reply
from omni_fast.rewards.judge.sentences import ANIMATE, EVENTS, OBJECTS, PLACES, article, prompt_text, reference_sentence
from omni_fast.rewards.score import Part, Score
from omni_fast.rewards.text_checks import strip_reasoning, words
from omni_fast.tasks.base import Item, Json, Resources, Split, words_of
from omni_fast.tasks.splits import BuiltIn, Level, Sizes, partition

MIN_WORDS = 10
_PROMPT = "Write one sentence of at least {n} words about {topic} with the words {first} and {second}."
_SIZES = Sizes()
_TINY_SIZES = Sizes(train=64, select=16, test=32)
_TINY_OBJECTS = ("moon", "river", "bread", "boat", "stone", "bell", "key", "song", "lamp", "coat", "apple", "bridge")


def _reply(item: Item, text: str) -> Reply:
    """What a judge is asked: the prompt in the words it was fitted on, without the length that is checked already."""
    asked = str(item.answer.get("asked", item.prompt))
    return Reply(asked, text, str(item.answer["reference"]), words_of(item.answer))


def _pools(seed: int) -> dict[Split, list[Item]]:
    rng = random.Random(f"writing:default:{seed}")
    shares: dict[Split, float] = {"train": 0.5, "select": 0.2, "test": 0.3}
    topics = partition(sorted({*ANIMATE, *PLACES, *EVENTS}), shares, rng)
    pairs = partition(list(combinations(sorted(set(OBJECTS)), 2)), shares, rng)
    pools: dict[Split, list[Item]] = {}
    for split, own in topics.items():
        pools[split] = []
        for place, pair in enumerate(pairs[split]):
            topic = own[place % len(own)]
            if topic in pair or len(pools[split]) == getattr(_SIZES, split):
                continue
            texts = rng.sample(pair, 2)
            reference = _reference(topic, texts, rng)
            answer: dict[str, Json] = {"words": [*texts], "reference": reference, "asked": prompt_text(topic, texts)}
            prompt = _PROMPT.format(n=MIN_WORDS, topic=article(topic), first=texts[0], second=texts[1])
            pools[split].append(Item("/".join((topic, *texts)), prompt, answer))
    return pools


def _reference(topic: str, texts: Sequence[str], rng: random.Random) -> str:
    """A reference that is long enough itself."""
    while len(words(sentence := reference_sentence(topic, texts, rng))) < MIN_WORDS:
        pass
    return sentence


def _tiny_pools(seed: int) -> dict[Split, list[Item]]:
    """Both orders of pairs of a dozen words; splits share no pair."""
    rng = random.Random(f"writing:tiny:{seed}")
    pools: dict[Split, list[Item]] = {}
    shares: dict[Split, float] = {"train": 0.52, "select": 0.14, "test": 0.34}
    for split, pairs in partition(list(combinations(_TINY_OBJECTS, 2)), shares, rng).items():
        pools[split] = []
        for pair in [order for low, high in pairs for order in ((low, high), (high, low))]:
            answer: dict[str, Json] = {"words": [*pair], "reference": _tiny_sentence(pair, rng)}
            pools[split].append(Item("/".join(pair), f"use {pair[0]} and {pair[1]}", answer))
        rng.shuffle(pools[split])
    return pools


_TINY_SENTENCES = (
    "the old man saw the {0} near the {1}.",
    "she put the {0} behind the {1} at night.",
    "we found a {0} under the {1} today.",
    "my father took the {0} to the {1}.",
)


def _tiny_sentence(pair: Sequence[str], rng: random.Random) -> str:
    return rng.choice(_TINY_SENTENCES).format(*pair)


class WritingTask(BuiltIn):
    """Part `preference`: the reward judge's verdict, 1 win, 0.5 tie, 0 loss. The metric: the other judge's, 0..1."""

    kind = "writing"
    part = "preference"
    levels = {
        "default": Level(_SIZES, "You write short sentences.", _pools),
        "tiny": Level(_TINY_SIZES, "", _tiny_pools),
    }

    def __init__(self, block: TaskConfig, seed: int, resources: Resources) -> None:
        super().__init__(block, seed, resources)
        self.reward_judge, self.metric_judge = resources.reward_judge(), resources.metric_judge()
        self.min_words = 0 if self.level == "tiny" else MIN_WORDS

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        return [Score({"preference": part}) for part in self._judge(self.reward_judge, items, completions)]

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        return [part.value for part in self._judge(self.metric_judge, items, completions)]

    @staticmethod
    def demonstrate(item: Item, items: Sequence[Item], rng: random.Random) -> tuple[str, str]:
        """The wrong reply uses other words."""
        others = rng.sample([word for word in _TINY_OBJECTS if word not in item.prompt.split()], 2)
        return str(item.answer["reference"]), _tiny_sentence(others, rng)

    def _judge(self, judge: Judge, items: Sequence[Item], completions: Sequence[str]) -> list[Part]:
        """A reply that is too short is lost; the judge sees the others."""
        long = [len(words(strip_reasoning(completion))) >= self.min_words for completion in completions]
        asked = [_reply(item, text) for item, text, enough in zip(items, completions, long, strict=True) if enough]
        verdicts = iter(judge.judge(asked))
        return [next(verdicts) if enough else Part(0.0, "too_short") for enough in long]
