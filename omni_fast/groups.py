"""From prompts to something to learn from: groups of samples, their scores, their advantages.

A group is the samples of one prompt. Tasks are scored each by their own reward and normalised inside the group, so a 0/1
reward and a 0/0.5/1 reward meet on one scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from omni_fast.curriculum.stages import Draw
from omni_fast.evaluate import decode
from omni_fast.policy.pack import Trajectory
from omni_fast.records import TaskRow
from omni_fast.rewards.compose import batch_normalise, group_advantages, group_statistics, part_statistics
from omni_fast.rewards.score import Score
from omni_fast.rollout.engine import Sample
from omni_fast.tasks.base import Item, Task


@dataclass(slots=True)
class Group:
    """One prompt of a step with its samples; `advantages[k]` is None where sample k does not train."""

    draw: Draw
    item: Item
    prompt: list[int]
    samples: list[Sample] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    advantages: list[float | None] = field(default_factory=list)

    def answer(self, samples: list[Sample], tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the engine's samples; the verifiers see the item's prefix and then what the policy wrote."""
        self.samples = samples
        self.texts = decode(tokenizer, [self.item] * len(samples), samples)


def score_groups(groups: Sequence[Group], tasks: Mapping[str, Task], scale: Literal["std", "none"]) -> None:
    """Fill in scores and advantages; each task is asked once for all its samples."""
    for name, members in by_task(groups).items():
        task = tasks[name]
        items = [group.item for group in members for _ in group.samples]
        scores = iter(task.score(items, [text for group in members for text in group.texts]))
        for group in members:
            group.scores = [next(scores) for _ in group.samples]
            group.advantages = group_advantages(group.scores, task.composition, scale)
        if task.composition.kind == "normalised":
            rescaled = batch_normalise([group.advantages for group in members])
            for group, advantages in zip(members, rescaled, strict=True):
                group.advantages = advantages


def trajectories(groups: Iterable[Group]) -> list[Trajectory]:
    """What the policy trains on: every valid sample, groups kept together so that they can share their prompt."""
    return [
        Trajectory(
            prompt=group.prompt,
            completion=sample.tokens,
            logprobs=sample.logprobs,
            advantage=advantage,
            group=number,
            task=group.draw.task,
        )
        for number, group in enumerate(groups)
        for sample, advantage in zip(group.samples, group.advantages, strict=True)
        if advantage is not None
    ]


def task_rows(
    groups: Sequence[Group], tasks: Mapping[str, Task], entropies: Mapping[str, float | None]
) -> dict[str, TaskRow]:
    """Per task of the step: reward, share of mixed groups, invalid samples with reasons, means of parts, length."""
    rows: dict[str, TaskRow] = {}
    for name, members in by_task(groups).items():
        stats = group_statistics([group.scores for group in members], tasks[name].composition)
        samples = [sample for group in members for sample in group.samples]
        parts = part_statistics([score for group in members for score in group.scores])
        rows[name] = TaskRow(
            reward=stats.reward or 0.0,
            entropy=entropies.get(name),
            mixed_groups=stats.mixed_share,
            groups=stats.groups,
            invalid=stats.invalid,
            invalid_reasons=stats.invalid_reasons,
            parts={part: values.mean for part, values in parts.items()},
            reasons={part: values.reasons for part, values in parts.items()},
            completion_tokens=sum(len(sample.tokens) for sample in samples) / len(samples),
            truncated=sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        )
    return rows


def by_task(groups: Iterable[Group]) -> dict[str, list[Group]]:
    members: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        members[group.draw.task].append(group)
    return dict(members)
