"""Rollouts that run ahead of training: the bound, the prompt stream over stops and faults, what the rows say."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeSGLang, serving, slow, status
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from timed_sglang import Letters, NamedWeights, TimedSGLang, config_for, nameless, small_model, timed
from transformers import AutoTokenizer

from omni_fast import train as driver
from omni_fast.ahead import Ahead
from omni_fast.build import Parts
from omni_fast.config import Config, load
from omni_fast.curriculum.stages import Draw, PromptStream, Stage, StreamState
from omni_fast.errors import RunError, UserError
from omni_fast.groups import Group
from omni_fast.progress import Progress
from omni_fast.rollout.engine import Rollout, Sample
from omni_fast.rollout.fleet import Fleet, Server, ServerError
from omni_fast.rollout.sglang import SGLangEngine, read
from omni_fast.scoring import Scorer

pytestmark = pytest.mark.timeout(300)
STAGE = Stage("joint", ("letters",), (1.0,), 6, joint=True)


class Made:
    """A model and the folder it is in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, small_model(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("model"))


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[Draw]]:
    """The prompts of every step that was trained."""
    steps: list[list[Draw]] = []
    plain = driver.trajectories

    def watched(groups: Sequence[Group]) -> list[Any]:
        steps.append([group.draw for group in groups])
        return plain(groups)

    monkeypatch.setattr(driver, "trajectories", watched)
    return steps


def train(folder: Path, config: Config) -> str:
    said = io.StringIO()
    with Progress(Console(file=said, width=400)) as progress:
        driver.train(config, folder, progress)
    return said.getvalue()


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["event"] == "step"]


def plain_order(steps: int, prompts: int = 4, items: int = 40) -> list[list[Draw]]:
    stream = PromptStream({"letters": items}, ("letters",), (1.0,), 0)
    return [stream.draw(prompts) for _ in range(steps)]


@pytest.mark.parametrize(("staleness", "version"), [(0, "0.5.17"), (1, "0.5.17"), (1, "0.5.21"), (2, "0.5.21")])
def test_every_bound_trains_from_end_to_end(
    made: Made, tmp_path: Path, trained: list[list[Draw]], staleness: int, version: str
) -> None:
    server = timed(made.model, version=version, token_s=0.003)
    with serving(server):
        said = train(tmp_path / "run", config_for(tmp_path, made.folder, [server.url], staleness))
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert trained == plain_order(5), "the same prompts in the same steps, whatever the bound"
    for place, row in enumerate(found):
        update = row["update"]
        assert update["staleness_mean"] <= update["staleness_max"] <= min(staleness, place)
        assert update["rollout_kl_k3"] >= 0 and row["tokens_per_s"] > 0
        assert {f"seconds/sync_{part}" for part in ("pack", "load", "verify", "paused", "total")} <= update.keys()
        assert row["waited_for"] == max(("generate", "reward", "update", "sync"), key=row["seconds"].__getitem__)
        assert row["max_staleness"] == staleness
    oldest = max(row["update"]["staleness_max"] for row in found)
    assert oldest == staleness or (version == "0.5.21" and 0 < oldest < staleness), "spans may say that all began later"
    lines = [line for line in said.splitlines() if " step " in line]
    assert len(lines) == 5 and all((f" of {staleness}  left" in line) == (staleness > 0) for line in lines)
    assert "left out" not in said


def test_the_local_engine_refuses_to_run_ahead(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_staleness 1 needs engine.kind 'sglang'.*set it to 0"):
        load("quickstart-tiny", ("rollout.max_staleness=1",))


def test_a_judge_by_labels_on_a_server_that_generates_is_refused(made: Made, tmp_path: Path) -> None:
    judge = {"judge__backend": "sglang", "judge__model": "m", "judge__url": "http://127.0.0.1:7/v1"}
    with pytest.raises(UserError, match="use judge.backend 'openai' on that server"):
        config_for(tmp_path, made.folder, ["http://127.0.0.1:7/"], 1, **judge)
    for urls, bound in ((["http://127.0.0.1:8"], 1), (["http://127.0.0.1:7"], 0)):
        assert config_for(tmp_path, made.folder, urls, bound, **judge).judge.url


def test_an_outage_stops_the_run_and_the_same_command_trains_each_prompt_once(
    made: Made, tmp_path: Path, trained: list[list[Draw]]
) -> None:
    """The only server goes away for good in step 3 of 5; later it is there again, empty."""
    server = timed(made.model, token_s=0.003)
    port = server.server_address[1]
    config = config_for(tmp_path, made.folder, [server.url], 2, engine__wait_s=0.5)

    def gone(handler: Any, body: dict) -> bool:
        if len(trained) < 2:
            return False
        threading.Thread(target=server.kill, daemon=True).start()
        handler.cut()
        return True

    server.faults.append(("/generate", gone))
    server.start()
    with pytest.raises(RunError, match="no engine server has been ready"):
        train(tmp_path / "run", config)
    count = len(trained)
    assert 2 <= count < 5 and [row["step"] for row in rows(tmp_path / "run")] == list(range(1, count + 1))
    with serving(timed(made.model, token_s=0.003, port=port)):
        said = train(tmp_path / "run", config)
    assert f"resumed after step {count}" in said
    assert trained == plain_order(5) and [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_stop_keeps_what_was_trained_and_draws_the_rest_again(
    made: Made, tmp_path: Path, trained: list[list[Draw]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = timed(made.model, token_s=0.003)
    config = config_for(tmp_path, made.folder, [server.url], 1, checkpoint__every_steps=100)
    plain = driver.outcome.record_step

    def stopped(parts: Any, stage: Stage, step: int, *rest: Any) -> Any:
        parts.run.stopping = step == 2  # as Ctrl-C does
        return plain(parts, stage, step, *rest)

    monkeypatch.setattr(driver.outcome, "record_step", stopped)
    with serving(server):
        with pytest.raises(RunError, match="the same command resumes"):
            train(tmp_path / "run", config)
        assert len(trained) == 2
        train(tmp_path / "run", config)
    assert trained == plain_order(5)


# -- the groups under way, without a policy ----------------------------------------------------------------------------


class Slowly(Letters):
    """Scores take as long as `seconds` says."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        super().__init__("letters", 0, 6)
        self.seconds = seconds

    def score(self, items: Sequence[Any], completions: Sequence[str]) -> Any:
        time.sleep(self.seconds())
        return super().score(items, completions)


class Rig:
    """An engine, a scorer and a prompt stream; `step` is a training step that trains nothing."""

    def __init__(
        self, made: Made, folder: Path, urls: Sequence[str], staleness: int, in_flight: int = 3, **limits: float
    ) -> None:
        self.said: list[str] = []
        self.fleet = Fleet(urls, in_flight=in_flight, say=self.said.append)
        self.engine = SGLangEngine(self.fleet, NamedWeights(self.fleet), **{"request_s": 5.0, "wait_s": 5.0} | limits)
        self.config = config_for(folder, made.folder, urls, staleness, rollout__prompts_per_step=3)
        self.task = Slowly(lambda: 0.0)
        tasks: dict[str, Any] = {"letters": self.task}
        progress = Progress(Console(file=io.StringIO()))
        self.scorer = Scorer(tasks, self.config.rewards, progress)
        self.parts = Parts(
            self.config, None, progress, made.model, made.tokenizer, tasks, None, self.engine, self.scorer, None
        )  # type: ignore[arg-type]
        self.trained: list[Group] = []
        self.staleness: list[dict[str, float]] = []

    def run(
        self, steps: int, state: StreamState | None = None, done: int = 0, update: Callable[[], None] = lambda: None
    ) -> StreamState:
        stream = PromptStream({"letters": 40}, ("letters",), (1.0,), 0)
        if state is not None:
            stream.load_state_dict(state)
        with Ahead(self.parts, STAGE, stream, done) as ahead:
            for _ in range(steps):
                groups = ahead.next()
                assert len(ahead._under_way) <= 1 + self.config.rollout.max_staleness
                self.scorer.finish(groups)
                assert all(len(group.samples) == len(group.scores) == 2 for group in groups)
                update()
                self.trained += groups
                self.staleness.append(ahead.done())
                self.engine.sync(self.engine.version + 1)
            return ahead.state

    def close(self) -> None:
        self.scorer.close()
        self.fleet.close()


@contextmanager
def rig(made: Made, folder: Path, servers: Sequence[FakeSGLang], staleness: int, **limits: Any) -> Iterator[Rig]:
    with serving(*servers):
        found = Rig(made, folder, [server.url for server in servers], staleness, **limits)
        try:
            yield found
        finally:
            found.close()


def in_order(groups: Sequence[Group]) -> bool:
    return [group.draw for group in groups] == [draw for step in plain_order(6, 3) for draw in step][: len(groups)]


@given(
    staleness=st.integers(0, 3),
    version=st.sampled_from(["0.5.17", "0.5.21"]),
    tokens_ms=st.lists(st.floats(0.1, 8.0), min_size=1, max_size=3),
    updates_ms=st.lists(st.floats(0.0, 40.0), min_size=6, max_size=6),
    scores_ms=st.floats(0.0, 15.0),
    stop=st.integers(1, 5),
)
@settings(deadline=None, max_examples=25)
def test_whatever_is_slow_the_bound_holds_and_every_prompt_is_trained_once(
    made: Made, tmp_path_factory: pytest.TempPathFactory,
    staleness: int, version: str, tokens_ms: list[float], updates_ms: list[float], scores_ms: float, stop: int,
) -> None:  # fmt: skip
    """A run that stops after some steps and one that resumes from its state: servers, updates and scores of any speed."""
    waits = iter(updates_ms)
    servers = [nameless(version=version, token_s=ms / 1e3) for ms in tokens_ms]
    with rig(made, tmp_path_factory.mktemp("rig"), servers, staleness) as found:
        found.task.seconds = lambda: scores_ms / 1e3
        state = found.run(stop, update=lambda: time.sleep(next(waits) / 1e3))
        found.run(6 - stop, state, stop, update=lambda: time.sleep(next(waits) / 1e3))
        assert in_order(found.trained) and len(found.trained) == 18
        for place, old in enumerate(found.staleness):
            since = place if place < stop else place - stop
            assert old["staleness_mean"] <= old["staleness_max"] <= min(staleness, since)
        for number, group in enumerate(found.trained):
            for sample in group.samples:
                ends = [0, *(end for _, _, end in sample.versions)]
                assert [start for _, start, _ in sample.versions] == ends[:-1] and ends[-1] == len(sample.tokens)
                held = [version for version, _, _ in sample.versions]
                assert held == sorted(held) and held[-1] <= number // 3 + 1
        assert not [line for line in found.said if "left out" in line]


def test_samples_that_outlive_an_update_say_which_weights_wrote_what(made: Made, tmp_path: Path) -> None:
    server = nameless(version="0.5.21", token_s=0.04)
    with rig(made, tmp_path, [server], 1) as found:
        found.run(4, update=lambda: time.sleep(0.1))
        mixed = [sample for group in found.trained for sample in group.samples if len(sample.versions) > 1]
        assert mixed and found.staleness[-1]["mixed_versions"] > 0
        assert all(second - first == 1 for sample in mixed for (first, *_), (second, *_) in [sample.versions[:2]])


def test_no_server_gets_a_prompt_salted_for_weights_that_it_does_not_hold_yet(made: Made, tmp_path: Path) -> None:
    """One server takes long to load while the other goes on with the old weights: both check what they get."""
    servers = [nameless(version="0.5.21", token_s=0.005) for _ in range(2)]
    with rig(made, tmp_path, servers, 2, in_flight=1) as found:
        servers[0].faults.append(("/update_weights_from_disk", slow(0.1)))
        found.run(5)
        assert not [line for line in found.said if "left out" in line]
        salts = [body["extra_key"] for body in servers[1].paths("/generate")]
        assert set(salts) >= {"0:named.0", "0:named.1", "0:named.2"} and salts == sorted(salts)


def test_scores_are_made_while_the_policy_is_updated(made: Made, tmp_path: Path) -> None:
    with rig(made, tmp_path, [nameless()], 1) as found:
        scored = threading.Semaphore(0)

        def seconds() -> float:
            scored.release()
            return 0.0

        def update() -> None:
            """Ends only once the groups of this step and of the next are scored."""
            assert all(scored.acquire(timeout=10) for _ in range(3 if found.trained else 6))

        found.task.seconds = seconds
        found.run(5, update=update)


def test_a_sample_older_than_allowed_is_never_trained(made: Made, tmp_path: Path) -> None:
    """If ever an engine gave one: the last check before the update."""
    with rig(made, tmp_path, [nameless()], 1) as found:
        plain = found.parts._complete

        def aged(groups: Sequence[Group], place: int, samples: list[Sample]) -> None:
            for sample in samples:
                sample.versions = [(found.engine.version - 2, 0, len(sample.tokens))]
            plain(groups, place, samples)

        found.run(2)
        found.parts._complete = aged  # type: ignore[method-assign]
        with pytest.raises(
            RunError, match=r"a sample of step 3 is \d weight versions old and rollout.max_staleness is 1"
        ):
            found.run(1, done=2)
        assert len(found.trained) == 6


def test_prompts_that_no_server_took_are_drawn_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(made, tmp_path, [nameless()], 0) as found:

        def refused(groups: Sequence[Group], label: str) -> list[Rollout]:
            raise RunError("no server takes a prompt")

        stream = PromptStream({"letters": 40}, ("letters",), (1.0,), 0)
        before = stream.state_dict()
        monkeypatch.setattr(found.parts, "start", refused)
        with Ahead(found.parts, STAGE, stream, 0) as ahead:
            with pytest.raises(RunError, match="no server"):
                ahead.next()
            assert stream.state_dict() != before == ahead.state


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_servers_die_come_back_and_join_late_and_nothing_is_lost_or_doubled(
    made: Made, tmp_path: Path, staleness: int
) -> None:
    first, second, third = (nameless(token_s=0.004) for _ in range(3))
    late = nameless(token_s=0.004)
    late.server_close()  # its port is free until it is started
    back: list[TimedSGLang] = []

    def again(port: int) -> None:
        back.append(nameless(token_s=0.004, port=port))
        back[-1].start()

    step = 0

    def update() -> None:
        nonlocal step
        step += 1
        if step == 1:
            first.kill()  # with groups of the next step on it, if any run ahead
            again(late.server_address[1])
        elif step == 3:
            again(first.server_address[1])
            second.faults.append(("/generate", status(503)))
        time.sleep(0.02)

    with serving(second, third):
        first.start()
        urls = [server.url for server in (first, second, third, late)]
        found = Rig(made, tmp_path, urls, staleness, wait_s=0.3)
        try:
            assert any(f"{late.url} is not ready after 0 s" in line for line in found.said)
            found.engine.wait_s = 10.0
            found.run(6, update=update)
            assert in_order(found.trained) and len(found.trained) == 18
            assert max(old["staleness_max"] for old in found.staleness) <= staleness
            deadline = time.monotonic() + 20
            while len(found.fleet.ready) < 4 and time.monotonic() < deadline:
                second.faults.clear()
                found.engine.tend(0.0)
                time.sleep(0.05)
            assert len(found.fleet.ready) == 4
            assert any(f"{late.url} has joined" in line for line in found.said)
            assert any(f"{first.url} is back" in line for line in found.said)
            assert all(server.in_flight == 0 for server in found.fleet.servers)
        finally:
            found.close()
            for server in back:
                server.kill()


def test_a_late_server_of_the_wrong_kind_stays_left_out(made: Made, tmp_path: Path) -> None:
    late = nameless(version="0.5.9")
    port = late.server_address[1]
    late.server_close()
    with serving(server := nameless()):
        found = Rig(made, tmp_path, [server.url, late.url], 1, wait_s=0.3)
        with serving(nameless(version="0.5.9", port=port)):
            found.run(2)
            found.engine.tend(0.0)
        found.close()
    assert len(found.trained) == 6 and sum("0.5.17 is the oldest supported" in line for line in found.said) == 1


# -- what an answer says of its versions -------------------------------------------------------------------------------


def answer(count: int, last: object, spans: object = None) -> dict:
    meta = {
        "finish_reason": {"type": "length"},
        "output_token_logprobs": [[-1.0, 7, None]] * count,
        "weight_version": last,
    }
    return {"output_ids": [7] * count, "meta_info": meta | ({} if spans is None else {"weight_versions": spans})}


def span(version: str, start: object, end: object) -> dict:
    return {"version": version, "start": start, "end": end}


def versions(row: dict) -> list[tuple[int, int, int]]:
    """Asked under version 4 of the engine `run`."""
    (sample,) = read(Server("http://a"), row, 1, "run.4")
    return sample.versions


def test_an_answer_tells_which_weights_wrote_which_token_and_at_worst_the_oldest_that_can_be() -> None:
    assert versions(answer(5, "run.4")) == [(4, 0, 5)]
    assert versions(answer(5, "run.6")) == [(4, 0, 4), (6, 4, 5)], "no spans: only the end is known"
    assert versions(answer(1, "run.5")) == [(4, 0, 1)]
    told = [span("run.4", 0, 2), span("run.5", 2, 5)]
    assert versions(answer(5, "run.5", told)) == [(4, 0, 2), (5, 2, 5)]
    assert versions(answer(5, "run.5", [span("run.5", 0, 5)])) == [(5, 0, 5)], "it began after a sync"
    (sample,) = read(Server("http://a"), answer(5, "run.5", told), 1, "run.4", adapter=True)
    assert sample.versions == [(4, 0, 5)], "a request keeps the adapter that it named"


@pytest.mark.parametrize(
    "row",
    [
        answer(5, "run.3"),
        answer(5, "other.5"),
        answer(5, "run.x"),
        answer(5, None),
        answer(5, "run.5", [span("run.3", 0, 2), span("run.5", 2, 5)]),
        answer(5, "run.5", [span("run.4", 0, 2), span("other.5", 2, 5)]),
        answer(5, "run.5", [span("run.4", 0, 2), span("run.5", 3, 5)]),
        answer(5, "run.5", [span("run.4", 0, 2), span("run.5", 2, 4)]),
        answer(5, "run.5", [span("run.4", 0, 0), span("run.5", 0, 5)]),
        answer(5, "run.5", [span("run.5", 0, "5")]),
        answer(5, "run.5", []),
        answer(5, "run.5", [None]),
    ],
)
def test_older_foreign_and_broken_versions_are_refused(row: dict) -> None:
    with pytest.raises(ServerError):
        versions(row)
