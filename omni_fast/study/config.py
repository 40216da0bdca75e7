"""A study's configuration: a training configuration and a section `study`.

Of `curriculum` a study reads `steps_per_stage` (of every stage of one task), `order` (the arm "user") and
`refresh_steps` (the arm "refresh"); the arms are its modes. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from omni_fast import config as configs
from omni_fast.config import Config, NonNegative, Section
from omni_fast.curriculum.online import Method as Online
from omni_fast.curriculum.order import EXACT_LIMIT
from omni_fast.errors import UserError

Family = Literal[
    "base", "single", "joint", "solved", "reversed", "random", "user", "merge", "sft", "online", "refresh", "repeat",
    "probe", "every_order",
]  # fmt: skip
Method = Literal["linear", "task_arithmetic", "ties", "dare", "dare_ties"]
Arms = Annotated[list[Family], Field(min_length=1)]
Seeds = Annotated[int, Field(gt=0, le=1000)]
Above0 = Annotated[float, Field(gt=0.0)]
RESERVED = ("base", "joint", "sft", "merge", "online")  # as names of tasks: they name stages


class StudyConfig(Section):
    arms: Arms = ["base", "single", "joint", "solved", "reversed", "random", "merge", "sft", "online"]
    primary: list[str] = ["solved", "joint"]  # the one contrast declared beforehand, first minus second
    seeds: Seeds = 5  # of base, single, joint, solved, reversed, merge
    other_seeds: Seeds = 2  # of all other arms
    merges: list[Method] = ["linear", "task_arithmetic", "ties", "dare"]
    merge_scales: list[Above0] = [1.0, 2.0, 3.0, 4.0]  # of the merged task vector, the best one on `select` is taken
    merge_density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # ties, dare: share of a task vector that is kept
    online: list[Online] = ["sec", "dump", "pac", "tac"]
    probe_steps: NonNegative = 0  # of the arm "probe": short single-task runs as a proxy of transfer
    temperatures: list[Above0] = [0.5, 0.7, 1.0, 1.3]  # every arm's last policy is sampled at
    keep_weights: bool = False  # of all policies; else of single-task runs, and of others while stages start from them

    @model_validator(mode="after")
    def _sensible(self) -> StudyConfig:
        if len(self.primary) != 2:
            raise ValueError("primary names two arms, the second of which is subtracted from the first")
        if "merge" in self.arms and not (self.merges and self.merge_scales):
            raise ValueError("the arm merge needs at least one of merges and of merge_scales")
        if "probe" in self.arms and not self.probe_steps:
            raise ValueError("the arm probe needs probe_steps, the length of its runs")
        return self


class StudyFile(Config):
    study: StudyConfig


def load(source: str, overrides: Sequence[str] = ()) -> tuple[Config, StudyConfig]:
    """As `omni_fast.config.load`, with a section `study`. UserError names the file, the key and the remedy."""
    data = configs.read(source, overrides)
    if "study" not in data:
        raise UserError(f"{source} has no section [study]: add one, or use `omni-fast train` for a single run")
    study = configs.validated(source, data, StudyFile).study
    config = configs.validated(source, {key: value for key, value in data.items() if key != "study"}, Config)
    if problem := check(config, study):
        raise UserError(f"{source}: {problem}")
    return config, study


def check(config: Config, study: StudyConfig) -> str:
    """What a study cannot be made of, and the remedy; "" if nothing."""
    names = [task.name for task in config.tasks]
    if len(names) < 2:
        return f"a study compares orders of tasks and has one task, {names[0]}: give at least two, or use `omni-fast train`"
    if len(names) > EXACT_LIMIT:
        return (
            f"a study compares with the best order, which is solved for at most {EXACT_LIMIT} tasks, got {len(names)}"
        )
    if taken := [name for name in names if name.partition(".")[0] in RESERVED]:
        return f"a study uses '{taken[0]}' for a stage; rename the task"
    curriculum = config.curriculum
    if curriculum.replay_fraction:
        return "curriculum.replay_fraction has no place in a study: its stages are shared between orders; drop it"
    if "user" in study.arms and sorted(curriculum.order) != sorted(names):
        return f"the arm user needs curriculum.order to name each task once: {', '.join(names)}"
    if "refresh" in study.arms:
        rest = curriculum.refresh_steps % len(names)
        if not 0 < curriculum.refresh_steps < len(names) * curriculum.steps_per_stage or rest:
            return (
                f"the arm refresh takes curriculum.refresh_steps from its stages in equal parts, so it has to be a multiple"
                f" of the number of tasks ({len(names)}) and less than all steps, got {curriculum.refresh_steps}"
            )
    if "every_order" in study.arms and len(names) > 5:
        return f"every_order of {len(names)} tasks is too much (more than 120 orders); take it out of study.arms"
    return ""
