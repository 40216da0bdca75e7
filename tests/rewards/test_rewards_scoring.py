"""Scoring beside the generation: the same scores as one by one, in any timing; pauses when nothing can score."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from omni_fast import scoring
from omni_fast.config import RewardsConfig
from omni_fast.curriculum.stages import Draw
from omni_fast.errors import RunError
from omni_fast.groups import Group, set_advantages
from omni_fast.progress import Progress
from omni_fast.rewards.compose import Composition
from omni_fast.rewards.score import Part, Score
from omni_fast.rollout.engine import Prompt, Sample, Sampling
from omni_fast.rollout.local import LocalEngine
from omni_fast.scoring import Scorer
from omni_fast.tasks.base import Item


class Letters:
    """A task whose score depends on the group as a whole, as hidden tests do; `before` runs at each call."""

    system, max_new_tokens = "", 8
    composition = Composition("additive", {"correct": 1.0})

    def __init__(self, name: str, before: Callable[[str], None] = lambda text: None) -> None:
        self.name, self.before = name, before
        self.calls = 0
        self.down = False

    def items(self, split: str) -> Sequence[Item]:
        return []

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        self.calls += 1
        self.before(completions[0])
        if self.down:
            return [Score({"correct": Part(None, "judge_down")}) for _ in completions]
        whole = sum(map(len, completions))
        return [Score({"correct": Part(float(len(text) * 7 % (whole + 1)))}) for text in completions]

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        return [0.0 for _ in completions]


def group(task: str, texts: Sequence[str]) -> Group:
    samples = [Sample([1], [0.0], "stop") for _ in texts]
    return Group(Draw(task, 0, 0), Item("i", "p"), [1], samples, list(texts))


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def scorer_of(said: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scorer]]:
    monkeypatch.setattr(scoring, "RETRY_S", 0.02)
    monkeypatch.setattr(scoring, "MAX_RETRY_S", 0.05)
    made = []

    def make(*tasks: Letters, stop: Callable[[], None] = lambda: None, **limits: float) -> Scorer:
        rewards = RewardsConfig(**{"max_invalid": 0.2, "pause_s": 5.0, **limits})
        progress = Progress(Console(file=said, width=400))
        made.append(Scorer({task.name: task for task in tasks}, rewards, progress, stop))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()


texts = st.lists(st.text("abc", max_size=6), min_size=2, max_size=4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), texts), min_size=1, max_size=6), st.randoms(), st.booleans())
def test_in_any_order_and_timing_the_scores_are_those_of_one_by_one(drawn: list[Any], rng: Any, hold: bool) -> None:
    tasks = {name: Letters(name, lambda text: time.sleep(len(text) / 5000)) for name in "ab"}
    scorer = Scorer(tasks, RewardsConfig(), Progress(Console(file=io.StringIO())), hold=hold)
    groups = [group(name, own) for name, own in drawn]
    plain = [group(name, own) for name, own in drawn]
    for one in plain:
        one.scores = tasks[one.draw.task].score([one.item] * len(one.texts), one.texts)
    order = list(groups)
    rng.shuffle(order)
    for one in order:
        scorer.submit(one)
    assert not hold or all(one.scoring is None for one in groups), "nothing is asked while others generate"
    assert scorer.finish(groups) >= 0.0
    scorer.close()
    for some in (groups, plain):
        set_advantages(some, tasks, "std")
    assert [(one.scores, one.advantages) for one in groups] == [(one.scores, one.advantages) for one in plain]


def test_scoring_starts_before_the_engine_has_finished(scorer_of: Callable[..., Scorer]) -> None:
    """A real engine: the groups that are complete are scored while others still generate, and none is lost."""
    torch.manual_seed(3)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=128, initializer_range=0.3)).eval()
    engine = LocalEngine(model)
    prompts = [Prompt([1, 2, place + 3], place) for place in range(12)]
    ended, scored, groups = [], threading.Event(), []
    scorer = scorer_of(Letters("a", lambda text: scored.set()))
    running: dict[int, int] = {}

    def finished(place: int, samples: list[Sample]) -> None:
        ended.append(place)
        groups.append(group("a", ["x" * len(sample.tokens) for sample in samples]))
        scorer.submit(groups[-1])

    def progress(tokens: int, left: int) -> None:
        if ended and left:
            assert scored.wait(10), "the first group is scored while samples still run"
            running[left] = len(ended)

    sampling = Sampling(40, stop_token_ids=tuple(range(8)), seed=5)
    results = engine.generate(prompts, 3, sampling, progress, finished)
    assert running, "some samples were still running"
    assert sorted(ended) == list(range(12)) and len(set(running.values())) > 1
    assert results == engine.generate(prompts, 3, sampling), "being watched changes nothing"
    assert all(sample.versions == [(0, 0, len(sample.tokens))] for samples in results for sample in samples)
    scorer.finish(groups)


def test_a_slow_task_does_not_hold_up_another(scorer_of: Callable[..., Scorer]) -> None:
    gate = threading.Event()
    slow, quick = Letters("slow", lambda text: gate.wait(10)), Letters("quick")  # type: ignore[arg-type,return-value]
    scorer = scorer_of(slow, quick)
    first, second = group("slow", ["a", "b"]), group("quick", ["a", "b"])
    scorer.submit(first)
    scorer.submit(second)
    while not second.scores:
        time.sleep(0.001)
    gate.set()
    scorer.finish([first, second])


def test_a_few_lost_samples_leave_their_groups_and_the_run_goes_on(
    scorer_of: Callable[..., Scorer], said: io.StringIO
) -> None:
    task = Letters("a")
    scorer = scorer_of(task, max_invalid=0.5)
    task.before = lambda text: setattr(task, "down", text.startswith("c"))
    groups = [group("a", ["a", "bb", "a"]), group("a", ["c", "bb", "a"])]
    for one in groups:
        scorer.submit(one)
    scorer.finish(groups)
    assert [score.valid for score in groups[1].scores] == [False] * 3 and said.getvalue() == ""
    set_advantages(groups, {"a": task}, "std")
    assert groups[1].advantages == [None] * 3 and groups[0].advantages != [None] * 3


def test_an_outage_pauses_says_so_and_ends_with_the_scores_it_would_have_had(
    scorer_of: Callable[..., Scorer], said: io.StringIO
) -> None:
    task, healthy = Letters("a"), Letters("a")
    scorer = scorer_of(task)
    groups = [group("a", ["a", "bb", "c" * n]) for n in range(6)]
    task.before = lambda text: setattr(task, "down", 2 < task.calls < 8)
    for one in groups:
        scorer.submit(one)
    scorer.finish(groups)
    assert [one.scores for one in groups] == [healthy.score([one.item] * 3, one.texts) for one in groups]
    lines = said.getvalue().splitlines()
    assert len(lines) == 2 and "paused: a:" in lines[0] and "judge_down" in lines[0] and "up to 5 s" in lines[0]
    assert "there again" in lines[1]
    assert task.calls < 15, "while it is down, one group a round is asked"


def test_after_the_limit_it_stops_and_names_what_is_missing(scorer_of: Callable[..., Scorer]) -> None:
    task = Letters("a")
    task.down = True
    scorer = scorer_of(task, pause_s=0.3)
    groups = [group("a", ["a", "b" * n]) for n in range(3)]
    for one in groups:
        scorer.submit(one)
    with pytest.raises(
        RunError, match="a: 6 of 6 samples could not be scored .judge_down.*same command again"
    ) as caught:
        scorer.finish(groups)
    assert caught.value.exit_code == 1


def test_the_user_may_stop_a_pause(scorer_of: Callable[..., Scorer]) -> None:
    class Stopped(RunError):
        pass

    def stop() -> None:
        if task.calls > 2:
            raise Stopped

    task = Letters("a")
    task.down = True
    scorer = scorer_of(task, stop=stop, pause_s=60.0)
    one = group("a", ["a", "b"])
    scorer.submit(one)
    with pytest.raises(Stopped):
        scorer.finish([one])


def test_a_bug_in_a_task_is_not_swallowed(scorer_of: Callable[..., Scorer]) -> None:
    task = Letters("a", lambda text: 1 / 0)  # type: ignore[arg-type,return-value]
    scorer = scorer_of(task)
    one = group("a", ["a", "b"])
    scorer.submit(one)
    with pytest.raises(ZeroDivisionError):
        scorer.finish([one])


def test_a_judge_that_is_closed_ends_what_is_asked_and_not_the_thread(scorer_of: Callable[..., Scorer]) -> None:
    """`JsonClient.close` cancels its calls, which is no `Exception`."""

    def cancelled(text: str) -> None:
        raise asyncio.CancelledError

    task = Letters("a", cancelled)
    scorer = scorer_of(task)
    first, second = group("a", ["a", "b"]), group("a", ["a", "b"])
    scorer.submit(first)
    assert first.scoring is not None and isinstance(first.scoring.exception(timeout=5), asyncio.CancelledError)
    task.before = lambda text: None
    scorer.submit(second)
    scorer.finish([second])
