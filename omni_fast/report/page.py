"""The sections of report.html, from `result.json`, the rows of metrics.jsonl and sample completions.

Every section draws what is there, and the page names those that have nothing to draw: a partial or interrupted run, NaN
and missing keys all render. All text that comes from a run (completions above all) is escaped, and the page forbids
scripts and external resources by its own policy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from omni_fast.report import charts, hacking, training
from omni_fast.report.charts import Cell, Mark, MarkRow, duration, facts_table, table, text
from omni_fast.report.verdict import brief, headline, listing, mapping, names, number, points, sentences, span

Json = Mapping[str, JsonValue]
Rows = Sequence[Json]

MAX_SAMPLES_PER_TASK = 3
NOTES = {
    "Accuracy matrix": (
        "Test score of every task (columns) for the initial policy and after each stage (rows). The framed cell is the task"
        " that the stage trained. Small print: the 95 % interval."
    ),
    "Transfer": (
        "How training one task (rows) moved the score of the others (columns), from the initial policy, on the split select."
        " Hatched cells are losses; the framed diagonal is the task's own gain, which no order can change."
    ),
    "Forecast against realised": (
        "The forecast adds the measured transfer of every later task to the score a task reached in its own run. It was made"
        " on the split select before the curriculum ran; realised scores are those of the split test."
    ),
    "Reward while training": (
        "Mean reward of the samples of a step. Curves of one task share a panel: its own run and its stage."
    ),
    "Entropy while training": (
        "Mean token entropy of the policy's samples, in nats. A collapse in one stage limits what later stages can explore."
    ),
    "Signs of reward hacking": (
        "Shares of a step's samples, 0 to 1. None of them proves a hack and none changes a reward: they say where to look."
    ),
    "Item flips": (
        "Test items solved before and no longer (lost), and the other way round (gained). A net 0 can hide many."
    ),
    "Completions before and after": "The same prompts, answered by the initial and by the final policy.",
}


def render(result: Json, metrics: Rows, samples: Rows) -> str:
    """The whole page.

    result: what result.json holds, complete or not.   metrics: the rows of metrics.jsonl.
    samples: rows {"task", "prompt", "before", "after", "score_before", "score_after"}, "reference" optional.
    """
    steps = training.latest_steps(metrics)
    sections = {
        "What happened": _verdict(result),
        "Accuracy matrix": _matrix(result),
        "Transfer": _transfer(result),
        "The order": _order(result),
        "Forecast against realised": _forecast(result),
        "Reward while training": training.curves(result, steps, "reward", (0.0, 1.0)),
        "Entropy while training": training.curves(result, steps, "entropy", None) + _probe(result),
        "Signs of reward hacking": hacking.signs(result, steps),
        "Item flips": _flips(result),
        "Completions before and after": _samples(result, samples),
        "Stages": training.stages(result, steps),
        "Time and throughput": training.timings(result, steps),
        "How it was measured": _setting(result),
    }
    drawn = "".join(charts.section(title, NOTES.get(title, ""), body) for title, body in sections.items() if body)
    missing = [title for title, body in sections.items() if not body]
    if missing:
        drawn += charts.section("Not there yet", "", f"<p>Nothing was recorded for: {text(', '.join(missing))}.</p>")
    head = headline(result)
    tasks = ", ".join(names(result.get("tasks"))) or "no tasks"
    return charts.frame(
        f"omni_fast: {tasks}",
        f"omni_fast report · {_kicker(result)}",
        head.text,
        f"{_status(result)}{_tiles(result)}{drawn}",
        "Intervals are 95 %. They hold the noise of the test items, not that of the training seed: another seed can differ by"
        " more. The split select decided the order; results come from the split test, which decides nothing.",
    )


def _kicker(result: Json) -> str:
    parts = [result.get("name"), result.get("model"), result.get("mode"), result.get("started")]
    known = [part for part in parts if isinstance(part, str) and part]
    return " · ".join([*known, ", ".join(names(result.get("tasks")))])


def _status(result: Json) -> str:
    status = result.get("status", "finished")
    if status == "finished":
        return ""
    words = {"interrupted": "This run was interrupted.", "running": "This run is still going."}
    sentence = words.get(str(status), f"State of the run: {status}.")
    rest = "The page shows what was measured up to here; the same command resumes it."
    return f"<p class=status><b>{text(sentence)}</b> {rest}</p>"


def _tiles(result: Json) -> str:
    intervals, seconds = mapping(result.get("intervals")), mapping(result.get("seconds"))
    average, bwt = mapping(intervals.get("gain_average")), mapping(result.get("bwt"))
    tiles: list[tuple[str, str, str]] = []
    if math.isfinite(number(average.get("value"))):
        tiles.append(("average gain on test", points(number(average.get("value"))), span(average)))
    if math.isfinite(number(bwt.get("value"))):
        tiles.append(("backward transfer", points(number(bwt.get("value"))), span(bwt)))
    probability = number(result.get("order_probability"))
    if math.isfinite(probability):
        tiles.append(("this order is the best in", f"{probability:.0%}", "of the bootstrap draws"))
    total = number(seconds.get("total"))
    if math.isfinite(total):
        tiles.append(("total time", duration(total), f"of which training {duration(number(seconds.get('train')))}"))
    peak = number(result.get("peak_bytes"))
    if math.isfinite(peak):
        tiles.append(("peak memory", f"{peak / 2**30:.1f} GiB", ""))
    return charts.tiles(tiles)


def _verdict(result: Json) -> str:
    found = sentences(result)
    if not found:
        return ""
    return f"<ul class=verdict>{''.join(f'<li class={s.tone}>{text(s.text)}</li>' for s in found)}</ul>"


def _matrix(result: Json) -> str:
    tasks = names(result.get("tasks"))
    base = mapping(result.get("base"))
    if not base:
        return ""
    rows = [("initial policy", [_score_cell(base.get(task)) for task in tasks])]
    for place, value in enumerate(listing(result.get("stages")), start=1):
        stage = mapping(value)
        own, row = str(stage.get("task", "")), mapping(stage.get("scores"))
        cells = [_score_cell(row.get(task), outlined=task == own or own == "joint") for task in tasks]
        rows.append((f"{place}. after {own}", cells))
    body = charts.heat_table(tasks, rows, scale=1.0, corner="policy \\ scored on")
    single = mapping(result.get("single"))
    if single:
        split = str(result.get("single_split", "select"))
        own_rows = [
            (f"only {trained}", [_score_cell(mapping(row).get(task), outlined=task == trained) for task in tasks])
            for trained, row in single.items()
        ]
        alone = charts.heat_table(tasks, own_rows, scale=1.0, corner="policy \\ scored on")
        body = (
            f"<div class=beside><div><h3>The run, stage by stage</h3>{body}</div>"
            f"<div><h3>Each task alone, from the initial policy (split {text(split)})</h3>{alone}</div></div>"
        )
    return body


def _score_cell(value: JsonValue, outlined: bool = False) -> Cell:
    score = mapping(value)
    x = number(score.get("value"))
    return Cell(x, points(x, signed=False), brief(score, signed=False), outlined)


def _transfer(result: Json) -> str:
    tasks, matrix = names(result.get("tasks")), mapping(result.get("transfer"))
    if not matrix:
        return ""
    rows = []
    for trained in tasks:
        effects = [mapping(mapping(matrix.get(trained)).get(scored)) for scored in tasks]
        values = [number(effect.get("value")) for effect in effects]
        cells = [Cell(x, points(x), brief(e), trained == j) for x, e, j in zip(values, effects, tasks, strict=True)]
        rows.append((trained, cells))
    off = [abs(c.value) for _, cells in rows for c in cells if not c.outlined and math.isfinite(c.value)]
    return charts.heat_table(tasks, rows, scale=max([*off, 0.05]) * 1.2, corner="trained \\ scored on")


def _mark(score: Json, style: int, hollow: bool = False) -> Mark:
    return Mark(number(score.get("value")), number(score.get("low")), number(score.get("high")), style, hollow)


def _order(result: Json) -> str:
    order = names(result.get("order"))
    if not order:
        return ""
    body = f"<div class=order>{'<i>→</i>'.join(f'<span>{text(task)}</span>' for task in order)}</div>"
    body += facts_table([("found by", text(str(result.get("order_method", "–"))))])
    tasks, pairs = names(result.get("tasks")), mapping(result.get("pairs"))
    if len(tasks) > 2 and pairs:
        rows = []
        for first in tasks:
            row = mapping(pairs.get(first))
            values = [number(row.get(then)) for then in tasks]
            rows.append((f"{first} first", [Cell(x, f"{x:.0%}" if math.isfinite(x) else "") for x in values]))
        body += "<h3>Which of two tasks is better placed right before the other (share of draws)</h3>"
        body += charts.heat_table([f"then {task}" for task in tasks], rows, scale=1.0, corner="")
    return body


def _forecast(result: Json) -> str:
    tasks, forecast, final = names(result.get("tasks")), mapping(result.get("forecast")), mapping(result.get("final"))
    if not forecast:
        return ""
    ratio, base = mapping(result.get("forecast_multiplicative")), mapping(result.get("base"))
    rows = []
    for task in tasks:
        marks = [_mark(mapping(base.get(task)), 7, True), _mark(mapping(forecast.get(task)), 2)]
        if ratio:
            marks.append(_mark(mapping(ratio.get(task)), 1, True))
        marks.append(_mark(mapping(final.get(task)), 0))
        off = number(mapping(forecast.get(task)).get("value")) - number(mapping(final.get(task)).get("value"))
        rows.append(MarkRow(task, marks, f"forecast {points(off)} off" if math.isfinite(off) else "not realised yet"))
    keys = [("initial policy", 7, True), ("forecast (differences)", 2, False)]
    keys += [("forecast (ratios)", 1, True)] if ratio else []
    keys += [("realised", 0, False)]
    body = charts.mark_rows(rows, keys=keys, label="score")
    lines = []
    for form, value in mapping(result.get("forecast_error")).items():
        error = mapping(value)
        cells = [number(error.get(key)) for key in ("mean_absolute", "bias", "rmse", "pearson", "spearman")]
        shown = [points(cells[0], False), points(cells[1]), points(cells[2], False), points(cells[3]), points(cells[4])]
        lines.append([form, str(int(number(error.get("n")))) if math.isfinite(number(error.get("n"))) else "–", *shown])
    if lines:
        body += "<h3>Error over all stages and tasks</h3>" + table(
            ["forecast", "points", "mean absolute", "bias", "root mean square", "Pearson", "Spearman"], lines
        )
        body += (
            "<p class=dim>Correlations are within task: each task's values are centred first, because the tasks' levels"
            " alone would correlate.</p>"
        )
    return body


def _probe(result: Json) -> str:
    """Entropy on a fixed probe set at each evaluation: policy -> task -> nats."""
    tasks = names(result.get("tasks"))
    rows = []
    for policy, value in mapping(result.get("entropy")).items():
        values = [number(mapping(value).get(task)) for task in tasks]
        rows.append((_policy_name(policy), [Cell(x, points(x, signed=False)) for x in values]))
    known = [cell.value for _, cells in rows for cell in cells if math.isfinite(cell.value)]
    if not known:
        return ""
    title = "<h3>On a fixed probe set, at each evaluation (nats)</h3>"
    return title + charts.heat_table(tasks, rows, scale=max(known), corner="policy \\ prompts of")


def _policy_name(name: str) -> str:
    return "initial policy" if name == "base" else f"after {name.rsplit(':', 1)[-1]}"


def _flips(result: Json) -> str:
    flips = mapping(result.get("flips"))
    rows = []
    for task in names(result.get("tasks")):
        lost, gained = (number(mapping(flips.get(task)).get(key)) for key in ("lost", "gained"))
        if math.isfinite(lost) and math.isfinite(gained):
            rows.append((task, int(lost), int(gained)))
    return charts.flip_bars(rows) if rows else ""


def _samples(result: Json, samples: Rows) -> str:
    """Rows {"task", "prompt", "before", "after", "score_before", "score_after", "reference"?}."""
    tasks = names(result.get("tasks"))
    order = [*tasks, *sorted({str(s.get("task", "")) for s in samples} - set(tasks))]
    body = []
    for task in order:
        own = [sample for sample in samples if str(sample.get("task", "")) == task][:MAX_SAMPLES_PER_TASK]
        if own:
            body.append(f"<h3>{text(task)}</h3>{''.join(map(_sample, own))}")
    return "".join(body)


def _sample(sample: Json) -> str:
    sides = []
    for when, title in (("before", "Initial policy"), ("after", "Final policy")):
        answer, score = sample.get(when), number(sample.get(f"score_{when}"))
        shown = text(answer) if isinstance(answer, str) and answer else "<i>nothing yet</i>"
        grade = f" · score <b>{score:.2f}</b>" if math.isfinite(score) else ""
        sides.append(f"<div><h4>{title}{grade}</h4><pre>{shown}</pre></div>")
    prompt, reference = sample.get("prompt"), sample.get("reference")
    given = f"<h4>Prompt</h4><pre>{text(prompt)}</pre>" if isinstance(prompt, str) else ""
    gold = (
        f"<details><summary>Reference</summary><pre>{text(reference)}</pre></details>"
        if isinstance(reference, str)
        else ""
    )
    return f"<div class=sample>{given}<div class=pair>{''.join(sides)}</div>{gold}</div>"


def _setting(result: Json) -> str:
    facts = []
    for key in ("model", "sandbox", "judge"):
        value = result.get(key)
        if isinstance(value, str) and value:
            facts.append((key, text(value)))
    method = mapping(result.get("intervals")).get("method")
    if isinstance(method, str):
        facts.append(("intervals", text(method)))
    sizes = {
        task: int(number(mapping(s).get("n")))
        for task, s in mapping(result.get("base")).items()
        if math.isfinite(number(mapping(s).get("n")))
    }
    if sizes:
        facts.append(("test items", text(", ".join(f"{task} {n}" for task, n in sizes.items()))))
    for policy, value in mapping(result.get("truncated")).items():
        shares = [(task, number(share)) for task, share in mapping(value).items()]
        listed = ", ".join(f"{task} {share:.0%}" for task, share in shares if math.isfinite(share))
        facts.append((f"met the token limit, {_policy_name(policy)}", text(listed)))
    versions = mapping(result.get("versions"))
    if versions:
        facts.append(("versions", text(", ".join(f"{name} {value}" for name, value in versions.items()))))
    config = result.get("config")
    body = facts_table(facts)
    if config:
        shown = json.dumps(config, indent=2, ensure_ascii=False, default=str)
        body += f"<details><summary>Configuration</summary><pre>{text(shown)}</pre></details>"
    return body
