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

FEATURES = (
    "coverage",
    "all_words",
    "topic",
    "faults",
    "clean_end",
    "clean_start",
    "one_sentence",
    "function_share",
    "function_run",
    "repeated_2",
    "repeated_words",
    "echo",
    "odd_letters",
)


def features(prompt: str, reply: str, required: Sequence[str]) -> list[float]:
    """The numbers of `FEATURES`, each in 0..1, in order."""
    text = clean(reply).strip()
    tokens = words(text)
    count = max(1, len(tokens))
    topics = [word for word in content(words(prompt)) if word not in required]
    topics = [word for word in topics if word not in ("write", "sentence", "use", "uses", "word", "words", "short")]
    share = function_word_share(tokens)
    run, longest = 0, 0
    for token in tokens:
        run = run + 1 if token in FUNCTION_WORDS else 0
        longest = max(longest, run)
    meaning = content(tokens)
    covered = coverage(tokens, required)
    letters = sum(ch.isascii() and (ch.isalpha() or ch in " .,'") for ch in text)
    return [
        covered,
        float(covered == 1.0),
        float(not topics or any(has_word(tokens, topic) for topic in topics)),
        min(1.0, 4.0 * grammar_faults(text) / count),
        float(ends_cleanly(text)),
        float(text[:1].isupper() or text[:1] in "\"'"),
        float(sentence_count(text) == 1),
        min(1.0, abs(share - 0.45) / 0.45),
        min(1.0, max(0, longest - 3) / 4),
        repeated_ngram_share(tokens, 2),
        1.0 - len(set(meaning)) / max(1, len(meaning)),
        echo_share(tokens, words(prompt), 3),
        1.0 - letters / max(1, len(text)),
    ]
