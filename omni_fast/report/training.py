"""The sections about training: reward and entropy curves, signs of reward hacking, the stages, where the time went.

They are drawn from the rows of metrics.jsonl. A step's row holds its tasks under "tasks"; here it becomes one row per
task. Signs of reward hacking are `signals` and `signs` of these rows (`rewards.monitors`), in words and as curves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from omni_fast.report import charts
from omni_fast.report.charts import Line, duration, facts_table, table, text
from omni_fast.report.verdict import Json, number, points

Rows = Sequence[Mapping[str, Any]]
Steps = Mapping[tuple[str, str], Rows]  # (stage, task) -> one row a step
SHARES = {
    "repeated": "repeats itself",
    "identical": "same in its group",
    "stuffed": "gold answer stuffed in",
    "disagreement": "judge against checks",
}
PARTS = ("generate", "reward", "update", "sync", "total")  # of a step's time


def by_task(metrics: Rows) -> Steps:
    """The steps, task by task."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in metrics:
        if row["event"] == "step":
            for task, values in row["tasks"].items():
                found.setdefault((row["stage"], task), []).append({**row, **values})
    return found


def label(stage: str, task: str) -> str:
    return stage if stage.endswith(f":{task}") else f"{stage}, {task}"


def curves(result: Json, steps: Steps, key: str, y_range: tuple[float, float] | None) -> str:
    if not steps:
        return ""
    lines: dict[str, list[Line]] = {task: [] for task in result["tasks"]}
    reused = _reused(result)
    for (stage, task), rows in steps.items():
        also = f", also stage {reused[task]}" if stage == f"single:{task}" and task in reused else ""
        ys = [number(row[key]) for row in rows]
        lines[task].append(Line(_stage_name(stage) + also, [row["step"] for row in rows], ys, len(lines[task])))
    known = [y for own in lines.values() for line in own for y in line.ys if math.isfinite(y)]
    if y_range is None:
        y_range = (0.0, max(known)) if known and max(known) > 0 else None
    elif known and not (y_range[0] <= min(known) and max(known) <= y_range[1]):
        y_range = None  # a composed reward may leave 0..1
    panels = [charts.line_panel(task, own, y_range=y_range, x_label="step") for task, own in lines.items()]
    return f"<div class=panels>{''.join(panels)}</div>"


def _reused(result: Json) -> dict[str, str]:
    """Task -> number of the stage that its own run stands for, since both are the same; from names as curriculum:1:math."""
    return {task: place for _, place, task in (name.split(":", 2) for name in result.get("reused", ()))}


def _stage_name(stage: str) -> str:
    kind, _, rest = stage.partition(":")
    place = rest.split(":")[0]
    return {"single": "own run", "refresh": "refresh"}.get(kind, f"{kind}, stage {place}" if rest else kind)


def stages(result: Json, steps: Steps) -> str:
    if not steps:
        return ""
    lines = [
        [
            label(stage, task),
            str(len(rows)),
            points(_mean(rows[:3], "reward"), False),
            points(_mean(rows[-3:], "reward"), False),
            f"{_mean(rows, 'mixed_groups'):.0%}",
            str(sum(row["invalid"] for row in rows)),
            f"{_mean(rows, 'completion_tokens'):,.0f}",
            points(_mean([row["update"] for row in rows], "grad_norm"), False),
            f"{_mean(rows, 'tokens_per_s'):,.0f}",
        ]
        for (stage, task), rows in steps.items()
    ]
    reused = text(", ".join(_reused(result)))
    note = f"<p class=dim>Taken over from the task's own run, which is the same stage: {reused}.</p>" if reused else ""
    heads = ["stage", "steps", "reward, first 3", "last 3", "mixed groups", "invalid samples", "tokens per answer"]
    return note + table([*heads, "gradient norm", "tokens/s"], lines) + _parts(steps)


def _parts(steps: Steps) -> str:
    """Mean and standard deviation of each reward part in the first and the last steps of a stage."""
    lines = []
    for (stage, task), own in steps.items():
        rows, spreads = ([row[key] for row in own] for key in ("parts", "spreads"))
        for part in dict.fromkeys(name for row in rows for name in row):
            shown = [points(_mean(some, part), False) for some in (rows[:3], rows[-3:], spreads[-3:])]
            lines.append([stage, f"{task}: {part}", *shown])
    heads = ["stage", "part of the reward", "mean, first 3 steps", "last 3 steps", "deviation, last 3"]
    return f"<details><summary>Parts of the reward</summary>{table(heads, lines, words=2)}</details>"


def timings(result: Json, steps: Steps) -> str:
    facts = [(name, duration(value)) for name, value in result.get("seconds", {}).items()]
    for what, rate in result.get("throughput", {}).items():
        name = {"rollout_tokens_per_s": "rollout", "train_tokens_per_s": "training"}[what]
        facts.append((name, "–" if rate is None else f"{rate:,.0f} tokens/s"))
    by_stage: dict[str, dict[int, Mapping[str, float]]] = {}  # a step's time once, however many tasks
    for (stage, _), rows in steps.items():
        by_stage.setdefault(stage, {}).update({row["step"]: row["seconds"] for row in rows})
    lines = [
        [stage, *(duration(sum(seconds[part] for seconds in own.values())) for part in PARTS)]
        for stage, own in by_stage.items()
    ]
    spent = f"<h3>Where the time of the training steps went</h3>{table(['stage', *PARTS], lines)}" if lines else ""
    return facts_table(facts) + spent


def _mean(rows: Rows, key: str) -> float:
    """Over the steps in which it is known."""
    known = [x for row in rows if (x := row.get(key)) is not None]
    return sum(known) / len(known) if known else math.nan


def signs(result: Json, steps: Steps) -> str:
    """Warnings first, then one panel per task: its last stage, whose first steps are the baseline of the length."""
    last = {task: (stage, rows) for (stage, task), rows in steps.items()}
    if not last:
        return ""
    warnings = [line for (stage, task), rows in steps.items() for line in _warnings(stage, task, rows)]
    count = sum(len(rows) for rows in steps.values())
    found = f"<ul>{''.join(warnings)}</ul>" if warnings else f"<p>None in {count} steps.</p>"
    panels = "".join(_shares(task, *last[task]) for task in result["tasks"] if task in last)
    return f"{found}<div class=panels>{panels}</div>"


def _warnings(stage: str, task: str, rows: Rows) -> list[str]:
    """One line per sign that was out of bounds: the steps, and what was said the last time."""
    lines = []
    for sign in dict.fromkeys(name for row in rows for name in row["signs"]):
        hits = [row for row in rows if sign in row["signs"]]
        where = f"{stage}, {task}, in {len(hits)} of {len(rows)} steps, last in step {hits[-1]['step']}"
        lines.append(f"<li><b>{text(where)}</b>: {text(hits[-1]['signs'][sign])}.</li>")
    return lines


def _shares(task: str, stage: str, rows: Rows) -> str:
    steps = [row["step"] for row in rows]
    lines = [
        Line(name, steps, [number(row["signals"][key]) for row in rows], style)
        for style, (key, name) in enumerate(SHARES.items())
        if any(row["signals"][key] is not None for row in rows)
    ]
    return charts.line_panel(f"{task} ({stage})", lines, y_range=(0.0, 1.0), x_label="step")
