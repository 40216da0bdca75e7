"""A training run whose judge is behind a URL: the server dies, lies and comes back; the result is that of a healthy run."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_server import Behaviour, JudgeServer, serving
from rich.console import Console
from typer.testing import CliRunner

from omni_fast import grading, scoring
from omni_fast import train as driver
from omni_fast.cli import app
from omni_fast.config import Config, load
from omni_fast.errors import RunError, UserError
from omni_fast.progress import Progress

pytestmark = pytest.mark.timeout(600)  # the first run of a machine warms the tiny model up

PROBE = 1  # the question that is asked while setting up


def honest(handler: Any, body: dict, number: int) -> None:
    handler.honest(body)


def config_for(url: str, **more: object) -> Config:
    overrides = {
        "judge.backend": "openai", "judge.url": url, "judge.model": "m", "judge.timeout_s": 2,
        "curriculum.mode": "joint", "curriculum.steps_per_stage": 1, "rollout.prompts_per_step": 8,
        "rollout.samples_per_prompt": 4, "tasks.writing.weight": 5, "rewards.pause_s": 60,
        "evaluation.select_items": 2, "evaluation.test_items": 2, "evaluation.probe_items": 0, **more,
    }  # fmt: skip
    return load("quickstart-tiny", tuple(f"{key}={value}" for key, value in overrides.items()))


def train(folder: Path, config: Config) -> str:
    """One run in this process; returns what it said."""
    said = io.StringIO()
    with Progress(Console(file=said, width=400)) as progress:
        driver.train(config, folder, progress)
    return said.getvalue()


def rows(folder: Path) -> list[dict[str, Any]]:
    """The steps without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_s", "waited_for", "scoring_s", "update")
    return [{key: value for key, value in row.items() if key not in clocks} for row in lines if row["event"] == "step"]


def final(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call gives up soon, so that the run's own pause is what is tested."""
    monkeypatch.setattr(grading, "JUDGE_PATIENCE_S", 0.2)
    monkeypatch.setattr(scoring, "RETRY_S", 0.1)
    monkeypatch.setattr(scoring, "MAX_RETRY_S", 0.3)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An undisturbed run, and how many questions it asked."""
    folder = tmp_path_factory.mktemp("healthy") / "run"
    with serving(honest) as server:
        train(folder, config_for(server.url))
        return folder, server.count - PROBE


def test_the_judge_is_asked_and_trains(healthy: tuple[Path, int]) -> None:
    folder, questions = healthy
    assert questions > 30
    values = [row["tasks"]["writing"] for row in rows(folder)]
    assert all(value["invalid"] == 0 for value in values) and any(value["mixed_groups"] > 0 for value in values)
    assert "openai m at" in json.loads((folder / "result.json").read_text())["judge"]


def dying(at: int, back_after_s: float | None, start_again: Callable[[int], None]) -> Behaviour:
    """Honest up to question `at`; then the whole server goes away, in the middle of a batch."""

    def behave(handler: Any, body: dict, number: int) -> None:
        if number < at:
            handler.honest(body)
        elif number == at:
            server: JudgeServer = handler.server
            threading.Thread(target=die, args=(server,), daemon=True).start()
            handler.close_connection = True

    def die(server: JudgeServer) -> None:
        port = server.server_address[1]
        server.shutdown()
        server.server_close()
        if back_after_s is not None:
            time.sleep(back_after_s)
            start_again(port)

    return behave


def test_a_server_that_dies_in_a_batch_and_comes_back_changes_nothing(
    healthy: tuple[Path, int], tmp_path: Path
) -> None:
    folder, questions = healthy
    again = threading.Event()
    ended = threading.Event()

    def start_again(port: int) -> None:
        with serving(honest, port):
            again.set()
            ended.wait(60)

    with serving(dying(questions // 2, 1.5, start_again)) as server:
        said = train(tmp_path / "run", config_for(server.url))
        ended.set()
    assert again.is_set()
    assert "fails (" in said and "paused: writing:" in said and "up to 60 s (rewards.pause_s)" in said
    assert "scores are there again" in said
    assert rows(tmp_path / "run") == rows(folder), "no sample lost, none scored 0"
    assert final(tmp_path / "run") == final(folder)


def test_a_server_that_stays_down_stops_the_run_which_resumes_elsewhere(
    healthy: tuple[Path, int], tmp_path: Path
) -> None:
    folder, questions = healthy
    run = tmp_path / "run"
    with (
        serving(dying(questions // 2, None, lambda port: None)) as server,
        pytest.raises(RunError, match="could not be scored .*nothing is lost.*same command again") as caught,
    ):
        train(run, config_for(server.url, **{"rewards.pause_s": 1.0}))
    assert caught.value.exit_code == 1
    before = rows(run)
    assert 1 <= len(before) < 4 and before == rows(folder)[: len(before)]
    assert list((run / "checkpoints").rglob(f"*step-{len(before)}")), "the steps before the outage are kept"
    with serving(honest) as server:  # another port: where a judge stands is not part of the run
        said = train(run, config_for(server.url))
    assert f"resumed after step {len(before)}" in said
    assert rows(run) == rows(folder) and final(run) == final(folder)


def test_ctrl_c_ends_a_pause_and_keeps_the_steps(healthy: tuple[Path, int], tmp_path: Path) -> None:
    folder, questions = healthy

    def interrupt() -> None:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    behave = dying(questions // 2, 0.0, lambda port: interrupt())
    with serving(behave) as server, pytest.raises(RunError, match="same command resumes") as caught:
        train(tmp_path / "run", config_for(server.url))
    assert caught.value.exit_code == 130
    assert list((tmp_path / "run" / "checkpoints").rglob("*step-*"))


def test_a_judge_that_is_now_and_then_unclear_costs_those_samples_alone(tmp_path: Path) -> None:
    """The same few questions never get a verdict: their samples leave their groups, and the run does not pause."""

    def behave(handler: Any, body: dict, number: int) -> None:
        text = body["messages"][-1]["content"]
        if number > PROBE and sum(map(ord, text[text.index("Reply A") : text.index("Reply B")])) % 23 == 0:
            handler.verdict("I cannot decide.")
        else:
            handler.honest(body)

    with serving(behave) as server:
        said = train(tmp_path / "run", config_for(server.url, **{"rewards.max_invalid": 0.9}))
    found = [row["tasks"]["writing"] for row in rows(tmp_path / "run")]
    assert sum(row["invalid"] for row in found) > 0 and "paused" not in said
    assert {reason for row in found for reason in row["invalid_reasons"]} == {"preference:judge_unclear"}


def test_the_audit_takes_a_judge_by_its_url() -> None:
    asked = ["judge", "audit", "--judge", "openai", "--model", "m", "--json"]
    with serving(honest) as server:
        done = CliRunner().invoke(app, [*asked, "--url", server.url])
        found = json.loads(done.stdout.splitlines()[0])
        assert server.count > 400 and found["judge"] == f"openai m at {server.url}"
    assert found["invalid"]["k"] == 0 and found["position_bias"]["k"] == 0 and found["verdicts"] > 700
    gone = CliRunner().invoke(app, [*asked, "--url", server.url])
    assert isinstance(gone.exception, UserError) and "nothing answers there" in str(gone.exception)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"judge.url": '"http://127.0.0.1:9/v1"'}, "nothing answers there"),
        ({"judge.url": '"127.0.0.1:9"'}, "not an http"),
        ({"judge.url": '""'}, "needs judge.url"),
        ({"judge.backend": "sglang", "judge.model": '"no/such/tokenizer/here"'}, "tokenizer cannot be loaded"),
    ],
)
def test_a_wrong_setting_is_told_before_training(tmp_path: Path, override: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(tmp_path / "run", config_for("http://127.0.0.1:9/v1", **override))
    assert not (tmp_path / "run" / "fingerprint.json").exists()
