"""The page: whole, partial and hostile input all render to well-formed, self-contained HTML."""

from __future__ import annotations

import copy
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.curriculum.scores import Estimate
from omni_fast.curriculum.stages import Stage
from omni_fast.report import charts
from omni_fast.report.charts import write_page
from omni_fast.report.page import render
from omni_fast.report.result import assemble
from omni_fast.report.training import PARTS, by_task
from omni_fast.report.verdict import headline, points, sentences

VOID = {"meta"}


class Checker(HTMLParser):
    """Collects tags and text, and fails on an unbalanced tree."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"an event handler: {name}"
            assert name not in ("src", "href"), f"an external reference: {value}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check(page: str) -> str:
    """Well-formed, no script, no NaN in a drawing; returns the visible text."""
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert "script" not in checker.tags
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert not re.search(r"\bnan\b|\binf\b", re.sub(r'<(text|title)[^>]*>.*?</\1>|aria-label="[^"]*"', "", drawings)), (
        "a NaN coordinate"
    )
    assert "url(http" not in page and "@import" not in page
    return " ".join(checker.words)


def test_full_report(fake_run, tmp_path):
    result, metrics, samples = fake_run
    path = tmp_path / "report.html"
    write_page(path, render(result, metrics, samples))
    page = path.read_text(encoding="utf-8")
    words = check(page)
    for part in ("Accuracy matrix", "Transfer", "The order", "Forecast against realised", "Entropy", "Item flips"):
        assert part in words
    assert "bubblewrap" in words and "frozen base" in words and "12 min 41 s" in words and "2.13.0" in words
    assert "<script>alert('sea')" in words, "the completion is shown as text"
    assert "Not there yet" not in words
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert len(page) < 300_000


def test_headline_and_sentences_follow_the_intervals(fake_run):
    result, _, _ = fake_run
    assert headline(result).tone == "good" and "rose by 0." in headline(result).text
    found = " ".join(s.text for s in sentences(result))
    assert "Rose: math" in found and "Did not rise beyond noise: writing" in found
    assert ("cannot tell" in found) == (not result["order_settled"])
    worse = copy.deepcopy(result)
    worse["intervals"]["gain_average"] = {"value": -0.05, "n": 400, "low": -0.08, "high": -0.02}
    assert headline(worse).tone == "bad" and "fell by 0.050" in headline(worse).text
    assert "run backwards" in " ".join(s.text for s in sentences({**result, "order_method": "reversed"}))
    open_ = copy.deepcopy(result)
    open_["intervals"]["gain_average"] = {"value": 0.01, "n": 400, "low": -0.02, "high": 0.04}
    assert headline(open_).tone == "open" and "beyond noise" in headline(open_).text


def test_dropped_items_are_said(fake_run):
    words = check(render({**fake_run[0], "items_dropped": {"writing": 3, "math": 0}}, [], []))
    assert "has no score for them: writing 3." in words


def test_model_mode_and_the_stage_that_a_run_stands_for_are_told(fake_run):
    words = check(render(*fake_run))
    first = fake_run[0]["order"][0]
    assert "omni_fast report · SmolLM2-135M · order · math, code, qa, writing" in words
    assert "own run, also stage 1" in words and f"which is the same stage: {first}." in words


PLANNED = ("transfer", "order", "order_method", "pairs", "statement", "forecast", "forecast_error", "order_probability")
SECTIONS = (("base", "stages"), ("single",), PLANNED)
LAST = ("final", "bwt", "intervals", "flips")


@pytest.mark.parametrize("known", range(len(SECTIONS) + 1))
def test_a_run_that_was_interrupted_shows_what_it_has(fake_run, known):
    result, metrics, samples = fake_run
    without = [*itertools.chain(*SECTIONS[known:]), *LAST]
    partial = {key: value for key, value in result.items() if key not in without}
    for rows in (metrics[:20] if known else [], metrics):
        words = check(render({**partial, "status": "interrupted"}, rows, samples if known else []))
    assert "not finished" in words and "resumes" in words and "Not there yet" in words
    assert ("only code" in words) == (known > 1) and ("of the bootstrap draws" in words) == (known > 2)


def test_a_task_that_was_added_has_no_scores_yet(fake_run):
    result, metrics, samples = fake_run
    partial = {key: value for key, value in result.items() if key not in (*itertools.chain(*SECTIONS), *LAST)}
    words = check(render({**partial, "tasks": [*result["tasks"], "new"], "base": result["base"], "stages": []}, [], []))
    assert "new" in words and "not finished" in words


def test_a_run_that_measures_nothing_shows_its_stages(fake_run):
    result, metrics, samples = fake_run
    unmeasured = {
        key: result[key] for key in ("tasks", "base", "stages", "final", "bwt", "intervals", "flips", "order")
    }
    rest = {
        key: result[key] for key in ("status", "seconds", "throughput", "config", "versions", "entropy", "truncated")
    }
    none = {"order_method": "random", "single": {}, "transfer": {}, "forecast": {}, "statement": "Not measured."}
    words = check(render({**unmeasured, **rest, **none, "order_probability": None}, metrics, samples))
    assert "drawn at random" in words and "Transfer" in words.split("Nothing was recorded for:")[1]


def test_the_gradient_norm_of_a_stage(fake_run):
    result, metrics, samples = copy.deepcopy(fake_run)
    for row in metrics:
        if row["event"] == "step":
            row["update"] = {"loss": 0.0, "grad_norm": 0.5}
    assert "0.500" in check(render(result, metrics, samples)).split("gradient norm")[1]


def test_null_scores_render(fake_run):
    result, metrics, samples = copy.deepcopy(fake_run)
    nothing = {"value": None, "n": 0, "low": None, "high": None}
    result["final"]["code"] = result["forecast"]["qa"] = result["stages"][1]["scores"]["math"] = nothing
    result["intervals"]["gain"]["code"] = nothing
    result["transfer"]["math"]["qa"] = nothing
    for row in metrics[::3]:
        for values in row["tasks"].values():
            values["entropy"] = None
    words = check(render(result, metrics, samples))
    assert "Not measured: code" in words


def test_joint_steps_give_each_task_its_curve_and_count_time_once(fake_run):
    result, metrics, _ = fake_run
    joint = [
        {
            **row,
            "stage": "joint",
            "tasks": {"math": row["tasks"]["math"], "qa": row["tasks"]["math"] | {"entropy": 1.25}},
            "seconds": dict.fromkeys(PARTS, 2.0),
        }
        for row in metrics
        if row["stage"] == "single:math"
    ]
    words = check(render(result, joint, []))
    assert "joint, math" in words and "joint, qa" in words
    assert "28 s" in words, "14 steps of 2 s"
    assert by_task(joint)["joint", "qa"][0]["entropy"] == 1.25


@given(st.text())
@settings(max_examples=40, deadline=None)
def test_completions_are_escaped(fake_run, answer):
    result, _, samples = fake_run
    hostile = samples[0] | {"prompt": answer, "before": answer, "after": "</pre><script>" + answer}
    page = render({**result, "judge": answer, "config": result["config"] | {"x": answer}}, [], [hostile])
    check(page)
    page.encode("utf-8")


def test_text_that_no_document_may_hold_is_replaced(fake_run, tmp_path):
    result, _, samples = fake_run
    path = tmp_path / "report.html"
    write_page(path, render(result, [], [samples[0] | {"before": "a\ud800b\x00c\x1b[31m", "after": ""}]))
    assert "\x00" not in path.read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_report(fake_run, tmp_path):
    folder = tmp_path / "gone"
    with pytest.raises(OSError):
        write_page(folder / "report.html", render(fake_run[0], [], []))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_other_numbers_of_tasks(fake_run, planned, count):
    rng = np.random.default_rng(0)
    names = [f"task {k}" for k in range(count)]

    def items():
        return {t: (rng.random(30) < 0.5) * 1.0 for t in names}

    base, single = items(), {t: items() for t in names}
    result = assemble(
        names,
        plan=planned(base, single, 3),
        rows_test=[items() for _ in range(count + 1)],
        trained=[_stage(t) for t in names],
    )
    rest = {key: fake_run[0][key] for key in ("status", "seconds", "throughput", "config", "versions")}
    row = fake_run[1][0]
    metrics = [
        {**row, "stage": f"single:{t}", "step": k, "tasks": {t: row["tasks"]["math"] | {"reward": 0.1 * (k % 7)}}}
        for t in names
        for k in range(60)
    ]
    check(render(result | rest | {"entropy": {}, "truncated": {}}, metrics, []))


@pytest.mark.parametrize("length", [4, 60, 200])
def test_long_names_leave_room_for_the_points(length):
    rows = [charts.MarkRow("x" * length, [charts.Mark(Estimate(x, 9, x, x), 0)], "y" * 20) for x in (0.2, 0.6)]
    drawn = charts.mark_rows(rows, label="score")
    left, right = (float(x) for x in re.findall(r"<circle cx=([\d.]+)", drawn))
    width = int(re.search(r'viewBox="0 0 (\d+)', drawn).group(1))
    assert 7 * length < left < right - 50 < width - 7 * 20


def test_one_score_is_told_alike_however_its_mean_was_summed():
    assert points(0.3375, False) == points(0.33749999999999997, False) == "0.338" and points(-0.0125) == "−0.013"


def test_axis_marks_cover_the_range():
    for low, high in ((0, 1), (-0.37, 0.02), (3, 3), (1e-7, 2e-7), (0, 123456)):
        marks = charts.ticks(low, high)
        assert marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12 and 2 <= len(marks) <= 9


def test_result_is_valid_and_names_what_is_not(fake_run):
    result, _, _ = fake_run
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    missing = {"base", "single", "transfer", "order", "forecast", "stages", "final", "bwt", "intervals"} - result.keys()
    assert not missing and result["bwt"]["n"] > 0


def _stage(*tasks: str) -> Stage:
    return Stage("any", tasks, (1 / len(tasks),) * len(tasks), 5, joint=len(tasks) > 1)


def test_a_task_may_be_called_joint():
    rows = [{"joint": np.full(10, x), "b": np.zeros(10)} for x in (0.0, 1.0, 0.4)]
    result = assemble(["joint", "b"], rows_test=rows, trained=[_stage("joint"), _stage("b")])
    assert result["bwt"]["value"] == pytest.approx(-0.6) and result["forgetting"]["joint"] == pytest.approx(0.6)


def test_assemble_grows_with_what_is_known(planned):
    names = ["a", "b"]
    x, y = np.zeros(10), np.ones(10)
    base = {"a": x, "b": x}
    own = {"a": {"a": y, "b": x}}
    first = assemble(names, single_test=own, rows_test=[base])
    assert "transfer" not in first and "final" not in first and first["single"]["a"]["a"]["value"] == 1.0
    single = {"a": {"a": y, "b": x}, "b": {"a": x, "b": y}}
    rows = [base, {"a": y, "b": x}]
    plan = planned(base, single, 5)
    known = {"plan": plan, "trained": [_stage("a"), _stage("b")]}
    half = assemble(names, **known, rows_test=rows)
    assert "final" not in half and len(half["stages"]) == 1 and half["forecast"]["a"]["value"] == 1.0
    done = assemble(names, **known, rows_test=[*rows, {"a": y, "b": y}])
    assert done["bwt"]["value"] == 0.0 and done["flips"]["a"] == {"lost": 0, "gained": 10}
    assert done["intervals"]["gain_average"]["value"] == 1.0
    joint = assemble(names, rows_test=[base, {"a": y, "b": y}], trained=[_stage("a", "b")])
    assert joint["bwt"]["value"] is None and joint["final"]["a"]["value"] == 1.0
    user = assemble(names, plan=planned(base, single, 1, ("b", "a")), mode="order", trained=[_stage("b")])
    assert user["order"] == ["b", "a"] and user["solved_order"] == ["a", "b"] and user["order_method"] == "order"


def test_signs_of_reward_hacking_are_told_in_words_and_drawn(fake_run):
    result, metrics, samples = fake_run
    shown = check(render(result, metrics, samples))
    assert "Signs of reward hacking" in shown and "single:writing, writing, in 4 of 14 steps, last in step 14" in shown
    assert "28% <b>repeat</b>" in shown, "escaped"
    assert "judge against checks" in shown and "deviation, last 3" in shown
    quiet = [
        {**row, "tasks": {name: {**values, "signs": {}} for name, values in row["tasks"].items()}} for row in metrics
    ]
    assert f"None in {len(metrics)} steps." in check(render(result, quiet, samples))
