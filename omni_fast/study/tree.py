"""The policies of one seed: each is trained from the one before it on its path, scored once, and shared by all arms.

Whatever is finished in the seed's run folder is never done again; weights are kept while a further stage starts from
them, and trained again if one turns up after they were dropped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from omni_fast import outcome
from omni_fast.build import Parts
from omni_fast.checkpoint import write_json
from omni_fast.curriculum.merge import merge
from omni_fast.curriculum.scores import Floats, score
from omni_fast.curriculum.sketch import gradient_sketch
from omni_fast.errors import RunError
from omni_fast.plan import item_scores
from omni_fast.records import Evaluated, Trained, joined, scored
from omni_fast.run import BASE, Interrupted
from omni_fast.study.arms import Design, said
from omni_fast.study.arms import Path as Stages
from omni_fast.study.progress import StudyProgress
from omni_fast.study.seed_run import SeedRun
from omni_fast.study.stages import Imitation, Scheduled
from omni_fast.tasks.base import Split
from omni_fast.train import Trainer

EVALUATION_WORK = 10.0  # steps that scoring a policy counts for, in the time left
SKETCH = 256  # numbers: the cosine of two tasks' gradients is then known to about 0.06


class Tree:
    """Reaches policies by their path. Failures are remembered: what starts from a failed policy fails at once."""

    def __init__(self, design: Design, seed: int, run: SeedRun, parts: Parts, progress: StudyProgress) -> None:
        """parts: built with the study's own seed, so that items and initial policy are those of every seed."""
        self.design, self.seed, self.run, self.progress = design, seed, run, progress
        self.parts = replace(parts, config=design.run_config(seed))
        self.trainer = Trainer(self.parts)
        self.failed: dict[Stages, str] = {}
        self.lost: set[str] = set()  # tasks that even the initial policy has no score on, tried again in this call
        self.paths: dict[str, Stages] = {}
        self.names: dict[Stages, str] = {}
        self.told: set[Stages] = set()  # policies that the time left has been told of
        self.arm, self.policies = "", 0  # what is under way, and how many policies the seed has in all
        run.describe = self._describe
        run.on_update = self._keep_sketch

    def name(self, path: Stages) -> str:
        if path not in self.names:
            self.names[path] = self.design.node(path, self.seed)
            self.paths[self.names[path]] = path
        return self.names[path]

    def reach(self, path: Stages, temperatures: Sequence[float] = ()) -> None:
        """Train and score the policy at the end of a path and those before it, as far as it is not done.

        temperatures: of sampled evaluations besides the greedy one. Raises RunError with what went wrong on the way.
        """
        for length in range(len(path) + 1):
            part = path[:length]
            place = len(list(self.run.folder.glob("nodes/*.json"))) + 1
            self.progress.head = f"seed {self.seed}  {self.arm}  node {place} of {self.policies}  {said(part)}"
            there = self.run.file(self.name(part)).is_file()
            if part in self.failed:
                raise RunError(f"it starts from {said(part)}, which failed: {self.failed[part]}")
            if self._unscored(part):
                try:
                    self._finish(part)
                except Interrupted:
                    raise
                except Exception as error:
                    self.failed[part] = str(error) or type(error).__name__
                    raise
                self.lost |= set() if part else set(self._unscored(part))
            if part not in self.told:
                self.told.add(part)
                self.progress.advance(self.design.trained(part)[1] + EVALUATION_WORK, there)
        sweep = (self.run.node(self.name(path)) or {"sweep": {}})["sweep"]
        missing = {t: self._unswept(sweep.get(repr(t))) for t in temperatures}
        if any(missing.values()):  # what fails here fails this arm alone: stages can start from the policy all the same
            self._sweep(path, missing)

    def _unscored(self, path: Stages) -> list[str]:
        """Tasks to score a policy on: it is new, the task was added, or what scores the task works again."""
        name = self.name(path)
        found = self.run.unscored(name, self.design.tasks)
        return found if self.run.evaluated(name) is None else [task for task in found if task not in self.lost]

    def _unswept(self, found: Evaluated | None) -> list[str]:
        tasks = found["splits"]["test"] if found else {}
        return [t for t in self.design.tasks if t not in tasks or not (t in self.lost or scored(tasks[t]))]

    def scores(self, path: Stages, split: Split) -> dict[str, Floats]:
        """Task -> item scores of a policy that is scored already."""
        return item_scores(self.run, self.name(path), split)

    def prune(self, wanted: Iterable[Stages]) -> None:
        """Drop the weights of all policies but the initial one and those that a wanted path passes through."""
        keep = {self.name(path[:length]) for path in wanted for length in range(len(path) + 1)}
        for name in list(self.paths):
            if name != BASE and name not in keep and self.run.has_weights(name):
                self.run.drop_weights(name)

    def _finish(self, path: Stages) -> None:
        self.run.raise_if_stopping()
        self._train(path)
        self.trainer.evaluate(self.name(path), "select", "test")

    def _train(self, path: Stages) -> None:
        """The policy's weights, from those of the one before it."""
        name = self.name(path)
        if self.run.has_weights(name) and (not path or self.run.trained(name)):
            return
        if not path:
            return self.parts.keep_weights(BASE)
        self.run.state["trained"].pop(name, None)  # its weights were dropped
        self._train(path[:-1])
        start, what = self.name(path[:-1]), path[-1].partition(":")[0]
        if what.startswith("merge."):
            self._merge(path, what.removeprefix("merge."))
        elif what.startswith("online."):
            scheduled = Scheduled(self.parts)
            scheduled.method = what.removeprefix("online.")
            scheduled.train_stage(self.design.stage(path, self.seed), start)
        elif what == "sft":
            Imitation(self.parts).train_stage(self.design.stage(path, self.seed), start)
        else:
            self.trainer.train_stage(self.design.stage(path, self.seed), start)

    def _merge(self, path: Stages, method: str) -> None:
        """Merge the single-task policies; the scale of the merged task vector is the best one on `select`."""
        start, study, name = time.perf_counter(), self.design.study, self.name(path)
        if self.parts.policy.lora:
            raise RunError("adapters are not merged (a sum of products is no product of sums); train all weights")
        singles = self.design.singles.values()
        for single in singles:
            self._train(single)
        models = [self.run.weights(self.name(single)) for single in singles]
        base = self.run.weights(BASE)

        def hold(scale: float) -> None:
            merged = merge(method, base, models, scale=scale, density=study.merge_density, seed=self.seed)  # type: ignore[arg-type]  # checked by the config
            self.parts.policy.load_weights(merged)
            self.parts.holds = f"{name}, under way"
            self.parts.engine.sync(self.parts.engine.version + 1)

        def on_select(scale: float) -> float:
            hold(scale)
            values = [score(self.parts.evaluate(t, own["select"]).values).value for t, own in self.parts.items.items()]
            if lost := [task for task, value in zip(self.parts.items, values, strict=True) if np.isnan(value)]:
                raise RunError(f"the scale of a merge is chosen by scores on select, and {', '.join(lost)} has none")
            return float(np.mean(values))

        scale = 1.0 if method == "linear" else max(study.merge_scales, key=lambda scale: (on_select(scale), -scale))
        hold(scale)
        self.progress.note = f"scale {scale:g}"
        self.parts.keep_weights(name)
        self.run.add_seconds(**{f"node:{name}": time.perf_counter() - start})
        self.run.finish_stage(name, Trained(tasks=self.design.tasks, steps=0, same_as=""))

    def _sweep(self, path: Stages, missing: Mapping[float, Sequence[str]]) -> None:
        """Sampled evaluations on `test`, with the entropy that the probe's tokens have at each temperature.

        missing: temperature -> tasks.
        """
        name, parts = self.name(path), self.parts
        if parts.holds != name:
            self._train(path)
            parts.load_weights(name)
            parts.engine.sync(parts.engine.version + 1)
        node = self.run.node(name)
        assert node is not None
        kept, sweep = parts.policy.inv_temperature, node["sweep"]
        for temperature, tasks in missing.items():
            test = {task: parts.evaluate(task, parts.items[task]["test"], temperature).record for task in tasks}
            parts.policy.inv_temperature = 1.0 / temperature
            try:
                found = Evaluated(splits={"test": test}, entropy=outcome.entropies(parts, tasks))
            finally:  # a failure costs this arm alone: the others train at the temperature that they ask for
                parts.policy.inv_temperature = kept
            sweep[repr(temperature)] = joined(sweep.get(repr(temperature)), found)
        self.run.write_node(name, node)

    def _describe(self, name: str) -> dict[str, Any]:
        path = self.paths[name]
        sketch = self._sketch_file(name)
        return {
            "id": name,
            "seed": self.seed,
            "path": list(path),
            "tasks": list(self.design.trained(path)[0]),
            "samples": sum(self.run.counted(name).values()) * self.design.config.rollout.samples_per_prompt,
            "seconds": self.run.state["totals"]["seconds"].get(f"node:{name}", 0.0),
            "weights": self.run.weights_hash(name),
            "sketch": json.loads(sketch.read_text(encoding="utf-8")) if sketch.is_file() else None,
        }

    def _keep_sketch(self, stage: str) -> None:
        """The gradient of a task at the initial policy, projected: that of the first update of its single-task run."""
        path = self.paths.get(stage, ())
        if len(path) == 1 and path[0].partition(":")[0] in self.design.tasks and not self._sketch_file(stage).is_file():
            gradients = ((slot.name, slot.grad) for slot in self.parts.policy.slots)
            sketch = gradient_sketch(gradients, size=SKETCH)
            write_json(self._sketch_file(stage), [float(f"{x:.6g}") for x in sketch])

    def _sketch_file(self, name: str) -> Path:
        return self.run.folder / f"sketch-{name}.json"
