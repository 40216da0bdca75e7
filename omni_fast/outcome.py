"""What a run writes down: rows of metrics.jsonl, entropies, result.json, report.html. Split `test` is what is reported."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from omni_fast.build import Parts
from omni_fast.checkpoint import write_json
from omni_fast.curriculum import scores
from omni_fast.curriculum.stages import Stage
from omni_fast.groups import Group, task_rows
from omni_fast.plan import item_scores, refresh, singles, solve, task_names
from omni_fast.policy.pack import Trajectory
from omni_fast.records import EvalRow, Evaluated, ProbeRow, StepRow, TaskScores
from omni_fast.report.charts import write_page
from omni_fast.report.page import render
from omni_fast.report.result import Json, assemble
from omni_fast.rewards.monitors import Monitor
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.run import BASE, Run
from omni_fast.tasks.base import Split

PACKAGES = ("omni-fast", "torch", "transformers", "numpy")


def record_step(
    parts: Parts,
    stage: Stage,
    step: int,
    groups: Sequence[Group],
    update: dict[str, float],
    seconds: dict[str, float],
    monitor: Monitor,
    scoring_s: float,
) -> StepRow:
    """Write a step's row and add its time and tokens to the totals. seconds: generate, reward, update, sync."""
    run, total = parts.run, sum(seconds.values())
    new_tokens = sum(len(sample.tokens) for group in groups for sample in group.samples)
    max_staleness = run.config.rollout.max_staleness
    row = StepRow(
        event="step",
        stage=stage.name,
        step=step,
        tasks=task_rows(groups, parts.tasks, {name: update.get(f"entropy/{name}") for name in stage.tasks}, monitor),
        update=update,
        new_tokens=new_tokens,
        tokens_per_s=new_tokens / (total if max_staleness else seconds["generate"]),
        waited_for=max(seconds, key=lambda part: seconds[part]),
        seconds=seconds | {"total": total},
        scoring_s=scoring_s,
        max_staleness=max_staleness,
    )
    part = "transfer" if stage.name.startswith("single:") else "train"
    run.add_seconds(**{part: total}, scoring=scoring_s, **seconds)  # scoring overlaps with generating
    run.add_counts(rollout_tokens=new_tokens, train_tokens=update.get("sample_tokens", 0.0))
    run.record(row)
    parts.trackers.log(row)
    return row


def score(parts: Parts, name: str, splits: Sequence[Split], tasks: Collection[str]) -> Evaluated:
    """Evaluate the policy as it is now; write a row a split, add its time."""
    kept: dict[str, dict[str, TaskScores]] = {}
    for split in splits:
        start = time.perf_counter()
        results = {task: parts.evaluate(task, parts.items[task][split]) for task in tasks}
        seconds = time.perf_counter() - start
        kept[split] = {task: result.record for task, result in results.items()}
        found = {task: scores.score(result.values).as_dict() for task, result in results.items()}
        row = EvalRow(event="eval", stage=name, split=split, scores=found, seconds=seconds)
        parts.run.add_seconds(eval=seconds)
        parts.run.record(row)
        parts.trackers.log(row)
        parts.progress.evaluated(row)
    return Evaluated(splits=kept, entropy=entropies(parts, tasks))


def entropies(parts: Parts, tasks: Collection[str]) -> dict[str, float]:
    """Task -> mean token entropy, in nats, of the policy as it is now on the probe (split `select`).

    The probe is fixed completions of the initial policy, which is the first to be scored on any task: the same tokens for
    every policy, so a change of the mean is a change of the policy and not of what it happened to write.
    """
    run = parts.run
    known = {row["task"] for row in run.state["probe"]}
    if parts.config.evaluation.probe_items and (new := [task for task in tasks if task not in known]):
        # Kept with the evaluation that is under way: saved alone, it would count rows that are written again.
        run.state["probe"] = [*run.state["probe"], *(row for task in new for row in _probe(parts, task))]
    rows = [
        Trajectory(row["prompt"], row["tokens"], [0.0] * len(row["tokens"]), 0.0, number, row["task"])
        for number, row in enumerate(run.state["probe"])
        if row["task"] in tasks
    ]
    found: dict[str, list[float]] = {}
    for trajectory, (_, entropy) in zip(rows, parts.policy.measure(rows), strict=True):
        found.setdefault(trajectory.task, []).extend(entropy)
    return {task: float(np.mean(values)) for task, values in found.items()}


def _probe(parts: Parts, task: str) -> list[ProbeRow]:
    """One completion for each of the task's first `select` items."""
    items = parts.items[task]["select"][: parts.config.evaluation.probe_items]
    prompts = [Prompt(parts.prompt(task, item), key) for key, item in enumerate(items)]
    limit = parts.tasks[task].max_new_tokens
    sampling = Sampling(limit, stop_token_ids=parts.stop_token_ids, seed=parts.config.seed)
    found = parts.engine.generate(prompts, 1, sampling)
    return [
        ProbeRow(task=task, prompt=list(prompt.tokens), tokens=samples[0].tokens)
        for prompt, samples in zip(prompts, found, strict=True)
    ]


def finish(run: Run) -> Path:
    """Write result.json and report.html from what is there; returns the report's path."""
    data = result(run)
    write_json(run.folder / "result.json", data)
    path = run.folder / "report.html"
    write_page(path, render(data, run.rows(), _samples(run)))
    return path


def result(run: Run) -> Json:
    """The content of result.json as far as the run has come; `status` says whether that is all of it."""
    config, names = run.config, task_names(run.config)
    measured = [name for name in names if run.evaluated(f"single:{name}")]
    started = run.evaluated(BASE) is not None
    plan = solve(run) if started and len(measured) >= len(singles(config)) else None
    planned = plan.stages if plan else []
    ended = plan and all(run.evaluated(stage.name) for stage in planned)
    stages = [*planned, *(refresh(run, plan) if plan and ended else ())]
    done = [stage for stage in stages if run.evaluated(stage.name)]
    rows = [BASE, *(stage.name for stage in done)] if started else []
    out = assemble(
        names,
        single_test={name: item_scores(run, f"single:{name}", "test") for name in measured},
        rows_test=[item_scores(run, name, "test") for name in rows],
        trained=stages,
        plan=plan,
        mode=config.curriculum.mode,
    )
    if plan and not plan.decision:
        out |= {"order": [task for stage in planned for task in stage.own], "order_method": config.curriculum.mode}
        out |= {"single": {}, "transfer": {}, "order_probability": None, "forecast": {}, "statement": plan.statement}
    kept = {name: run.scores_of(name) for name in rows}
    totals = run.state["totals"]
    return out | {
        "status": "finished" if plan and len(done) == len(stages) else "interrupted",
        "reused": [stage.name for stage in done if (run.trained(stage.name) or {"same_as": ""})["same_as"]],
        "entropy": {name: dict(found["entropy"]) for name, found in kept.items()},
        "truncated": {n: {t: row["truncated"] for t, row in f["splits"]["test"].items()} for n, f in kept.items()},
        "seconds": dict(totals["seconds"]),
        "throughput": _throughput(totals["counts"], totals["seconds"], config.rollout.max_staleness > 0),
        **setting(),
        "config": config.model_dump(mode="json"),
        **run.state["facts"],
    }


def setting() -> Json:
    """The machine and the versions behind a result."""
    return {
        "machine": {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    }


def _samples(run: Run) -> list[Json]:
    """Completions of the initial policy and of that after the last stage so far on the same test items."""
    names = [name for name in run.state["evaluated"] if not name.startswith("single:")]
    if len(names) < 2:
        return []
    first, last = (run.scores_of(name)["splits"]["test"] for name in (names[0], names[-1]))
    found: list[Json] = []
    for task in (task for task in first if task in last):  # else it is added to the run and not scored there yet
        for one, other in zip(first[task]["samples"], last[task]["samples"], strict=True):
            values = {"score_before": one["value"], "score_after": other["value"]}
            texts = {"prompt": one["prompt"], "before": one["completion"], "after": other["completion"]}
            found.append({"task": task, **texts, **values})
    return found


def _throughput(counts: Mapping[str, float], seconds: Mapping[str, float], overlapped: bool) -> Json:
    """Tokens per second of generating and of training; a rollout that ran ahead took the steps' whole time."""
    generating = sum(seconds.get(part, 0.0) for part in (("transfer", "train") if overlapped else ("generate",)))
    spent = {"rollout": generating, "train": seconds.get("update", 0.0)}
    return {f"{name}_tokens_per_s": counts[f"{name}_tokens"] / s if s else None for name, s in spent.items()}
