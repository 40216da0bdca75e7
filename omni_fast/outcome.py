"""From the phases of a run to its plan and its result: nothing here trains, everything reads what the phases left.

Phases, by name: "evaluate base", "train single:TASK", "evaluate single:TASK", "plan", then "train NAME" and "evaluate NAME" for
each stage. `select` scores decide, `test` scores are reported.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from omni_fast.checkpoint import write_json
from omni_fast.config import Config
from omni_fast.curriculum import scores
from omni_fast.curriculum.decide import Decision, decide
from omni_fast.curriculum.scores import Floats
from omni_fast.curriculum.stages import Stage, build_stages, refresh_stage
from omni_fast.curriculum.transfer import Transfer, measure
from omni_fast.evaluate import Evaluation
from omni_fast.groups import Group
from omni_fast.report import write_report
from omni_fast.report.result import assemble
from omni_fast.run import BASE, Run
from omni_fast.tasks.base import Json, Split

SHOWN_COMPLETIONS = 4  # per task, before and after, for the report
PACKAGES = ("omni-fast", "torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained in which order, and why. transfer and decision are None where nothing was measured."""

    stages: list[Stage]
    statement: str
    transfer: Transfer | None
    decision: Decision | None


def stage_steps(config: Config) -> dict[str, int]:
    return dict.fromkeys(task_names(config), config.curriculum.steps_per_stage)


def task_names(config: Config) -> list[str]:
    return [task.name for task in config.tasks]


def solve(config: Config, run: Run) -> Plan:
    """Transfer from the finished single-task runs (split `select`), the order, the stages."""
    names = task_names(config)
    transfer = decision = None
    order: Sequence[str] = config.curriculum.order
    statement = f"Mode {config.curriculum.mode}: the order is not measured."
    if config.curriculum.measures_transfer:
        transfer = measured_transfer(config, run)
        decision = decide(transfer)
        order, statement = decision.order, decision.statement
    stages = build_stages(
        config.curriculum.mode,
        names,
        stage_steps(config),
        order=order,
        seed=config.seed,
        replay=config.curriculum.replay_fraction,
        weights={task.name: task.weight for task in config.tasks},
    )
    return Plan(stages, statement, transfer, decision)


def measured_transfer(config: Config, run: Run) -> Transfer:
    """From the `select` scores of the initial policy and of each task's own run."""
    base = item_scores(run, BASE, "select")
    single = {name: item_scores(run, f"single:{name}", "select") for name in task_names(config)}
    return measure(base, single, draws=config.evaluation.bootstrap_draws, seed=config.seed)


def refresh(config: Config, run: Run, plan: Plan) -> Stage | None:
    """The short last stage, on the task that fell furthest since its own stage (split `select`), if it is asked for."""
    if not config.curriculum.refresh_steps or len(plan.stages) < 2:
        return None
    own = {stage.own[0]: item_scores(run, stage.name, "select")[stage.own[0]] for stage in plan.stages}
    final = item_scores(run, plan.stages[-1].name, "select")
    return refresh_stage(
        {task: scores.score(items) for task, items in own.items()},
        {task: scores.score(final[task]) for task in own},
        config.curriculum.refresh_steps,
    )


def reuse(run: Run, stage: Stage, start: str) -> bool:
    """A stage that repeats a finished single-task run (same task, same steps, from the initial policy) takes its weights."""
    twin = f"single:{stage.tasks[0]}"
    done = run.result(f"train {twin}")
    if start != BASE or len(stage.tasks) > 1 or not isinstance(done, dict) or done["steps"] != stage.steps:
        return False
    run.finish(f"train {stage.name}", {"task": stage.tasks[0], "steps": stage.steps, "same_as": twin})
    return True


def reuse_scores(run: Run, name: str) -> bool:
    """A stage that lent its weights lends its scores too."""
    trained = run.result(f"train {name}")
    if not isinstance(trained, dict) or not trained["same_as"]:
        return False
    run.finish(f"evaluate {name}", run.result(f"evaluate {trained['same_as']}"))
    return True


def evaluation_record(results: Mapping[Split, Mapping[str, Evaluation]], entropy: Mapping[str, float]) -> Json:
    """The JSON kept of an evaluation: item scores (null where the infrastructure failed), and some completions."""
    record: dict[str, Json] = {"entropy": dict(entropy)}
    for split, tasks in results.items():
        record[split] = {
            task: {
                "values": [None if math.isnan(value) else float(value) for value in result.values],
                "truncated": result.truncated,
                "samples": [
                    {"prompt": item.prompt, "completion": text, "value": None if math.isnan(value) else float(value)}
                    for item, text, value in zip(
                        result.items[:SHOWN_COMPLETIONS], result.completions, result.values, strict=False
                    )
                ],
            }
            for task, result in tasks.items()
        }
    return record


def item_scores(run: Run, name: str, split: Split) -> dict[str, Floats]:
    """Task -> item scores [n_items] of the weights `name` on a split; NaN where there is none."""
    record = run.record_of(f"evaluate {name}")
    return {task: np.array(kept["values"], dtype=np.float64) for task, kept in record[split].items()}


def step_row(
    stage: Stage,
    step: int,
    clock: Sequence[float],
    groups: Sequence[Group],
    tasks: Mapping[str, Mapping[str, object]],
    update: Mapping[str, float],
) -> dict[str, object]:
    """A row of metrics.jsonl. clock: times at the start, after generate, reward, update and sync."""
    spans = [after - before for before, after in zip(clock, clock[1:], strict=False)]
    seconds = dict(zip(("generate", "reward", "update", "sync"), spans, strict=True))
    seconds["total"] = clock[-1] - clock[0]
    new_tokens = sum(len(sample.tokens) for group in groups for sample in group.samples)
    return {
        "event": "step",
        "stage": stage.name,
        "step": step,
        "tasks": {name: {**values, "entropy": update.get(f"entropy/{name}")} for name, values in tasks.items()},
        "loss": update.get("loss"),  # absent when no group was mixed
        "grad_norm": update["grad_norm"],
        "update": dict(update),
        "new_tokens": new_tokens,
        "tokens_per_s": new_tokens / seconds["generate"],
        "seconds": seconds,
        "waited_for": max(("generate", "reward", "update", "sync"), key=lambda part: seconds[part]),
    }


def record_step(run: Run, row: Mapping[str, Json]) -> None:
    """Write the row and add its time and tokens to the run's totals."""
    seconds, update = row["seconds"], row["update"]
    part = "transfer" if str(row["stage"]).startswith("single:") else "train"
    run.add_seconds(**{part: seconds["total"], "generate": seconds["generate"], "update": seconds["update"]})
    run.add_counts(rollout_tokens=row["new_tokens"], train_tokens=update.get("sample_tokens", 0.0))
    run.record(row)


def evaluation_row(name: str, split: Split, results: Mapping[str, Evaluation], seconds: float) -> dict[str, Json]:
    """A row of metrics.jsonl."""
    found = {task: dict(scores.score(result.values).as_dict()) for task, result in results.items()}
    return {"event": "eval", "stage": name, "split": split, "scores": found, "seconds": seconds}


def finish(config: Config, run: Run) -> Path:
    """Write result.json and report.html from what is there; returns the report's path."""
    data = result(config, run)
    write_json(run.folder / "result.json", data)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    path = run.folder / "report.html"
    write_report(data, rows, data["samples"], path)
    return path


def result(config: Config, run: Run) -> dict[str, Json]:
    """The content of result.json as far as the phases are finished; `status` says whether that is all of it."""
    names = task_names(config)
    plan = solve(config, run) if solvable(config, run) else None
    stages = plan.stages if plan else []
    done = [stage for stage in stages if run.finished(f"evaluate {stage.name}")]
    singles = [name for name in names if run.finished(f"evaluate single:{name}")]
    solved = plan is not None and plan.decision is not None
    out = assemble(
        names,
        base_select=item_scores(run, BASE, "select") if run.finished(f"evaluate {BASE}") else None,
        single_select={name: item_scores(run, f"single:{name}", "select") for name in singles},
        single_test={name: item_scores(run, f"single:{name}", "test") for name in singles},
        rows_test=[item_scores(run, name, "test") for name in [BASE, *(stage.name for stage in done)]]
        if run.finished(f"evaluate {BASE}")
        else [],
        trained=[("joint" if stage.joint else stage.own[0], stage.steps) for stage in stages],
        order=[stage.own[0] for stage in stages] if solved else None,
        draws=config.evaluation.bootstrap_draws,
        seed=config.seed,
        order_method=None if config.curriculum.mode == "curriculum" else config.curriculum.mode,
    )
    if plan and not solved:
        out |= {"order": [task for stage in stages for task in stage.own], "order_method": config.curriculum.mode}
        out |= {"single": {}, "transfer": {}, "order_probability": None, "forecast": {}, "statement": plan.statement}
    evaluated = [BASE, *(stage.name for stage in done)] if run.finished(f"evaluate {BASE}") else []
    kept = {name: run.record_of(f"evaluate {name}") for name in evaluated}
    out |= {
        "status": "finished" if plan and len(done) == len(stages) else "interrupted",
        "entropy": {name: record["entropy"] for name, record in kept.items()},
        "truncated": {n: {t: row["truncated"] for t, row in record["test"].items()} for n, record in kept.items()},
        "samples": samples(run, evaluated),
        "seconds": dict(run.state["seconds"]),
        "throughput": _throughput(run),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "machine": {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "config": config.model_dump(mode="json"),
    }
    return out | dict(run.state["facts"])


def solvable(config: Config, run: Run) -> bool:
    """Whether the order is known by now."""
    needed = [BASE, *(f"single:{name}" for name in task_names(config))] if config.curriculum.measures_transfer else []
    return all(run.finished(f"evaluate {name}") for name in needed)


def samples(run: Run, names: Sequence[str]) -> list[Json]:
    """Completions of the first and of the last evaluated policy on the same test items."""
    if not names:
        return []
    first, last = (run.record_of(f"evaluate {name}")["test"] for name in (names[0], names[-1]))
    return [
        {"task": task, "prompt": a["prompt"], "before": a["completion"], "after": b["completion"],
         "score_before": a["value"], "score_after": b["value"]}
        for task in first
        for a, b in zip(first[task]["samples"], last[task]["samples"], strict=True)
    ]  # fmt: skip


def _throughput(run: Run) -> dict[str, Json]:
    counts, seconds = run.state["counts"], run.state["seconds"]
    return {
        "rollout_tokens_per_s": counts.get("rollout_tokens", 0.0) / max(seconds.get("generate", 0.0), 1e-9),
        "train_tokens_per_s": counts.get("train_tokens", 0.0) / max(seconds.get("update", 0.0), 1e-9),
    }
