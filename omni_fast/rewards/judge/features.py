"""The cheap half of what the embedded judge sees: numbers of a reply, each with a sign a reader would agree with.

None of them is a length or grows with it, so that the judge cannot be paid in words.
"""

from __future__ import annotations

from collections.abc import Sequence

from omni_fast.rewards.text_checks import (
    FUNCTION_WORDS,
    clean,
    content,
    coverage,
    echo_share,
    ends_cleanly,
    function_word_share,
    grammar_faults,
    has_word,
    repeated_ngram_share,
    sentence_count,
    words,
)


def features(prompt: str, reply: str, required: Sequence[str]) -> dict[str, float]:
    """The features by name, each in 0..1."""
    text = clean(reply).strip()
    tokens = words(text)
    count = max(1, len(tokens))
    topics = [word for word in content(words(prompt)) if word not in required]
    topics = [word for word in topics if word not in ("write", "sentence", "use", "uses", "word", "words", "short")]
    share = function_word_share(tokens)
    runs = "".join("x" if token in FUNCTION_WORDS else " " for token in tokens).split()
    meaning = content(tokens)
    covered = coverage(tokens, required)
    letters = sum(ch.isascii() and (ch.isalpha() or ch in " .,'") for ch in text)
    return {
        "coverage": covered,
        "all_words": float(covered == 1.0),
        "topic": float(not topics or any(has_word(tokens, topic) for topic in topics)),
        "faults": min(1.0, 4.0 * grammar_faults(text) / count),
        "clean_end": float(ends_cleanly(text)),
        "clean_start": float(text[:1].isupper() or text[:1] in "\"'"),
        "one_sentence": float(sentence_count(text) == 1),
        "function_share": min(1.0, abs(share - 0.45) / 0.45),
        "function_run": min(1.0, max(0, max(map(len, runs), default=0) - 3) / 4),
        "repeated_2": repeated_ngram_share(tokens, 2),
        "repeated_words": 1.0 - len(set(meaning)) / max(1, len(meaning)),
        "echo": echo_share(tokens, words(prompt), 3),
        "odd_letters": 1.0 - letters / max(1, len(text)),
    }


FEATURES = tuple(features("", "", ()))
