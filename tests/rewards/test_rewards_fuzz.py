"""Every reward that reads text, on 10,000 arbitrary ones: nothing raises, every value is a number in 0..1, all in bounded time.

The maths verifier's worker processes and the programs in the jail are fuzzed as often in tests/real.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.config import RewardConfig, TaskConfig
from omni_fast.rewards.code import extract_code
from omni_fast.rewards.compose import group_advantages
from omni_fast.rewards.judge.base import Judge, Reply
from omni_fast.rewards.judge.client import Failure, Keep
from omni_fast.rewards.judge.embedded import EmbeddedJudge, fit_head
from omni_fast.rewards.judge.pairwise import VERDICTS, Question, Verdict, parse_verdict
from omni_fast.rewards.judge.rubric import RubricJudge
from omni_fast.rewards.judge.server import PairwiseJudge
from omni_fast.rewards.math import compare_fast, extract_answer, normalise
from omni_fast.rewards.monitors import Monitor, WatchedGroup
from omni_fast.rewards.parts import EXTRA
from omni_fast.rewards.qa import QaMatcher
from omni_fast.rewards.score import Part
from omni_fast.rewards.text_checks import MAX_CHARS, clean, words
from omni_fast.tasks import build_tasks
from omni_fast.tasks.base import Resources, Task
from omni_fast.tasks.code import program
from omni_fast.tasks.composed import composed

CASES, BATCH = 10_000, 10
LIMIT_S = 20.0  # for a batch, on a machine as busy as it may be; usual are milliseconds
PIECES = [
    "<think>", "</think>", "the", "moon", "a cat", "score: 10", "<|im_end|>", "A", '{"verdict": "A"}', "\\boxed{", "}", "####",
    "<answer>", "is", "1,000", "not", "Lima", "Oslo", ".", "\n", "```python", "return", "﷽", "\ud800", "\u202e", "0" * 50, "(" * 30,
]  # fmt: skip
any_text = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=120),
    st.binary(max_size=120).map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.lists(st.sampled_from(PIECES), max_size=40).map(" ".join),
    st.tuples(st.sampled_from(PIECES), st.integers(1, 3000)).map(lambda pair: pair[0] * pair[1]),
)
Reward = Callable[[Sequence[str]], Sequence[Part]]


def bigrams(texts: Sequence[str]) -> torch.Tensor:
    """A hashed bag of word pairs."""
    result = torch.zeros(len(texts), 64)
    for row, text in enumerate(texts):
        tokens = ["<", *words(text), ">"]
        for left, right in zip(tokens, tokens[1:], strict=False):
            result[row, zlib.crc32(f"{left} {right}".encode()) % 64] += 1.0 / len(tokens)
    return result


class Agreeable:
    """A judge's server that takes every text for a win, so that only the gates stand in the way."""

    name = "agreeable"

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[Verdict | Failure]:
        assert all(message["content"].encode() for question in questions for message in question.messages("salt"))
        return ["A" if place % 2 == 0 else "B" for place in range(len(questions))]


def judged(judge: Judge) -> Reward:
    return lambda texts: judge.judge(
        [Reply("Write about a cat.", text, "A quiet cat slept.", ("moon",)) for text in texts]
    )


def of_task(task: Task, kind: str) -> Reward:
    """The composed reward of a task with the extra parts, as a config asks for it."""
    part = next(iter(task.composition.weights))
    weights = {part: 1.0, "format": 0.1, "unrepeated": 0.1}
    whole = composed(task, RewardConfig(kind=kind, weights=weights, gate=part if kind == "gated" else ""))  # type: ignore[arg-type]
    item = task.items("train")[0]

    def parts(texts: Sequence[str]) -> list[Part]:
        scores = whole.score([item] * len(texts), texts)
        assert all(score.parts.keys() == weights.keys() for score in scores)
        advantages = group_advantages(scores, whole.composition)
        assert all(value is not None and abs(value) < 100 for value in advantages)
        assert all(value is not None and 0.0 <= value <= 1.0 for value in whole.metric([item] * len(texts), texts))
        return [part for score in scores for part in score.parts.values()]

    return parts


def exact(texts: Sequence[str]) -> list[Part]:
    """The maths verifier up to the point where a worker process is asked."""
    answers = [extract_answer(text) for text in texts]
    verdicts = [compare_fast("7271828182", normalise(answer)) if answer is not None else False for answer in answers]
    return [Part(float(bool(verdict))) for verdict in verdicts]


def programs(texts: Sequence[str]) -> list[Part]:
    """What is taken for the program in a reply; running it is the jail's."""
    assert all(isinstance(extract_code(text, text[:5]), str) for text in texts)
    return [Part(float(program(text) is not None)) for text in texts]


def around_judges(texts: Sequence[str]) -> list[Part]:
    """Arbitrary prompts too, what a judge is asked, what is read in its answer, what the monitors see."""
    for prompt, text in pairwise(texts):
        assert parse_verdict(text) in (*VERDICTS, None)
        assert all(message["content"].encode() for message in Question(prompt, text, prompt).messages("salt"))
        assert len(clean(text).encode()) <= 4 * MAX_CHARS
    groups = [WatchedGroup(texts, [0.0] * len(texts), texts[:2], [0.5] * len(texts)), WatchedGroup(texts, [None] * 2)]
    signals, _ = Monitor().update("t", groups)
    assert all(value is None or math.isfinite(value) for value in signals.record().values())
    return RubricJudge().judge([Reply(prompt, text, "", ("moon",)) for prompt, text in pairwise([*texts, ""])])


def never() -> Any:
    raise AssertionError("nothing is verified here")


@pytest.fixture(scope="module")
def rewards() -> dict[str, Reward]:
    matcher = QaMatcher("Guatemala City", candidates=["Lima", "Oslo"])
    rubric = RubricJudge()
    own = Resources(never, never, lambda: rubric, lambda: rubric)
    tasks = build_tasks(
        [TaskConfig(name="qa", kind="qa"), TaskConfig(name="writing", kind="writing")], seed=0, resources=own
    )
    found: dict[str, Reward] = {
        "qa": lambda texts: [matcher.score(text) for text in texts],
        "maths, exact": exact,
        "programs": programs,
        "around judges": around_judges,
        "rubric": judged(rubric),
        "embedded": judged(EmbeddedJudge(bigrams, fit_head(bigrams))),
        "pairwise": judged(PairwiseJudge(Agreeable())),
        "qa task, normalised": of_task(tasks["qa"], "normalised"),
        "writing task, gated": of_task(tasks["writing"], "gated"),
    }
    for name, part in EXTRA.items():
        found[name] = lambda texts, part=part: [part(text) for text in texts]  # type: ignore[misc]
    return found


def test_10000_texts_raise_nothing_in_any_reward(rewards: dict[str, Reward]) -> None:
    seen: Counter[str] = Counter()
    paid: Counter[str] = Counter()

    @settings(deadline=None, max_examples=CASES // BATCH, database=None)
    @given(st.lists(any_text, min_size=BATCH, max_size=BATCH))
    def every_reward(texts: list[str]) -> None:
        for name, reward in rewards.items():
            start = time.monotonic()
            parts = reward(texts)
            assert time.monotonic() - start < LIMIT_S, name
            assert len(parts) >= len(texts), name
            for part in parts:
                assert part.value is not None and 0.0 <= part.value <= 1.0, (name, part)
            seen[name] += len(texts)
            paid[name] += sum(part.value == 1.0 for part in parts)

    every_reward()
    assert all(seen[name] >= CASES for name in rewards), seen
    assert paid["qa"] == 0 and paid["maths, exact"] == 0, "no text is right by accident"
