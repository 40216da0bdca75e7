"""The real SGLang server on the CPU: what omni_fast relies on, asked over HTTP of one server that is started once."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from served_sglang import (
    SAMPLING,
    TOLERANCE,
    assert_of_the_policy,
    assert_serves,
    disk_update,
    engine,
    generate,
    get,
    logprobs,
    post,
    some_prompts,
    streamed,
    teacher_forced,
    tiny_llama,
    train_a_little,
)

from omni_fast import config as configs
from omni_fast import serving, train
from omni_fast.errors import RunError
from omni_fast.policy.adapter import add_adapter
from omni_fast.policy.pack import Trajectory
from omni_fast.policy.update import Policy
from omni_fast.progress import Progress
from omni_fast.rollout.engine import Sample, Sampling
from omni_fast.serving import install, process
from omni_fast.sync import adapter

pytestmark = pytest.mark.timeout(900)


def test_the_state_tells_a_ready_server_of_the_pinned_version(engine_folder: Path) -> None:
    (found,) = serving.status(engine_folder)
    assert found.state == "ready" and found.server.version == install.VERSION and found.weight_version == "default"


def test_another_start_takes_the_running_server_over(engine_folder: Path) -> None:
    (before,) = serving.status(engine_folder)
    said: list[str] = []
    (again,) = serving.start([before.server.launch], engine_folder, say=said.append)
    assert again == before.server and "taken over" in said[-1]


def test_n_samples_of_one_prompt_differ_and_end_as_told(url: str) -> None:
    samples = generate(url, [7, 8, 9, 10], n=4, max_new_tokens=20, temperature=1.0, ignore_eos=True)
    assert len(samples) == 4 and len({tuple(sample["output_ids"]) for sample in samples}) == 4
    for sample in samples:
        assert len(sample["output_ids"]) == len(logprobs(sample)) == 20
        assert sample["meta_info"]["finish_reason"]["type"] == "length"
    (ended,) = generate(url, [7, 8, 9, 10], max_new_tokens=400, temperature=1.0, stop_token_ids=list(range(320)))
    assert len(ended["output_ids"]) == 1 and ended["meta_info"]["finish_reason"]["type"] == "stop"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_distribution_sampled_from(url: str, temperature: float) -> None:
    model = tiny_llama(0)
    prompt = torch.randint(5, 320, (31,), generator=torch.Generator().manual_seed(3)).tolist()
    for sample in generate(url, prompt, n=4, max_new_tokens=32, temperature=temperature, ignore_eos=True):
        expected = teacher_forced(model, prompt, sample, temperature)
        torch.testing.assert_close(logprobs(sample), expected, atol=TOLERANCE, rtol=0)


def test_chat_answers_with_the_template(url: str) -> None:
    body = {"model": "x", "messages": [{"role": "user", "content": "What is 2 + 3?"}], "n": 2, "max_tokens": 5}
    answer = post(url, "/v1/chat/completions", body | {"temperature": 0.0})
    first, second = (choice["message"]["content"] for choice in answer["choices"])
    assert first == second and answer["usage"]["completion_tokens"] <= 10


@pytest.mark.usefixtures("original")
def test_weights_from_disk_are_served_under_their_version(url: str, tmp_path: Path) -> None:
    changed = tiny_llama(1)
    changed.save_pretrained(tmp_path)
    assert_serves(url, tiny_llama(0), "default")
    disk_update(url, tmp_path, "7")
    assert_serves(url, changed, "7")


@pytest.mark.usefixtures("original")
def test_weights_as_tensors_are_served_under_their_version(url: str) -> None:
    changed = tiny_llama(2)
    buffer = io.BytesIO()
    pickle.dump([(name, value.detach().clone()) for name, value in changed.named_parameters()], buffer)
    packed = base64.b64encode(buffer.getvalue()).decode()
    answer = post(
        url,
        "/update_weights_from_tensor",
        {"serialized_named_tensors": [packed], "flush_cache": True, "weight_version": "8"},
    )
    assert answer["success"], answer
    assert_serves(url, changed, "8")


@pytest.mark.usefixtures("original")
@pytest.mark.parametrize(
    ("mode", "flush", "ends"), [("in_place", False, "length"), ("retract", False, "length"), ("abort", True, "abort")]
)
def test_the_safe_ways_to_pause_keep_the_server_alive(
    url: str, tmp_path: Path, engine_folder: Path, mode: str, flush: bool, ends: str
) -> None:
    """A request is under way while weights change; the default (retract with a flush) would kill the server."""
    changed = tiny_llama(3)
    changed.save_pretrained(tmp_path)
    with streamed(url, [9, 9, 9], max_new_tokens=1000, temperature=1.0, ignore_eos=True) as states:
        assert len(next(states)["output_ids"]) < 1000, "under way"
        post(url, "/pause_generation", {"mode": mode})
        disk_update(url, tmp_path, f"after-{mode}", flush_cache=flush)
        post(url, "/continue_generation")
        last = [*states][-1]
    assert last["meta_info"]["finish_reason"]["type"] == ends
    assert (last["meta_info"]["completion_tokens"] == 1000) == (ends == "length")
    assert serving.status(engine_folder)[0].state == "ready"
    post(url, "/flush_cache")
    assert_serves(url, changed, f"after-{mode}")


# -- the trainer's own client, over the same server --------------------------------------------------------------------


@pytest.mark.usefixtures("original")
@pytest.mark.parametrize("transport", ["disk", "tensor", "distributed"])
def test_after_each_sync_the_engine_samples_from_the_policy(url: str, tmp_path: Path, transport: str) -> None:
    policy, prompts = tiny_llama(0), some_prompts(6)
    with engine(url, policy, tmp_path, transport) as made:
        for version in range(3):
            if version:
                train_a_little(policy, version)
                seconds = made.sync(version)
                print(f"sync by {transport}: {seconds}")
            assert_of_the_policy(policy, prompts, made.generate(prompts, 3, SAMPLING), 3, version)


@pytest.mark.usefixtures("original")
def test_the_server_tells_how_many_layers_it_has(url: str, tmp_path: Path) -> None:
    """Where a model's weights are not shown this is what tells a deeper one from the policy's."""
    with engine(url, tiny_llama(0), tmp_path) as made:
        assert made.fleet.run(made.weights._layers(made.fleet.servers[0])) == 2


@pytest.mark.usefixtures("original")
def test_a_kill_in_mid_rollout_loses_and_doubles_nothing(url: str, engine_folder: Path, tmp_path: Path) -> None:
    policy, prompts = tiny_llama(0), some_prompts(40)
    long = Sampling(max_new_tokens=100, temperature=SAMPLING.temperature, stop_token_ids=(1,))
    came: list[int] = []

    def kill_once(place: int, group: list[Sample]) -> None:
        came.append(place)
        if len(came) == 8:
            os.kill(before.pid, signal.SIGKILL)

    before = serving.status(engine_folder)[0].server
    with engine(url, policy, tmp_path) as made, serving.watched(engine_folder, say=print):
        train_a_little(policy, 5)
        made.sync(1)
        groups = made.generate(prompts, 2, long, finished=kill_once)
        assert sorted(came) == list(range(40)), "each group once"
        (after,) = serving.status(engine_folder)
        assert after.state == "ready" and after.server.url == url and after.server.restarts == before.restarts + 1
        assert not process.group(before.pid, before.born), "the killed one left nothing behind"
        assert_of_the_policy(policy, prompts, groups, 2, 1)


@pytest.mark.usefixtures("original")
@pytest.mark.parametrize("transport", ["disk", "distributed"])
def test_a_kill_in_mid_sync_leaves_no_old_weights_behind(
    url: str, engine_folder: Path, tmp_path: Path, transport: str
) -> None:
    policy, prompts = tiny_llama(0), some_prompts(4)
    with engine(url, policy, tmp_path, transport) as made:
        server = serving.status(engine_folder)[0].server
        train_a_little(policy, 6)
        killer = threading.Timer(0.02, os.kill, (server.pid, signal.SIGKILL))
        killer.start()
        try:
            made.sync(1)
        except RunError as error:  # the only server is gone, which a sync may say
            print(error)
        killer.join()
        with serving.watched(engine_folder, say=print):
            made.version = 1
            assert_of_the_policy(policy, prompts, made.generate(prompts, 2, SAMPLING), 2, 1)


def write_grpo(folder: Path, url: str, model_folder: Path, judge: str = "", sync: str = "disk", rank: int = 0) -> Path:
    """The config of three steps whose samples are generated, and compared by /v1/score, on one server."""
    config = folder / "run.toml"
    config.write_text(
        f"""
        [model]
        path = {json.dumps(str(model_folder))}
        dtype = "float32"
        lora_rank = {rank}
        [engine]
        kind = "sglang"
        urls = [{json.dumps(url)}]
        sync = "{sync}"
        [rollout]
        prompts_per_step = 4
        samples_per_prompt = 8
        [curriculum]
        mode = "joint"
        steps_per_stage = 3
        [evaluation]
        select_items = 4
        test_items = 4
        probe_items = 0
        [judge]
        backend = "sglang"
        {judge}
        [[tasks]]
        name = "writing"
        kind = "writing"
        level = "tiny"
        max_new_tokens = 64
        """
    )
    return config


@pytest.mark.usefixtures("original")
def test_grpo_with_policy_and_judge_on_the_server(cli, url: str, model_folder: Path, tmp_path: Path) -> None:
    """Three steps; the samples are generated and compared (/v1/score) by the same server."""
    judge = f"url = {json.dumps(url + '/v1')}\nmodel = {json.dumps(str(model_folder))}"
    config = write_grpo(tmp_path, url, model_folder, judge=judge)
    check_run(cli("train", str(config), "--run", str(tmp_path / "run")), tmp_path / "run")


def check_run(done: Any, run: Path) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    assert len(steps) == 3 and all(row["tasks"]["writing"]["invalid"] == 0 for row in steps)
    trained = [row["update"] for row in steps if row["update"]["rows"]]
    assert trained and all(update["rollout_kl_k3"] < 1e-6 for update in trained), "the engine has the trainer's weights"
    judged = {reason for row in steps for reason in row["tasks"]["writing"]["reasons"]["preference"]}
    assert judged & {"win", "loss", "tie"}, "the server was asked, not only the rules in front of it"


def test_a_run_ahead_is_one_version_behind_and_weighted_for_it(
    url: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: None
) -> None:
    """max_staleness 1: what reaches the loss is the sampler's log-probs, and its weight is min(exp(own - sampler's), 2)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "rollout"))
    wanted: list[dict[str, float]] = []
    update = Policy.update

    def watched(policy: Policy, batch: Sequence[Trajectory]) -> dict[str, float]:
        trained = [one for one in batch if one.advantage]
        gaps = torch.cat([own_logprobs(policy.model, one) - torch.tensor(one.logprobs) for one in trained])
        metrics = update(policy, batch)
        assert policy.loss.rollout == "truncate"
        weights = gaps.exp().clamp(max=2)
        effective = weights.sum().square() / len(gaps) / weights.square().sum()
        wanted.append(
            {"gap": gaps.abs().mean().item(), "weight": weights.mean().item(), "weight_ess": effective.item()}
        )
        return metrics

    monkeypatch.setattr(Policy, "update", watched)
    ahead = ("judge.backend=rubric", "rollout.max_staleness=1", "curriculum.steps_per_stage=5", "threads=1")
    letters = ("tasks.writing.kind=python", "tasks.writing.cls=timed_sglang:Letters", "optimizer.learning_rate=1e-4")
    made = configs.load(str(write_grpo(tmp_path, url, model_folder)), (*ahead, *letters))
    with Progress(Console(quiet=True)) as progress:
        train.train(made, tmp_path / "run", progress)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [row["update"] for row in rows if row["event"] == "step"]
    assert len(updates) == len(wanted) == 5 and all(update["rows"] for update in updates)
    assert [update["staleness_max"] for update in updates] == [0, 1, 1, 1, 1]
    for update, own in zip(updates, wanted, strict=True):
        print({name: value for name, value in update.items() if "rollout" in name}, own)
        for name, value in own.items():
            assert update[f"rollout_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-5)
        assert update["rollout_kl_k3"] < 1e-2
    fresh, *behind = (update["rollout_gap"] for update in updates)
    assert min(behind[1:]) > 100 * fresh, (
        "of the version before, which the warm-up of the step size hardly moved at first"
    )


@torch.no_grad()
def own_logprobs(model: torch.nn.Module, one: Trajectory) -> torch.Tensor:
    tokens = torch.tensor([[*one.prompt, *one.completion]])
    rows = model(input_ids=tokens).logits[0, len(one.prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, tokens[0, len(one.prompt) :, None])[:, 0]


@pytest.mark.usefixtures("original")
def test_a_server_that_a_dead_trainer_left_paused_serves_the_policy(url: str, tmp_path: Path) -> None:
    policy, prompts = tiny_llama(4), some_prompts(2)
    post(url, "/pause_generation", {"mode": "in_place"})
    with engine(url, policy, tmp_path) as made:
        assert_of_the_policy(policy, prompts, made.generate(prompts, 2, SAMPLING), 2, 0)


@pytest.mark.usefixtures("original")
def test_a_server_that_slept_serves_the_policy_again(url: str, tmp_path: Path) -> None:
    """On a CPU SGLang answers and frees nothing; it keeps the states, and dies of a wrong order of calls, as on a GPU."""
    policy, prompts = tiny_llama(0), some_prompts(4)
    with engine(url, policy, tmp_path, "tensor") as made:
        for version in (1, 2):
            train_a_little(policy, version)
            made.sleep()
            print(f"sync of a sleeper: {made.sync(version)}")
            assert_of_the_policy(policy, prompts, made.generate(prompts, 2, SAMPLING), 2, version)
        made.sleep()
        made.wake("weights", "kv_cache")
        assert made.fleet.ready and not made.fleet.servers[0].asleep


# -- one server for a LoRA policy and its frozen base ------------------------------------------------------------------


def test_an_adapter_is_served_beside_the_base_that_stays(adapter_url: str, tmp_path: Path) -> None:
    policy, base, prompts = tiny_llama(0), tiny_llama(0), some_prompts(6)
    add_adapter(policy, rank=4, alpha=8.0)
    with engine(adapter_url, policy, tmp_path, "adapter") as made:
        for version in range(6):
            if version:
                train_a_little(policy, version)
                print(f"sync by adapter: {made.sync(version)}")
            assert_of_the_policy(policy, prompts, made.generate(prompts, 3, SAMPLING), 3, version)
            (sample,) = generate(adapter_url, [7, 8, 9], max_new_tokens=12, temperature=0.7, ignore_eos=True)
            expected = teacher_forced(base, [7, 8, 9], sample, 0.7)
            torch.testing.assert_close(logprobs(sample), expected, atol=TOLERANCE, rtol=0)
        assert len(held(adapter_url, made.weights.run)) == 3, "older ones are taken away"
    assert not held(adapter_url, made.weights.run), "all of them at the end"


def held(url: str, run: str) -> set[str]:
    return {name for name in get(url, "/v1/models").split('"') if name.startswith(run)}


def test_an_adapter_with_one_wrong_number_is_not_served(
    adapter_folder: Path, adapter_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang dies of it. It is started again, and gets the right one before it is asked."""
    policy, prompts = tiny_llama(0), some_prompts(2)
    add_adapter(policy, rank=4, alpha=8.0)
    with (
        engine(adapter_url, policy, tmp_path, "adapter") as made,
        serving.watched(adapter_folder, say=print),
    ):
        train_a_little(policy, 9)
        with monkeypatch.context() as patch:
            patch.setattr(adapter, "_sha256", lambda value: "0" * 64)
            made.sync(1)
        assert not made.fleet.ready and "load_lora_adapter_from_tensors" in made.fleet.reasons()
        made.version = 1
        assert_of_the_policy(policy, prompts, made.generate(prompts, 2, SAMPLING), 2, 1)
    assert "sync MISMATCH" in Path(f"{serving.status(adapter_folder)[0].server.log}.0").read_text()


def test_grpo_of_a_lora_policy_judged_by_its_base_on_the_same_server(
    cli, adapter_url: str, model_folder: Path, tmp_path: Path
) -> None:
    config = write_grpo(tmp_path, adapter_url, model_folder, sync="adapter", rank=4)
    check_run(cli("train", str(config), "--run", str(tmp_path / "run")), tmp_path / "run")
