"""`Task`: the only interface the training loop knows of a domain.

A task owns its prompts, its reward and its test metric. Three disjoint splits: `train` (GRPO), `select` (everything that
decides: transfer, order, temperature) and `test` (everything that is reported).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from omni_fast.rewards.code import CodeVerifier
from omni_fast.rewards.compose import Composition
from omni_fast.rewards.judge.base import Judge
from omni_fast.rewards.math import MathVerifier
from omni_fast.rewards.score import Score

Split = Literal["train", "select", "test"]
SPLITS: tuple[Split, ...] = ("train", "select", "test")

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt with what is needed to grade its completions.

    id: unique within the task and stable over runs (it is what a resume and the paired bootstrap match on).
    prompt: the user's message, before the chat template.
    prefix: text the assistant's turn is opened with (part of the prompt for the model, of the answer for the verifier).
    answer: what the verifier needs; never shown to the model.
    """

    id: str
    prompt: str
    answer: Mapping[str, Json] = field(default_factory=dict)
    prefix: str = ""


def texts_of(answer: Mapping[str, Json], column: str) -> list[str]:
    """A list of an answer as texts; none where it has none."""
    values = answer.get(column)
    return [str(value) for value in values] if isinstance(values, list) else []


def words_of(answer: Mapping[str, Json]) -> tuple[str, ...]:
    """The words that a prompt asks for, lower case."""
    return tuple(word.lower() for word in texts_of(answer, "words"))


class Task(Protocol):
    """A domain. All methods are deterministic functions of the task's seed and their arguments."""

    name: str
    system: str  # system message of the chat template; "" for none
    composition: Composition  # how the parts of a score become one reward
    max_new_tokens: int  # completion limit while training; evaluation allows twice as many

    def items(self, split: Split) -> Sequence[Item]:
        """All items of a split, in a fixed order."""
        ...

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        """The training reward of each completion (`completions[k]` answers `items[k]`), in order. Never raises for any text."""
        ...

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        """The test metric of each completion in 0..1; None where the infrastructure failed."""
        ...


@dataclass(frozen=True, slots=True)
class Resources:
    """What tasks grade with. Each is made when a task first needs it, so that a run without code starts no sandbox.

    reward_judge trains the writing task, metric_judge is what its score is reported by: two different judges.
    """

    math: Callable[[], MathVerifier]
    code: Callable[[], CodeVerifier]
    reward_judge: Callable[[], Judge]
    metric_judge: Callable[[], Judge]
