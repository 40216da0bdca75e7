"""Weights on servers equal the policy's after every sync, or the server gets no prompt."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch
from fake_sglang import FakeSGLang, Fault, Handler, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from syncing import PROMPTS, SAMPLING, SHAPE, TRANSPORTS, check_equal, engine, fake, llama, move
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM

from omni_fast.errors import UserError
from omni_fast.policy.adapter import add_adapter
from omni_fast.rollout.fleet import Fleet, Server
from omni_fast.sync import WeightSync, broadcast
from omni_fast.sync.plan import Bucket, Entry, checksum, make_plan, tensors


@pytest.mark.parametrize("version", ["0.5.17", "0.5.21"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_server_has_the_policys_weights_after_each_sync(tmp_path: Path, transport: str, version: str) -> None:
    model = llama()
    servers = [fake(model, version=version), fake(model, version=version)]
    with engine(model, tmp_path, *servers, transport=transport, bucket_bytes=20_000) as made:
        for step in range(1, 4):
            move(model)
            seconds = made.sync(step)
            parts = {part: seconds[f"seconds/sync_{part}"] for part in "pack load verify paused total".split()}
            assert parts["total"] >= parts["pack"] + parts["load"] + parts["verify"] > 0
            assert seconds["engine_servers"] == 2
            for server in servers:
                check_equal(model, server)
                assert server.weight_version == made.weights.tag and made.weights.tag.endswith(f".{step}")
                assert not server.paused and not server.session
            found = made.generate(PROMPTS, 2, SAMPLING)
            assert all(one.versions == [(step, 0, 4)] for group in found for one in group)
        assert made.said == []
    loads = servers[0].paths("/update_weights_from_tensor")
    loads += servers[0].paths("/update_weights_from_distributed")
    if transport != "disk":
        assert len(loads) == 4 * len(make_plan(model, 20_000)) > 8
        assert len(servers[0].paths("/init_weights_update_group")) == (transport == "distributed"), "one group for all"
        assert not servers[0].groups, "close ends it"
        assert len(servers[0].paths("/begin_weight_update")) == (4 if version == "0.5.21" else 0)
    assert not (tmp_path / "engine").exists(), "close takes the weights on disk away"


def test_tags_are_never_those_of_another_engine(tmp_path: Path) -> None:
    model, tags = llama(), set()
    for number in range(2):
        server = fake(model)
        with engine(model, tmp_path / str(number), server) as made:
            made.generate(PROMPTS, 2, SAMPLING)
            tags |= {body["extra_key"] for body in server.paths("/generate") if "extra_key" in body}
    assert len(tags) == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_server_that_holds_fewer_bits_is_no_difference(tmp_path: Path, transport: str, dtype: torch.dtype) -> None:
    model = llama()
    server = fake(model)
    take = server._take
    server._take = lambda values, body: take({name: value.to(dtype) for name, value in values.items()}, body)  # type: ignore[method-assign]
    with engine(model, tmp_path, server, transport=transport) as made:
        assert made.said == [] and made.fleet.ready


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_fp32_policy_is_cast_for_servers_that_hold_bf16(tmp_path: Path, transport: str) -> None:
    """As the server would round itself, in half the bytes; not where servers differ or do not say."""
    model = llama()
    for held, kind in [(("bfloat16", "bfloat16"), torch.bfloat16), (("bfloat16", "auto"), torch.float32)]:
        servers = [fake(model, dtype=dtype) for dtype in held]
        with engine(model, tmp_path, *servers, transport=transport) as made:
            assert made.said == [] and {bucket.dtype for bucket in made.weights.plan} == {kind}
            for server in servers:
                assert all(value.dtype == kind for value in server.weights.values())
                assert all(torch.equal(server.weights[name], value.to(kind)) for name, value in tensors(model))


def test_a_bf16_policy_arrives_as_it_is(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    for transport in TRANSPORTS:
        server = fake(model)
        with engine(model, tmp_path, server, transport=transport):
            check_equal(model, server)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_lora_arrives_merged(tmp_path: Path, transport: str) -> None:
    plain, model = llama(), llama()
    add_adapter(model, rank=4, alpha=8.0)
    server = fake(plain)
    with engine(model, tmp_path, server, transport=transport) as made:
        check_equal(plain, server)  # a fresh adapter changes nothing
        move(model)
        made.sync(1)
        name = "model.layers.1.mlp.down_proj"
        layer = model.get_submodule(name)
        merged = layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
        torch.testing.assert_close(server.weights[f"{name}.weight"], merged)
        assert server.weights.keys() == dict(plain.named_parameters()).keys() and made.said == []


# -- what is refused before the first step -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "told"),
    [
        (FakeSGLang(random_weights(llama()), vocabulary=65), "a vocabulary of 65, the policy one of 64"),
        (FakeSGLang(random_weights(llama()), vocabulary=64, architecture="Qwen2ForCausalLM"), "architecture Qwen2"),
        (FakeSGLang(random_weights(llama(hidden_size=64)), vocabulary=64), r"rows of \[64\] in"),
        (FakeSGLang(random_weights(llama(num_hidden_layers=1)), vocabulary=64), "it has no model.layers.1.*, the policy one of"),
        (FakeSGLang(random_weights(llama(num_hidden_layers=3)), vocabulary=64), "it has a layer 2, the policy 2 layers"),
        (FakeSGLang(random_weights(llama(intermediate_size=40)), vocabulary=64), "it has rows of .40. in"),
    ],
    ids="vocabulary architecture width fewer deeper inner".split(),
)  # fmt: skip
def test_another_model_is_refused_and_left_as_it_was(tmp_path: Path, server: FakeSGLang, told: str) -> None:
    with pytest.raises(UserError, match=told), engine(llama(), tmp_path, server):
        pass
    assert server.weight_version == "default" and not server.paths("/update_weights_from_disk")


def test_a_shape_that_only_the_load_can_tell_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did not take the policy's weights.*Failed to update"):
        server = fake(llama(num_key_value_heads=4))
        with engine(llama(), tmp_path, server):
            pass


def test_shared_memory_needs_servers_of_this_host(tmp_path: Path) -> None:
    fleet = Fleet(["http://10.0.0.7:30000"])
    with pytest.raises(UserError, match="not on this host"):
        WeightSync(fleet, llama(), tmp_path, transport="tensor")
    fleet.close()


def qwen3(**changes: object) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 16} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_of_other_layers_is_refused_where_no_weights_are_shown(tmp_path: Path, layers: int) -> None:
    """A deeper server would take all weights and keep its last layer; SGLang leaves out what it has no layer for."""
    server = fake(qwen3(num_hidden_layers=layers), architecture="Qwen3ForCausalLM")
    with pytest.raises(UserError, match=f"it has {layers} layers, the policy 2"), engine(qwen3(), tmp_path, server):  # type: ignore[arg-type]
        pass
    assert server.weight_version == "default"
    server = fake(qwen3(), architecture="Qwen3ForCausalLM")
    server.weights_checker = server.missing  # type: ignore[method-assign]
    with engine(qwen3(), tmp_path, server) as made:  # type: ignore[arg-type]
        assert made.fleet.ready


def test_a_model_whose_weights_sglang_does_not_show_is_told_once_and_works(tmp_path: Path) -> None:
    model = qwen3()
    server = fake(model, architecture="Qwen3ForCausalLM")
    with engine(model, tmp_path, server) as made:
        move(model)
        made.sync(1)
        check_equal(model, server)
        assert len(made.said) == 1 and "does not show its weights" in made.said[0]


def test_a_model_with_other_names_is_taken_too(tmp_path: Path) -> None:
    sizes = {name: size for name, size in SHAPE.items() if name != "num_key_value_heads"}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    server = fake(model, architecture="GPTNeoXForCausalLM")
    with engine(model, tmp_path, server):  # type: ignore[arg-type]
        check_equal(model, server)


def test_a_server_that_words_its_vocabulary_otherwise_is_taken(tmp_path: Path) -> None:
    def otherwise(handler: Handler, body: dict) -> bool:
        if "token_ids_logprob" in body:
            handler.reply(400, {"error": {"message": "token_ids_logprob: no such token"}})
        return "token_ids_logprob" in body

    model = llama()
    server = fake(model)
    server.faults.append(("/generate", otherwise))
    with engine(model, tmp_path, server):
        check_equal(model, server)


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
@pytest.mark.parametrize("limit", [1, 40_000, 1 << 30])
def test_servers_stand_still_for_loads_alone(tmp_path: Path, transport: str, limit: int) -> None:
    """What fits into the memory is packed before the pause, each other bucket while the one before it is under way."""
    model = llama()
    server = fake(model)
    events: list[str] = []
    with engine(model, tmp_path, server, transport=transport, bucket_bytes=8_000, packed_bytes=limit) as made:
        path, pack = f"/update_weights_from_{transport}", made.weights._packed

        def load(handler: Handler, body: dict) -> bool:
            events.append("load")
            time.sleep(0.03)
            events.append("loaded")
            return False

        def packed(number: int) -> torch.Tensor:
            events.append(f"pack {number}")
            return pack(number)

        def told(event: str) -> Fault:
            return lambda handler, body: events.append(event) is not None

        made.weights._packed = packed  # type: ignore[method-assign]
        server.faults += [(path, load), ("/pause_generation", told("pause")), ("/continue_generation", told("on"))]
        move(model)
        seconds = made.sync(1)
        check_equal(model, server)
    count, ahead = len(made.weights.plan), len(made.weights._sizes)
    assert ahead == 2 if limit == 1 else ahead == count if limit == 1 << 30 else 2 < ahead < count
    assert events[: ahead + 1] == [*(f"pack {number}" for number in range(ahead)), "pause"]
    rest = [event for event in events[ahead + 1 :] if "pack" not in event]
    assert rest == ["load", "loaded"] * count + ["on"]
    for number in range(ahead, count):
        loaded = events[: events.index(f"pack {number}")].count("loaded")
        assert loaded == number - ahead + 1, "while the next load is under way, into the memory of the one before"
    assert (seconds["seconds/sync_pack_paused"] == 0.0) == (ahead == count)
    assert seconds["seconds/sync_paused"] >= seconds["seconds/sync_load"] + seconds["seconds/sync_pack_paused"]


def test_in_a_run_other_tensors_are_read_back_each_time(tmp_path: Path) -> None:
    model = llama()
    server = fake(model)
    names = [entry.name for bucket in make_plan(model) for entry in bucket.entries]
    with engine(model, tmp_path, server, compared=3) as made:
        before = len(server.paths("/get_weights_by_name"))
        for step in range(1, 8):
            made.sync(step)
        read = [body["name"] for body in server.paths("/get_weights_by_name")[before:]]
    assert len(read) == 21 and set(read) == set(names), "all are read in turn"


# -- the plan ----------------------------------------------------------------------------------------------------------


@given(st.integers(64, 200_000), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=25)
def test_the_plan_has_every_weight_once_in_bounded_buckets(size: int, tied: bool, mixed: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    if mixed:
        model.model.norm.to(torch.float64)
    plan = make_plan(model, size)
    own = dict(model.named_parameters())
    assert sorted(entry.name for bucket in plan for entry in bucket.entries) == sorted(own)
    for bucket in plan:
        for entry in bucket.entries:
            assert entry.dtype == bucket.dtype == own[entry.name].dtype and entry.shape == own[entry.name].shape
        flat = torch.arange(bucket.size // bucket.dtype.itemsize)
        assert torch.equal(torch.cat([view.flatten() for _, view in bucket.views(flat)]), flat)
        assert len(bucket.entries) == 1 or bucket.size <= size


@pytest.mark.parametrize(
    ("own", "limit", "ahead"),
    [([90, 10, 10, 10, 10], 130, 5), ([90, 10, 90, 10], 130, 2), ([90, 10, 10, 90, 10], 130, 3), ([90], 1, 1)],
)
def test_one_large_bucket_costs_no_other_its_place(tmp_path: Path, own: list[int], limit: int, ahead: int) -> None:
    fleet = Fleet(["http://127.0.0.1:9"])
    weights = WeightSync(fleet, llama(), tmp_path, packed_bytes=limit)
    weights.plan = [Bucket(torch.uint8, [Entry("", torch.Size([size]), torch.uint8)]) for size in own]
    held = weights._sizes
    assert len(held) == ahead and all(size <= held[number % ahead] for number, size in enumerate(own))
    fleet.close()


@given(st.integers(0, 30), st.integers(0, 7))
@settings(deadline=None, max_examples=50)
def test_a_checksum_sees_one_bit(place: int, bit: int) -> None:
    value = torch.randn(31)
    other = value.clone()
    other.view(torch.int32)[place] ^= 1 << bit
    assert checksum(value) != checksum(other) and checksum(value) == checksum(value.clone())
    assert checksum(value.expand(2, 31).t()[:, 0]) == checksum(value)


def test_the_trainers_address_is_the_one_that_servers_reach() -> None:
    assert broadcast._address([Server("http://localhost:1"), Server("http://127.0.0.1:2")]) == "127.0.0.1"
    far = Server(f"http://{socket.gethostbyname(socket.gethostname())}:1")
    with socket.create_server((broadcast._address([Server("http://127.0.0.1:2"), far]), 0)) as here:  # an own one
        assert here.getsockname()[0] != "0.0.0.0"
