"""`RubricJudge`: a judge made of programmatic checks alone.

It is the metric of the writing task (the held-out score must come from another judge than the reward), and the reward
judge where the embedded one did not reach its bar. Its checks are those a reader can repeat by hand.
Limits: it sees form, not sense. "The stone ate the quiet Tuesday." passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from omni_fast.rewards import text_checks
from omni_fast.rewards.judge.base import Reply, gated
from omni_fast.rewards.score import Part

WEIGHTS = {"required": 0.4, "topic": 0.15, "one_sentence": 0.15, "clean_end": 0.1, "grammar": 0.1, "distinct": 0.1}
_TASK_WORDS = text_checks.word_set(
    "write sentence sentences use uses using word words short one story include includes"
)


def checks(prompt: str, text: str, required: Sequence[str]) -> dict[str, float]:
    """Each check of `WEIGHTS`, 0..1."""
    tokens = text_checks.words(text)
    instruction = text_checks.FUNCTION_WORDS | _TASK_WORDS | {word.lower() for word in required}
    topics = [word for word in text_checks.words(prompt) if word not in instruction]
    meaning = text_checks.content(tokens)
    return {
        "required": text_checks.coverage(tokens, required),
        "topic": float(not topics or any(text_checks.has_word(tokens, topic) for topic in topics)),
        "one_sentence": float(text_checks.sentence_count(text) == 1 and 6 <= len(tokens) <= 30),
        "clean_end": float(text_checks.ends_cleanly(text_checks.clean(text).strip())),
        "grammar": float(
            text_checks.grammar_faults(text) == 0 and 0.2 <= text_checks.function_word_share(tokens) <= 0.75
        ),
        "distinct": len(set(meaning)) / len(meaning) if meaning else 0.0,
    }


class RubricJudge:
    """Weighted share of the checks that a reply passes; 0 behind a gate. Absolute: the reference is not read."""

    name = "rubric"

    def judge(self, replies: Sequence[Reply]) -> list[Part]:
        return gated(replies, lambda passed: [self._one(reply) for reply in passed])

    def _one(self, reply: Reply) -> Part:
        found = checks(reply.prompt, reply.completion, reply.required)
        return Part(sum(weight * found[name] for name, weight in WEIGHTS.items()))
