"""The plan of a run on a terminal: measured transfer, the order, its forecast.

What report.html shows with drawings, as rich tables; numbers carry their 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omni_fast.curriculum.decide import Decision
from omni_fast.curriculum.predict import forecast
from omni_fast.curriculum.scores import Estimate
from omni_fast.curriculum.stages import Stage
from omni_fast.curriculum.transfer import Transfer


class Plan(Protocol):
    """What is needed of a solved plan; transfer and decision are None where the order was not measured."""

    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def transfer(self) -> Transfer | None: ...
    @property
    def decision(self) -> Decision | None: ...


def plan_table(plan: Plan) -> RenderableType:
    """Stages, and where transfer was measured the matrix, the forecast and the alternatives."""
    parts: list[RenderableType] = []
    if plan.transfer is not None:
        parts.append(transfer_table(plan.transfer))
        parts.append(_forecast_table(plan.transfer, [stage.own[0] for stage in plan.stages if not stage.joint]))
    stages = Table(title="Stages", title_justify="left", show_edge=False)
    for head in ("stage", "steps", "prompts from"):
        stages.add_column(head, justify="right" if head == "steps" else "left")
    for stage in plan.stages:
        shares = ", ".join(f"{task} {weight:.0%}" for task, weight in zip(stage.tasks, stage.weights, strict=True))
        stages.add_row(Text(stage.name), str(stage.steps), Text(shares))
    parts.append(stages)
    if plan.decision is not None and plan.decision.second is not None and plan.decision.gap is not None:
        ahead = _change(plan.decision.gap)
        second = " -> ".join(plan.decision.second)
        parts.append(Text(f"second best: {second}, summed forecast behind by {ahead}"))
    return Group(*parts)


def transfer_table(transfer: Transfer) -> Table:
    """T[i -> j] with intervals; the diagonal is each task's own gain."""
    table = Table(title="Transfer (split select)", title_justify="left", show_edge=False)
    table.add_column("trained \\ scored on")
    for task in transfer.tasks:
        table.add_column(Text(task), justify="right")
    for trained, row in transfer.effects().items():
        table.add_row(Text(trained), *(Text(_change(row[task])) for task in transfer.tasks))
    return table


def _forecast_table(transfer: Transfer, order: Sequence[str]) -> Table:
    table = Table(title="Forecast (split select)", title_justify="left", show_edge=False)
    for head in ("task", "initial policy", "own run", "after all stages"):
        table.add_column(head, justify="left" if head == "task" else "right")
    final = forecast(transfer, order)
    for j, task in enumerate(transfer.tasks):
        told = f"{final[task].value:.3f} ({final[task].low:.3f} to {final[task].high:.3f})"
        table.add_row(Text(task), f"{transfer.base_K[j]:.3f}", f"{transfer.own_K[j]:.3f}", told)
    return table


def _change(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"
