"""From prompts to something to learn from: groups of samples, their scores, their advantages.

A group is the samples of one prompt. Tasks are scored each by their own reward and normalised inside the group, so a 0/1
reward and a 0/0.5/1 reward meet on one scale. Scores come from `scoring`, while other groups are still generated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from omni_fast.curriculum.stages import Draw
from omni_fast.evaluate import decode
from omni_fast.policy.pack import Trajectory
from omni_fast.records import TaskRow
from omni_fast.rewards.compose import batch_normalise, group_advantages, group_statistics, part_statistics, total
from omni_fast.rewards.monitors import Monitor, WatchedGroup
from omni_fast.rewards.score import Score
from omni_fast.rollout.engine import Sample
from omni_fast.tasks.base import Item, Task

JUDGED = "preference"  # the part of a score that a judge gives


@dataclass(slots=True)
class Group:
    """One prompt of a step with its samples; `advantages[k]` is None where sample k does not train.

    scoring: gives the seconds that the scores took, once they are there (`scoring.Scorer`).
    """

    draw: Draw
    item: Item
    prompt: list[int]
    samples: list[Sample] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scoring: Future[float] | None = None
    scores: list[Score] = field(default_factory=list)
    advantages: list[float | None] = field(default_factory=list)

    def answer(self, samples: list[Sample], tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the engine's samples; the verifiers see the item's prefix and then what the policy wrote."""
        self.samples = samples
        self.texts = decode(tokenizer, [self.item] * len(samples), samples)


def set_advantages(groups: Sequence[Group], tasks: Mapping[str, Task], scale: Literal["std", "none"]) -> None:
    """From the scores of a whole step to the advantages of its samples."""
    for name, members in by_task(groups).items():
        composition = tasks[name].composition
        for group in members:
            group.advantages = group_advantages(group.scores, composition, scale)
        if composition.kind == "normalised":
            rescaled = batch_normalise([group.advantages for group in members])
            for group, advantages in zip(members, rescaled, strict=True):
                group.advantages = advantages


def staleness(groups: Iterable[Group], version: int) -> dict[str, float]:
    """How many versions behind `version` the oldest token of a sample is (mean and max), and the share of samples that
    began under one version and ended under another."""
    spans = [sample.versions for group in groups for sample in group.samples]
    behind = [version - min(held for held, _, _ in versions) for versions in spans]
    return {
        "staleness_mean": sum(behind) / len(behind),
        "staleness_max": float(max(behind)),
        "mixed_versions": sum(len(versions) > 1 for versions in spans) / len(spans),
    }


def trajectories(groups: Iterable[Group]) -> list[Trajectory]:
    """What the policy trains on: every valid sample, groups kept together so that they can share their prompt."""
    return [
        Trajectory(group.prompt, sample.tokens, sample.logprobs, advantage, number, group.draw.task)
        for number, group in enumerate(groups)
        for sample, advantage in zip(group.samples, group.advantages, strict=True)
        if advantage is not None
    ]


def task_rows(
    groups: Sequence[Group], tasks: Mapping[str, Task], entropies: Mapping[str, float | None], monitor: Monitor
) -> dict[str, TaskRow]:
    """Per task of the step: reward, mixed groups, invalid samples with reasons, parts, length, signs of reward hacking."""
    rows: dict[str, TaskRow] = {}
    for name, members in by_task(groups).items():
        stats = group_statistics([group.scores for group in members], tasks[name].composition)
        samples = [sample for group in members for sample in group.samples]
        parts = part_statistics([score for group in members for score in group.scores])
        signals, signs = monitor.update(name, [watched(group, tasks[name]) for group in members])
        rows[name] = TaskRow(
            reward=stats.reward or 0.0,
            entropy=entropies.get(name),
            mixed_groups=stats.mixed_share,
            groups=stats.groups,
            invalid=stats.invalid,
            invalid_reasons=stats.invalid_reasons,
            parts={part: values.mean for part, values in parts.items()},
            spreads={part: values.std for part, values in parts.items()},
            reasons={part: values.reasons for part, values in parts.items()},
            completion_tokens=sum(len(sample.tokens) for sample in samples) / len(samples),
            truncated=sum(sample.finish_reason == "length" for sample in samples) / len(samples),
            signals=signals.record(),
            signs=signs,
        )
    return rows


def watched(group: Group, task: Task) -> WatchedGroup:
    """A group as the monitors see it; the cheap checks of a judged task are its metric, which no reward judge gives."""
    gold = group.item.answer.get("gold")
    golds = (str(gold),) if gold is not None else ()
    if JUDGED not in task.composition.weights:
        return WatchedGroup(group.texts, [total(score, task.composition) for score in group.scores], golds)
    checks = task.metric([group.item] * len(group.texts), group.texts)
    return WatchedGroup(group.texts, [score.parts[JUDGED].value for score in group.scores], golds, checks)


def by_task(groups: Iterable[Group]) -> dict[str, list[Group]]:
    members: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        members[group.draw.task].append(group)
    return dict(members)
