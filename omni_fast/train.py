"""The driver. Read `train` for the method and `Trainer.step` for GRPO; everything else is in the module its name says.

score the initial policy -> one short run per task -> transfer -> order -> stages, each handing its weights to the next
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_fast import outcome, plan
from omni_fast.ahead import Ahead
from omni_fast.build import Parts, build
from omni_fast.config import Config
from omni_fast.curriculum.stages import PromptStream, Stage
from omni_fast.dry_run import work
from omni_fast.errors import RunError, UserError
from omni_fast.groups import Group, set_advantages, trajectories
from omni_fast.policy.slots import Clock
from omni_fast.progress import Progress
from omni_fast.records import Trained
from omni_fast.rewards.monitors import Monitor
from omni_fast.run import BASE, Run
from omni_fast.tasks.base import Split


def train(config: Config, folder: Path, progress: Progress) -> Path:
    """The whole method in a run folder; the same call on the same folder resumes. Returns the report's path."""
    with Run.open(folder, config) as run:
        if run.state["finished"]:
            progress.say("this run is finished already")
        else:
            with build(config, run, progress) as parts:
                trainer = Trainer(parts)
                trainer.measure()
                solved = plan.solve(run)
                progress.say(solved.statement)
                last = trainer.train_stages(solved.stages, BASE)
                last = trainer.train_stages(plan.refresh(run, solved), last)
                parts.export(run.folder / "final", last)
            run.finish()
        return outcome.finish(run)


def measure(config: Config, folder: Path, progress: Progress) -> None:
    """Only the first half of `train`: what the order is solved from. `train` on the same folder goes on from there."""
    with Run.open(folder, config) as run, build(config, run, progress) as parts:
        Trainer(parts).measure()


class Trainer:
    """The policy under training with its engine and tasks; each method is a phase that a resume skips or continues."""

    Stream = PromptStream

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config, self.run, self.progress = parts, parts.config, parts.run, parts.progress
        self.policy, self.engine, self.tasks = parts.policy, parts.engine, parts.tasks

    def measure(self) -> None:
        """Score the initial policy; where the order is to be solved, one short run per task, each scored on all tasks."""
        if not self.run.has_weights(BASE):
            self.parts.keep_weights(BASE)
        left = work(self.config)
        self.progress.plan(steps=left.steps, items=left.items)
        self.evaluate(BASE, "select", "test")
        for single in plan.singles(self.config):
            self.train_stage(single, start=BASE)
            self.evaluate(single.name, "select", "test")

    def train_stages(self, stages: Sequence[Stage], start: str) -> str:
        """One stage after the other, each scored on all tasks; returns the name of the last weights."""
        for stage in stages:
            self.train_stage(stage, start)
            self.evaluate(stage.name, *plan.stage_splits(self.config))
            start = stage.name
        return start

    def train_stage(self, stage: Stage, start: str) -> None:
        """All steps of a stage from the weights `start`; a finished stage that is the same one lends its weights."""
        if self.run.trained(stage.name) or plan.reuse(self.run, stage, start):
            return self.progress.skip(steps=stage.steps)
        self.progress.stage(stage.name)
        saved, done = self.run.load_checkpoint(stage.name, self.progress.warn), 0
        stream = self.begin(stage, saved.state if saved else None)
        if saved is None:
            self.parts.load_weights(start)
            self.policy.reset_optimizer()
        else:
            done = saved.state["step"]
            self.policy.load(saved.path, saved.state["policy"])
            self.progress.resumed(done)
        self.parts.holds = f"{stage.name}, under way"
        self.engine.sync(self.engine.version + 1)
        with Ahead(self.parts, stage, stream, done) as ahead:
            while ahead.step < stage.steps:
                self.step(stage, ahead)
                if self.run.checkpoint_due(ahead.step, stage.steps):
                    self.checkpoint(stage, ahead)
                    self.run.raise_if_stopping()
        self.parts.keep_weights(stage.name)
        self.run.finish_stage(stage.name, Trained(tasks=list(stage.own), steps=stage.steps, same_as=""))

    def begin(self, stage: Stage, saved: Mapping[str, Any] | None) -> PromptStream:
        """What a stage needs besides the policy, from its start or as a checkpoint has it."""
        self.monitor = Monitor(saved["monitor"] if saved else {})
        sizes = {task: len(items["train"]) for task, items in self.parts.items.items()}
        stream = self.Stream(sizes, stage.tasks, stage.weights, self.config.seed)
        if saved:
            stream.load_state_dict(saved["stream"])
        return stream

    def checkpoint(self, stage: Stage, ahead: Ahead, **more: Any) -> None:
        """Everything that a resume after the trained steps needs."""
        more |= {"policy": self.policy.numbers(), "stream": dict(ahead.state), "monitor": self.monitor.baselines}
        self.run.save_checkpoint(stage.name, ahead.step, self.policy.save, more)

    def step(self, stage: Stage, ahead: Ahead) -> list[Group]:
        """One GRPO step: groups from the engine, each scored as soon as it is complete; update, sync, the step's row."""
        clock = Clock()
        try:
            groups = ahead.next()
            clock.lap("generate")
            busy_s = self.parts.scorer.finish(groups)
        except (RunError, UserError):  # no samples or scores, or stopped: the policy is still that of the step before
            self.checkpoint(stage, ahead)
            raise
        set_advantages(groups, self.tasks, self.config.loss.advantage_scale)
        clock.lap("reward")
        self.progress.wait("the policy update")
        self.parts.sleep()
        told = self.policy.update(trajectories(groups)) | ahead.done()
        clock.lap("update")
        told |= self.engine.sync(self.engine.version + 1)
        clock.lap("sync")
        self.row = outcome.record_step(self.parts, stage, ahead.step, groups, told, clock.parts, self.monitor, busy_s)
        self.progress.step(self.row, stage.steps)
        return groups

    def evaluate(self, name: str, *splits: Split) -> None:
        """Score every task that has no score yet with the weights `name`: a row of the accuracy matrix, item by item."""
        wanted = self.run.unscored(name, self.tasks)
        done = self.tasks.keys() - wanted
        self.progress.skip(items=sum(len(self.parts.items[task][split]) for task in done for split in splits))
        if wanted and self.parts.holds != name:
            self.parts.load_weights(name)
            self.engine.sync(self.engine.version + 1)
        if wanted:
            self.run.finish_evaluation(name, outcome.score(self.parts, name, splits, wanted))
