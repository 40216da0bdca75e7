"""What must never leak from training into what decides and what is reported."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.config import TaskConfig
from omni_fast.errors import UserError
from omni_fast.rewards.code import CodeVerifier
from omni_fast.rewards.judge.rubric import RubricJudge
from omni_fast.rewards.math import MathVerifier
from omni_fast.rewards.sandbox import Sandbox
from omni_fast.tasks import BUILT_IN, build_tasks, qa
from omni_fast.tasks.base import SPLITS, Item, Resources, Task
from omni_fast.tasks.qa import countries
from omni_fast.tasks.splits import partition
from omni_fast.tasks.tiny import tiny_corpus

SEEDS = (0, 1, 7)
VERIFIER = MathVerifier()
CODE = CodeVerifier(Sandbox())  # never started: these tests grade no code


RESOURCES = Resources(lambda: VERIFIER, lambda: CODE, RubricJudge, RubricJudge)


def block(kind: str, level: str = "default") -> TaskConfig:
    return TaskConfig.model_validate({"name": kind, "kind": kind, "level": level})


def tasks(seed: int, level: str = "default", kinds: Sequence[str] = tuple(BUILT_IN)) -> list[Task]:
    return list(build_tasks([block(kind, level) for kind in kinds], seed=seed, resources=RESOURCES).values())


def keys(task: Task, item: Item) -> set[object]:
    """What identifies the thing asked: it may occur in one split only."""
    if task.name == "math":
        return {frozenset(re.findall(r"\d+", item.prompt))}
    if task.name == "code":
        return {item.answer["operation"]}
    if task.name == "qa":
        return {item.id.split("/")[1]}
    return {item.id.split("/")[0], frozenset(item.id.split("/")[1:])}


@pytest.mark.parametrize("seed", SEEDS)
def test_splits_share_nothing_that_is_asked(seed: int) -> None:
    for task in tasks(seed):
        asked = {split: {key for item in task.items(split) for key in keys(task, item)} for split in SPLITS}
        for one, other in itertools.combinations(SPLITS, 2):
            assert not asked[one] & asked[other], (task.name, one, other)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("level", ["default", "tiny"])
def test_prompts_and_ids_are_distinct_over_all_splits(seed: int, level: str) -> None:
    for task in tasks(seed, level):
        items = [item for split in SPLITS for item in task.items(split)]
        assert len({item.id for item in items}) == len(items), task.name
        assert len({(item.prompt, item.prefix) for item in items}) == len(items), task.name


@pytest.mark.parametrize("seed", SEEDS)
def test_default_sizes_allow_the_evaluations_that_the_project_promises(seed: int) -> None:
    for task in tasks(seed):
        assert len(task.items("train")) >= 400 and len(task.items("select")) >= 48 and len(task.items("test")) >= 120


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=8)
def test_every_seed_fills_every_split(seed: int) -> None:
    for level in ("default", "tiny"):
        for task in tasks(seed, level):
            sizes = BUILT_IN[task.name].levels[level].sizes
            assert all(len(task.items(split)) == getattr(sizes, split) > 0 for split in SPLITS)


def test_same_seed_same_items_and_another_seed_others() -> None:
    for one, same, other in zip(tasks(3), tasks(3), tasks(4), strict=True):
        for split in SPLITS:
            assert one.items(split) == same.items(split)
            assert one.items(split) != other.items(split), one.name


def test_an_echo_of_the_prompt_is_never_right() -> None:
    """The last-number rule would pay for it."""
    (task,) = tasks(0, kinds=["math"])
    for split in SPLITS:
        items = task.items(split)
        assert not any(task.metric(items, [item.prompt for item in items]))


def test_prompts_are_short_enough_for_the_quickstart() -> None:
    for task in tasks(0):
        longest = max(len((item.prompt + item.prefix).split()) for split in SPLITS for item in task.items(split))
        assert longest <= 30, task.name


def test_qa_candidates_hold_the_gold_once_at_no_fixed_place() -> None:
    places = []
    for split in SPLITS:
        for item in tasks(0, kinds=["qa"])[0].items(split):
            candidates = item.answer["candidates"]
            assert isinstance(candidates, list) and len(candidates) == qa.CANDIDATES == len(set(map(str, candidates)))
            places.append(candidates.index(item.answer["gold"]))
    shares = [places.count(place) / len(places) for place in range(qa.CANDIDATES)]
    assert max(shares) < 0.32 and min(shares) > 0.18, shares


def test_qa_shows_a_fact_again_with_other_distractors() -> None:
    items = tasks(0, kinds=["qa"])[0].items("train")
    first = {item.id.removesuffix("/0"): item for item in items if item.id.endswith("/0")}
    again = [item for item in items if item.id.endswith("/1")]
    assert again and all(item.prompt != first[item.id.removesuffix("/1")].prompt for item in again)


def test_countries_are_askable() -> None:
    known = {country.name: country for country in countries()}
    assert known["France"].capital == "Paris" and known["France"].continent == "Europe"
    assert len(known) > 140 and "Mexico" not in known  # its capital gives it away


@given(n=st.integers(6, 60), seed=st.integers(0, 99), select=st.floats(0.05, 0.3), test=st.floats(0.05, 0.4))
@settings(deadline=None)
def test_partition_loses_and_repeats_nothing(n: int, seed: int, select: float, test: float) -> None:
    shares = {"train": 1 - select - test, "select": select, "test": test}
    parts = partition(range(n), shares, random.Random(seed))  # type: ignore[arg-type]
    assert sorted(parts["train"] + parts["select"] + parts["test"]) == list(range(n))
    assert all(parts[split] for split in SPLITS)


def test_a_level_that_there_is_not_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="no level 'hard'"):
        tasks(0, "hard", ["qa"])


@pytest.mark.parametrize("kind", BUILT_IN)
def test_tiny_corpus_demonstrates_train_items_alone(kind: str) -> None:
    rows = tiny_corpus([block(kind, "tiny")], 0)
    (made,) = tasks(0, "tiny", [kind])
    train = {item.prompt for item in made.items("train")}
    held_out = {item.prompt for split in SPLITS[1:] for item in made.items(split)}
    prompts = {prompt for prompt, _, _ in rows}
    assert prompts and not prompts & held_out and prompts >= train
    assert all(reply and wrong and reply != wrong for _, reply, wrong in rows)
    assert rows == tiny_corpus([block(kind, "tiny")], 0) != tiny_corpus([block(kind, "tiny")], 1)


def test_tiny_corpus_of_blocks_joins_the_domains() -> None:
    both, one, other = (
        tiny_corpus([block(k, "tiny") for k in kinds], 3) for kinds in (("math", "qa"), ("math",), ("qa",))
    )
    assert both == one + other
    with pytest.raises(UserError, match="task 'big' cannot be learned"):
        tiny_corpus([TaskConfig(name="big", kind="math")], 3)
