"""The plan of a run on a terminal: measured transfer, the order, its forecast, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omni_fast.curriculum.decide import Plan
from omni_fast.curriculum.predict import forecast
from omni_fast.curriculum.scores import Estimate


def plan_table(plan: Plan) -> RenderableType:
    """Stages, and where transfer was measured the matrix, the forecast and the runner-up."""
    parts: list[RenderableType] = []
    if plan.transfer is not None:
        measured, tasks = plan.transfer, plan.transfer.tasks
        effects = [(i, *(_change(row[task]) for task in tasks)) for i, row in measured.effects().items()]
        parts.append(_table("Transfer (split select)", ["trained \\ scored on", *tasks], effects))
        final = forecast(measured, [stage.own[0] for stage in plan.stages if not stage.joint])
        told = [f"{final[task].value:.3f} ({final[task].low:.3f} to {final[task].high:.3f})" for task in tasks]
        reached = [[f"{x:.3f}" for x in column] for column in (measured.base_K, measured.own_K)]
        rows = list(zip(tasks, *reached, told, strict=True))
        parts.append(_table("Forecast (split select)", ["task", "initial policy", "own run", "after all stages"], rows))
    stages = []
    for stage in plan.stages:
        shares = zip(stage.tasks, stage.weights, strict=True)
        stages.append((stage.name, str(stage.steps), ", ".join(f"{task} {weight:.0%}" for task, weight in shares)))
    parts.append(_table("Stages", ["stage", "steps", "prompts from"], stages))
    if plan.decision is not None and plan.decision.second is not None and plan.decision.gap is not None:
        second, ahead = " -> ".join(plan.decision.second), _change(plan.decision.gap)
        parts.append(Text(f"second best: {second}, summed forecast behind by {ahead}"))
    return Group(*parts)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False)
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _change(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"
