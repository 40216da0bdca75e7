"""The engine protocol: everything the loop needs from whatever generates.

Order is kept and every sample is accounted for: a result list has one entry per prompt and `n` samples in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw completions.

    temperature: 0 is greedy (the log-probs are then those of the temperature-1 distribution).
    seed: with the prompt's key and the sample's number it fixes every draw, whatever else is in the batch.
    stop_token_ids: a completion ends with, and includes, the first of these.
    """

    max_new_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt. `key` names it for seeding (stable over resumes); it need not be unique."""

    tokens: Sequence[int]
    key: int


@dataclass(slots=True)
class Sample:
    """One completion.

    tokens, logprobs: as long as each other; `logprobs` are of the distribution that was sampled from, in nats.
    versions: spans (weight version, start, end) over `tokens`; one span covers all when nothing was updated meanwhile.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    versions: list[tuple[int, int, int]] = field(default_factory=list)


Progress = Callable[[int, int], None]  # tokens generated so far, samples still running
Finished = Callable[[int, list[Sample]], None]  # a prompt's place and its samples, once the last of them is complete


class Rollout(Protocol):
    """Completions that were asked for."""

    def wait(self, progress: Progress | None = None) -> list[list[Sample]]:
        """The samples of each prompt, in the order of the prompts, once all are complete."""

    def cancel(self) -> None:
        """Give up what is still under way."""


class Engine(Protocol):
    """A generator of completions that knows the version of its weights."""

    version: int

    def start(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, arrived: Finished | None = None) -> Rollout:
        """Ask for `n` samples for each prompt without waiting for them; `arrived` gets each complete group, in any thread.

        No token is of weights older than those of this moment; later ones may join in where `sync` comes before the end.
        """

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[list[Sample]]:
        """The samples of `start`, waited for; `finished` gets each complete group, in any thread."""
        return self.start(prompts, n, sampling, finished).wait(progress)

    def sync(self, version: int) -> dict[str, float]:
        """Take over the policy's current weights as `version`; metrics of it, for the step's row."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Deferred:
    """The rollout of an engine that shares its cores and weights with the trainer: it is made when it is waited for."""

    make: Callable[[Progress | None], list[list[Sample]]]

    def wait(self, progress: Progress | None = None) -> list[list[Sample]]:
        return self.make(progress)

    def cancel(self) -> None:
        """Nothing is under way."""
