"""A LoRA policy beside its frozen base on the servers, and servers that give their memory back between two steps."""

from __future__ import annotations

import base64
import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from fake_sglang import FakeSGLang, Handler, cut, status, times
from syncing import PROMPTS, SAMPLING, TRANSPORTS, check_equal, engine, fake, llama, move
from transformers import LlamaForCausalLM

from omni_fast.errors import UserError
from omni_fast.policy.adapter import add_adapter, save_adapter
from omni_fast.rollout.fleet import Server
from omni_fast.sync.adapter import CHECKS, request


def check_adapter(model: LlamaForCausalLM, server: FakeSGLang, tag: str) -> None:
    held = server.adapters[tag]
    own = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    assert len(held) == len(own) == 2 * 2 * 7
    for name, value in own.items():
        assert torch.equal(held[f"base_model.model.{name.replace('.default', '')}"], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_travels_alone_and_the_base_stays(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama()
    add_adapter(model, rank=4, alpha=8.0)
    model.to(dtype)
    servers = [fake(llama(), lora_rank=8), fake(llama(), lora_rank=4)]
    before = {name: value.clone() for name, value in servers[0].weights.items()}
    with engine(model, tmp_path, *servers, transport="adapter") as made:
        for step in range(1, 7):
            move(model)
            assert made.sync(step)["seconds/sync_paused"] == 0.0
            for server in servers:
                check_adapter(model, server, made.weights.tag)
                assert len(server.adapters) <= 3, "older ones are taken away"
            found = made.generate(PROMPTS, 2, SAMPLING)
            assert all(one.versions == [(step, 0, 4)] for group in found for one in group)
            assert servers[0].paths("/generate")[-1]["lora_path"] == made.weights.tag
        assert made.said == [] and servers[0].weights.keys() == before.keys()
    assert all(torch.equal(servers[0].weights[name], value) for name, value in before.items())
    assert not servers[0].paths("/pause_generation"), "requests go on under way"
    assert not servers[0].adapters and not servers[1].adapters, "close leaves none behind"


def test_an_adapter_that_was_loaded_is_no_map_of_its_file(tmp_path: Path) -> None:
    """The file goes while the server still holds the adapter."""
    model = llama()
    add_adapter(model, rank=4, alpha=8.0)
    save_adapter(model, tmp_path)
    server = Server("http://127.0.0.1:9", version=CHECKS)
    body = request(tmp_path, "x", server)[1]
    assert isinstance(body, dict)
    values = pickle.loads(base64.b64decode(str(body["serialized_named_tensors"][0])))
    assert len(values) == 2 * 2 * 7 and "adapter_model.safetensors" not in Path("/proc/self/maps").read_text()


def test_an_adapter_with_one_wrong_number_is_not_loaded(tmp_path: Path) -> None:
    """A server is told a checksum of each tensor; SGLang dies of a wrong one, and is started again."""
    model = llama()
    add_adapter(model, rank=4, alpha=8.0)
    server = fake(llama(), lora_rank=8)

    def spoil(handler: Handler, body: dict) -> bool:
        values = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
        assert values.keys() == body["expected_checksums"].keys() and len(values) == 2 * 2 * 7
        next(iter(values.values())).view(-1)[0] += 1e-7
        body["serialized_named_tensors"] = [base64.b64encode(pickle.dumps(values)).decode()]
        return False

    with engine(model, tmp_path, server, transport="adapter") as made:
        move(model)
        server.faults.append(("/load_lora_adapter_from_tensors", times(1, spoil)))
        made.sync(1)
        assert made.weights.tag not in server.adapters and not made.fleet.ready
        assert "the connection broke" in made.said[0]


def test_a_server_of_another_version_loads_the_folder_and_each_gpu_gets_its_copy(tmp_path: Path) -> None:
    model = llama()
    add_adapter(model, rank=4, alpha=8.0)
    many, newer = fake(llama(), lora_rank=8), fake(llama(), lora_rank=8, version="0.5.21")
    many.server_info = lambda body: (200, {"version": "0.5.17", "tp_size": 4})  # type: ignore[method-assign]
    with engine(model, tmp_path, many, newer, transport="adapter") as made:
        move(model)
        made.sync(1)
        for server in (many, newer):
            check_adapter(model, server, made.weights.tag)
            assert bool(server.paths("/load_lora_adapter")) == (server is newer)
        (body,) = many.paths("/load_lora_adapter_from_tensors")[1:]
        assert len(body["serialized_named_tensors"]) == 4 and len(json.dumps(body)) < 30_000, "no numbers in it"


@pytest.mark.parametrize("noticed", [True, False])
def test_a_server_started_again_gets_the_adapter_before_it_gets_prompts(tmp_path: Path, noticed: bool) -> None:
    model = llama()
    add_adapter(model, rank=4, alpha=8.0)
    server = fake(llama(), lora_rank=8)
    with engine(model, tmp_path, server, transport="adapter") as made:
        for step in range(1, 5):
            made.sync(step)
        server.adapters.clear()
        server.weight_version = "default"
        if noticed:
            made.fleet.drain(made.fleet.servers[0], "died")
        made.generate(PROMPTS, 2, SAMPLING)
        check_adapter(model, server, made.weights.tag)
        made.sync(5)
        assert made.fleet.ready


def test_an_adapter_that_is_loaded_again_takes_no_place_of_an_older_one(tmp_path: Path) -> None:
    """Requests of the two versions before are still under way when a server has answered a load by half."""
    model = llama()
    add_adapter(model, rank=4, alpha=8.0)
    server = fake(llama(), lora_rank=8)
    with engine(model, tmp_path, server, transport="adapter") as made:
        for step in range(1, 4):
            server.faults.append(("/update_weight_version", times(step == 2, cut)))
            made.sync(step)
            made.generate(PROMPTS, 2, SAMPLING)  # which brings it back
        assert [tag.rpartition(".")[2] for tag in server.adapters] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("rank", "told"), [(0, r"HTTP 400 \(LoRA is not enabled.*start them .*--enable-lora"), (2, "max-lora-rank")]
)
def test_a_server_that_cannot_take_the_adapter_is_told_before_the_first_step(
    tmp_path: Path, rank: int, told: str
) -> None:
    model = llama()
    add_adapter(model, rank=4, alpha=8.0)
    with (
        pytest.raises(UserError, match=f"did not take the policy's weights.*{told}"),
        engine(model, tmp_path, fake(llama(), lora_rank=rank), transport="adapter"),
    ):
        pass


@pytest.mark.parametrize("transport", [*TRANSPORTS, "adapter"])
def test_servers_that_slept_have_all_weights_after_the_next_sync(tmp_path: Path, transport: str) -> None:
    """A base that no sync brings back keeps its memory. One server is restarted asleep, one fails to wake."""
    model = llama()
    if transport == "adapter":
        add_adapter(model, rank=4, alpha=8.0)
    servers = [fake(llama(), lora_rank=8) for _ in range(3)]
    with engine(model, tmp_path, *servers, transport=transport) as made:
        for step in range(1, 4):
            move(model)
            made.sleep()
            asleep = {"kv_cache"} if transport == "adapter" else {"kv_cache", "weights"}
            assert all(server.asleep == asleep for server in servers)
            if step == 2:
                servers[1].faults.append(("/resume_memory_occupation", times(1, status(500))))
                servers[2].faults.append(("/resume_memory_occupation", times(1, cut)))
                servers[2].asleep, servers[2].weight_version = set(), "default"
                servers[2].adapters.clear()
            made.sync(step)
            until = time.monotonic() + 5
            while len(made.fleet.ready) < 3 and time.monotonic() < until:
                made.generate(PROMPTS, 2, SAMPLING)
            for server in servers:
                assert not server.asleep
                if transport == "adapter":
                    check_adapter(model, server, made.weights.tag)
                    assert not any(value.isnan().any() for value in server.weights.values())
                else:
                    check_equal(model, server)
        made.sleep()
        made.wake("weights", "kv_cache")
        assert not any(server.asleep for server in servers)


@pytest.mark.parametrize("transport", [*TRANSPORTS, "adapter"])
def test_a_server_that_fails_after_it_was_loaded_asleep_wakes_whole(tmp_path: Path, transport: str) -> None:
    """It has the new version by then, and no cache."""
    model = llama()
    if transport == "adapter":
        add_adapter(model, rank=4, alpha=8.0)
    server = fake(llama(), lora_rank=8)
    with engine(model, tmp_path, server, transport=transport) as made:
        made.sleep()
        server.faults.append(("/model_info", times(1, status(500))))
        move(model)
        made.sync(1)
        assert not made.fleet.ready and server.weight_version == made.weights.tag
        made.generate(PROMPTS, 2, SAMPLING)
        assert not server.asleep and made.fleet.ready
