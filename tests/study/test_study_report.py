"""report.html and summary.md of finished, partial and damaged studies."""

import copy
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_study import Builder, World, planted, write

from omni_fast.errors import UserError
from omni_fast.study import records
from omni_fast.study.report import main, write_report
from omni_fast.study.report_findings import analyse, headline, p_value, tables, verdict

SMALL = dict(tasks=("math", "code", "qa"), items=80, noise=0.015, seeds=(0, 1, 2, 3, 4), order_seeds=(0, 1, 2))
EFFECT = World(base=0.5, own=0.75, matrix=planted(3) / 2, joint=0.55, merge=0.5, **SMALL)
NULL = World(base=0.5, own=0.7, matrix=np.zeros((3, 3)), joint=0.7, merge=0.7, **SMALL)


class Outline(HTMLParser):
    """The headings and the kinds of elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.heads, self.tags, self.inside = [], set(), None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("h1", "h2"):
            self.inside = tag
            self.heads.append("")

    def handle_data(self, data):
        if self.inside:
            self.heads[-1] += data

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = None


def _report(folder, whole):
    path = write_report(write(folder, whole))
    assert path == folder / "report.html" and not list(folder.glob(".*"))
    return path.read_text(encoding="utf-8"), (folder / "summary.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole():
    return Builder(EFFECT).whole()


@pytest.fixture(scope="module")
def made(whole, tmp_path_factory):
    return _report(tmp_path_factory.mktemp("effect"), whole)


def _without(whole, keep):
    """The study with only the cells that `keep` likes, and the nodes those pass through."""
    part = copy.deepcopy(whole)
    part["cells"] = [cell for cell in part["cells"] if keep(cell)]
    used = {(cell["seed"], node) for cell in part["cells"] for node in [*cell["stages"], cell["base"]]}
    part["nodes"] = [node for node in part["nodes"] if (node["seed"], node["id"]) in used]
    return part


def test_the_page_is_self_contained_and_whole(made):
    page, _ = made
    outline = Outline(page)
    assert outline.heads[0].startswith("solved beats joint")
    assert "script" not in outline.tags and "img" not in outline.tags and "link" not in outline.tags
    assert not re.search(r"https?://|url\((?!#)", page) and "default-src 'none'" in page
    for head in ("Arms", "Cost", "Accuracy matrix", "Transfer", "Orders", "Forecast against realised", "Entropy"):
        assert head in outline.heads
    assert "Not there yet" not in outline.heads and "prefers-color-scheme: dark" in page
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S).lower().replace("finance", "")


def test_each_arm_has_one_look_of_its_own_in_every_panel(made):
    looks: dict[str, set[str]] = {}
    for legend in re.findall(r"<figcaption class=legend>(.*?)</figcaption>", made[0]):
        for drawn, name in re.findall(r"<span>(<svg.*?</svg>)([^<]+)</span>", legend):
            looks.setdefault(name, set()).add(drawn)
    assert {"base", "joint", "solved", "reversed", "refresh"} <= set(looks)
    assert all(len(found) == 1 for found in looks.values()) and len(set.union(*looks.values())) == len(looks)


def test_temperatures_stand_on_their_axis(made):
    panel = re.search(r"<figure class=panel><svg[^>]*aria-label=.math: score by temperature.*?</svg>", made[0])
    xs = re.findall(r"class=mid>([\d.]+)</text>", panel[0])
    assert xs == ["0.5", "0.75", "1", "1.25", "1.5"]  # to the last of them and no further


def test_a_task_that_nothing_scored_has_no_interval(tmp_path):
    whole = Builder(NULL).whole()
    for node in whole["nodes"]:
        for found in (node["evaluated"], *node["sweep"].values()):
            for tasks in found["splits"].values():
                tasks["code"]["values"] = [None] * NULL.items
    _, summary = _report(tmp_path, whole)
    assert "| joint | 5 | 0.7" in summary and " | – | 0.7" in summary and not re.search(r"– \(|nan", summary)


def test_colours_come_from_the_theme(made):
    body = made[0].split("</style>")[1]
    assert not re.search(r"(fill|stroke|color)\s*[:=]\s*[\"']?#[0-9a-fA-F]{3}", body), (
        "a fixed colour ignores dark mode"
    )


def test_the_summary_has_the_verdict_and_every_table(made):
    _, summary = made
    assert summary.startswith("# Study synthetic\n\nsolved beats joint")
    for title in ("Test scores", "Average score against joint", "Cost", "Assumption 1", "Assumption 2", "Every order"):
        assert f"### {title}" in summary
    for block in re.findall(r"(?:^\|.*\n)+", summary, flags=re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    assert "order matters beyond noise" in summary and "not finished" not in summary.lower()


def test_nothing_is_claimed_where_there_is_nothing(tmp_path):
    _, summary = _report(tmp_path, Builder(NULL, seed=2).whole())
    assert "The data do not tell solved from joint" in summary
    assert "order does not matter beyond noise" in summary and "order matters beyond noise" not in summary
    assert "no better than assuming no transfer" in summary or "not the same in every seed" in summary
    assert (
        "Ahead of joint" not in summary.replace("Not told", "")
        or "solved" not in summary.split("Ahead of joint")[1][:80]
    )


def test_a_worse_primary_arm_is_called_worse(whole, tmp_path):
    turned = copy.deepcopy(whole) | {"primary": ["joint", "solved"]}
    study = records.read(write(tmp_path, turned))
    told = headline(analyse(study))
    assert told.tone == "bad" and "falls behind" in told.text and "−0." in told.text


@pytest.mark.parametrize(
    ("keep", "there", "absent"),
    [
        (lambda c: False, "not measured yet", "Arms"),
        (lambda c: c["arm"] == "base" and c["seed"] == 0, "Not finished", "Transfer"),
        (lambda c: c["kind"] in ("base", "single") and c["seed"] == 0, "Not finished", "Forecast against realised"),
        (lambda c: c["seed"] == 0, "With one seed solved − joint is", "Orders"),
        (lambda c: c["kind"] not in ("joint", "order"), "not measured yet", "Orders"),
    ],
    ids=["nothing", "base", "singles", "one-seed", "no-orders"],
)
def test_a_partial_study_gives_a_partial_report(whole, tmp_path, keep, there, absent):
    page, summary = _report(tmp_path, _without(whole, keep))
    outline = Outline(page)
    assert "This study is not finished." in page and there in summary
    assert absent not in outline.heads


def test_one_seed_supports_nothing(whole, tmp_path):
    study = records.read(write(tmp_path, _without(whole, lambda cell: cell["seed"] == 0)))
    found = analyse(study)
    assert found.transfer is not None and "over the items of one seed; it is not told" in " ".join(
        s.text for s in verdict(found)
    )
    assert {sentence.tone for sentence in verdict(found) if sentence.text not in found.warnings} == {"open"}


def test_what_is_not_rejected_is_not_called_supported(tmp_path):
    told = verdict(analyse(records.read(write(tmp_path, Builder(NULL, seed=2).whole()))))
    kept = [s for s in told if "not rejected" in s.text or "does not depend on where it starts" in s.text]
    assert len(kept) >= 2 and {s.tone for s in kept} == {"open"}


@pytest.mark.parametrize("primary", [["reversed", "joint"], ["solved", "reversed"], ["base", "joint"]])
def test_another_primary_contrast_is_told_once(whole, tmp_path, primary):
    found = analyse(records.read(write(tmp_path, copy.deepcopy(whole) | {"primary": primary})))
    assert all(set(pair) != set(primary) and len(set(pair)) == 2 for pair in found.pairs)
    assert (primary[0] == "base") == (not found.pairs), "the initial policy is not at the same budget"


def test_a_primary_contrast_without_its_arm_is_told(whole, tmp_path):
    part = copy.deepcopy(whole)
    part["arms"] = [arm for arm in part["arms"] if arm["name"] != "joint"]
    told = headline(analyse(records.read(write(tmp_path, part))))
    assert told.text.endswith("this study has no arm joint.")


def test_refreshes_of_different_tasks_are_no_stage_of_one(whole, tmp_path):
    part = copy.deepcopy(whole)
    for node in part["nodes"]:
        if len(node["path"]) == 4 and node["seed"] == 1:
            node["tasks"] = ["math"]
    page, _ = _report(tmp_path / "two", part)
    assert "4. refresh" in page and "4. qa" not in page
    assert "4. qa" in _report(tmp_path / "one", whole)[0]


def test_effects_whose_names_run_together_are_told_apart(tmp_path):
    """a → aa and aa → a: each with its own p, in a family of two."""
    world = World(tasks=("a", "aa"), matrix=planted(2), items=40, order_seeds=(0, 1, 2))
    found = analyse(records.read(write(tmp_path, Builder(world).whole())))
    (made,) = (made for made in tables(found)["assumptions"] if made.title.startswith("Assumption 1"))
    low, high = sorted(s.p for _, _, s in found.assumptions.constant.values())
    assert sorted(row[-1] for row in made.rows) == sorted([p_value(2 * low), p_value(max(2 * low, high))])


def test_no_entropy_and_a_bar_in_a_name(whole, tmp_path, recwarn):
    part = json.loads(json.dumps(whole).replace('"math"', '"ma|th"').replace("math:", "ma|th:"))
    for node in part["nodes"]:
        node["evaluated"]["entropy"], node["sweep"] = {}, {}
    page, summary = _report(tmp_path, part)
    assert "Entropy" not in Outline(page).heads and not [w for w in recwarn if "NaN" in str(w.message)]
    assert "| ma\\|th |" in summary


def test_the_command_names_what_is_wrong(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "holds no study" in capsys.readouterr().err
    packed = write(tmp_path, whole) / records.PACKED
    monkeypatch.setattr(sys, "argv", ["report", str(packed)])
    with pytest.raises(SystemExit):
        main()
    assert "Not a directory" in capsys.readouterr().err


def test_failures_are_told_and_text_is_escaped(whole, tmp_path):
    broken = copy.deepcopy(whole)
    for cell in broken["cells"]:
        if cell["arm"] == "online:sec":
            cell |= {"status": "failed", "reason": "<script>alert(1)</script> the loss\n\n# is not finite"}
        if cell["arm"] == "sft":
            cell["samples_train"] = 17
    page, summary = _report(tmp_path, broken)
    assert "the loss # is not finite" in page and "<script>" not in page and "\n# is not" not in summary
    assert "Failed: online:sec (seed 0), online:sec (seed 1)" in summary


def test_unequal_budgets_are_told(whole, tmp_path):
    uneven = copy.deepcopy(whole)
    for cell in uneven["cells"]:
        if cell["arm"] == "joint":
            cell["samples_train"] *= 2
    study = records.read(write(tmp_path, uneven))
    assert any("budgets are not equal" in sentence.text for sentence in verdict(analyse(study)))


def test_the_committed_study_says_what_the_docs_say():
    root = Path(__file__).parents[2]
    results = root / "benchmarks" / "results" / "study-tiny"
    found = analyse(records.read(results))
    assert headline(found).text in (results / "summary.md").read_text(encoding="utf-8")
    docs = (root / "docs" / "study.md").read_text(encoding="utf-8")
    errors = found.forecast.errors["additive, average of the tasks"]
    for number in (found.primary.value, found.orders.sd, found.orders.gap.value, errors.pearson):
        assert f"{number:.3f}" in docs or f"{number:.2f}" in docs, number


def test_no_study_and_a_damaged_one(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        write_report(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        write_report(tmp_path)
