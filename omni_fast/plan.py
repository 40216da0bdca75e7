"""From what is measured to what is trained: transfer, order, stages, and which stage is already there.

Split `select` decides everything here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omni_fast.config import Config
from omni_fast.curriculum import scores
from omni_fast.curriculum.decide import Plan, decide
from omni_fast.curriculum.scores import Floats
from omni_fast.curriculum.stages import Stage, build_stages, fell_furthest
from omni_fast.curriculum.transfer import measure
from omni_fast.records import Trained
from omni_fast.run import BASE, Run
from omni_fast.tasks.base import Split


def task_names(config: Config) -> list[str]:
    return [task.name for task in config.tasks]


def singles(config: Config) -> list[Stage]:
    """The single-task runs that transfer is measured from; none where the order is not solved."""
    names = task_names(config) if config.curriculum.measures_transfer else []
    return [Stage(f"single:{name}", (name,), (1.0,), config.curriculum.steps_per_stage) for name in names]


def solve(run: Run) -> Plan:
    """The order from the finished single-task runs, or as the config gives it, and its stages."""
    config, names = run.config, task_names(run.config)
    wanted, weights = config.curriculum, {task.name: task.weight for task in config.tasks}
    transfer = decision = None
    order: Sequence[str] = wanted.order
    statement = f"Mode {wanted.mode}: the order is not measured."
    if wanted.measures_transfer:
        single = {name: item_scores(run, f"single:{name}", "select") for name in names}
        base = item_scores(run, BASE, "select")
        transfer = measure(base, single, draws=config.evaluation.bootstrap_draws, seed=config.seed)
        decision = decide(transfer)
        order, statement = decision.order, decision.statement
    steps, replay = wanted.steps_per_stage, wanted.replay_fraction
    stages = build_stages(wanted.mode, names, steps, order=order, seed=config.seed, replay=replay, weights=weights)
    return Plan(stages, statement, transfer, decision)


def refresh(run: Run, plan: Plan) -> list[Stage]:
    """A last short stage, if it is asked for, on the task that fell furthest since its own stage."""
    steps = run.config.curriculum.refresh_steps
    if not steps or len(plan.stages) < 2:
        return []
    own = {stage.own[0]: scores.score(item_scores(run, stage.name, "select")[stage.own[0]]) for stage in plan.stages}
    final = item_scores(run, plan.stages[-1].name, "select")
    task = fell_furthest(own, {task: scores.score(final[task]) for task in own})
    return [Stage(f"refresh:{task}", (task,), (1.0,), steps)] if task else []


def stage_splits(config: Config) -> tuple[Split, ...]:
    """The splits on which a stage is scored: `select` too where a refresh is decided on it."""
    return ("select", "test") if config.curriculum.refresh_steps else ("test",)


def reuse(run: Run, stage: Stage, start: str) -> bool:
    """A stage that repeats a finished run (same task, steps, start) takes its weights and scores."""
    twin = f"single:{stage.tasks[0]}"
    done, scored = run.trained(twin), run.evaluated(twin)
    if start != BASE or len(stage.tasks) > 1 or done is None or scored is None or done["steps"] != stage.steps:
        return False
    run.finish_stage(stage.name, Trained(tasks=list(stage.own), steps=stage.steps, same_as=twin))
    run.finish_evaluation(stage.name, scored)
    return True


def item_scores(run: Run, name: str, split: Split) -> dict[str, Floats]:
    """Task -> item scores [n_items] of the weights `name` on a split; NaN where there is none."""
    found = run.scores_of(name)["splits"][split]
    return {task: np.array(kept["values"], dtype=np.float64) for task, kept in found.items()}
