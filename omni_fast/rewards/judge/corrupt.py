"""Bad replies on purpose: every family spoils a good sentence in one way, at the same number of words.

Why by family: a judge fitted on all families and tested on the same ones proves nothing. Leaving one family out at a
time asks whether the judge knows what a good sentence is, or merely the spoilers it has seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from omni_fast.rewards.judge.base import Pair
from omni_fast.rewards.judge.sentences import OBJECTS, PHRASES, article, random_prompt, random_reply, reference_sentence
from omni_fast.rewards.text_checks import DETERMINERS, FUNCTION_WORDS, PREPOSITIONS, has_word

_FILLER, _SYLLABLES, _RARE = (PHRASES[kind] for kind in ("filler", "syllables", "rare"))
_ANY = [*OBJECTS, *PHRASES["animate"], *PHRASES["places"], *sorted(FUNCTION_WORDS)]
_FOREIGN = [line.split() for line in PHRASES["foreign"]]


def _finish(tokens: Sequence[str], stop: str = ".") -> str:
    text = " ".join(tokens).strip(" .,")
    return text[:1].upper() + text[1:] + stop


def _fit(tokens: Sequence[str], length: int) -> list[str]:
    """Exactly `length` words, by repeating from the start when there are too few."""
    return [tokens[i % len(tokens)] for i in range(length)]


def _plain(text: str) -> list[str]:
    return text.rstrip(".").replace(",", "").split()


def _other(topic: str, words: Sequence[str], length: int, rng: random.Random, keep_topic: bool = False) -> str:
    """A good sentence of about `length` words about something else (or the same topic with other words)."""
    best, absent = "", {*words} if keep_topic else {*words, topic}
    for _ in range(60):
        other_topic, other_words = random_prompt(rng)
        about = topic if keep_topic else other_topic
        if (not keep_topic and about == topic) or set(other_words) & {*words, about, topic}:
            continue
        text = reference_sentence(about, other_words, rng)
        if any(has_word(_plain(text.lower()), word) for word in absent):
            continue
        if not best or abs(len(text.split()) - length) < abs(len(best.split()) - length):
            best = text
        if len(best.split()) == length:
            break
    return best


def _shuffled(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    tokens = _plain(good.lower())
    rng.shuffle(tokens)
    return _finish(tokens)


def _local_swaps(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    tokens = _plain(good)
    for i in range(0, len(tokens) - 1, 2):
        if rng.random() < 0.7:
            tokens[i], tokens[i + 1] = tokens[i + 1], tokens[i]
    return _finish(tokens)


def _repeated(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    tokens = _plain(good)
    n = rng.randint(2, 4)
    start = rng.randrange(max(1, len(tokens) - n))
    head = tokens[: rng.randint(0, len(tokens) // 2)]
    return _finish(head + _fit(tokens[start : start + n], len(tokens) - len(head)))


def _truncated(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    """A longer sentence cut at the good one's length, as a token limit would."""
    length = len(good.split())
    tokens = reference_sentence(topic, words, rng).rstrip(".").split()
    tokens += rng.choice((" and the", " while", " because of", " with a")).split()
    while len(tokens) < length + 2:
        tokens += reference_sentence(topic, words, rng).rstrip(".").lower().split()
    return _finish(tokens[:length], "")


def _off_topic(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    return _other(topic, words, len(good.split()), rng)


def _missing_words(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    return _other(topic, words, len(good.split()), rng, keep_topic=True)


def _one_missing(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    gone = rng.choice(list(words))
    new = rng.choice([word for word in OBJECTS if word not in words and word[0] not in "aeiou"])
    return " ".join(new + token[len(gone) :] if token.strip(".,") == gone else token for token in good.split())


def _filler(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    start = rng.randrange(len(_FILLER))
    head = f"{article(topic)} is something that".split() if rng.random() < 0.5 else []
    return _finish([*head, *_fit(_FILLER[start:] + _FILLER[:start], len(good.split()) - len(head))])


def _gibberish(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    return _finish(["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in good.split()])


def _foreign(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    tokens = rng.choice(_FOREIGN)
    start = rng.randrange(len(tokens) // 2)
    return _finish(_fit(tokens[start:] + tokens[:start], len(good.split())))


def _echo(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    about, both = article(topic), f"uses the words {words[0]} and {words[1]}"
    texts = (
        f"write one sentence about {about} that {both} in one sentence about {about}",
        f"{about} that {both} is {about} that {both}",
        f"one sentence about {about} {both} so this sentence {both}",
    )
    return _finish(_fit(rng.choice(texts).split(), len(good.split())))


def _word_salad(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    tokens = [rng.choice(_ANY) for _ in good.split()]
    for word in words:
        tokens[rng.randrange(len(tokens))] = word
    return _finish(tokens)


def _pasted_words(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    """Someone else's sentence with the required words dropped in anywhere."""
    tokens = _plain(_other(topic, words, max(6, len(good.split()) - 3), rng))
    for word in (*words, topic):
        tokens.insert(rng.randint(1, len(tokens)), word)
    return _finish(tokens)


def _wrong_function_words(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    pool = sorted(FUNCTION_WORDS)
    return _finish([rng.choice(pool) if token.lower() in FUNCTION_WORDS else token for token in _plain(good)])


def _wrong_content(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    """Right frame, absurd words: verbs and nouns exchanged for terms of art; the required words stay."""
    keep = {*words, topic} | FUNCTION_WORDS
    return _finish([token if token.lower() in keep else rng.choice(_RARE) for token in _plain(good)])


def _dropped_function_words(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    kept = [token for token in _plain(good) if token.lower() not in (DETERMINERS | PREPOSITIONS | {"and", "was", "to"})]
    kept += [rng.choice(OBJECTS) for _ in range(len(good.split()) - len(kept))]
    return _finish(kept)


def _typos(good: str, topic: str, words: Sequence[str], rng: random.Random) -> str:
    tokens = _plain(good)
    for place, token in enumerate(tokens):
        if len(token) > 3 and rng.random() < 0.6:
            i = rng.randrange(len(token) - 1)
            left = token[i] if rng.random() < 0.5 else ""  # two letters change places, or one is lost
            tokens[place] = token[:i] + token[i + 1] + left + token[i + 2 :]
    return _finish(tokens)


_SPOILERS: tuple[Callable[[str, str, Sequence[str], random.Random], str], ...] = (
    _shuffled, _local_swaps, _repeated, _truncated, _off_topic, _missing_words, _one_missing, _filler, _gibberish,
    _foreign, _echo, _word_salad, _pasted_words, _wrong_function_words, _wrong_content, _dropped_function_words, _typos,
)  # fmt: skip
FAMILIES = {spoiler.__name__.removeprefix("_"): spoiler for spoiler in _SPOILERS}


def make_pairs(per_family: int, seed: int) -> list[Pair]:
    """`per_family` pairs of a good and a spoiled reply of each family, equal in words to within one, each on a prompt
    of its own."""
    rng = random.Random(seed)
    pairs = []
    for family, spoil in FAMILIES.items():
        made = 0
        while made < per_family:
            topic, good = random_reply(rng)
            bad = spoil(good.reference, topic, good.required, rng)
            if bad != good.reference and abs(len(bad.split()) - len(good.reference.split())) <= 1:
                pairs.append(Pair(family, replace(good, reference=bad)))
                made += 1
    return pairs
