"""The shapes of what a run writes down: state.json and the rows of metrics.jsonl. Plain JSON, typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from omni_fast.curriculum.scores import Floats, ScoreDict


class Shown(TypedDict):
    """A completion kept for the report."""

    prompt: str
    completion: str
    value: float | None


class TaskScores(TypedDict):
    """Item-level scores of one task on one split, null where the infrastructure failed."""

    values: list[float | None]
    truncated: float
    samples: list[Shown]


class Evaluation(NamedTuple):
    """Of one task on one split. values: float64 [n_items], the task's metric in 0..1 in the order of the items; NaN where the
    infrastructure failed. record: what is kept of it."""

    values: Floats
    record: TaskScores


class Evaluated(TypedDict):
    """One policy scored on all tasks. entropy: nats per token on the probe."""

    splits: dict[str, dict[str, TaskScores]]
    entropy: dict[str, float]


class Trained(TypedDict):
    """A finished stage. same_as: the finished run that it repeats, whose weights and scores it has; "" for its own."""

    tasks: list[str]
    steps: int
    same_as: str


class ProbeRow(TypedDict):
    """A completion of the initial policy on which entropies are read."""

    task: str
    prompt: list[int]
    tokens: list[int]


class Totals(TypedDict):
    """What adds up over a run, and how much of metrics.jsonl it covers."""

    metrics_bytes: int
    seconds: dict[str, float]
    counts: dict[str, float]


class State(TypedDict):
    """state.json."""

    trained: dict[str, Trained]
    evaluated: dict[str, Evaluated]
    probe: list[ProbeRow]
    items: dict[str, str]  # task -> digest of its items, which must not change under a run
    totals: Totals
    finished: bool
    facts: dict[str, Any]  # what the parts say of themselves, handed on to result.json as it is


class TaskRow(TypedDict):
    """One task in a step. entropy: nats per token over the samples that trained; null when none did."""

    reward: float
    entropy: float | None
    mixed_groups: float
    groups: int
    invalid: int
    invalid_reasons: Mapping[str, int]
    parts: Mapping[str, float | None]  # mean over the valid samples
    spreads: Mapping[str, float | None]  # standard deviation
    reasons: Mapping[str, Mapping[str, int]]
    completion_tokens: float
    truncated: float
    signals: Mapping[str, float | None]  # of `rewards.monitors`
    signs: Mapping[str, str]  # the signals out of bounds, in words


class StepRow(TypedDict):
    """A row of metrics.jsonl: one optimiser step.

    seconds: generate, reward, update, sync, total, each what the step waited for: `reward` is for scores after generating,
    and where rollouts run ahead (max_staleness > 0) `generate` is what of them was not hidden behind other steps.
    scoring_s: what verifiers and judges worked, most of it while samples were still generated.
    tokens_per_s: new tokens per second of generating; where rollouts run ahead, per second of the step.
    update: what the optimiser step says of itself (`policy.update`: loss, where any group was mixed, grad_norm, ...), and how
    old its samples were (`groups.staleness`).
    """

    event: str
    stage: str
    step: int
    tasks: dict[str, TaskRow]
    update: dict[str, float]
    new_tokens: int
    tokens_per_s: float
    seconds: dict[str, float]
    scoring_s: float
    waited_for: str
    max_staleness: int


class EvalRow(TypedDict):
    """A row of metrics.jsonl: one split scored after a stage."""

    event: str
    stage: str
    split: str
    scores: dict[str, ScoreDict]
    seconds: float


def scored(found: TaskScores | None) -> bool:
    """Whether any item has a score."""
    return found is not None and any(value is not None for value in found["values"])


def joined(before: Evaluated | None, now: Evaluated) -> Evaluated:
    """One policy's scores on all tasks, where some were scored later."""
    if before is None:
        return now
    splits = {split: before["splits"].get(split, {}) | tasks for split, tasks in now["splits"].items()}
    return Evaluated(splits=before["splits"] | splits, entropy=before["entropy"] | now["entropy"])


def empty_state() -> State:
    totals = Totals(metrics_bytes=0, seconds={}, counts={})
    return State(trained={}, evaluated={}, probe=[], items={}, totals=totals, finished=False, facts={})
