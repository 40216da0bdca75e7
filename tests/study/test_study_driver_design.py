"""What a study would run: arms, shared paths, equal budgets, names, and every way to get the configuration wrong."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.errors import UserError
from omni_fast.study import config as configs
from omni_fast.study import plan, tiny
from omni_fast.study.arms import Design

RECIPES = ("study-tiny", "study-smollm2", "study-qwen2.5-7b")


def design(*overrides: str, recipe: str = "study-tiny") -> Design:
    return Design(recipe, *configs.load(recipe, overrides))


def test_all_orders_of_four_tasks_are_64_stages() -> None:
    only = design('study.arms=["every_order"]', "study.other_seeds=1")
    assert len(only.arms()) == 24 and len(only.nodes(0)) == 4 + 12 + 24 + 24


def test_what_the_orders_share_is_not_run_again() -> None:
    small = design('study.arms=["base","single","joint","solved","reversed","user","every_order","repeat","probe"]')
    assert len(small.nodes(0, solved=["shift", "sort", "scramble", "reverse"])) == 64 + 1 + 4 + 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_full_arm_trains_on_as_many_samples(recipe: str) -> None:
    found = design(recipe=recipe)
    budget = found.samples(found.steps * len(found.tasks))
    for arm in found.arms():
        path = found.path(arm.name, 0, found.tasks)
        assert path is not None
        steps = sum(int(stage.rpartition(":")[2]) for stage in path if ":" in stage)
        steps += found.config.curriculum.refresh_steps if arm.kind == "refresh" else 0
        if arm.kind in ("joint", "order", "refresh", "online", "sft"):
            assert found.samples(steps) == budget, arm.name


def test_the_decided_seeds_are_those_of_the_arms() -> None:
    arms = {arm.name: arm for arm in design().arms()}
    for name in ("base", "joint", "solved", "reversed", "merge:linear", "merge:ties"):
        assert len(arms[name].seeds) >= 5
    assert all(len(arm.seeds) >= 2 for arm in arms.values())
    assert {arms[name].seeds for name in ("solved", "joint")} == {tuple(range(8))}


def test_a_policy_is_named_by_what_it_depends_on() -> None:
    path = ("sort:24", "shift:24")
    here = design().node(path, 1)
    same = design("study.seeds=3", "threads=2", "curriculum.mode=random", "checkpoint.every_steps=3")
    assert same.node(path, 1) == here
    others = [
        design().node(path, 2),
        design().node(("shift:24", "sort:24"), 1),
        design("optimizer.learning_rate=2e-4").node(path, 1),
        design("seed=1").node(path, 1),
    ]
    assert len({here, *others}) == 5
    merged = ("merge.ties",)
    assert design().node(merged, 0) != design("study.merge_density=0.3").node(merged, 0)


def test_a_stage_is_what_the_trainer_runs() -> None:
    found = design()
    assert found.stage(("sort:24", "shift:24"), 0).tasks == ("shift",)
    joint = found.stage(("joint:96",), 0)
    assert joint.joint and joint.steps == 96 and sum(joint.weights) == pytest.approx(1.0)
    assert found.stage(("sft:96",), 0).steps == 192  # as many to sample as to learn


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("study.sedes=3", "did you mean 'seeds'"),
        ('study.arms=["base", "refreshed"]', "or 'every_order', got 'refreshed'"),
        ('study.merges=["tie"]', "'task_arithmetic', 'ties', 'dare'"),
        ('study.primary=["solved"]', "primary names two arms"),
        ("study.probe_steps=0", "the arm probe needs probe_steps"),
        ("study.temperatures=[0]", "greater than 0"),
        ("study.temperatures=[inf]", "finite number"),
        ("study.merge_scales=[]", "at least one of merges"),
        ("study.merge_scales=[nan]", "finite number"),
        ("study.arms=[]", "at least 1 item"),
        ("study.seeds=0", "greater than 0, got 0"),
        ("study.seeds=1000000000", "less than or equal to 1000"),
        ("rolout.prompts_per_step=3", "did you mean 'rollout'"),
        ("curriculum.refresh_steps=6", "multiple of the number of tasks (4)"),
        ("curriculum.refresh_steps=0", "multiple of the number of tasks"),
        ("curriculum.order=[]", "needs curriculum.order to name each task once"),
        ("curriculum.replay_fraction=0.2", "no place in a study"),
        ("tasks.sort.name=joint", "rename the task"),
        ("tasks.sort.name=merge.sort", "rename the task"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override: str, words: str) -> None:
    with pytest.raises(UserError, match="^study-tiny: ") as caught:
        configs.load("study-tiny", [override, 'curriculum.order=["a"]'] if override.startswith("tasks") else [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ('["solved", "jont"]', "did you mean 'joint'"),
        ('["joint", "joint"]', "two different arms"),
        ('["user", "sft:1"]', "sft:1: did you mean 'sft'"),
        ('["probe:sort", "joint"]', "name two different arms"),
        ('["order:sort>reverse>shift>scramble", "joint"]', "name two different arms"),
    ],
)
def test_the_primary_contrast_is_of_two_arms(pair: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        design(f"study.primary={pair}")


@pytest.mark.parametrize(
    "overrides",
    [
        ['study.arms=["base", "joint", "base"]'],
        ['study.merges=["ties", "ties"]'],
        ["tasks.sort.name=a", "tasks.shift.name=b", "tasks.reverse.name=a.b", 'study.arms=["every_order"]'],
    ],
)
def test_arms_that_would_be_one_file_are_refused(overrides: list[str]) -> None:
    with pytest.raises(UserError, match="would be kept in one file"):
        design(*overrides)


def many_tasks(folder: Path, count: int) -> Path:
    task = '[[tasks]]\nname = "t{}"\nkind = "python"\ncls = "omni_fast.study.tiny:Sort"\n'
    path = folder / "many.toml"
    path.write_text("[study]\n" + "".join(task.format(k) for k in range(count)))
    return path


@pytest.mark.timeout(60)
def test_twelve_tasks_are_a_study_and_nineteen_are_not(tmp_path: Path) -> None:
    """12! orders are never listed."""
    arms = Design("many", *configs.load(str(many_tasks(tmp_path, 12)))).arms()
    assert [arm.name for arm in arms[:2]] == ["base", "single:t0"]
    with pytest.raises(UserError, match="at most 18 tasks, got 19"):
        configs.load(str(many_tasks(tmp_path, 19)))


def test_one_task_is_no_study(tmp_path: Path) -> None:
    path = tmp_path / "one.toml"
    path.write_text('[study]\n[[tasks]]\nname = "math"\nkind = "math"\n')
    with pytest.raises(UserError, match="has one task, math: give at least two"):
        configs.load(str(path))


def test_a_config_of_a_training_run_is_no_study() -> None:
    with pytest.raises(UserError, match=r"quickstart has no section \[study\]: add one, or use `omni-fast train`"):
        configs.load("quickstart")


def test_tasks_that_the_model_cannot_read_are_refused() -> None:
    with pytest.raises(UserError, match="knows digits only"):
        tiny.check_tasks(["omni_fast.study.tiny:Sort", "mine:Task"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_tells_policies_samples_and_cost(recipe: str, tmp_path: Path) -> None:
    text = "\n".join(plan.describe(design(recipe=recipe), tmp_path, jobs=1))
    for words in ("policies ", "samples ", "cost ", "primary contrast solved - joint", "joint:"):
        assert words in text
    assert "depends on" not in text


def test_more_jobs_than_seeds_are_no_faster(tmp_path: Path) -> None:
    costs = [plan.describe(design("threads=64"), tmp_path, jobs)[-1] for jobs in (8, 64)]
    assert costs[0] == costs[1] and "with --jobs 8" in costs[0]


digits = st.lists(st.sampled_from(tiny.DIGITS), min_size=tiny.LENGTH, max_size=tiny.LENGTH, unique=True).map("".join)


@settings(deadline=None)
@given(digits, st.integers(0, 99))
def test_an_answer_is_right_for_its_own_task(prompt: str, seed: int) -> None:
    for function in tiny.MARKS:
        assert tiny.right(function, prompt, tiny.answer(function, prompt, random.Random(seed)))
        assert not tiny.right(function, prompt, "") and not tiny.right(function, prompt, prompt + "0")
    assert not tiny.right("scramble", prompt, prompt)


def test_scramble_has_44_right_answers() -> None:
    answers = ["".join(order) for order in itertools.permutations("01234")]
    assert sum(tiny.right("scramble", "01234", text) for text in answers) == 44


def test_no_set_of_digits_is_in_two_splits() -> None:
    seen: dict[frozenset[str], str] = {}
    for kind in (tiny.Sort, tiny.Reverse, tiny.Shift, tiny.Scramble):
        task = kind(name="any", seed=3, max_new_tokens=6)
        for split in ("train", "select", "test"):
            for item in task.items(split):  # type: ignore[arg-type]
                assert seen.setdefault(frozenset(item.prompt[1:]), split) == split
