"""What a study runs: its arms, and the path of stages through which each goes from the initial policy.

A stage is written as text: "sort:24" (24 steps of one task), "joint:96", "online.sec:96", "sft:96", "merge.ties". Arms
that begin alike share the policies they pass through, so all orders of four tasks are 64 stages and not 96. Every arm
trains on as many samples: K stages of one task, or one stage of K times the steps; a refresh is taken out of the other
stages; a merge has the samples of the runs it merges; sft generates as many and learns from those that are right.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import get_args

from omni_fast.config import Config, CurriculumConfig
from omni_fast.curriculum.order import random_order
from omni_fast.curriculum.stages import Stage
from omni_fast.errors import UserError
from omni_fast.run import BASE
from omni_fast.study.config import Family, StudyConfig
from omni_fast.study.records import Arm, Kind, slug

Path = tuple[str, ...]
MANY_SEEDS = ("base", "single", "joint", "solved", "reversed", "merge")
SOLVED = ("solved", "reversed", "refresh")  # their order is known once transfer is measured


def said(path: Path) -> str:
    return " > ".join(path) or "the initial policy"


@dataclass(frozen=True)
class Design:
    """Everything that is decided before anything runs."""

    name: str
    config: Config
    study: StudyConfig

    def __post_init__(self) -> None:
        """UserError for a primary contrast of what the table does not compare, and for arms with one name as files."""
        files: dict[str, Arm] = {}
        for arm in self.arms():
            if (other := files.setdefault(slug(arm.name), arm)) is not arm:
                raise UserError(
                    f"the arms {other.name} and {arm.name} would be kept in one file: list each arm once, and let no task's"
                    " name be those of others with a dot between"
                )
        families = [family for family in get_args(Family) if family not in ("repeat", "probe", "every_order")]
        names = [name for family in families for name, _ in self._names(family)]
        unknown = [name for name in self.study.primary if name not in names]
        if unknown or len(set(self.study.primary)) < 2:
            near = difflib.get_close_matches(unknown[0], names, n=1) if unknown else []
            hint = f"did you mean '{near[0]}'?" if near else "name two different arms, for example solved and joint"
            raise UserError(f"study.primary is {' - '.join(self.study.primary)}: {hint}")

    @property
    def tasks(self) -> list[str]:
        return [task.name for task in self.config.tasks]

    @property
    def steps(self) -> int:
        return self.config.curriculum.steps_per_stage

    @property
    def singles(self) -> dict[str, Path]:
        """Task -> path of its single-task run."""
        return {task: (f"{task}:{self.steps}",) for task in self.tasks}

    def arms(self) -> list[Arm]:
        """In the order in which they run: what decides first, all orders last."""
        arms: list[Arm] = []
        for family in self.study.arms:
            count = self.study.seeds if family in MANY_SEEDS else self.study.other_seeds
            seeds = tuple(range(self.config.seed, self.config.seed + count))
            arms += [Arm(name, kind, seeds, family == "every_order") for name, kind in self._names(family)]
        return sorted(arms, key=lambda arm: (arm.every, not arm.competes))

    def _names(self, family: str) -> list[tuple[str, Kind]]:
        if family == "every_order":
            return [(f"order:{'>'.join(order)}", "order") for order in permutations(self.tasks)]
        many: dict[str, Sequence[str]] = {"merge": self.study.merges, "online": self.study.online}
        many |= dict.fromkeys(("single", "repeat", "probe"), self.tasks)
        kind: Kind = "order" if family in ("solved", "reversed", "random", "user") else family  # type: ignore[assignment]
        return [(f"{family}:{each}", kind) for each in many[family]] if family in many else [(family, kind)]

    def seeds(self) -> list[int]:
        return sorted({seed for arm in self.arms() for seed in arm.seeds})

    def order(self, arm: str, seed: int, solved: Sequence[str] | None) -> tuple[str, ...] | None:
        """The arm's order of tasks; () where it has none, None where it is not solved yet."""
        if arm in SOLVED:
            if solved is None:
                return None
            return tuple(reversed(solved)) if arm == "reversed" else tuple(solved)
        if arm == "random":
            return tuple(self.tasks[i] for i in random_order(len(self.tasks), seed))
        if arm == "user":
            return tuple(self.config.curriculum.order)
        return tuple(arm.removeprefix("order:").split(">")) if arm.startswith("order:") else ()

    def path(self, arm: str, seed: int, solved: Sequence[str] | None = None) -> Path | None:
        """The arm's stages but for a refresh, which is decided after them; None where the order is not solved yet."""
        head, _, task = arm.partition(":")
        everything = self.steps * len(self.tasks)
        fixed: dict[str, Path] = {
            "base": (),
            "single": (f"{task}:{self.steps}",),
            "repeat": (f"{task}:{self.steps}",) * 2,
            "probe": (f"{task}:{self.study.probe_steps}",),
            "joint": (f"joint:{everything}",),
            "sft": (f"sft:{everything}",),
            "online": (f"online.{task}:{everything}",),
            "merge": (f"merge.{task}",),
        }
        if head in fixed:
            return fixed[head]
        order = self.order(arm, seed, solved)
        steps = self.steps - (self.config.curriculum.refresh_steps // len(self.tasks) if arm == "refresh" else 0)
        return None if order is None else tuple(f"{name}:{steps}" for name in order)

    def stage(self, path: Path, seed: int) -> Stage:
        """The last stage of a path as the trainer runs it; sft samples for as many steps as it then learns for."""
        tasks, steps = self.trained(path)
        weights = [task.weight for task in self.config.tasks if task.name in tasks]
        shares = tuple(weight / sum(weights) for weight in weights)
        steps *= 2 if path[-1].startswith("sft:") else 1
        return Stage(self.node(path, seed), tasks, shares, steps, joint=len(tasks) > 1)

    def trained(self, path: Path) -> tuple[tuple[str, ...], int]:
        """The tasks of a path's last stage, and its steps; a merge has none."""
        what, _, steps = path[-1].partition(":") if path else ("", "", "")
        return ((what,) if what in self.tasks else tuple(self.tasks) if path else ()), int(steps or 0)

    def node(self, path: Path, seed: int) -> str:
        """The policy's name: a hash of all that it depends on, after a head for people.

        Stages of one task do not depend on the other tasks, which may therefore be added later.
        """
        if not path:
            return BASE
        settings = self.run_config(seed).fingerprint()
        del settings["curriculum"], settings["threads"]
        names = [stage.partition(":")[0] for stage in path]
        if set(names) <= set(self.tasks):
            settings["tasks"] = [task for task in settings["tasks"] if task["name"] in names]
        key: list[object] = [settings, self.config.seed, path]
        if path[-1].startswith("merge."):
            key += [self.steps, self.study.merge_scales, self.study.merge_density]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
        return f"{slug('+'.join(path).replace(':', ''))[:60]}-{digest}"

    def run_config(self, seed: int) -> Config:
        """What a seed's run folder is bound to: neither the arms nor the machine's threads."""
        return self.config.model_copy(update={"curriculum": CurriculumConfig(), "seed": seed, "threads": 0})

    def nodes(self, seed: int, solved: Sequence[str] | None = None) -> dict[Path, int]:
        """Every path that the seed's arms pass through (but for the initial policy) -> steps of its last stage.

        Where the order is not solved yet, its stages are counted as if no other arm passed through them.
        """
        found: dict[Path, int] = {}
        for arm in self.arms():
            if seed not in arm.seeds:
                continue
            path = self.path(arm.name, seed, solved)
            if path is None:
                first, *later = self.path(arm.name, seed, self.tasks) or ()
                path = (first, *(f"{arm.name}?{part}" for part in later))
            if arm.kind == "refresh":
                path = (*path, f"?:{self.config.curriculum.refresh_steps}")
            if arm.kind == "merge" or arm.name in SOLVED:
                found |= dict.fromkeys(self.singles.values(), self.steps)
            found |= {path[: k + 1]: int(path[k].rpartition(":")[2]) if ":" in path[k] else 0 for k in range(len(path))}
        return found

    def samples(self, steps: int) -> int:
        """Completions generated in so many steps."""
        return steps * self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt
