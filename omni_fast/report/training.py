"""The sections about training: reward and entropy curves, signs of reward hacking, the stages, where the time went.

They are drawn from the rows of metrics.jsonl. A step's row holds its tasks under "tasks"; here it becomes one row per
task. Signs of reward hacking are `signals` and `signs` of these rows (`rewards.monitors`), in words and as curves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from omni_fast.report import charts
from omni_fast.report.charts import Line, duration, facts_table, table, text
from omni_fast.report.verdict import Json, mapping, names, number, points

Rows = Sequence[Json]
Steps = Mapping[tuple[str, str], Rows]  # (stage, task) -> one row a step
SHARES = {
    "repeated": "repeats itself",
    "identical": "same in its group",
    "stuffed": "gold answer stuffed in",
    "disagreement": "judge against checks",
}


def latest_steps(metrics: Rows) -> Steps:
    """The steps in order; of one that was recorded twice, the last counts."""
    found: dict[tuple[str, str], dict[float, Json]] = {}
    for row in metrics:
        step = number(row.get("step"))
        if row.get("event") != "step" or not math.isfinite(step):
            continue
        own = {key: value for key, value in row.items() if key not in ("tasks", "update")}
        for task, values in mapping(row.get("tasks")).items():
            entropy = mapping(row.get("update")).get(f"entropy/{task}")
            whole = {"entropy": entropy, **own, **mapping(values)}
            found.setdefault((str(row.get("stage", "")), task), {})[step] = whole
    return {key: [rows[step] for step in sorted(rows)] for key, rows in found.items()}


def label(stage: str, task: str) -> str:
    return stage if stage.endswith(f":{task}") else f"{stage}, {task}"


def curves(result: Json, steps: Steps, key: str, y_range: tuple[float, float] | None) -> str:
    by_task: dict[str, list[Line]] = {task: [] for task in names(result.get("tasks"))}
    reused = _reused(result)
    for (stage, task), rows in steps.items():
        lines = by_task.setdefault(task, [])
        xs, ys = ([number(row.get(name)) for row in rows] for name in ("step", key))
        also = f", also stage {reused[task]}" if stage == f"single:{task}" and task in reused else ""
        lines.append(Line(_stage_name(stage) + also, xs, ys, len(lines)))
    if not any(by_task.values()):
        return ""
    known = [y for lines in by_task.values() for line in lines for y in line.ys if math.isfinite(y)]
    if y_range is None:
        y_range = (0.0, max(known)) if known and max(known) > 0 else None
    elif known and not (y_range[0] <= min(known) and max(known) <= y_range[1]):
        y_range = None  # a composed reward may leave 0..1
    panels = [charts.line_panel(task, lines, y_range=y_range, x_label="step") for task, lines in by_task.items()]
    return f"<div class=panels>{''.join(panels)}</div>"


def _reused(result: Json) -> dict[str, str]:
    """Task -> number of the stage that its own run stands for, since both are the same; from names as curriculum:1:math."""
    parts = [name.split(":", 2) for name in names(result.get("reused"))]
    return {task: place for _, place, task in (part for part in parts if len(part) == 3)}


def _stage_name(stage: str) -> str:
    kind, _, rest = stage.partition(":")
    number_of = rest.split(":")[0]
    return {"single": "own run", "refresh": "refresh"}.get(kind, f"{kind}, stage {number_of}" if rest else kind)


def stages(result: Json, steps: Steps) -> str:
    if not steps:
        return ""
    lines = [
        [
            label(stage, task),
            str(len(rows)),
            points(_mean(rows[:3], "reward"), False),
            points(_mean(rows[-3:], "reward"), False),
            _shown(_mean(rows, "mixed_groups"), ".0%"),
            f"{sum(n for row in rows if math.isfinite(n := number(row.get('invalid')))):.0f}",
            _shown(_mean(rows, "completion_tokens"), ",.0f"),
            points(_mean(rows, "grad_norm"), False),
            _shown(_mean(rows, "tokens_per_s"), ",.0f"),
        ]
        for (stage, task), rows in steps.items()
    ]
    note, reused = "", ", ".join(_reused(result))
    if reused:
        note = f"<p class=dim>Taken over from the task's own run, which is the same stage: {text(reused)}.</p>"
    heads = ["stage", "steps", "reward, first 3", "last 3", "mixed groups", "invalid samples", "tokens per answer"]
    return note + table([*heads, "gradient norm", "tokens/s"], lines) + _parts(steps)


def _parts(steps: Steps) -> str:
    """Mean and standard deviation of each reward part in the first and the last steps of a stage."""
    lines = []
    for (stage, task), own in steps.items():
        rows, spreads = ([mapping(row.get(key)) for row in own] for key in ("parts", "spreads"))
        for part in dict.fromkeys(name for row in rows for name in row):
            shown = [points(_mean(some, part), False) for some in (rows[:3], rows[-3:], spreads[-3:])]
            lines.append([stage, f"{task}: {part}", *shown])
    if not lines:
        return ""
    heads = ["stage", "part of the reward", "mean, first 3 steps", "last 3 steps", "deviation, last 3"]
    return f"<details><summary>Parts of the reward</summary>{table(heads, lines, words=2)}</details>"


def timings(result: Json, steps: Steps) -> str:
    words = {"rollout_tokens_per_s": "rollout", "train_tokens_per_s": "training"}
    facts = [(text(name), duration(number(value))) for name, value in mapping(result.get("seconds")).items()]
    for name, value in mapping(result.get("throughput")).items():
        facts.append((text(words.get(name, name)), f"{_shown(number(value), ',.0f')} tokens/s"))
    by_stage: dict[str, dict[float, Json]] = {}  # a step's time once, however many tasks
    for (stage, _), rows in steps.items():
        by_stage.setdefault(stage, {}).update({number(row.get("step")): row for row in rows})
    bars: dict[str, dict[str, float]] = {}
    for stage, own in by_stage.items():
        parts: dict[str, float] = {}
        for row in own.values():
            for name, value in mapping(row.get("seconds")).items():
                if name != "total" and math.isfinite(number(value)):
                    parts[name] = parts.get(name, 0.0) + max(0.0, number(value))
        if parts:
            bars[stage] = parts
    drawn = "<h3>Where the time of the training steps went</h3>" + charts.stacked_bars(bars, unit="s") if bars else ""
    return facts_table(facts) + drawn


def _mean(rows: Rows, key: str) -> float:
    return average([number(row.get(key)) for row in rows])


def average(values: Sequence[float]) -> float:
    """Of those that are known."""
    known = [x for x in values if math.isfinite(x)]
    return sum(known) / len(known) if known else math.nan


def _shown(x: float, form: str) -> str:
    return f"{x:{form}}" if math.isfinite(x) else "–"


def signs(result: Json, steps: Steps) -> str:
    """Warnings first, then one panel per task: its last stage, whose first steps are the baseline of the length."""
    last: dict[str, tuple[str, Rows]] = {}
    warnings, lengths, count = [], [], 0
    for (stage, task), everything in steps.items():
        rows = [row for row in everything if mapping(row.get("signals"))]
        if not rows:
            continue
        count += len(rows)
        last[task] = stage, rows
        warnings += _warnings(stage, task, rows)
        words = [number(mapping(row.get("signals")).get("words")) for row in rows]
        lengths.append([label(stage, task), *(f"{average(some):.1f}" for some in (words[:3], words[-3:]))])
    if not last:
        return ""
    order = dict.fromkeys([task for task in names(result.get("tasks")) if task in last] + list(last))
    found = f"<ul>{''.join(warnings)}</ul>" if warnings else f"<p>None in {count} steps.</p>"
    panels = "".join(_shares(task, *last[task]) for task in order)
    shown = table(["stage", "words per completion, first 3 steps", "last 3 steps"], lengths)
    return f"{found}<div class=panels>{panels}</div><details><summary>Length</summary>{shown}</details>"


def _warnings(stage: str, task: str, rows: Rows) -> list[str]:
    """One line per sign that was out of bounds: the steps, and what was said the last time."""
    lines = []
    for sign in dict.fromkeys(name for row in rows for name in mapping(row.get("signs"))):
        hits = [row for row in rows if sign in mapping(row.get("signs"))]
        where = f"{stage}, {task}, in {len(hits)} of {len(rows)} steps, last in step {number(hits[-1].get('step')):.0f}"
        lines.append(f"<li><b>{text(where)}</b>: {text(str(mapping(hits[-1].get('signs'))[sign]))}.</li>")
    return lines


def _shares(task: str, stage: str, rows: Rows) -> str:
    lines = []
    for style, (key, name) in enumerate(SHARES.items()):
        ys = [number(mapping(row.get("signals")).get(key)) for row in rows]
        if any(math.isfinite(y) for y in ys):
            lines.append(Line(name, [number(row.get("step")) for row in rows], ys, style))
    return charts.line_panel(f"{task} ({stage})", lines, y_range=(0.0, 1.0), x_label="step")
