"""Reference-quality sentences for the short writing task, from a small grammar.

They fit the embedded judge, audit judges, and are references; a grammar gives any number of them without a model.
Limits: plain narrative English, singular concrete nouns. Unknown topics are treated as places or things to be near to.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

PROMPT = "Write one sentence about {topic} that uses the words {w1} and {w2}."

ANIMATE = (
    "cat dog teacher sailor farmer painter baker robot doctor child fox horse nurse king queen wizard pirate gardener "
    "musician student cook pilot writer miner tailor shepherd soldier knight dragon owl bear rabbit wolf detective "
    "carpenter fisherman grandmother traveller dancer clown librarian mechanic neighbour girl boy"
).split()
PLACES = (
    "garden castle market river forest village harbour beach station library school kitchen museum farm island valley "
    "desert hotel theatre lake city bakery church tower cave park street workshop"
).split()
EVENTS = "storm winter party wedding journey festival dream race concert summer night flood holiday".split()
OBJECTS = (
    "moon river bread window lamp boat stone letter bell coat apple key mountain song clock bridge mirror candle "
    "basket "
    "map drum hat book flower door ladder cup chair ring wheel ship cloud star fire rope box piano feather kite "
    "garden hammer bottle photograph blanket umbrella train coin lantern table shell wall tree bicycle"
).split()

_ADJECTIVES = (
    "old young quiet tired lonely clever gentle small tall cheerful patient curious nervous careful brave sleepy kind "
    "thoughtful stubborn proud"
).split()
_THING_ADJECTIVES = (
    "old broken silver wooden tiny forgotten bright heavy blue golden dusty strange beautiful simple cold warm lost "
    "painted familiar"
).split()
_PEOPLE = (
    "the old woman|a young boy|my brother|her grandfather|the two sisters|a stranger|our neighbour|the girl|his mother|"
    "the children|an old friend|the night guard|a small child|she|he|I|we|they|Anna|Thomas|Maria|my aunt|the quiet man"
).split("|")
_OPENINGS = (
    "|||||In the early morning, |Every evening, |Last winter, |Before sunrise, |On a rainy afternoon, |Late at night, |"
    "One day, |After a long day, |When the rain stopped, |Years ago, |As the sun went down, |On Sundays, |"
    "While everyone slept, |Without a word, |Just before noon, |That autumn, "
).split("|")
# Past-tense verb phrases with a place for one noun phrase.
_FIRST = (
    "carried {n} up the hill|looked at {n} for a long time|sat beside {n}|walked slowly past {n}|dreamed about {n}|"
    "found {n} behind the house|painted {n} on the wall|told a story about {n}|stopped to look at {n}|waited near {n}|"
    "searched everywhere for {n}|remembered {n}|reached for {n}|talked quietly about {n}|hid behind {n}|"
    "drew a picture of {n}|thought about {n}|noticed {n} in the distance|turned away from {n}|leaned against {n}|"
    "smiled at {n}|discovered {n} by accident|pointed at {n}|wrote a poem about {n}|cared more about {n} than anyone|"
    "gave {n} to a friend|ran towards {n}|bought {n} from a merchant|wondered who had left {n} there"
).split("|")
_SECOND = (
    " and then forgot {n}| and dreamed of {n}| because {n} was gone| while {n} was still in sight| until {n} "
    "came into view|"
    " and smiled when {n} appeared| but never touched {n}| and left {n} behind| so that nobody would see {n}|"
    ", hoping to find {n} again| and hummed a tune about {n}|, where {n} had been waiting all year| before "
    "returning to {n}|"
    " with {n} close by| and wished for {n}| although {n} meant much more| as {n} glowed in the light|"
    " and asked about {n}|, thinking only of {n}| and kept {n} as a secret| and traded it for {n}| next to {n}|"
    ", just as {n} disappeared into the dark| and promised to bring {n} home"
).split("|")
_CLOSINGS = (
    "||||||| with a smile| in silence| once more| that night| for the first time| without any fear| under a grey sky|"
    " before going home| in the soft light| as the wind grew colder| while the village slept| and felt happy again"
).split("|")
_THING_SECOND = (
    "{N} stood in {t}, and {p} {v}|Near {t}, {p} {v}|In the middle of {t}, {p} {v}|{P} {v} not far from {t}|"
    "{P} came to {t} and {v}|Nobody in {t} was surprised when {p} {v}|Because of {t}, {p} {v}|{P} still "
    "remembers {t}, where someone {v}"
).split("|")
_EVENT_SECOND = (
    "During {t}, {p} {v}|{P} waited for {t} to end and {v}|After {t}, {p} {v}|All through {t}, {p} {v}|"
    "{P} {v} on the day of {t}|When {t} began, {p} {v}|{P} spoke of {t} and {v}"
).split("|")


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _noun_phrase(noun: str, rng: random.Random) -> str:
    bare = noun if rng.random() < 0.6 else f"{rng.choice(_THING_ADJECTIVES)} {noun}"
    return f"the {bare}" if rng.random() < 0.75 else article(bare)


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def reference_sentence(topic: str, words: Sequence[str], rng: random.Random) -> str:
    """One correct English sentence about `topic` (a singular noun, with or without article) that uses both `words`."""
    topic = topic.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    first, second = rng.sample(list(words), 2)
    phrase = rng.choice(_FIRST).format(n=_noun_phrase(first, rng)) + rng.choice(_SECOND).format(
        n=_noun_phrase(second, rng)
    )
    phrase += rng.choice(_CLOSINGS)
    if topic in ANIMATE:
        adjective = f"{rng.choice(_ADJECTIVES)} " if rng.random() < 0.6 else ""
        noun = adjective + topic
        subject = f"the {noun}" if rng.random() < 0.7 else article(noun)
        return _upper_first(f"{rng.choice(_OPENINGS)}{subject} {phrase}.")
    shape = rng.choice(_EVENT_SECOND if topic in EVENTS else _THING_SECOND)
    person = rng.choice(_PEOPLE)
    place = f"the {topic}" if rng.random() < 0.5 else f"the {rng.choice(_THING_ADJECTIVES)} {topic}"
    text = shape.format(
        t=place,
        p=person,
        P=_upper_first(person),
        v=phrase,
        N=_upper_first(article(rng.choice(_THING_ADJECTIVES) + " statue")),
    )
    return _upper_first(text) + "."


def random_prompt(rng: random.Random) -> tuple[str, tuple[str, str]]:
    """A topic and two words, all different."""
    topic = rng.choice(ANIMATE + PLACES + EVENTS)
    first, second = rng.sample([word for word in OBJECTS if word != topic], 2)
    return topic, (first, second)


def prompt_text(topic: str, words: Sequence[str]) -> str:
    """The prompt in the words of the writing task."""
    return PROMPT.format(topic=article(topic), w1=words[0], w2=words[1])
