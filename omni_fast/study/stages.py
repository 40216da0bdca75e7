"""Stages whose prompts or targets the plain loop does not know: online schedules, and imitation of right answers.

`schedule`: each step's mixture of tasks comes from an online scheduler that sees what the step before showed.
`imitate`: half of the steps sample from the policy they start from and keep what is right, the other half learn it by
cross-entropy, in batches as large as a step's samples. With every advantage 1 and the ratio 1 the gradient of the
configured loss is that of the cross-entropy, so the kernels are the same (rejection sampling as in Yuan et al. 2023).

Both have the trainer's checkpoints and resume as its stages do. Samples are never older than the policy they train.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from omni_fast import outcome
from omni_fast.curriculum.online import Feedback, Method, build_scheduler
from omni_fast.curriculum.sketch import gradient_sketch
from omni_fast.curriculum.stages import Draw, PromptStream, Stage
from omni_fast.errors import RunError
from omni_fast.groups import Group, by_task, set_advantages, trajectories
from omni_fast.policy.pack import Trajectory
from omni_fast.records import Trained
from omni_fast.rewards.compose import Composition, total
from omni_fast.rewards.monitors import Monitor
from omni_fast.study.seed_run import SeedRun
from omni_fast.train import Trainer

SKETCH = 1024


def schedule(trainer: Trainer, stage: Stage, start: str, method: str) -> None:
    """Train with the mixture that a scheduler (sec, dump, pac, tac) chooses at each step."""
    parts, config, run = trainer.parts, trainer.config, trainer.run
    kind: Method = method  # type: ignore[assignment]  # checked by the config
    scheduler = build_scheduler(kind, stage.tasks, config.seed, steps=stage.steps)

    def step(stream: PromptStream, monitor: Monitor, number: int) -> None:
        wanted = scheduler.allocate(config.rollout.prompts_per_step)
        clock = [time.perf_counter()]
        groups, scoring_s = _sampled(trainer, [d for t, n in wanted.items() for d in stream.take(t, n)], stage, number)
        clock.append(time.perf_counter())
        set_advantages(groups, trainer.tasks, config.loss.advantage_scale)
        clock.append(time.perf_counter())
        metrics = trainer.policy.update(trajectories(groups))
        clock.append(time.perf_counter())
        metrics |= parts.engine.sync(parts.engine.version + 1)
        clock.append(time.perf_counter())
        row = outcome.record_step(run, stage, number, clock, groups, trainer.tasks, metrics, monitor, scoring_s)
        trainer.progress.step(row, stage.steps)
        sketch = None
        if method == "tac" and not metrics["skipped"]:
            sketch = gradient_sketch(((slot.name, slot.grad) for slot in trainer.policy.slots), size=SKETCH)
        seen = {}
        for task, members in by_task(groups).items():
            advantages = [abs(a) for group in members for a in group.advantages if a is not None]
            mean = float(np.mean(advantages)) if advantages else 0.0
            seen[task] = Feedback(len(members), row["tasks"][task]["reward"], mean, sketch)
        scheduler.observe(seen)

    def load(state: dict[str, object]) -> None:
        scheduler.load_state_dict(state)

    _run(trainer, stage, start, step, lambda: dict(scheduler.state_dict()), load)


def imitate(trainer: Trainer, run: SeedRun, stage: Stage, start: str) -> None:
    """Sample from the weights `start` for half of the stage's steps, learn from what is right for the other half."""
    config = trainer.config
    path = run.folder / f"right-{stage.name}.jsonl"
    half, batch = stage.steps // 2, config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    kept: list[Trajectory] = []

    def step(stream: PromptStream, monitor: Monitor, number: int) -> None:
        began = time.perf_counter()
        if number <= half:
            if number == 1:
                path.unlink(missing_ok=True)
            groups, _ = _sampled(trainer, stream.draw(config.rollout.prompts_per_step), stage, number)
            found = [one for group in groups for one in _right(group, trainer.tasks[group.draw.task].composition)]
            kept.extend(found)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([number, t.prompt, t.completion, t.logprobs, t.task]) + "\n" for t in found)
            seen = {task: len(members) for task, members in by_task(groups).items()}
            run.count(stage.name, seen, time.perf_counter() - began)
            return
        if not kept:
            raise RunError("no sample of the initial policy was right, so there is nothing to imitate")
        place, size = (number - half - 1) * batch, len(kept)
        chosen = []
        for position in range(place, place + batch):
            epoch, offset = divmod(position, size)
            chosen.append(kept[int(np.random.default_rng([config.seed, epoch]).permutation(size)[offset])])
        trainer.policy.update([_target(one, index) for index, one in enumerate(chosen)])
        if number == stage.steps:
            trainer.parts.engine.sync(trainer.parts.engine.version + 1)
        run.count(stage.name, {}, time.perf_counter() - began)

    def load(state: dict[str, object]) -> None:
        kept.extend(_read(path, int(str(state["step"]))))

    _run(trainer, stage, start, step, dict, load)


def _run(
    trainer: Trainer,
    stage: Stage,
    start: str,
    step: Callable[[PromptStream, Monitor, int], None],
    extra: Callable[[], dict[str, object]],
    load: Callable[[dict[str, object]], None],
) -> None:
    """The steps of a stage with their checkpoints. extra, load: what `step` keeps besides; load gets the step as well."""
    run, parts, policy = trainer.run, trainer.parts, trainer.policy
    stream = PromptStream(parts.train_sizes, stage.tasks, stage.weights, trainer.config.seed)
    saved, done = run.load_checkpoint(stage.name, trainer.progress.warn), 0
    monitor = Monitor(saved.state["monitor"] if saved else {})
    if saved is None:
        parts.load_weights(start)
        policy.reset_optimizer()
    else:
        done = saved.state["step"]
        policy.load_state_dict(saved.tensors, saved.state["policy"])
        stream.load_state_dict(saved.state["stream"])
        load({**saved.state["own"], "step": done})
    parts.holds = f"{stage.name}, under way"
    parts.engine.sync(parts.engine.version + 1)
    for number in range(done + 1, stage.steps + 1):
        step(stream, monitor, number)
        if run.checkpoint_due(number, stage.steps):
            tensors, numbers = policy.state_dict()
            rest = {"policy": numbers, "stream": dict(stream.state_dict()), "monitor": monitor.baselines}
            run.save_checkpoint(stage.name, number, tensors, {**rest, "own": extra()})
            run.raise_if_stopping()
    parts.keep_weights(stage.name)
    run.finish_stage(stage.name, Trained(tasks=list(stage.tasks), steps=stage.steps, same_as=""))


def _sampled(trainer: Trainer, draws: Sequence[Draw], stage: Stage, step: int) -> tuple[list[Group], float]:
    """Groups with samples and scores, and the seconds that scoring took."""
    parts = trainer.parts
    groups = [parts.group(draw) for draw in draws]
    for rollout in parts.start(groups, f"{stage.name.partition('-')[0]}:{step}"):
        rollout.wait(trainer.progress.generating)
    return groups, parts.scorer.finish(groups)


def _right(group: Group, composition: Composition) -> list[Trajectory]:
    """The samples with full marks."""
    full = sum(weight for weight in composition.weights.values() if weight > 0) - 1e-6
    return [
        Trajectory(group.prompt, sample.tokens, sample.logprobs, 1.0, 0, group.draw.task)
        for sample, scored in zip(group.samples, group.scores, strict=True)
        if (total(scored, composition) or 0.0) >= full
    ]


def _target(one: Trajectory, group: int) -> Trajectory:
    return Trajectory(one.prompt, one.completion, one.logprobs, 1.0, group, one.task)


def _read(path: Path, step: int) -> list[Trajectory]:
    """What was kept up to a step; later lines, of work that is done again, are cut off."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.is_file() else []
    rows = [row for row in rows if row[0] <= step]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [Trajectory(prompt, tokens, logprobs, 1.0, 0, task) for _, prompt, tokens, logprobs, task in rows]
