"""The sections of report.html, from `result.json`, the rows of metrics.jsonl and sample completions.

Every section draws what is there, and the page names those that have nothing to draw: a run that was interrupted renders
at any point. All text that comes from a run (completions above all) is escaped, and the page forbids
scripts and external resources by its own policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from omni_fast.curriculum.scores import ScoreDict
from omni_fast.report import charts, training
from omni_fast.report.charts import ERROR_HEADS, Cell, Mark, MarkRow, duration, facts_table, table, text
from omni_fast.report.training import Rows
from omni_fast.report.verdict import Json, brief, estimate, headline, number, points, sentences, span

MAX_SAMPLES_PER_TASK = 3
KINDS = (  # of scores in the forecast's drawing: key of the result, name, style, hollow
    ("base", "initial policy", 7, True),
    ("forecast", "forecast (differences)", 2, False),
    ("forecast_multiplicative", "forecast (ratios)", 1, True),
    ("final", "realised", 0, False),
)
SIGNED = ("bias", "pearson", "spearman")  # measures of a forecast's error
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
    steps = training.by_task(metrics)
    tasks = result["tasks"]
    bodies = {
        "What happened": charts.verdict(sentences(result)),
        "Accuracy matrix": _matrix(result),
        "Transfer": _transfer(result),
        "The order": _order(result),
        "Forecast against realised": _forecast(result),
        "Reward while training": training.curves(result, steps, "reward", (0.0, 1.0)),
        "Entropy while training": training.curves(result, steps, "entropy", None) + _probe(result),
        "Signs of reward hacking": training.signs(result, steps),
        "Item flips": _flips(result),
        "Completions before and after": _samples(tasks, samples),
        "Stages": training.stages(result, steps),
        "Time and throughput": training.timings(result, steps),
        "How it was measured": _setting(result),
    }
    status, config = "", result["config"]
    if result["status"] != "finished":
        rest = "The page shows what was measured up to here; the same command resumes it."
        status = f"<p class=status><b>This run was interrupted.</b> {rest}</p>"
    return charts.frame(
        f"omni_fast: {', '.join(tasks)}",
        f"omni_fast report · {config['model']['path']} · {config['curriculum']['mode']} · {', '.join(tasks)}",
        headline(result).text,
        f"{status}{_tiles(result)}{charts.sections(bodies, NOTES)}",
        "Intervals are 95 %. They hold the noise of the test items, not that of the training seed: another seed can differ by"
        " more. The split select decided the order; results come from the split test, which decides nothing.",
    )


def _tiles(result: Json) -> str:
    average, bwt = estimate(result.get("intervals", {}).get("gain_average")), estimate(result.get("bwt"))
    probability, peak = number(result.get("order_probability")), number(result.get("peak_bytes"))
    total, train = (result["seconds"].get(part, math.nan) for part in ("total", "train"))
    tiles = [
        (average.value, "average gain on test", points(average.value), span(average)),
        (bwt.value, "backward transfer", points(bwt.value), span(bwt)),
        (probability, "this order is the best in", f"{probability:.0%}", "of the bootstrap draws"),
        (total, "total time", duration(total), f"of which training {duration(train)}"),
        (peak, "peak memory", f"{peak / 2**30:.1f} GiB", ""),
    ]
    return charts.tiles([(what, shown, small) for value, what, shown, small in tiles if math.isfinite(value)])


def _matrix(result: Json) -> str:
    tasks = result["tasks"]
    if "base" not in result:
        return ""
    rows = [("initial policy", _score_cells(tasks, result["base"]))]
    for place, stage in enumerate(result["stages"], start=1):
        rows.append((f"{place}. after {stage['task']}", _score_cells(tasks, stage["scores"], stage["task"])))
    body = charts.heat_table(tasks, rows, scale=1.0, corner="policy \\ scored on")
    if single := result.get("single"):
        own_rows = [(f"only {task}", _score_cells(tasks, row, task)) for task, row in single.items()]
        alone = charts.heat_table(tasks, own_rows, scale=1.0, corner="policy \\ scored on")
        body = (
            f"<div class=beside><div><h3>The run, stage by stage</h3>{body}</div>"
            f"<div><h3>Each task alone, from the initial policy (split test)</h3>{alone}</div></div>"
        )
    return body


def _score_cells(tasks: Sequence[str], row: Mapping[str, ScoreDict], own: str = "") -> list[Cell]:
    """own: the task to frame, or "joint" for all. A task that was added to the run may have no score yet."""
    scores = {task: estimate(row.get(task)) for task in tasks}
    return [Cell(x.value, points(x.value, False), brief(x), own in (task, "joint")) for task, x in scores.items()]


def _transfer(result: Json) -> str:
    effects = {(i, j): estimate(x) for i, row in result.get("transfer", {}).items() for j, x in row.items()}
    return charts.transfer_table(result["tasks"], effects) if effects else ""


def _order(result: Json) -> str:
    if "order" not in result:
        return ""
    body = f"<div class=order>{'<i>→</i>'.join(f'<span>{text(task)}</span>' for task in result['order'])}</div>"
    body += facts_table([("found by", result["order_method"])])
    if len(result["tasks"]) > 2 and "pairs" in result:
        body += charts.pair_table(result["tasks"], result["pairs"])
    return body


def _forecast(result: Json) -> str:
    if not result.get("forecast"):
        return ""
    rows = []
    for task in result["tasks"]:
        scores = {key: estimate(result.get(key, {}).get(task)) for key, *_ in KINDS}
        off = scores["forecast"].value - scores["final"].value
        note = f"forecast {points(off)} off" if math.isfinite(off) else "not realised yet"
        rows.append(MarkRow(task, [Mark(scores[key], style, hollow) for key, _, style, hollow in KINDS], note))
    body = charts.mark_rows(rows, keys=[kind[1:] for kind in KINDS], label="score")
    lines = [
        [form, str(error["n"]), *(points(number(x), name in SIGNED) for name, x in error.items() if name != "n")]
        for form, error in result["forecast_error"].items()
    ]
    if lines:
        body += f"<h3>Error over all stages and tasks (correlations within task)</h3>{table(ERROR_HEADS, lines)}"
    return body


def _probe(result: Json) -> str:
    """Entropy on a fixed probe set at each evaluation: policy -> task -> nats."""
    tasks, policies = result["tasks"], result["entropy"].items()
    rows = [(_policy_name(policy), [found.get(task, math.nan) for task in tasks]) for policy, found in policies]
    drawn = charts.entropy_table(tasks, rows)
    return drawn and f"<h3>On a fixed probe set, at each evaluation (nats)</h3>{drawn}"


def _policy_name(name: str) -> str:
    return "initial policy" if name == "base" else f"after {name.rsplit(':', 1)[-1]}"


def _flips(result: Json) -> str:
    rows = [[task, f"−{count['lost']}", f"+{count['gained']}"] for task, count in result.get("flips", {}).items()]
    return table(["task", "lost", "gained"], rows) if rows else ""


def _samples(tasks: Sequence[str], samples: Rows) -> str:
    body = []
    for task in tasks:
        own = [sample for sample in samples if sample["task"] == task][:MAX_SAMPLES_PER_TASK]
        if own:
            body.append(f"<h3>{text(task)}</h3>{''.join(map(_sample, own))}")
    return "".join(body)


def _sample(sample: Mapping[str, Any]) -> str:
    sides = []
    for when, title in (("before", "Initial policy"), ("after", "Final policy")):
        score = sample[f"score_{when}"]
        grade = "" if score is None else f" · score <b>{score:.2f}</b>"
        sides.append(f"<div><h4>{title}{grade}</h4><pre>{text(sample[when]) or '<i>nothing</i>'}</pre></div>")
    given = f"<h4>Prompt</h4><pre>{text(sample['prompt'])}</pre>"
    return f"<div class=sample>{given}<div class=pair>{''.join(sides)}</div></div>"


def _setting(result: Json) -> str:
    facts = [("model", result["config"]["model"]["path"])]
    facts += [(key, result[key]) for key in ("sandbox", "judge") if key in result]
    if "intervals" in result:
        facts.append(("intervals", result["intervals"]["method"]))
    if base := result.get("base"):
        facts.append(("test items", ", ".join(f"{task} {score['n']}" for task, score in base.items())))
    for policy, shares in result["truncated"].items():
        listed = ", ".join(f"{task} {share:.0%}" for task, share in shares.items())
        facts.append((f"met the token limit, {_policy_name(policy)}", listed))
    facts.append(("versions", ", ".join(f"{name} {value}" for name, value in result["versions"].items())))
    return facts_table(facts) + charts.configuration(result["config"])
