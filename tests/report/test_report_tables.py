"""The plan on a terminal."""

import io

import numpy as np
from rich.console import Console

from omni_fast.curriculum.decide import Plan, decide
from omni_fast.curriculum.stages import build_stages
from omni_fast.curriculum.transfer import measure
from omni_fast.report.tables import plan_table


def _print(plan: Plan) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(plan_table(plan))
    return out.getvalue()


def test_a_measured_plan():
    rng = np.random.default_rng(0)
    tasks = ["math [bold]", "code"]
    base = {t: (rng.random(50) < 0.3) * 1.0 for t in tasks}
    single = {i: {t: (rng.random(50) < 0.5) * 1.0 for t in tasks} for i in tasks}
    transfer = measure(base, single)
    decision = decide(transfer)
    stages = build_stages("curriculum", tasks, 12, order=decision.order, replay=0.25, weights={})
    shown = _print(Plan(stages, decision.statement, transfer, decision))
    assert f"{transfer.base_K[1]:.3f}" in shown and "second best" in shown and "25%" in shown
    assert "math [bold]" in shown, "a task's name is text, not markup"
    assert f"{transfer.matrix_KK[0, 1]:+.3f}" in shown


def test_a_joint_plan_has_stages_only():
    shown = _print(Plan(build_stages("joint", ["a", "b"], 2, weights={"a": 3, "b": 1}), "", None, None))
    assert "joint" in shown and "75%" in shown and "Transfer" not in shown
