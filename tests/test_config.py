"""Configs: what is refused and with which words, dotted overrides, recipes, the fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_fast.config import Config, load, recipes
from omni_fast.errors import UserError

PLAIN = """
seed = 3
[rollout]
prompts_per_step = 4
[[tasks]]
name = "sums"
kind = "math"
[[tasks]]
name = "facts"
kind = "qa"
max_new_tokens = 9
"""


@pytest.fixture
def plain(tmp_path: Path) -> str:
    return written(tmp_path, PLAIN)


def written(folder: Path, text: str) -> str:
    path = folder / "job.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(source: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(source, overrides)
    return str(caught.value)


def test_a_file_is_read_and_the_rest_has_defaults(plain: str) -> None:
    config = load(plain)
    assert (config.seed, config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (3, 4, 8)
    assert [(task.name, task.kind, task.max_new_tokens) for task in config.tasks] == [
        ("sums", "math", 16),
        ("facts", "qa", 9),
    ]


def test_every_recipe_loads_and_has_the_four_domains() -> None:
    assert {"quickstart", "quickstart-tiny"} <= set(recipes())
    for name in recipes():
        if name.startswith("study-"):
            with pytest.raises(UserError, match=f"{name} is a study; run it with: omni-fast study {name}"):
                load(name)
        else:
            assert {task.kind for task in load(name).tasks} == {"math", "code", "qa", "writing"}


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("rollout.prompt_per_step=4", "rollout.prompt_per_step", "prompts_per_step"),
        ("curiculum.mode=joint", "curiculum", "curriculum"),
        ("tasks.sums.max_tokens=4", "tasks.sums.max_tokens", "max_new_tokens"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(plain: str, override: str, key: str, meant: str) -> None:
    message = refused(plain, override)
    assert plain in message and f"unknown key '{key}'" in message and f"did you mean '{meant}'?" in message


def test_an_unknown_key_like_no_other_lists_what_there_is(plain: str) -> None:
    message = refused(plain, "checkpoint.zzz=1")
    assert "unknown key 'checkpoint.zzz'" in message and "every_steps" in message and "keep_last" in message


@pytest.mark.parametrize(
    ("override", "where", "got"),
    [
        ("rollout.prompts_per_step=many", "'rollout.prompts_per_step'", "'many'"),
        ("rollout.samples_per_prompt=1", "'rollout.samples_per_prompt'", "1"),
        ("optimizer.learning_rate=0", "'optimizer.learning_rate'", "0"),
        ("optimizer.beta2=1", "'optimizer.beta2'", "1"),
        ("rollout.temperature=inf", "'rollout.temperature'", "inf"),
        ("loss.entropy_bonus=nan", "'loss.entropy_bonus'", "nan"),
        ("loss.policy=ppo", "'loss.policy'", "'ppo'"),
        ("curriculum.order=sums", "'curriculum.order'", "'sums'"),
        ("tasks.facts.kind=riddles", "'tasks.facts.kind'", "'riddles'"),
        ("seed=-1", "'seed'", "-1"),
        ("seed=18446744073709551616", "'seed'", "18446744073709551616"),  # more than a generator takes
        ("rollout.prompts_per_step=true", "'rollout.prompts_per_step'", "True"),
        ("evaluation.test_items=2.0", "'evaluation.test_items'", "2.0"),
        ('sandbox.unsafe="true"', "'sandbox.unsafe'", "'true'"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_was(plain: str, override: str, where: str, got: str) -> None:
    message = refused(plain, override)
    assert where in message and f"got {got}" in message


def test_all_mistakes_are_told_at_once(plain: str) -> None:
    message = refused(plain, "seed=-1", "loss.policy=ppo", "loging.wandb=true")
    assert all(key in message for key in ("'seed'", "'loss.policy'", "'logging'"))


def test_a_section_that_is_a_value_and_a_value_that_is_a_section(plain: str) -> None:
    assert "'rollout'" in refused(plain, "rollout=4")
    assert "'seed' is a value, not a section" in refused(plain, "seed.sub=4")


def test_no_such_file_lists_the_recipes() -> None:
    message = refused("quikstart.toml")
    assert "'quikstart.toml'" in message and "quickstart-tiny" in message


def test_bad_toml_names_file_and_line(tmp_path: Path) -> None:
    source = written(tmp_path, 'seed = 3\n[rollout\nprompts_per_step = 4\n[[tasks]]\nname = "a"\nkind = "math"\n')
    message = refused(source)
    assert source in message and "not valid TOML" in message and "line 2" in message


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xff\xfe\x00seed")
    assert str(path) in refused(str(path))


def test_no_task_is_refused(tmp_path: Path) -> None:
    assert "'tasks' is missing" in refused(written(tmp_path, "seed = 1\n"))
    assert "'tasks'" in refused(written(tmp_path, "tasks = []\n"))


def test_a_task_without_what_its_kind_needs_is_refused(plain: str) -> None:
    message = refused(plain, "tasks.sums.kind=jsonl")
    assert "'sums'" in message and "file, prompt, verifier" in message
    assert "cls" in refused(plain, "tasks.sums.kind=python")


def test_duplicate_task_names_are_refused(plain: str) -> None:
    assert "task names must differ, got ['facts', 'facts']" in refused(plain, "tasks.sums.name=facts")


@pytest.mark.parametrize("order", ['["sums"]', '["sums", "sums"]', '["sums", "facts", "poems"]', "[]"])
def test_an_order_that_is_no_permutation_is_refused(plain: str, order: str) -> None:
    message = refused(plain, "curriculum.mode=order", f"curriculum.order={order}")
    assert "name each task once" in message and "['sums', 'facts']" in message


def test_overrides_are_toml_or_bare_text_and_the_last_wins(plain: str) -> None:
    config = load(
        plain,
        (
            "model.path=tiny",
            "rollout.temperature=0.7",
            "logging.tensorboard=true",
            "curriculum.mode=order",
            'curriculum.order=["facts", "sums"]',
            "seed=5",
            "seed=6",
        ),
    )
    assert config.model.path == "tiny" and config.rollout.temperature == 0.7 and config.logging.tensorboard
    assert config.curriculum.order == ["facts", "sums"] and config.seed == 6


def test_an_override_reaches_a_task_by_its_name_and_only_that(plain: str) -> None:
    config = load(plain, ("tasks.facts.max_new_tokens=30", "tasks.facts.system=Be brief."))
    assert [(task.max_new_tokens, task.system) for task in config.tasks] == [(16, None), (30, "Be brief.")]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tasks.poems.max_new_tokens=3", "tasks.NAME.KEY, with a NAME of sums, facts"),
        ("tasks.sums=3", "tasks.NAME.KEY, with a NAME of sums, facts"),
        ("seed", "is no KEY=VALUE"),
        ("=3", "is no KEY=VALUE"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(plain: str, override: str, says: str) -> None:
    message = refused(plain, override)
    assert f"override '{override}'" in message and says in message


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "[/b]", "single:sums", "two words"])
def test_a_task_name_that_is_no_folder_name_is_refused(plain: str, name: str) -> None:
    assert "it becomes part of folder names" in refused(plain, f'tasks.sums.name="{name}"')


def test_the_fingerprint_changes_with_the_result_and_only_with_it(plain: str) -> None:
    def of(*overrides: str) -> str:
        return json.dumps(load(plain, overrides).fingerprint())

    assert of() == of("seed=3") == of("logging.tensorboard=true") == of("checkpoint.every_steps=2")
    changed = {of("seed=4"), of("loss.policy=gspo"), of("tasks.sums.max_new_tokens=15"), of("model.path=tiny")}
    assert len(changed | {of()}) == 5


def test_a_config_survives_json(plain: str) -> None:
    config = load(plain, ("optimizer.learning_rate=3e-4",))
    assert Config.model_validate_json(config.model_dump_json()) == config
