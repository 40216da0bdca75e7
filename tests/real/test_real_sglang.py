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
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from omni_fast import serving
from omni_fast.errors import RunError, UserError
from omni_fast.serving import install, process

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
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2,
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
        TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    tiny_llama(0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the one server that all tests share."""
    try:
        install.install("cpu", print)
    except (RunError, UserError) as error:
        reason = f"SGLang's environment cannot be built here: {error}"
        pytest.fail(reason) if os.environ.get("OMNI_FAST_ENGINE_REQUIRED") else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("servers")
    launch = serving.Launch("policy-0", str(model_folder), dtype="float32", flags=("--log-level", "warning"))
    try:
        serving.start([launch], folder, say=print)
        yield folder
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


def generate(url: str, tokens: list[int], **sampling: Any) -> list[dict[str, Any]]:
    found = post(url, "/generate", {"input_ids": tokens, "return_logprob": True, "sampling_params": sampling})
    return found if isinstance(found, list) else [found]


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
    samples: list[dict[str, Any]] = []
    request = threading.Thread(
        target=lambda: samples.extend(generate(url, [9, 9, 9], max_new_tokens=400, temperature=1.0, ignore_eos=True))
    )
    request.start()
    time.sleep(0.4)
    post(url, "/pause_generation", {"mode": mode})
    disk_update(url, tmp_path, f"after-{mode}", flush_cache=flush)
    post(url, "/continue_generation")
    request.join(60)
    assert [sample["meta_info"]["finish_reason"]["type"] for sample in samples] == [ends]
    assert (len(samples[0]["output_ids"]) == 400) == (ends == "length")
    assert serving.status(engine_folder)[0].state == "ready"
    post(url, "/flush_cache")
    assert_serves(url, changed, f"after-{mode}")


def test_a_flag_that_sglang_does_not_know_is_told_as_the_users(
    engine_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    launch = serving.Launch("policy-0", str(model_folder), flags=("--no-such-flag",))
    with pytest.raises(UserError, match="no-such-flag"):
        serving.start([launch], tmp_path, say=print)
    assert serving.status(tmp_path) == []


def test_a_killed_server_is_started_again_at_the_same_address(engine_folder: Path, url: str) -> None:
    before = serving.status(engine_folder)[0].server
    assert not serving.restart_if_dead(engine_folder, url)
    os.kill(before.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while before.alive and time.monotonic() < until:
        time.sleep(0.05)
    assert serving.restart_if_dead(engine_folder, url, say=print)
    (after,) = serving.status(engine_folder)
    assert after.state == "ready" and after.server.url == url and after.server.pid != before.pid
    assert after.server.restarts == before.restarts + 1 and not process.group(before.pid, before.born)
    assert_serves(url, tiny_llama(0), "default")
