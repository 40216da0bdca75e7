"""The sections of report.html, from `result.json`, the rows of metrics.jsonl and sample completions.

Every section draws what is there, and the page names those that have nothing to draw: a partial or interrupted run, NaN
and missing keys all render. All text that comes from a run (completions above all) is escaped, and the page forbids
scripts and external resources by its own policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import JsonValue

from omni_fast.report import charts, training
from omni_fast.report.charts import Cell, Mark, MarkRow, duration, facts_table, table, text
from omni_fast.report.training import Json, Rows
from omni_fast.report.verdict import brief, estimate, headline, listing, mapping, names, number, points, sentences, span

MAX_SAMPLES_PER_TASK = 3
ERRORS = {  # of a forecast: heading, and whether it has a sign
    "mean_absolute": ("mean absolute", False),
    "bias": ("bias", True),
    "rmse": ("root mean square", False),
    "pearson": ("Pearson", True),
    "spearman": ("Spearman", True),
}
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
    samples: rows {"task", "prompt", "before", "after", "score_before", "score_after"}.
    """
    steps = training.latest_steps(metrics)
    bodies = {
        "What happened": _verdict(result),
        "Accuracy matrix": _matrix(result),
        "Transfer": _transfer(result),
        "The order": _order(result),
        "Forecast against realised": _forecast(result),
        "Reward while training": training.curves(result, steps, "reward", (0.0, 1.0)),
        "Entropy while training": training.curves(result, steps, "entropy", None) + _probe(result),
        "Signs of reward hacking": training.signs(result, steps),
        "Item flips": _flips(result),
        "Completions before and after": _samples(result, samples),
        "Stages": training.stages(result, steps),
        "Time and throughput": training.timings(result, steps),
        "How it was measured": _setting(result),
    }
    head = headline(result)
    tasks = ", ".join(names(result.get("tasks"))) or "no tasks"
    return charts.frame(
        f"omni_fast: {tasks}",
        f"omni_fast report · {_kicker(result)}",
        head.text,
        f"{_status(result)}{_tiles(result)}{charts.sections(bodies, NOTES)}",
        "Intervals are 95 %. They hold the noise of the test items, not that of the training seed: another seed can differ by"
        " more. The split select decided the order; results come from the split test, which decides nothing.",
    )


def _kicker(result: Json) -> str:
    parts = [_configured(result, "model", "path"), _configured(result, "curriculum", "mode")]
    return " · ".join([*filter(None, parts), ", ".join(names(result.get("tasks")))])


def _configured(result: Json, section: str, key: str) -> str:
    return str(mapping(mapping(result.get("config")).get(section)).get(key, ""))


def _status(result: Json) -> str:
    if result.get("status", "finished") == "finished":
        return ""
    rest = "The page shows what was measured up to here; the same command resumes it."
    return f"<p class=status><b>This run was interrupted.</b> {rest}</p>"


def _tiles(result: Json) -> str:
    seconds = mapping(result.get("seconds"))
    average, bwt = estimate(mapping(result.get("intervals")).get("gain_average")), estimate(result.get("bwt"))
    probability, peak = number(result.get("order_probability")), number(result.get("peak_bytes"))
    total, train = number(seconds.get("total")), number(seconds.get("train"))
    tiles = [
        (average.value, "average gain on test", points(average.value), span(average)),
        (bwt.value, "backward transfer", points(bwt.value), span(bwt)),
        (probability, "this order is the best in", f"{probability:.0%}", "of the bootstrap draws"),
        (total, "total time", duration(total), f"of which training {duration(train)}"),
        (peak, "peak memory", f"{peak / 2**30:.1f} GiB", ""),
    ]
    return charts.tiles([(what, shown, small) for value, what, shown, small in tiles if math.isfinite(value)])


def _verdict(result: Json) -> str:
    return charts.verdict([(found.tone, found.text) for found in sentences(result)])


def _matrix(result: Json) -> str:
    tasks, base = names(result.get("tasks")), result.get("base")
    if not base:
        return ""
    rows = [("initial policy", _score_cells(tasks, base))]
    for place, stage in enumerate(map(mapping, listing(result.get("stages"))), start=1):
        own = str(stage.get("task", ""))
        rows.append((f"{place}. after {own}", _score_cells(tasks, stage.get("scores"), own)))
    body = charts.heat_table(tasks, rows, scale=1.0, corner="policy \\ scored on")
    single = mapping(result.get("single"))
    if single:
        own_rows = [(f"only {task}", _score_cells(tasks, row, task)) for task, row in single.items()]
        alone = charts.heat_table(tasks, own_rows, scale=1.0, corner="policy \\ scored on")
        split = str(result.get("single_split", "select"))
        body = (
            f"<div class=beside><div><h3>The run, stage by stage</h3>{body}</div>"
            f"<div><h3>Each task alone, from the initial policy (split {text(split)})</h3>{alone}</div></div>"
        )
    return body


def _score_cells(tasks: Sequence[str], row: JsonValue, own: str = "") -> list[Cell]:
    """own: the task to frame, or "joint" for all."""
    scores = [estimate(mapping(row).get(task)) for task in tasks]
    return [
        Cell(score.value, points(score.value, False), brief(score), own in (task, "joint"))
        for task, score in zip(tasks, scores, strict=True)
    ]


def _transfer(result: Json) -> str:
    tasks, matrix = names(result.get("tasks")), mapping(result.get("transfer"))
    if not matrix:
        return ""
    return charts.transfer_table(tasks, {(i, j): estimate(mapping(matrix.get(i)).get(j)) for i in tasks for j in tasks})


def _order(result: Json) -> str:
    order = names(result.get("order"))
    if not order:
        return ""
    body = f"<div class=order>{'<i>→</i>'.join(f'<span>{text(task)}</span>' for task in order)}</div>"
    body += facts_table([("found by", text(str(result.get("order_method", "–"))))])
    tasks, pairs = names(result.get("tasks")), mapping(result.get("pairs"))
    if len(tasks) > 2 and pairs:
        body += charts.pair_table(
            tasks, {(i, j): number(mapping(pairs.get(i)).get(j)) for i in tasks for j in tasks if i != j}
        )
    return body


def _forecast(result: Json) -> str:
    kinds = [
        ("base", "initial policy", 7, True),
        ("forecast", "forecast (differences)", 2, False),
        ("forecast_multiplicative", "forecast (ratios)", 1, True),
        ("final", "realised", 0, False),
    ]
    found = {key: mapping(result.get(key)) for key, *_ in kinds}
    if not found["forecast"]:
        return ""
    kinds = [kind for kind in kinds if found[kind[0]] or kind[0] != "forecast_multiplicative"]
    rows = []
    for task in names(result.get("tasks")):
        scores = {key: estimate(row.get(task)) for key, row in found.items()}
        off = scores["forecast"].value - scores["final"].value
        note = f"forecast {points(off)} off" if math.isfinite(off) else "not realised yet"
        rows.append(MarkRow(task, [Mark(scores[key], style, hollow) for key, _, style, hollow in kinds], note))
    body = charts.mark_rows(rows, keys=[(name, style, hollow) for _, name, style, hollow in kinds], label="score")
    lines = []
    for form, error in mapping(result.get("forecast_error")).items():
        n, *rest = (number(mapping(error).get(key)) for key in ("n", *ERRORS))
        lines.append([form, f"{n:.0f}", *(points(x, ERRORS[key][1]) for key, x in zip(ERRORS, rest, strict=True))])
    if lines:
        body += "<h3>Error over all stages and tasks</h3>"
        body += table(["forecast", "points", *(name for name, _ in ERRORS.values())], lines)
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
    prompt = sample.get("prompt")
    given = f"<h4>Prompt</h4><pre>{text(prompt)}</pre>" if isinstance(prompt, str) else ""
    return f"<div class=sample>{given}<div class=pair>{''.join(sides)}</div></div>"


def _setting(result: Json) -> str:
    model = _configured(result, "model", "path")
    facts = [("model", text(model))] if model else []
    facts += [(key, text(str(result[key]))) for key in ("sandbox", "judge") if result.get(key)]
    if method := mapping(result.get("intervals")).get("method"):
        facts.append(("intervals", text(str(method))))
    if sizes := [f"{task} {estimate(score).n}" for task, score in mapping(result.get("base")).items()]:
        facts.append(("test items", text(", ".join(sizes))))
    for policy, value in mapping(result.get("truncated")).items():
        listed = ", ".join(f"{task} {number(share):.0%}" for task, share in mapping(value).items())
        facts.append((f"met the token limit, {_policy_name(policy)}", text(listed)))
    if versions := mapping(result.get("versions")):
        facts.append(("versions", text(", ".join(f"{name} {value}" for name, value in versions.items()))))
    return facts_table(facts) + (charts.configuration(result["config"]) if result.get("config") else "")
