"""The section about signs of reward hacking: what the monitors saw, in words and as curves.

Drawn from `signals` and `signs` of each task's rows in metrics.jsonl (`rewards.monitors`).
"""

from __future__ import annotations

import math

from omni_fast.report import charts
from omni_fast.report.charts import Line, table, text
from omni_fast.report.training import Json, Rows, Steps, average, label
from omni_fast.report.verdict import mapping, names, number

SHARES = {
    "repeated": "repeats itself",
    "identical": "same in its group",
    "stuffed": "gold answer stuffed in",
    "disagreement": "judge against checks",
}


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
    panels = "".join(_panel(task, *last[task]) for task in order)
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


def _panel(task: str, stage: str, rows: Rows) -> str:
    lines = []
    for style, (key, name) in enumerate(SHARES.items()):
        ys = [number(mapping(row.get("signals")).get(key)) for row in rows]
        if any(math.isfinite(y) for y in ys):
            lines.append(Line(name, [number(row.get("step")) for row in rows], ys, style))
    return charts.line_panel(f"{task} ({stage})", lines, y_range=(0.0, 1.0), x_label="step")
