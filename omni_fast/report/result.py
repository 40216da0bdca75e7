"""What `result.json` holds, and how it is made from item scores.

`Result` is the checked form: a finished run has every field, a partial one (interrupted, or a task failed) leaves out
what it does not know yet. `assemble` computes every section that follows from item-level scores; the caller adds what
only it knows (seconds, throughput, peak_bytes, sandbox, judge, versions, config). Splits: `base`, `stages`, `final`,
`bwt`, `intervals` and (where measured) `single` come from `test`; `base_select`, `single_select`, `transfer`, the order
and the forecast come from `select`, which decides and is never the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from omni_fast.curriculum import predict, scores
from omni_fast.curriculum.decide import decide
from omni_fast.curriculum.scores import Estimate, ItemScores
from omni_fast.curriculum.transfer import measure, single_scores
from omni_fast.errors import UserError

Json = dict[str, JsonValue]


class Score(BaseModel):
    """A number, the items behind it and its 95 % interval; null where it could not be measured."""

    model_config = ConfigDict(extra="forbid")
    value: float | None
    n: int = Field(ge=0)
    low: float | None
    high: float | None


class Flips(BaseModel):
    """Items that went from 1 to 0 (lost) and from 0 to 1 (gained)."""

    lost: int
    gained: int


class StageResult(BaseModel):
    """One stage of the curriculum: its task ("joint" for all), its steps, test scores of every task after it."""

    model_config = ConfigDict(extra="allow")
    task: str
    steps: int
    scores: dict[str, Score]
    reused: bool = False


class Intervals(BaseModel):
    """Paired intervals of final - base on `test`, per task and averaged over the tasks."""

    method: str
    gain: dict[str, Score]
    gain_average: Score
    order_gap: Score | None = None


class Seconds(BaseModel):
    """Wall-clock seconds; they overlap with nothing but `total`."""

    model_config = ConfigDict(extra="allow")
    setup: float | None = None
    transfer: float | None = None
    train: float | None = None
    eval: float | None = None
    total: float | None = None


class Throughput(BaseModel):
    """Tokens per second over the whole run."""

    model_config = ConfigDict(extra="allow")
    rollout_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None


class ForecastError(BaseModel):
    """See `omni_fast.curriculum.predict.ForecastError`; null where it cannot be computed."""

    n: int
    mean_absolute: float | None
    bias: float | None
    rmse: float | None
    pearson: float | None
    spearman: float | None
    pearson_pooled: float | None


class Result(BaseModel):
    """A finished run. Further keys are kept as they are."""

    model_config = ConfigDict(extra="allow")
    tasks: list[str] = Field(min_length=1)
    base: dict[str, Score]
    single: dict[str, dict[str, Score]]
    transfer: dict[str, dict[str, Score]]
    order: list[str]
    order_method: str
    order_probability: float | None
    forecast: dict[str, Score]
    stages: list[StageResult]
    final: dict[str, Score]
    bwt: Score
    intervals: Intervals
    seconds: Seconds
    throughput: Throughput
    peak_bytes: int | None
    sandbox: str
    judge: str
    status: Literal["finished", "interrupted", "running"] = "finished"
    statement: str = ""
    forecast_multiplicative: dict[str, Score] = Field(default_factory=dict)
    forecast_error: dict[str, ForecastError] = Field(default_factory=dict)
    flips: dict[str, Flips] = Field(default_factory=dict)


def validate_result(data: Mapping[str, JsonValue]) -> Result:
    """Check a finished run's result. UserError that names the first wrong key."""
    try:
        return Result.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"The result has {error.error_count()} wrong or missing entries, the first is '{where}': {first['msg']};"
            " run the job to its end, or repair the file."
        ) from error


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
        out["base_select"] = _dicts({t: scores.score(base_select[t]) for t in names if t in base_select})
    if single_select:
        out["single_select"] = {t: _dicts(row) for t, row in single_scores(single_select).items()}
    reported = single_test or single_select
    if reported:
        out["single"] = {t: _dicts(row) for t, row in single_scores(reported).items()}
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
        "transfer_flips": {i: {j: dict(f) for j, f in row.items()} for i, row in transfer.flips().items()},
        "items_dropped": dict(zip(transfer.tasks, transfer.dropped_K, strict=True)),
        "order": list(run),
        "order_method": order_method or decision.method,
        "solved_order": list(decision.order),
        "order_probability": decision.probability,
        "order_settled": decision.settled,
        "second_order": list(decision.second) if decision.second else None,
        "beats_second": decision.beats_second,
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
            if form == "additive":
                out["forecast_rows"] = [_dicts(row) for row in rows]
            if len(realised):
                error = predict.forecast_error(predicted[: len(realised)], realised)
                errors[form] = {name: _number(getattr(error, name)) for name in error.__dataclass_fields__}
        out["forecast_error"] = errors
    return out


def _realised(names: list[str], rows: Sequence[ItemScores], trained: Sequence[tuple[str, int]], known: Json) -> Json:
    out: Json = {"base": _dicts({t: scores.score(rows[0][t]) for t in names if t in rows[0]})}
    done = rows[1:]
    out["stages"] = [
        {"task": task, "steps": steps, "scores": _dicts({t: scores.score(row[t]) for t in names if t in row})}
        for row, (task, steps) in zip(done, trained, strict=False)
    ]
    if not done or len(done) < len(trained):
        return out
    last = done[-1]
    own = [tuple(names) if task == "joint" else (task,) for task, _ in trained]
    out["final"] = _dicts({t: scores.score(last[t]) for t in names})
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
    data = estimate.as_dict()
    return {"value": data["value"], "n": data["n"], "low": data["low"], "high": data["high"]}


def _dicts(estimates: Mapping[str, Estimate]) -> Json:
    return {task: _dict(estimate) for task, estimate in estimates.items()}
