"""What `result.json` holds, and how it is made from item scores.

`assemble` computes every section that follows from item-level scores; the caller adds what only it knows (seconds,
throughput, peak_bytes, sandbox, judge, versions, config). A partial run (interrupted, or a task failed) leaves out what
it does not know yet. Splits: `base`, `stages`, `final`, `bwt`, `intervals` and (where measured) `single` come from
`test`; `base_select`, `single_select`, `transfer`, the order and the forecast from `select`, which decides and is never
the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import JsonValue

from omni_fast.curriculum import predict, scores
from omni_fast.curriculum.decide import decide
from omni_fast.curriculum.scores import Estimate, ItemScores
from omni_fast.curriculum.transfer import measure

Json = dict[str, JsonValue]


def assemble(
    tasks: Sequence[str],
    *,
    base_select: ItemScores | None = None,
    single_select: Mapping[str, ItemScores] | None = None,
    single_test: Mapping[str, ItemScores] | None = None,
    rows_test: Sequence[ItemScores] = (),
    trained: Sequence[tuple[str, int]] = (),
    order: Sequence[str] | None = None,
    order_method: str | None = None,
    draws: int = scores.DRAWS,
    seed: int = 0,
) -> Json:
    """All sections of `result.json` that follow from item scores; what is not there yet is left out.

    base_select, single_select: item scores on `select` of the initial policy and of the single-task runs (trained task
    -> task). Transfer, order and forecast appear once every task has its run.
    single_test: the same on `test` where it was measured; `single` then comes from it.
    rows_test: item scores on `test`, row 0 the initial policy, row s after stage s.   trained: (task or "joint", steps)
    a stage.
    order, order_method: the order that was run, when it is not the solved one ("order", "reversed", "random").
    draws, seed: of the bootstrap behind transfer and order; the same as in the plan give the same probabilities.
    """
    names = list(tasks)
    out: Json = {"tasks": list(names)}
    if base_select is not None:
        out["base_select"] = _scores(base_select)
    if single_select:
        out["single_select"] = {task: _scores(row) for task, row in single_select.items()}
    reported = single_test or single_select
    if reported:
        out["single"] = {task: _scores(row) for task, row in reported.items()}
        out["single_split"] = "test" if single_test else "select"
    if base_select is not None and single_select is not None and set(single_select) == set(names):
        out |= _solved(names, base_select, single_select, rows_test, trained, order, order_method, draws, seed)
    if rows_test:
        out |= _realised(names, rows_test, trained, out)
    return out


def _solved(
    names: list[str],
    base: ItemScores,
    single: Mapping[str, ItemScores],
    rows_test: Sequence[ItemScores],
    trained: Sequence[tuple[str, int]],
    order: Sequence[str] | None,
    order_method: str | None,
    draws: int,
    seed: int,
) -> Json:
    transfer = measure(base, {task: single[task] for task in names}, draws=draws, seed=seed)
    decision = decide(transfer)
    run = list(order or decision.order)
    out: Json = {
        "transfer": {i: _dicts(row) for i, row in transfer.effects().items()},
        "items_dropped": dict(zip(transfer.tasks, transfer.dropped_K, strict=True)),
        "order": list(run),
        "order_method": order_method or decision.method,
        "solved_order": list(decision.order),
        "order_probability": decision.probability,
        "order_settled": decision.settled,
        "second_order": list(decision.second) if decision.second else None,
        "order_gap": _dict(decision.gap) if decision.gap else None,
        "more_items": dict(decision.more_items) if decision.more_items is not None else None,
        "pairs": {a: dict(row) for a, row in decision.pairs.items()},
        "statement": decision.statement,
        "forecast": _dicts(predict.forecast(transfer, run)),
        "forecast_multiplicative": _dicts(predict.forecast(transfer, run, "multiplicative")),
    }
    stages = [task for task, _ in trained]
    if stages and all(task in names for task in stages):
        errors: Json = {}
        realised = np.array([[scores.score(row[t]).value for t in names] for row in rows_test[1:]])
        for form in ("additive", "multiplicative"):
            rows = predict.forecast_rows(transfer, stages, form)[1 : len(realised) + 1]
            predicted = np.array([[row[t].value for t in names] for row in rows])
            if len(realised):
                error = predict.forecast_error(predicted[: len(realised)], realised)
                errors[form] = {name: _number(getattr(error, name)) for name in error.__dataclass_fields__}
        out["forecast_error"] = errors
    return out


def _realised(names: list[str], rows: Sequence[ItemScores], trained: Sequence[tuple[str, int]], known: Json) -> Json:
    out: Json = {"base": _scores(rows[0])}
    done = rows[1:]
    out["stages"] = [
        {"task": task, "steps": steps, "scores": _scores(row)}
        for row, (task, steps) in zip(done, trained, strict=False)
    ]
    if not done or len(done) < len(trained):
        return out
    last = done[-1]
    own = [tuple(names) if task == "joint" else (task,) for task, _ in trained]
    out["final"] = _scores(last)
    out["bwt"] = _dict(scores.backward_transfer(rows, own))
    out["forward_transfer"] = _dict(scores.forward_transfer(rows, own))
    out["forgetting"] = {t: _number(x) for t, x in scores.forgetting(rows, own).items()}
    first = {t: rows[0][t] for t in names}
    out["intervals"] = {
        "method": "95 %: Wilson for single scores of 0/1 items, paired percentile bootstrap over items for differences",
        "gain": _dicts({t: scores.difference(first[t], last[t]) for t in names}),
        "gain_average": _dict(scores.mean_difference(first, last)),
        "order_gap": known.get("order_gap"),
    }
    flips = {t: scores.flips(first[t], last[t]) for t in names}
    out["flips"] = {t: {"lost": lost, "gained": gained} for t, (lost, gained) in flips.items()}
    return out


def _number(x: float | int) -> float | int | None:
    return x if np.isfinite(x) else None


def _dict(estimate: Estimate) -> Json:
    found = estimate.as_dict()
    return {"value": found["value"], "n": found["n"], "low": found["low"], "high": found["high"]}


def _dicts(estimates: Mapping[str, Estimate]) -> Json:
    return {task: _dict(estimate) for task, estimate in estimates.items()}


def _scores(items: ItemScores) -> Json:
    return _dicts({task: scores.score(values) for task, values in items.items()})
