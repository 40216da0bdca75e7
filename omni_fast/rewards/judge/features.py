"""The cheap half of what the embedded judge sees: numbers of a reply, each with a sign a reader would agree with.

None of them is a length or grows with it, so that the judge cannot be paid in words.
"""

from __future__ import annotations

from collections.abc import Sequence

from omni_fast.rewards import text_checks


def features(prompt: str, reply: str, required: Sequence[str]) -> dict[str, float]:
    """The features by name, each in 0..1."""
    text = text_checks.clean(reply).strip()
    tokens = text_checks.words(text)
    count = max(1, len(tokens))
    topics = [word for word in text_checks.content(text_checks.words(prompt)) if word not in required]
    topics = [word for word in topics if word not in ("write", "sentence", "use", "uses", "word", "words", "short")]
    share = text_checks.function_word_share(tokens)
    runs = "".join("x" if token in text_checks.FUNCTION_WORDS else " " for token in tokens).split()
    meaning = text_checks.content(tokens)
    covered = text_checks.coverage(tokens, required)
    letters = sum(ch.isascii() and (ch.isalpha() or ch in " .,'") for ch in text)
    return {
        "coverage": covered,
        "all_words": float(covered == 1.0),
        "topic": float(not topics or any(text_checks.has_word(tokens, topic) for topic in topics)),
        "faults": min(1.0, 4.0 * text_checks.grammar_faults(text) / count),
        "clean_end": float(text_checks.ends_cleanly(text)),
        "clean_start": float(text[:1].isupper() or text[:1] in "\"'"),
        "one_sentence": float(text_checks.sentence_count(text) == 1),
        "function_share": min(1.0, abs(share - 0.45) / 0.45),
        "function_run": min(1.0, max(0, max(map(len, runs), default=0) - 3) / 4),
        "repeated_2": text_checks.repeated_ngram_share(tokens, 2),
        "repeated_words": 1.0 - len(set(meaning)) / max(1, len(meaning)),
        "echo": text_checks.echo_share(tokens, text_checks.words(prompt), 3),
        "odd_letters": 1.0 - letters / max(1, len(text)),
    }


FEATURES = tuple(features("", "", ()))
