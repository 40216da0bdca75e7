"""What `result.json` holds, and how it is made from item scores.

`assemble` computes every section that follows from item-level scores; the caller adds what only it knows (seconds,
throughput, peak_bytes, sandbox, judge, versions, config). A partial run (interrupted, or a task failed) leaves out what
it does not know yet. Splits: `base`, `stages`, `final`, `bwt`, `intervals` and `single` come from
`test`; `transfer`, the order and the forecast from `select`, which decides and is never the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from omni_fast.curriculum import predict, scores
from omni_fast.curriculum.decide import Decision, Plan
from omni_fast.curriculum.scores import Estimate, ItemScores
from omni_fast.curriculum.stages import Stage
from omni_fast.curriculum.transfer import Transfer

Json = dict[str, Any]


def assemble(
    tasks: Sequence[str],
    *,
    single_test: Mapping[str, ItemScores] | None = None,
    rows_test: Sequence[ItemScores] = (),
    trained: Sequence[Stage] = (),
    plan: Plan | None = None,
    mode: str = "curriculum",
) -> Json:
    """All sections of `result.json` that follow from item scores; what is not there yet is left out.

    single_test: item scores on `test` of the single-task runs (trained task -> task).
    rows_test: item scores on `test`, row 0 the initial policy, row s after stage s.   trained: all stages, done or not.
    plan: once it is solved.   mode: "curriculum" where the order that was run is the solved one.
    """
    out: Json = {"tasks": list(tasks)}
    if single_test:
        out["single"] = {task: _scores(row) for task, row in single_test.items()}
    if plan is not None and plan.transfer is not None and plan.decision is not None:
        out |= _solved(plan.transfer, plan.decision, [task for stage in plan.stages for task in stage.own])
        if mode != "curriculum":
            out["order_method"] = mode
        out["forecast_error"] = _forecast_error(plan.transfer, trained, rows_test[1:])
    if rows_test:
        out |= _realised(rows_test, trained)
    return out


def _solved(transfer: Transfer, decision: Decision, run: list[str]) -> Json:
    return {
        "transfer": {i: _dicts(row) for i, row in transfer.effects().items()},
        "items_dropped": dict(zip(transfer.tasks, transfer.dropped_K, strict=True)),
        "order": list(run),
        "order_method": decision.method,
        "solved_order": list(decision.order),
        "order_probability": decision.probability,
        "order_settled": decision.settled,
        "pairs": {a: dict(row) for a, row in decision.pairs.items()},
        "statement": decision.statement,
        "forecast": _dicts(predict.forecast(transfer, run)),
        "forecast_multiplicative": _dicts(predict.forecast(transfer, run, "multiplicative")),
    }


def _forecast_error(transfer: Transfer, stages: Sequence[Stage], rows: Sequence[ItemScores]) -> Json:
    """Form of the forecast -> measures over all stages that are done; {} before the first."""
    index = [transfer.tasks.index(stage.own[0]) for stage in stages][: len(rows)]
    realised = np.array([[scores.score(row[task]).value for task in transfer.tasks] for row in rows])
    out: Json = {}
    for form in get_args(predict.Form) if rows else ():
        predicted = np.clip(predict.walk(transfer.scores_MK, transfer.n_K, index, form)[1:], 0.0, 1.0)
        out[form] = _numbers(predict.forecast_error(predicted, realised)._asdict())
    return out


def _realised(rows: Sequence[ItemScores], trained: Sequence[Stage]) -> Json:
    done, own = rows[1:], [stage.own for stage in trained]
    names = ["joint" if stage.joint else stage.own[0] for stage in trained]
    stages = [
        {"task": name, "steps": stage.steps, "scores": _scores(row)}
        for name, stage, row in zip(names, trained, done, strict=False)
    ]
    out: Json = {"base": _scores(rows[0]), "stages": stages}
    if not done or len(done) < len(trained):
        return out
    first, last = rows[0], rows[-1]
    flips = {task: scores.flips(first[task], last[task]) for task in first}
    return out | {
        "final": _scores(last),
        "bwt": scores.backward_transfer(rows, own).as_dict(),
        "forward_transfer": scores.forward_transfer(rows, own).as_dict(),
        "forgetting": _numbers(scores.forgetting(rows, own)),
        "intervals": {
            "method": "95 %: Wilson for single scores of 0/1 items, paired percentile bootstrap over items for differences",
            "gain": _dicts({task: scores.mean_difference({task: first[task]}, last) for task in first}),
            "gain_average": scores.mean_difference(first, last).as_dict(),
        },
        "flips": {task: {"lost": lost, "gained": gained} for task, (lost, gained) in flips.items()},
    }


def _numbers(found: Mapping[str, float]) -> Json:
    """null for what is not finite."""
    return {name: x if np.isfinite(x) else None for name, x in found.items()}


def _dicts(estimates: Mapping[str, Estimate]) -> Json:
    return {task: estimate.as_dict() for task, estimate in estimates.items()}


def _scores(items: ItemScores) -> Json:
    return _dicts({task: scores.score(values) for task, values in items.items()})
