"""The sections about training: reward and entropy curves, a table of the stages, where the time went.

They are drawn from the rows of metrics.jsonl. A step's row holds its tasks under "tasks"; here it becomes one row per
task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from omni_fast.report import charts
from omni_fast.report.charts import Line, Stack, duration, facts_table, table, text
from omni_fast.report.verdict import listing, mapping, names, number, points

Json = Mapping[str, JsonValue]
Rows = Sequence[Json]


def latest_steps(metrics: Rows) -> dict[str, list[Json]]:
    """Stage -> its rows, one per step and task, in order; of a step that was recorded twice, the last counts."""
    stages: dict[str, dict[tuple[float, str], Json]] = {}
    for row in metrics:
        if row.get("event") != "step" or not math.isfinite(number(row.get("step"))):
            continue
        rows = stages.setdefault(str(row.get("stage", "")), {})
        for task, values in mapping(row.get("tasks")).items():
            entropy = mapping(row.get("update")).get(f"entropy/{task}")
            own = {key: value for key, value in row.items() if key not in ("tasks", "update")}
            rows[number(row.get("step")), task] = {"entropy": entropy, **own, **mapping(values), "task": task}
    return {stage: [rows[key] for key in sorted(rows)] for stage, rows in stages.items()}


def curves(result: Json, steps: Mapping[str, Rows], key: str, y_range: tuple[float, float] | None) -> str:
    by_task: dict[str, list[Line]] = {task: [] for task in names(result.get("tasks"))}
    reused = {
        str(mapping(s).get("task")): k
        for k, s in enumerate(listing(result.get("stages")), start=1)
        if mapping(s).get("reused") is True
    }
    for stage, rows in steps.items():
        for task in dict.fromkeys(str(row.get("task", "")) for row in rows):
            own = [row for row in rows if str(row.get("task", "")) == task]
            lines = by_task.setdefault(task, [])
            xs, ys = [number(row.get("step")) for row in own], [number(row.get(key)) for row in own]
            also = f", also stage {reused[task]}" if stage == f"single:{task}" and task in reused else ""
            lines.append(Line(_stage_name(stage) + also, xs, ys, len(lines)))
    if not any(by_task.values()):
        return ""
    ys = [y for lines in by_task.values() for line in lines for y in line.ys if math.isfinite(y)]
    if y_range is None:
        y_range = (0.0, max(ys)) if ys and max(ys) > 0 else None
    elif ys and not (y_range[0] <= min(ys) and max(ys) <= y_range[1]):
        y_range = None  # a composed reward may leave 0..1
    panels = [charts.line_panel(task, lines, y_range=y_range, x_label="step") for task, lines in by_task.items()]
    return f"<div class=panels>{''.join(panels)}</div>"


def _stage_name(stage: str) -> str:
    kind, _, rest = stage.partition(":")
    number_of = rest.split(":")[0]
    return {"single": "own run", "refresh": "refresh"}.get(kind, f"{kind}, stage {number_of}" if rest else kind)


def stages(result: Json, steps: Mapping[str, Rows]) -> str:
    if not steps:
        return ""
    lines = []
    for stage, everything in steps.items():
        for task in dict.fromkeys(str(row.get("task", "")) for row in everything):
            rows = [row for row in everything if str(row.get("task", "")) == task]
            lines.append(
                [
                    stage if stage.endswith(f":{task}") else f"{stage}, {task}",
                    str(len(rows)),
                    points(_mean(rows[:3], "reward"), False),
                    points(_mean(rows[-3:], "reward"), False),
                    _percent(_mean(rows, "mixed_groups")),
                    f"{sum(number(r.get('invalid')) for r in rows if math.isfinite(number(r.get('invalid')))):.0f}",
                    _whole(_mean(rows, "completion_tokens")),
                    points(_mean(rows, "grad_norm"), False),
                    _whole(_mean(rows, "tokens_per_s")),
                ]
            )
    reused = [str(mapping(s).get("task")) for s in listing(result.get("stages")) if mapping(s).get("reused") is True]
    note = ""
    if reused:
        note = (
            f"<p class=dim>Taken over from the task's own run, which is the same stage: {text(', '.join(reused))}.</p>"
        )
    heads = ["stage", "steps", "reward, first 3", "last 3", "mixed groups", "invalid samples", "tokens per answer"]
    return note + table([*heads, "gradient norm", "tokens/s"], lines) + _parts(steps)


def _parts(steps: Mapping[str, Rows]) -> str:
    """Mean and standard deviation of each reward part in the first and the last steps of a stage."""
    lines = []
    for stage, everything in steps.items():
        for task in dict.fromkeys(str(row.get("task", "")) for row in everything):
            own = [row for row in everything if str(row.get("task", "")) == task]
            rows, spreads = ([mapping(row.get(key)) for row in own] for key in ("parts", "spreads"))
            for part in dict.fromkeys(name for row in rows for name in row):
                shown = [points(_mean(some, part), False) for some in (rows[:3], rows[-3:], spreads[-3:])]
                lines.append([stage, f"{task}: {part}", *shown])
    if not lines:
        return ""
    heads = ["stage", "part of the reward", "mean, first 3 steps", "last 3 steps", "deviation, last 3"]
    return f"<details><summary>Parts of the reward</summary>{table(heads, lines, words=2)}</details>"


def timings(result: Json, steps: Mapping[str, Rows]) -> str:
    facts = []
    for name, value in mapping(result.get("seconds")).items():
        if math.isfinite(number(value)):
            facts.append((text(name), duration(number(value))))
    words = {"rollout_tokens_per_s": "rollout", "train_tokens_per_s": "training"}
    for name, value in mapping(result.get("throughput")).items():
        if math.isfinite(number(value)):
            facts.append((text(words.get(name, name)), f"{number(value):,.0f} tokens/s"))
    bars = []
    for stage, rows in steps.items():
        parts: dict[str, float] = {}
        for row in {number(row.get("step")): row for row in rows}.values():  # a step's time once, however many tasks
            for name, value in mapping(row.get("seconds")).items():
                if name != "total" and math.isfinite(number(value)):
                    parts[name] = parts.get(name, 0.0) + max(0.0, number(value))
        if parts:
            bars.append(Stack(stage, parts))
    if not facts and not bars:
        return ""
    drawn = "<h3>Where the time of the training steps went</h3>" + charts.stacked_bars(bars, unit="s") if bars else ""
    return facts_table(facts) + drawn


def _mean(rows: Rows, key: str) -> float:
    return _average([number(row.get(key)) for row in rows])


def _average(values: Sequence[float]) -> float:
    known = [x for x in values if math.isfinite(x)]
    return sum(known) / len(known) if known else math.nan


def _percent(x: float) -> str:
    return f"{x:.0%}" if math.isfinite(x) else "–"


def _whole(x: float) -> str:
    return f"{x:,.0f}" if math.isfinite(x) else "–"
