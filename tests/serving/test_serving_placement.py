"""Where policy and judge are served: what a config may ask for, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_fast.build import with_judge
from omni_fast.commands.engine import _model_folder
from omni_fast.config import Config, load
from omni_fast.errors import UserError
from omni_fast.serving.launch import adapter_flags, command, launches

ONE_SERVER = ("engine.kind=sglang", "engine.sync=adapter", "model.lora_rank=8", "judge.backend=sglang")


def config(*overrides: str) -> Config:
    return load("quickstart", overrides)


def test_one_server_for_policy_and_judge() -> None:
    made = config(*ONE_SERVER)
    assert made.adapter_rank == 8
    judge = with_judge(made, ["http://a:1/", "http://b:2"], "/model").judge
    assert (judge.url, judge.model, judge.backend) == ("http://a:1/v1", "/model", "sglang")
    named = with_judge(config(*ONE_SERVER, "judge.model=other"), ["http://a:1/v1"], "/model").judge
    assert (named.url, named.model) == ("http://a:1/v1", "other")
    elsewhere = config(*ONE_SERVER, "judge.url=http://j/v1", "judge.model=m")
    assert with_judge(elsewhere, ["http://a:1"], "/model") is elsewhere
    embedded = config("engine.kind=sglang")
    assert with_judge(embedded, ["http://a:1"], "/model") is embedded and embedded.adapter_rank == 0


@pytest.mark.parametrize(
    ("without", "told"),
    [
        ("engine.kind=local", r"needs judge\.url; without one the engine's own server judges"),
        ("engine.sync=disk", r"only with engine\.kind 'sglang', engine\.sync 'adapter'"),
        ("model.lora_rank=0", r"engine\.sync 'adapter' brings servers a LoRA adapter and model\.lora_rank is 0"),
    ],
)
def test_a_judge_whose_weights_would_move_is_refused(without: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        config(*ONE_SERVER, without)


@pytest.mark.parametrize("without", ["engine.kind=local", "rollout.max_staleness=1"])
def test_servers_that_would_sleep_while_they_are_needed_are_refused(without: str) -> None:
    assert config("engine.kind=sglang", "engine.sleep=true").engine.sleep
    with pytest.raises(UserError, match=r"engine\.sleep needs engine\.kind 'sglang' and rollout\.max_staleness 0"):
        config("engine.kind=sglang", "engine.sleep=true", without)


def test_a_model_in_the_home_folder_is_served_from_there() -> None:
    """`train` took the ~ of a config's model.path for home, `engine up` did not."""
    assert _model_folder("~/m", config()) == str(Path.home() / "m") and _model_folder("a/b", config()) == "a/b"


def test_servers_are_started_for_adapters_of_the_rank_and_the_users_flags_win() -> None:
    assert adapter_flags(0, "cpu") == []
    flags = [*adapter_flags(8, "cpu"), "--max-lora-rank", "64"]
    (launch,) = launches("policy", "/model", "cpu", "auto", flags, 1)
    made = command(launch, Path("/python"), 1, None)
    assert made[-2:] == ["--max-lora-rank", "64"] and made[made.index("--max-lora-rank") + 1] == "8"
    assert made[made.index("--lora-backend") + 1] == "torch_native" and "--lora-backend" not in adapter_flags(8, "cuda")
