"""A tiny policy, what a real SGLang server says, and an engine over it; not a test module."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from omni_fast.rollout.engine import Prompt, Sample, Sampling
from omni_fast.rollout.fleet import Fleet
from omni_fast.rollout.sglang import SGLangEngine
from omni_fast.sync import WeightSync

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
