"""The real SGLang server on the CPU: what omni_fast relies on, asked over HTTP of one server that is started once.

The environment is installed when it is missing (about 2 minutes); where that fails the tests are skipped with the reason,
or fail when OMNI_FAST_ENGINE_REQUIRED is set.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import signal
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from omni_fast import serving
from omni_fast.errors import RunError, UserError
from omni_fast.policy.adapter import add_adapter
from omni_fast.rollout.engine import Prompt, Sample, Sampling
from omni_fast.rollout.fleet import Fleet
from omni_fast.rollout.sglang import SGLangEngine
from omni_fast.serving import install, process
from omni_fast.serving.launch import adapter_flags
from omni_fast.sync import WeightSync

pytestmark = pytest.mark.timeout(900)
TOLERANCE = 1e-4
TEXT = [
    "The capital of France is Paris.",
    "What is 2 + 3? Answer: 5",
    "def add(a, b): return a + b",
    "A wonderful cat.",
]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """Two layers, peaked distributions: equal log-probs are then no accident."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [*TEXT, " A B" * 9],  # the judge's labels are tokens
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    tiny_llama(0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def environment() -> None:
    try:
        install.install("cpu", print)
    except (RunError, UserError) as error:
        reason = f"SGLang's environment cannot be built here: {error}"
        pytest.fail(reason) if os.environ.get("OMNI_FAST_ENGINE_REQUIRED") else pytest.skip(reason)


@pytest.fixture(scope="session")
def engine_folder(environment: None, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the one server that most tests share."""
    folder = tmp_path_factory.mktemp("servers")
    launch = serving.Launch("policy-0", str(model_folder), dtype="float32", flags=("--log-level", "warning"))
    try:
        serving.start([launch], folder, say=print)
        yield folder
    finally:
        serving.down(folder)


@pytest.fixture(scope="session")
def adapter_url(environment: None, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another server, which takes LoRA adapters."""
    folder = tmp_path_factory.mktemp("adapter-servers")
    flags = (*adapter_flags(8, "cpu"), "--log-level", "warning")
    launch = serving.Launch("policy-0", str(model_folder), dtype="float32", flags=flags)
    try:
        (server,) = serving.start([launch], folder, say=print)
        yield server.url
    finally:
        serving.down(folder)


@pytest.fixture(scope="session")
def url(engine_folder: Path) -> str:
    return serving.status(engine_folder)[0].server.url


def post(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        url + path, json.dumps(body or {}).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    try:
        return json.loads(text)
    except ValueError:
        return text.decode()


def get(url: str, path: str) -> str:
    with urllib.request.urlopen(url + path, timeout=60) as answer:
        return str(answer.read().decode())


def generate(url: str, tokens: list[int], **sampling: Any) -> list[dict[str, Any]]:
    found = post(url, "/generate", {"input_ids": tokens, "return_logprob": True, "sampling_params": sampling})
    return found if isinstance(found, list) else [found]


@contextmanager
def streamed(url: str, tokens: list[int], **sampling: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The states of one request, each as soon as the server has sent it."""
    body = {"input_ids": tokens, "stream": True, "sampling_params": sampling}
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        yield (json.loads(line[5:]) for line in answer if line.startswith(b"data:") and b"[DONE]" not in line)


def logprobs(sample: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([entry[0] for entry in sample["meta_info"]["output_token_logprobs"]])


@torch.no_grad()
def teacher_forced(
    model: LlamaForCausalLM, prompt: list[int], sample: dict[str, Any], temperature: float
) -> torch.Tensor:
    """Log-probs [T] of the sample's tokens under the model, of the distribution that is sampled from."""
    tokens = torch.tensor([prompt + sample["output_ids"]])
    logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]


def assert_serves(url: str, model: LlamaForCausalLM, version: str) -> None:
    """The server's samples name the version, and their log-probs are the model's."""
    for seed in range(2):
        prompt = torch.randint(5, 320, (12 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        for sample in generate(url, prompt, n=2, max_new_tokens=12, temperature=0.7, ignore_eos=True):
            assert sample["meta_info"]["weight_version"] == version
            torch.testing.assert_close(
                logprobs(sample), teacher_forced(model, prompt, sample, 0.7), atol=TOLERANCE, rtol=0
            )


def disk_update(url: str, folder: Path, version: str, **more: Any) -> None:
    answer = post(
        url,
        "/update_weights_from_disk",
        {"model_path": str(folder), "weight_version": version, "flush_cache": True} | more,
    )
    assert answer["success"], answer


@pytest.fixture
def original(url: str, model_folder: Path) -> Iterator[None]:
    """Puts the first weights back after a test that changes them."""
    yield
    disk_update(url, model_folder, "default")


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

SAMPLING = Sampling(max_new_tokens=16, temperature=0.7, stop_token_ids=(1,))


@contextmanager
def engine(url: str, policy: LlamaForCausalLM, folder: Path, transport: str = "disk") -> Iterator[SGLangEngine]:
    """All tensors are read back whole after each sync."""
    fleet = Fleet([url], in_flight=4, say=print)
    weights = WeightSync(fleet, policy, folder / "weights", transport=transport, compared=None)  # type: ignore[arg-type]
    made = SGLangEngine(fleet, weights, request_s=60, wait_s=200, adapter=transport == "adapter")
    try:
        yield made
    finally:
        weights.close()
        made.close()


def some_prompts(count: int, tokens: int = 10) -> list[Prompt]:
    draw = torch.Generator().manual_seed(count)
    return [Prompt(torch.randint(5, 320, (tokens,), generator=draw).tolist(), key) for key in range(count)]


@torch.no_grad()
def train_a_little(policy: LlamaForCausalLM, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in (one for one in policy.parameters() if one.requires_grad):
        parameter += 0.05 * torch.randn_like(parameter)


@torch.no_grad()
def assert_of_the_policy(
    policy: LlamaForCausalLM, prompts: Sequence[Prompt], groups: Sequence[Sequence[Sample]], n: int, version: int
) -> None:
    assert [len(group) for group in groups] == [n] * len(prompts)
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            tokens = torch.tensor([[*prompt.tokens, *sample.tokens]])
            rows = policy(input_ids=tokens).logits[0, len(prompt.tokens) - 1 : -1] / SAMPLING.temperature
            expected = rows.log_softmax(-1).gather(1, tokens[0, len(prompt.tokens) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=TOLERANCE, rtol=0)
            assert sample.versions == [(version, 0, len(sample.tokens))]


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
def test_a_kill_in_mid_rollout_loses_and_doubles_nothing(url: str, engine_folder: Path, tmp_path: Path) -> None:
    policy, prompts = tiny_llama(0), some_prompts(40)
    long = Sampling(max_new_tokens=100, temperature=SAMPLING.temperature, stop_token_ids=(1,))
    came: list[int] = []

    def kill_once(place: int, group: list[Sample]) -> None:
        came.append(place)
        if len(came) == 8:
            os.kill(before.pid, signal.SIGKILL)

    before = serving.status(engine_folder)[0].server
    assert not serving.restart_if_dead(engine_folder, url)
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
    held = [name for name in get(adapter_url, "/v1/models").split('"') if name.startswith(made.weights.run)]
    assert len({*held}) == 3, "older ones are taken away"


def test_grpo_of_a_lora_policy_judged_by_its_base_on_the_same_server(
    cli, adapter_url: str, model_folder: Path, tmp_path: Path
) -> None:
    config = write_grpo(tmp_path, adapter_url, model_folder, sync="adapter", rank=4)
    check_run(cli("train", str(config), "--run", str(tmp_path / "run")), tmp_path / "run")
