"""The whole method on a from-scratch model, through the command line: one run, looked at from all sides."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from omni_fast import outcome
from omni_fast.checkpoint import load_tensors
from omni_fast.cli import app
from omni_fast.run import Run

pytestmark = pytest.mark.timeout(600)  # the fixture trains; the rest takes seconds

TASKS = ["math", "code", "qa", "writing"]
KEYS = {
    "tasks", "base", "single", "transfer", "order", "order_method", "order_probability", "forecast", "stages", "final",
    "bwt", "intervals", "seconds", "throughput", "peak_bytes", "sandbox", "judge",
}  # fmt: skip
STEP_LINE = re.compile(
    r"step (\d+)/(\d+)  \w+: reward \d\.\d+ entropy (?:\d+\.\d+|–) mixed \d+%.*?  \d+ tokens/s  [\d.]+ s \(\w+\)  left \d+:\d\d"
)


class Tiny(NamedTuple):
    folder: Path
    output: str
    result: dict[str, Any]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def tiny(cli, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("e2e") / "run"
    done = cli("quickstart", "--tiny", "--run", str(folder), timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Tiny(folder, done.stdout, result, rows)


def test_the_result_has_every_key(tiny: Tiny) -> None:
    assert tiny.result.keys() >= KEYS
    result = tiny.result
    assert result["status"] == "finished" and result["tasks"] == TASKS
    assert set(result["base"]) == set(result["final"]) == set(result["forecast"]) == set(TASKS)
    assert all(set(row) == set(TASKS) for row in (*result["single"].values(), *result["transfer"].values()))
    assert sorted(result["order"]) == sorted(TASKS) and [stage["task"] for stage in result["stages"]] == result["order"]
    assert result["order_method"] and 0 <= result["order_probability"] <= 1
    for score in (*result["base"].values(), *result["final"].values()):
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1 and score["n"] > 0
    assert result["seconds"]["total"] < 600
    assert all(result["seconds"][part] > 0 for part in ("setup", "transfer", "train", "eval"))
    assert result["throughput"]["rollout_tokens_per_s"] and result["throughput"]["train_tokens_per_s"]
    assert 1e8 < result["peak_bytes"] < 8e9
    assert result["sandbox"] and result["judge"]


def test_the_base_and_the_final_row_are_those_of_the_stages(tiny: Tiny) -> None:
    result = tiny.result
    assert result["final"] == result["stages"][-1]["scores"]
    assert result["stages"][0]["scores"] == result["single"][result["order"][0]], "the first stage repeats its own run"
    assert result["reused"] == [f"curriculum:1:{result['order'][0]}"]


def test_training_on_the_tiny_tasks_helps(tiny: Tiny) -> None:
    """Rewards of 64 samples a step; the 17 test items of this smoke run are too few to show a gain."""

    def mean_reward(first: int, last: int) -> float:
        rewards = [
            row["tasks"][task]["reward"]
            for task in TASKS
            for row in tiny.rows
            if row["event"] == "step" and row["stage"] == f"single:{task}" and first <= row["step"] <= last
        ]
        return sum(rewards) / len(rewards)

    assert mean_reward(7, 10) > mean_reward(1, 4)


def test_every_step_and_every_evaluation_has_a_row(tiny: Tiny) -> None:
    steps = [row for row in tiny.rows if row["event"] == "step"]
    per_stage = tiny.result["config"]["curriculum"]["steps_per_stage"]
    stages = list(dict.fromkeys(row["stage"] for row in steps))
    order = tiny.result["order"]
    later = [f"curriculum:{place}:{task}" for place, task in enumerate(order[1:], start=2)]
    assert stages == [f"single:{task}" for task in TASKS] + later
    for stage in stages:
        assert [row["step"] for row in steps if row["stage"] == stage] == list(range(1, per_stage + 1))
    for row in steps:
        assert row["tokens_per_s"] > 0 and row["seconds"]["total"] > 0 and row["new_tokens"] > 0
        for values in row["tasks"].values():
            assert 0 <= values["reward"] <= 1 and 0 <= values["mixed_groups"] <= 1 and values["invalid"] == 0
    evaluated = [(row["stage"], row["split"]) for row in tiny.rows if row["event"] == "eval"]
    both = [(name, split) for name in ("base", *stages[:4]) for split in ("select", "test")]
    assert evaluated == both + [(name, "test") for name in later]


def test_progress_tells_all_it_should(tiny: Tiny) -> None:
    found = STEP_LINE.findall(tiny.output)
    assert len(found) == sum(row["event"] == "step" for row in tiny.rows), tiny.output
    for task in TASKS:
        assert f"single:{task}" in tiny.output
    assert "select after base" in tiny.output and "test after base" in tiny.output
    assert str(tiny.folder / "result.json") in tiny.output and str(tiny.folder / "report.html") in tiny.output


def test_the_report_stands_alone(tiny: Tiny) -> None:
    page = (tiny.folder / "report.html").read_text(encoding="utf-8")
    assert len(page) > 10_000 and all(task in page for task in TASKS)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page, re.IGNORECASE)
    assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import|<link", page, re.IGNORECASE)


def test_no_checkpoint_and_no_work_file_is_left(tiny: Tiny) -> None:
    left = [path for path in (tiny.folder / "checkpoints").rglob("*") if path.is_file()]
    assert left == []
    assert [path for path in tiny.folder.rglob(".*") if path.name != ".lock"] == []


def test_the_final_policy_loads_and_training_moved_it(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder / "final")
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000
    assert tokenizer.chat_template
    base = load_tensors(tiny.folder / "weights" / "base")
    last = load_tensors(tiny.folder / "weights" / f"curriculum-4-{tiny.result['order'][3]}")
    final = dict(model.named_parameters())
    assert base.keys() == last.keys()
    for name, weight in last.items():
        torch.testing.assert_close(final[name].detach(), weight, rtol=0, atol=0)
    assert any(not torch.equal(base[name], weight) for name, weight in last.items())


def test_the_same_command_again_finds_nothing_to_do(cli, tiny: Tiny) -> None:
    weights = (tiny.folder / "final" / "model.safetensors").read_bytes()
    metrics = (tiny.folder / "metrics.jsonl").read_bytes()
    start = time.monotonic()
    again = cli("quickstart", "--tiny", "--run", str(tiny.folder))
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stdout and "step 1/" not in again.stdout
    assert time.monotonic() - start < 60
    assert json.loads((tiny.folder / "result.json").read_text()) == tiny.result
    assert (tiny.folder / "final" / "model.safetensors").read_bytes() == weights
    assert (tiny.folder / "metrics.jsonl").read_bytes() == metrics


def test_report_writes_the_same_result_again(cli, tiny: Tiny) -> None:
    (tiny.folder / "report.html").unlink()
    done = cli("report", str(tiny.folder))
    assert done.returncode == 0, done.stderr
    assert (tiny.folder / "report.html").is_file()
    assert json.loads((tiny.folder / "result.json").read_text()) == tiny.result


def test_a_single_task_run_is_not_shown_as_the_final_policy(tiny: Tiny, tmp_path: Path) -> None:
    state = json.loads((tiny.folder / "state.json").read_text())
    state["evaluated"] = {name: row for name, row in state["evaluated"].items() if not name.startswith("curriculum")}
    (tmp_path / "state.json").write_text(json.dumps(state))
    for name in ("fingerprint.json", "metrics.jsonl"):
        shutil.copy(tiny.folder / name, tmp_path)
    page = outcome.finish(Run.read(tmp_path)).read_text()
    assert "Completions before and after" in page.split("Nothing was recorded for")[1] and "Final policy" not in page


def test_plan_says_what_the_run_solved(cli, tiny: Tiny) -> None:
    shown = cli("plan", str(tiny.folder))
    assert shown.returncode == 0, shown.stderr
    assert all(f"curriculum:{place}:{task}" in shown.stdout for place, task in enumerate(tiny.result["order"], 1))
    machine = cli("plan", str(tiny.folder), "--json")
    assert machine.returncode == 0, machine.stderr
    planned = json.loads(machine.stdout)
    assert {key: tiny.result[key] for key in planned} == planned


def test_eval_scores_the_final_policy_as_the_run_did(cli, tiny: Tiny) -> None:
    done = cli("eval", "quickstart-tiny", "--model", str(tiny.folder / "final"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for task in ("math", "code", "qa"):
        assert found[task]["n"] == tiny.result["final"][task]["n"]
        assert found[task]["value"] == pytest.approx(tiny.result["final"][task]["value"], abs=0.06)


@pytest.mark.parametrize("mode", ["joint", "order"])
def test_other_modes_go_through_with_two_tasks(cli, tiny: Tiny, tmp_path: Path, mode: str) -> None:
    config = tmp_path / "two.toml"
    config.write_text(TWO_TASKS.format(model=tiny.folder / "final", mode=mode))
    folder = tmp_path / "run"
    done = cli("train", str(config), "--run", str(folder))
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    steps = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if row["event"] == "step"]
    assert result["status"] == "finished" and len(steps) == 4 and not result["transfer"]
    if mode == "joint":
        assert [stage["task"] for stage in result["stages"]] == ["joint"]
        assert all(set(row["tasks"]) == {"sums", "facts"} for row in steps)
    else:
        assert result["order"] == ["facts", "sums"] == [stage["task"] for stage in result["stages"]]
        assert [list(row["tasks"]) for row in steps] == [["facts"], ["facts"], ["sums"], ["sums"]]
        assert cli("plan", str(folder)).returncode == 0


TWO_TASKS = """
model = {{ path = "{model}", dtype = "float32" }}
rollout = {{ prompts_per_step = 4, samples_per_prompt = 4 }}
curriculum = {{ mode = "{mode}", order = ["facts", "sums"], steps_per_stage = 2 }}
evaluation = {{ select_items = 4, test_items = 6, probe_items = 2 }}
[[tasks]]
name = "sums"
kind = "math"
level = "tiny"
max_new_tokens = 4
[[tasks]]
name = "facts"
kind = "qa"
level = "tiny"
max_new_tokens = 8
"""


def test_dry_run_prints_config_and_plan_and_starts_nothing(cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = cli("quickstart", "--tiny", "--dry-run", "--run", str(folder), "rollout.prompts_per_step=5")
    assert done.returncode == 0, done.stderr
    assert not folder.exists()
    for words in ("prompts_per_step = 5", "steps ", "new tokens", "memory ", "time ", str(folder)):
        assert words in done.stdout, words


def test_doctor_looks_at_the_machine(cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stderr
    for what in ("Python", "torch", "native CPU kernels", "bubblewrap", "cores", "memory", "disk"):
        assert f" {what}: " in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "quickstart",
        "train",
        "transfer",
        "plan",
        "eval",
        "report",
        "doctor",
        "data check",
        "sandbox self-test",
        "judge audit",
    ],
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    assert "Example" in done.output and f"omni-fast {command}" in done.output
