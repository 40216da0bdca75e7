"""report.html and summary.md of a study: one self-contained page and its tables as text.

Both come from `report_findings`; this file draws. A study that is not finished gives a report of what there is, which
names what is missing. Drawings differ in hatch, dash and marker, not in colour alone, and follow the reader's theme.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from omni_fast.curriculum.scores import Floats
from omni_fast.errors import UserError
from omni_fast.report import charts
from omni_fast.report.charts import Cell, Line, Mark, MarkRow, facts_table, text
from omni_fast.report.verdict import points
from omni_fast.study import records
from omni_fast.study.analysis import BASE, JOINT, declared
from omni_fast.study.analysis_draws import Names
from omni_fast.study.report_findings import Findings, Table, analyse, arrow, headline, p_value, tables, verdict

MAX_ORDERS = 24
STAGED = ("solved", "reversed", "random", "user", "refresh")
NOTES = {
    "Arms": "Split test, mean over seeds. Relative gains are ratios of average scores; p but of the declared one after Holm.",
    "Cost": "Every full arm trains on the same number of samples; what measuring transfer costs on top is charged apart.",
    "Accuracy matrix": "Test score of every task after each stage, mean over the seeds that ran this order. Framed: trained.",
    "Transfer": "How a stage of one task (rows) moves the scores (columns) on split select. Hatched: losses. Framed: own gain.",
    "Orders": "Every order against the mean of all. Orders that begin alike share those stages within a seed.",
    "Forecast against realised": "One point per order, with 95 % intervals; on the diagonal forecast and realised are equal.",
    "The two assumptions": "Spread: standard deviation between starting checkpoints, noise removed. Noise: of one measurement.",
    "Entropy": "On a fixed probe. Effective temperature: where the initial policy has the entropy of the trained one at 1.",
    "Item flips": "A net change of 0 can hide many of both.",
}


def write_report(folder: Path) -> Path:
    """Write report.html and summary.md into a study's folder, from what it holds so far; returns the page's path.

    UserError when the folder holds no study or a damaged one, OSError when it cannot be written.
    """
    folder = folder.expanduser()
    found = analyse(records.read(folder))
    charts.write_page(folder / "summary.md", summary(found))
    charts.write_page(folder / "report.html", page(found))
    return folder / "report.html"


def summary(found: Findings) -> str:
    """The Markdown summary: verdict first, then every table."""
    parts = [f"# Study {found.study.name}", headline(found).text, "## What the data supports"]
    parts.append("\n".join(f"- {sentence.text}" for sentence in verdict(found)))
    if found.missing:
        parts.append(f"Not finished: {', '.join(found.missing)}.")
    parts += [made.markdown() for section in tables(found).values() for made in section]
    return "\n\n".join(parts).replace("\u00a0", " ") + "\n"


def page(found: Findings) -> str:
    """The whole page."""
    made = {name: "".join(_html(each) for each in section) for name, section in tables(found).items()}
    bodies = {
        "What the data supports": charts.verdict(verdict(found)),
        "Arms": made["arms"] and _gains(found) + made["arms"],
        "Cost": made["cost"],
        "Accuracy matrix": _matrices(found),
        "Transfer": made["transfer"] and _transfer(found) + made["transfer"],
        "Orders": made["orders"] and _orders(found) + made["orders"],
        "Forecast against realised": _scatter(found) + made["forecast"],
        "The two assumptions": made["assumptions"],
        "Entropy": _entropy(found) + made["entropy"],
        "Item flips": made["flips"],
        "How it was measured": _setting(found),
    }
    study, status = found.study, ""
    if found.missing:
        rest = f"Missing: {text(', '.join(found.missing))}. The same command goes on with it."
        status = f"<p class=status><b>This study is not finished.</b> {rest}</p>"
    return charts.frame(
        f"omni_fast study: {study.name}",
        f"omni_fast study · {study.name} · {', '.join(study.tasks)}",
        headline(found).text,
        status + charts.sections(bodies, NOTES),
        "Intervals are 95 %: a hierarchical bootstrap over seeds, then items, read with Student's t. Split select decides,"
        " split test is reported. The primary contrast was declared before anything ran.",
    )


def _html(made: Table) -> str:
    drawn = charts.table(made.heads, made.cells(), made.words)
    if made.folded:
        return f"<details><summary>{text(made.title)}</summary>{drawn}</details>"
    return f"<h3>{text(made.title)}</h3>{drawn}"


def _gains(found: Findings) -> str:
    """Every arm's average score minus that of joint training; the declared contrast first and filled."""
    first, second = found.study.primary
    rows = [MarkRow(f"{first} − {second}", [Mark(found.primary, 0)], "declared")]
    for row in sorted(found.rows, key=lambda row: -row.over_joint.value):
        if math.isfinite(row.over_joint.value) and not declared(found.study, row.arm.name):
            note = f"p {p_value(row.p_holm)}" if math.isfinite(row.p_holm) else "one seed"
            rows.append(MarkRow(f"{row.arm.name} − joint", [Mark(row.over_joint, 0, True)], note))
    return charts.mark_rows(rows, zero=True, label="difference of the average test score")


def _matrices(found: Findings) -> str:
    tasks, out = found.study.tasks, []
    for row in found.rows:
        if row.arm.name not in STAGED or not row.orders:
            continue
        order, count = max(row.orders.items(), key=lambda pair: pair[1])
        cells = [cell for cell in found.study.of(row.arm.name) if cell.order == order and cell.base is not None]
        depth = min(len(cell.stages) for cell in cells)
        lines = []
        for stage in range(depth + 1):
            nodes = [(cell.base, *cell.stages)[stage] for cell in cells]
            trained = {node.tasks for node in nodes if node}  # a refresh may differ between the seeds
            own = trained.pop() if len(trained) == 1 else ()
            means = [float(np.mean([node.scores.mean("test", task) for node in nodes if node])) for task in tasks]
            name = f"{stage}. {', '.join(own) or 'refresh'}" if stage else "initial policy"
            drawn = [Cell(x, points(x, False), "", task in own) for task, x in zip(tasks, means, strict=True)]
            lines.append((name, drawn))
        seeds = f"{count} of {len(row.seeds)} seeds"
        table = charts.heat_table(tasks, lines, scale=1.0, corner="after \\ scored on")
        out.append(f"<div><h3>{text(row.arm.name)} ({seeds}): {text(arrow(order))}</h3>{table}</div>")
    return f"<div class=beside>{''.join(out)}</div>" if out else ""


def _transfer(found: Findings) -> str:
    assert found.transfer is not None  # it has tables
    part, tasks = found.transfer, found.study.tasks
    return charts.transfer_table(tasks, part.effects) + charts.pair_table(tasks, part.decision.pairs)


def _orders(found: Findings) -> str:
    assert found.orders is not None  # it has a table
    ranked, half = found.orders.ranked, MAX_ORDERS // 2
    kept = ranked if len(ranked) <= MAX_ORDERS else [*ranked[:half], *ranked[-half:]]
    solved = found.orders.solved[0] if found.orders.solved else None
    rows = [
        MarkRow(arrow(order), [Mark(gain, 0, order != solved)], "solved" if order == solved else "")
        for order, _, gain in kept
    ]
    return charts.mark_rows(rows, zero=True, label="average test score, minus the mean of all orders")


def _scatter(found: Findings) -> str:
    if found.forecast is None:
        return ""
    part = found.forecast
    panels = [charts.forecast_panel(task, part.points[task], k) for k, task in enumerate(found.study.tasks)]
    seeds = f"Transfer of seeds {', '.join(map(str, part.measured_on))}; realised in {', '.join(map(str, part.realised_on))}."
    return f"<p class=dim>{seeds}</p><div class=panels>{''.join(panels)}</div>"


def _entropy(found: Findings) -> str:
    part = found.entropy
    if part is None:
        return ""
    tasks = found.study.tasks
    body = "".join(
        [
            *_panels(tasks, part.by_stage, "entropy (nats)", "stages done"),
            *_panels(tasks, part.tau, "effective temperature", "stages done"),
            *_panels(tasks, part.sweep, "score by temperature", "temperature", found.study.temperatures),
        ]
    )
    body = f"<div class=panels>{body}</div>"
    if part.single is not None:
        names = ["initial policy", *(f"after {task}" for task in tasks)]
        title = "<h3>Entropy of the initial policy and after each task alone (nats)</h3>"
        body += title + charts.entropy_table(tasks, list(zip(names, part.single.tolist(), strict=True)))
    return body


def _panels(
    tasks: Names, by_arm: dict[str, Floats], what: str, x_label: str, xs: Sequence[float] = ()
) -> Iterator[str]:
    """A panel per task, a line per arm. by_arm: arm -> values [X, K].   xs: 0, 1, 2 ... without it."""
    shown = [(style, name, by_arm[name]) for style, name in enumerate((BASE, JOINT, *STAGED)) if name in by_arm]
    for k, task in enumerate(tasks if shown else ()):
        lines = [Line(name, xs or range(len(table)), list(table[:, k]), style) for style, name, table in shown]
        yield charts.line_panel(f"{task}: {what}", lines, y_range=None, x_label=x_label)


def _setting(found: Findings) -> str:
    study = found.study
    facts = [(name, _said(value)) for name, value in study.facts.items()]
    return facts_table(facts) + charts.configuration(study.config)


def _said(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(inner)}" for key, inner in value.items())
    return ", ".join(map(_said, value)) if isinstance(value, list) else str(value)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="Draw report.html and summary.md of a study again.")
    parser.add_argument("folder", type=Path, help="a study's folder, or one that holds a packed study")
    try:
        print(write_report(parser.parse_args().folder))
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
