"""Stages whose prompts or targets the plain loop does not know: online schedules, and imitation of right answers.

`Scheduled`: each step's mixture of tasks comes from an online scheduler that sees what the steps before showed.
`Imitation`: half of the steps sample from the policy they start from and keep what is right, the other half learn it by
cross-entropy, in batches as large as a step's samples. With every advantage 1 and the ratio 1 the gradient of the
configured loss is that of the cross-entropy, so the kernels are the same (rejection sampling as in Yuan et al. 2023).

Both have the trainer's checkpoints and resume as its stages do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from omni_fast.ahead import Ahead
from omni_fast.curriculum.online import Feedback, Method, Scheduler, build_scheduler
from omni_fast.curriculum.sketch import gradient_sketch
from omni_fast.curriculum.stages import Draw, PromptStream, Stage
from omni_fast.errors import RunError
from omni_fast.groups import Group, by_task
from omni_fast.policy.pack import Trajectory
from omni_fast.rewards.compose import total
from omni_fast.study.seed_run import SeedRun
from omni_fast.train import Trainer

SKETCH = 1024


class ScheduledStream(PromptStream):
    """Prompts of the tasks that a scheduler asks for."""

    scheduler: Scheduler

    def draw(self, n: int) -> list[Draw]:
        self.scheduler.step = sum(self.taken.values()) // n  # of the prompts, which may run ahead of what is observed
        return [self.take(task) for task, count in self.scheduler.allocate(n).items() for _ in range(count)]


class Scheduled(Trainer):
    """Trains with the mixture that `method` chooses at each step."""

    Stream, method = ScheduledStream, "sec"

    def begin(self, stage: Stage, saved: Mapping[str, Any] | None) -> PromptStream:
        stream = super().begin(stage, saved)
        assert isinstance(stream, ScheduledStream)
        kind: Method = self.method  # type: ignore[assignment]  # checked by the config
        stream.scheduler = self.scheduler = build_scheduler(kind, stage.tasks, self.config.seed, steps=stage.steps)
        if saved:
            self.scheduler.load_state_dict(saved["scheduler"])
        return stream

    def checkpoint(self, stage: Stage, ahead: Ahead, **more: Any) -> None:
        super().checkpoint(stage, ahead, scheduler=self.scheduler.state_dict())

    def step(self, stage: Stage, ahead: Ahead) -> list[Group]:
        groups, sketch = super().step(stage, ahead), None
        if self.method == "tac" and not self.row["update"]["skipped"]:
            sketch = gradient_sketch(((slot.name, slot.grad) for slot in self.policy.slots), size=SKETCH)
        seen = {}
        for task, members in by_task(groups).items():
            advantages = [abs(a) for group in members for a in group.advantages if a is not None]
            mean = float(np.mean(advantages)) if advantages else 0.0
            seen[task] = Feedback(len(members), self.row["tasks"][task]["reward"], mean, sketch)
        self.scheduler.observe(seen)
        return groups


class Imitation(Trainer):
    """Samples from the weights it starts from for half of the stage's steps, learns what is right in the other half."""

    def begin(self, stage: Stage, saved: Mapping[str, Any] | None) -> PromptStream:
        """What was right is kept in a file; lines of steps that are done again are cut off."""
        self.path = self.run.folder / f"right-{stage.name}.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if saved and self.path.is_file() else []
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= (saved or {})["step"]]
        self.path.write_text("".join(lines), encoding="utf-8")
        self.kept = [Trajectory(**json.loads(line)["sample"]) for line in lines]
        return super().begin(stage, saved)

    def step(self, stage: Stage, ahead: Ahead) -> list[Group]:
        began, half = time.perf_counter(), stage.steps // 2
        groups: list[Group] = []
        if ahead.step < half:
            groups = ahead.next()
            self.parts.scorer.finish(groups)
            ahead.done()
            self._keep(ahead.step, groups)
        elif not self.kept:
            raise RunError("no sample of the initial policy was right, so there is nothing to imitate")
        else:
            self.policy.update(self._batch(ahead.step - half))
            ahead.step += 1
            if ahead.step == stage.steps:
                self.engine.sync(self.engine.version + 1)
        assert isinstance(self.run, SeedRun)
        seen = {task: len(members) for task, members in by_task(groups).items()}
        self.run.count(stage.name, seen, time.perf_counter() - began)
        return groups

    def _keep(self, step: int, groups: Sequence[Group]) -> None:
        """The samples with full marks."""
        found = []
        for group in groups:
            composition = self.tasks[group.draw.task].composition
            full = sum(weight for weight in composition.weights.values() if weight > 0) - 1e-6
            found += [
                Trajectory(group.prompt, sample.tokens, sample.logprobs, 1.0, 0, group.draw.task)
                for sample, scored in zip(group.samples, group.scores, strict=True)
                if (total(scored, composition) or 0.0) >= full
            ]
        self.kept += found
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, "sample": asdict(one)}) + "\n" for one in found)

    def _batch(self, number: int) -> list[Trajectory]:
        """Of an update: as many as a step has samples, each epoch in an order of its own, each sample its own group."""
        size = self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt
        chosen = []
        for place in range(number * size, (number + 1) * size):
            epoch, offset = divmod(place, len(self.kept))
            order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.kept))
            chosen.append(replace(self.kept[int(order[offset])], group=place))
        return chosen
