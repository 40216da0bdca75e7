"""Cheap, deterministic facts about a piece of English text, and the gates that run before any judge.

Why: a judge, learned or prompted, can be talked into anything by empty replies, repetitions, copies of the prompt,
words of the rubric, or "master key" openers (arXiv 2507.08794). Those are recognised here and score 0.
Limits: English, words separated by spaces, and only the first `MAX_CHARS` characters, so every function is bounded.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise

MAX_CHARS = 8_000
MIN_WORDS, MAX_WORDS = 5, 400  # of a reply that a judge may see

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)]*(?:\s|$)")
_ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|st|e\.g|i\.e|etc)\.", re.IGNORECASE)


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = word_set("a an the my your his her its our their this that these those every each no some any")
PREPOSITIONS = word_set(
    "of in on at by for with from into onto over under near beside behind through across between before after during "
    "toward towards above below against along around among inside outside without within past beneath until"
)
AUXILIARIES = word_set(
    "is are was were be been being am has have had do does did will would can could shall should may might must"
)
PRONOUNS = word_set(
    "i you he she it we they me him us them who whom which what himself herself itself themselves someone everyone "
    "something nothing there"
)
CONJUNCTIONS = word_set("and or but nor so yet because although though while if when as since than then where")
ADVERBS = word_set(
    "not never always often too very just only also again still even once more most how why up down out off"
)
FUNCTION_WORDS = DETERMINERS | PREPOSITIONS | AUXILIARIES | PRONOUNS | CONJUNCTIONS | ADVERBS | {"to"}
_DANGLING = (
    DETERMINERS | CONJUNCTIONS | {"of", "to", "with", "from", "into", "is", "was", "are", "were", "at", "for", "very"}
)

# `=== name: what it is`, then regular expressions of which one is enough.
_GATES = {
    block.split(":", 1)[0]: "|".join(block.strip().split("\n")[1:])
    for block in files("omni_fast.rewards").joinpath("gates.txt").read_text(encoding="utf-8").split("=== ")[1:]
}
_RUBRIC = re.compile(rf"\b(?:{_GATES['rubric']})", re.IGNORECASE)
_INJECTION = re.compile(_GATES["injection"], re.IGNORECASE | re.MULTILINE)
_MASTER_KEY = re.compile(rf"^\W*(?:{_GATES['master_key']})", re.IGNORECASE)
_META = re.compile(_GATES["meta"], re.IGNORECASE)
_OPEN = re.compile(r"<(?:think|thinking|reasoning|scratchpad)>", re.IGNORECASE)
_CLOSE = re.compile(r"</(?:think|thinking|reasoning|scratchpad)>", re.IGNORECASE)


def after_reasoning(text: str) -> str:
    """What follows the last end of reasoning."""
    text = text[:200_000]
    return text[max((close.end() for close in _CLOSE.finditer(text)), default=0) :].strip()


def strip_reasoning(text: str) -> str:
    """The text after its reasoning; a reasoning that never ends leaves nothing."""
    text = after_reasoning(text)
    unfinished = _OPEN.search(text)
    return text[: unfinished.start()].strip() if unfinished else text


# Cyrillic, Greek and other letters that are read as Latin ones, after NFKC and without their accents
_LOOKALIKES = str.maketrans(
    "АВЕЅІЈКМНОРСТУХҮԌԚԜӀаевѕіјкмнорстухүԍԛԝӏԁһпгьΑΒΕΖΗΙΚΜΝΟΡΤΥΧαβεικηνορστυχωγıɑɡɩꓲ",
    "ABESIJKMHOPCTYXYGQWlaebsijkmhopctyxygqwldhnrbABEZHIKMNOPTYXabeiknvopotuxwyiagil",
)


def plain(text: str) -> str:
    """A cleaned text as it looks: without accents, and letters of other scripts as the Latin ones they look like."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(ch for ch in letters if not unicodedata.combining(ch)).translate(_LOOKALIKES)


def clean(text: str) -> str:
    """NFKC form of the first `MAX_CHARS` characters, without invalid surrogates and control characters."""
    text = text[:MAX_CHARS].encode("utf-8", "replace").decode("utf-8")
    text = unicodedata.normalize("NFKC", text)[:MAX_CHARS]
    return "".join(ch for ch in text if ch.isprintable() or ch in "\n\t ").replace("’", "'")


def words(text: str) -> list[str]:
    """Lower-case words of the cleaned text, digits and punctuation left out."""
    return [match.lower() for match in _WORD.findall(clean(text))]


def sentence_count(text: str) -> int:
    """Sentences by their ends; a last one without an end counts, an abbreviation does not end one."""
    body = _ABBREVIATION.sub(lambda match: match.group().replace(".", ""), clean(text)).strip()
    ends = list(_SENTENCE_END.finditer(body))
    rest = body[ends[-1].end() :] if ends else body
    return len(ends) + bool(_WORD.search(rest))


def content(tokens: Sequence[str]) -> list[str]:
    """Without the function words."""
    return [token for token in tokens if token not in FUNCTION_WORDS]


def ends_cleanly(text: str) -> bool:
    """Whether a text, cleaned and stripped, ends as a sentence does."""
    return re.search(r"[.!?][\"')]*$", text) is not None


def has_word(tokens: Sequence[str], word: str) -> bool:
    """True when the word or its regular plural occurs as a whole word."""
    word = word.lower()
    return any(token in (word, word + "s", word + "es") for token in tokens)


def coverage(tokens: Sequence[str], required: Sequence[str]) -> float:
    """Share of the required words that occur; 1.0 when none is required."""
    return sum(has_word(tokens, word) for word in required) / len(required) if required else 1.0


def repeated_ngram_share(tokens: Sequence[str], n: int) -> float:
    """Share of the n-grams that already occurred before; 0.0 for fewer than n + 1 words."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def echo_share(tokens: Sequence[str], prompt_tokens: Sequence[str], n: int = 4) -> float:
    """Share of the n-grams that stand in the prompt too; 0.0 for texts shorter than n words."""
    known = {tuple(prompt_tokens[i : i + n]) for i in range(len(prompt_tokens) - n + 1)}
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def function_word_share(tokens: Sequence[str]) -> float:
    """Share of English function words: about 0.3 to 0.6 in prose, near 0 in lists, gibberish and other languages."""
    return sum(token in FUNCTION_WORDS for token in tokens) / len(tokens) if tokens else 0.0


# what may not follow a word
_CLASHES = {
    left: rights
    for lefts, rights in {
        "a an the every my your its our their": (
            DETERMINERS | PREPOSITIONS | AUXILIARIES | PRONOUNS | word_set("and or but because to")
        ),
        "of from into with at by for beside near": (
            AUXILIARIES | word_set("and or but of by at because i he she we they")
        ),
        "is are was were has have had": word_set("is are was were of has can will and"),
        "and or but": word_set("and or of"),
        "to": word_set("and or of to is was were are has"),
    }.items()
    for left in lefts.split()
}


def _clash(left: str, right: str) -> bool:
    return left not in ("had", "that") if left == right else right in _CLASHES.get(left, ())


def grammar_faults(text: str) -> int:
    """Pairs of neighbouring words that English does not allow ("the of", "is was", "a the", "an moon"), and a
    dangling end.

    Few false alarms rather than full coverage: it is one feature among others, never a parser.
    """
    faults, last = 0, ""
    for sentence in re.split(r"[.!?,;:\n]+", clean(text)):
        tokens = [match.lower() for match in _WORD.findall(sentence)]
        for left, right in pairwise(tokens):
            faults += _clash(left, right)
            faults += (left == "an" and right[0] not in "aeiouh") or (left == "a" and right[0] in "aio")
        last = tokens[-1] if tokens else last
    return faults + (last in _DANGLING)


def gate(prompt: str, completion: str, required: Sequence[str] = ()) -> str | None:
    """Why a completion is refused before any judge sees it, or None when it may pass.

    Reasons: empty, injection, master_key, rubric_words, prompt_echo, too_short, too_long, repeated, wrong_language,
    word_list.
    """
    text = clean(completion).strip()
    seen = plain(text)
    tokens = [match.lower() for match in _WORD.findall(seen)]
    if not tokens:
        return "empty"
    for reason, pattern in (("injection", _INJECTION), ("master_key", _MASTER_KEY), ("rubric_words", _RUBRIC)):
        if pattern.search(seen):
            return reason
    if len(tokens) < MIN_WORDS:
        return "too_short"
    if len(tokens) > MAX_WORDS or len(completion) > MAX_CHARS:
        return "too_long"
    if (_META.search(prompt) and _META.search(seen)) or echo_share(tokens, words(plain(clean(prompt)))) > 0.3:
        return "prompt_echo"
    meaning = content(tokens)
    top = Counter(meaning).most_common(1)[0][1] if meaning else len(tokens)
    runs = any(a == b == c for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False))
    if runs or repeated_ngram_share(tokens, 3) > 0.15 or top >= max(3, 0.25 * len(tokens)):
        return "repeated"
    letters = [ch for ch in text if ch.isalpha()]
    latin = sum(ch.isascii() for ch in letters) >= 0.9 * len(letters)
    if not latin or sum(map(len, tokens)) < 0.6 * len("".join(text.split())) or function_word_share(tokens) < 0.12:
        return "wrong_language"
    wanted = [plain(clean(word)) for word in required]
    extra = [token for token in meaning if not any(has_word([token], word) for word in wanted)]
    if required and len(extra) < 2:
        return "word_list"
    return None
