"""Reference-quality sentences for the short writing task, from a small grammar.

They fit the embedded judge, audit judges, and are references; a grammar gives any number of them without a model.
Limits: plain narrative English, singular concrete nouns. Unknown topics are treated as places or things to be near to.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from importlib.resources import files

from omni_fast.rewards.judge.base import Reply

PROMPT = "Write one sentence about {topic} that uses the words {w1} and {w2}."

_FILE = files("omni_fast.rewards.judge") / "data" / "phrases.json"  # {n}: a noun phrase, {t}: a place, {p}: a person
PHRASES: dict[str, list[str]] = json.loads(_FILE.read_text(encoding="utf-8"))
ANIMATE, PLACES, EVENTS, OBJECTS = (PHRASES[kind] for kind in ("animate", "places", "events", "objects"))


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _noun_phrase(noun: str, rng: random.Random) -> str:
    bare = noun if rng.random() < 0.6 else f"{rng.choice(PHRASES['thing_adjectives'])} {noun}"
    return f"the {bare}" if rng.random() < 0.75 else article(bare)


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def reference_sentence(topic: str, words: Sequence[str], rng: random.Random) -> str:
    """One correct English sentence about `topic` (a singular noun, with or without article) that uses both `words`."""
    topic = topic.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    used = zip(("first", "second"), rng.sample(list(words), 2), strict=True)
    phrase = "".join(rng.choice(PHRASES[place]).format(n=_noun_phrase(noun, rng)) for place, noun in used)
    phrase += rng.choice(PHRASES["closings"])
    if topic in ANIMATE:
        adjective = f"{rng.choice(PHRASES['adjectives'])} " if rng.random() < 0.6 else ""
        noun = adjective + topic
        subject = f"the {noun}" if rng.random() < 0.7 else article(noun)
        return _upper_first(f"{rng.choice(PHRASES['openings'])}{subject} {phrase}.")
    shape = rng.choice(PHRASES["event_second"] if topic in EVENTS else PHRASES["thing_second"])
    person = rng.choice(PHRASES["people"])
    place = f"the {topic}" if rng.random() < 0.5 else f"the {rng.choice(PHRASES['thing_adjectives'])} {topic}"
    statue = _upper_first(article(rng.choice(PHRASES["thing_adjectives"]) + " statue"))
    return _upper_first(shape.format(t=place, p=person, P=_upper_first(person), v=phrase, N=statue)) + "."


def random_prompt(rng: random.Random) -> tuple[str, tuple[str, str]]:
    """A topic and two words, all different."""
    topic = rng.choice(ANIMATE + PLACES + EVENTS)
    first, second = rng.sample([word for word in OBJECTS if word != topic], 2)
    return topic, (first, second)


def prompt_text(topic: str, words: Sequence[str]) -> str:
    """The prompt in the words of the writing task."""
    return PROMPT.format(topic=article(topic), w1=words[0], w2=words[1])


def random_reply(rng: random.Random) -> tuple[str, Reply]:
    """A topic, and a good reply to a prompt on it that is its own reference."""
    topic, words = random_prompt(rng)
    text = reference_sentence(topic, words, rng)
    return topic, Reply(prompt_text(topic, words), text, text, words)
