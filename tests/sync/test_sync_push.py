"""Weights on servers equal the policy's after every sync, or the server gets no prompt."""

from __future__ import annotations

import re
import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from fake_sglang import FakeSGLang, Fault, Handler, cut, random_weights, saying, serving, silent, slow, status, times
from hypothesis import given, settings
from hypothesis import strategies as st
from syncing import PROMPTS, SAMPLING, SHAPE, TRANSPORTS, check_equal, engine, fake, llama, move
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM

from omni_fast.errors import RunError, UserError
from omni_fast.policy.adapter import add_adapter
from omni_fast.rollout.fleet import Fleet, Server
from omni_fast.rollout.sglang import SGLangEngine
from omni_fast.sync import WeightSync, broadcast
from omni_fast.sync.plan import Bucket, Plan, checksum, make_plan, tensors


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
        assert len(loads) == 4 * len(make_plan(model, 20_000).buckets) > 8
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
            assert made.said == [] and {entry.dtype for entry in made.weights.plan.entries} == {kind}
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
        (FakeSGLang(random_weights(llama(hidden_size=64)), vocabulary=64), r"rows of \[64\], the policy"),
        (FakeSGLang(random_weights(llama(num_hidden_layers=1)), vocabulary=64), "it has nothing, the policy model.layers.1"),
        (FakeSGLang(random_weights(llama(num_hidden_layers=3)), vocabulary=64), "it has a layer 2, the policy 2 layers"),
        (FakeSGLang(random_weights(llama(intermediate_size=40)), vocabulary=64), "it has rows of .40., the policy"),
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


def test_a_model_whose_weights_sglang_does_not_show_is_told_once_and_works(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 16}))  # type: ignore[arg-type]
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


# -- a sync that goes wrong --------------------------------------------------------------------------------------------


def half(handler: Handler, body: dict) -> bool:
    handler.reply(200, {"success": True, "message": "Succeeded to update model weights."}, cut=20)
    return True


FAULTY = [
    ("/update_weights_from_disk", status(500), r"HTTP 500 \(on demand 500\)"),
    ("/update_weights_from_disk", cut, "the connection broke: cut off"),
    ("/update_weights_from_disk", half, "the connection broke: cut off"),
    ("/update_weights_from_disk", silent, "no answer within 0.7 s"),
    ("/pause_generation", status(503), r"HTTP 503 \(on demand 503\)"),
    ("/continue_generation", cut, "the connection broke: cut off"),
    ("/model_info", status(500), r"HTTP 500 \(on demand 500\)"),
    ("/get_weights_by_name", saying(b"[]"), r"has no model.embed_tokens.weight, or not all of it"),
    ("/get_weights_by_name", saying(b'[["a"], 1]'), "shows no numbers of model.embed_tokens.weight"),
]
NAMES = "load cut half silent pause continue info empty nonsense".split()


@pytest.mark.parametrize(("path", "fault", "told"), FAULTY, ids=NAMES)
def test_a_server_that_fails_in_a_sync_is_drained_and_then_caught_up(
    tmp_path: Path, path: str, fault: Fault, told: str
) -> None:
    model = llama()
    servers = [fake(model), fake(model)]
    with engine(model, tmp_path, *servers, load_s=0.7) as made:
        move(model)
        servers[0].faults.append((path, times(1, fault)))
        made.sync(1)
        assert re.search(rf"left out \(weight sync: {path} {told}\)", made.said[0])
        assert [server.ready for server in made.fleet.servers] == [False, True]
        found = made.generate(PROMPTS * 10, 2, SAMPLING)
        assert len(found) == 60 and made.fleet.servers[0].ready
        check_equal(model, servers[0])
        assert servers[0].weight_version == made.weights.tag == servers[1].weight_version
        assert not servers[0].paused
        assert len(made.said) == 2 and "is back" in made.said[1]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_comes_late_gets_the_weights_from_disk_and_takes_part_from_then_on(
    tmp_path: Path, transport: str
) -> None:
    model = llama()
    early, late = fake(model), fake(model)
    said: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(serving(early))
        stack.callback(late.server_close)
        late.socket.close()  # nothing listens there yet
        fleet = Fleet([early.url, late.url], say=said.append)
        stack.callback(fleet.close)
        weights = WeightSync(fleet, model, tmp_path / "engine", transport=transport, compared=None)  # type: ignore[arg-type]
        stack.callback(weights.close)
        made = SGLangEngine(fleet, weights, request_s=5, wait_s=0.5)
        assert "is left out until it answers" in said[0]
        for step in range(1, 3):
            move(model)
            assert made.sync(step)["engine_servers"] == 1
        again = fake(model, port=late.server_address[1])
        stack.enter_context(serving(again))
        until = time.monotonic() + 5
        while len(fleet.ready) < 2 and time.monotonic() < until:
            made.generate(PROMPTS, 2, SAMPLING)
        assert "has joined, with weight version 2" in said[-1] and again.weight_version == weights.tag
        assert len(again.paths("/update_weights_from_disk")) == 1
        check_equal(model, again)
        move(model)
        assert made.sync(3)["engine_servers"] == 2
        for server in (early, again):
            check_equal(model, server)


def test_nothing_depends_on_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It jumps by hours with every look, as the clocks of two hosts may differ."""
    hours, real = iter(range(0, 10**9, 7)), time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * (next(hours) % 48 - 24))
    model = llama()
    server = fake(model)
    with engine(model, tmp_path, server) as made:
        for step in range(1, 4):
            move(model)
            made.sync(step)
            found = made.generate(PROMPTS, 2, SAMPLING)
            assert all(one.versions == [(step, 0, 4)] for group in found for one in group)
        check_equal(model, server)
        assert made.said == []


def dies(handler: Handler, body: dict) -> bool:
    """Its part of the group goes away in the middle, as with the process."""
    handler.server.groups.clear()
    return cut(handler, body)


def frozen(handler: Handler, body: dict) -> bool:
    """Takes no part and says nothing until long after the limit."""
    time.sleep(3)
    return cut(handler, body)


LOSSES = [
    ("/update_weights_from_distributed", dies, True),
    ("/update_weights_from_distributed", frozen, True),
    ("/update_weights_from_distributed", status(500), True),
    ("/update_weights_from_distributed", status(400), False),
    ("/init_weights_update_group", cut, True),
    ("/init_weights_update_group", status(400), False),
]


@pytest.mark.parametrize(("path", "fault", "drained"), LOSSES, ids="dies frozen 500 refuses away joins-not".split())
@pytest.mark.parametrize("version", ["0.5.17", "0.5.21"])
def test_a_group_that_is_lost_in_mid_sync_is_bounded_and_the_weights_come_from_disk(
    tmp_path: Path, path: str, fault: Fault, drained: bool, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "ANSWER_S", 0.5)
    model = llama()
    servers = [fake(model, version=version) for _ in range(3)]
    options = {"transport": "distributed", "bucket_bytes": 20_000, "broadcast_s": 1.0}
    with engine(model, tmp_path, *servers, **options) as made:  # type: ignore[arg-type]
        move(model)
        servers[1].faults.append((path, times(1, fault)))
        if "init" in path:
            made.weights._end_group()
        started = time.monotonic()
        made.sync(1)
        assert time.monotonic() - started < 8
        assert [server.ready for server in made.fleet.servers] == [True, not drained, True]
        assert "given up" in made.said[0] and all("left out" in line for line in made.said[1:])
        for server in (servers[0], servers[2]):
            check_equal(model, server)
            assert server.weight_version == made.weights.tag and not server.paused and not server.session
        made.generate(PROMPTS * 10, 2, SAMPLING)  # by now it is back
        check_equal(model, servers[1])
        move(model)
        made.sync(2)
        assert len(made.fleet.ready) == 3 and len(servers[1].groups) == 1, "a new group, with all of them"
        for server in servers:
            check_equal(model, server)


def test_a_group_is_joined_before_servers_stand_still(tmp_path: Path) -> None:
    model = llama()
    server = fake(model)
    with engine(model, tmp_path, server, transport="distributed"):
        paths = [path for path, _ in server.asked]
    assert paths.index("/init_weights_update_group") < paths.index("/pause_generation")


def test_a_session_that_a_dead_trainer_left_open_is_closed(tmp_path: Path) -> None:
    model = llama()
    server = fake(model, version="0.5.21")
    server.session = True
    with engine(model, tmp_path, server, transport="tensor") as made:
        check_equal(model, server)
        assert made.said == [] and not server.session


def test_a_bucket_that_was_answered_and_not_loaded_is_noticed_where_no_weights_are_shown(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 16}))  # type: ignore[arg-type]
    server = fake(model, architecture="Qwen3ForCausalLM")
    with engine(model, tmp_path, server, transport="tensor", bucket_bytes=8_000) as made:
        refused = saying(b'{"success": false, "message": "not in a session"}')
        server.faults.append(("/update_weights_from_tensor", times(1, refused)))
        move(model)
        made.sync(1)
        assert not made.fleet.ready and "not in a session" in made.fleet.reasons()
        made.generate(PROMPTS, 2, SAMPLING)
        check_equal(model, server)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_wrong_number_or_version_is_noticed(tmp_path: Path, transport: str) -> None:
    model = llama()
    server = fake(model)
    take = server._take

    def forget(values: dict, body: dict) -> tuple[int, object]:
        server._take = take  # type: ignore[method-assign]
        return take(values, body | {"weight_version": "default"})

    with engine(model, tmp_path, server, transport=transport) as made:
        for step, told in enumerate(["is not what was sent", "holds weights"], 1):
            move(model)
            if step == 1:
                spoil_once(server)
            else:
                server._take = forget  # type: ignore[method-assign]
            made.sync(step)
            assert not made.fleet.ready and told in made.fleet.reasons()
            made.generate(PROMPTS, 2, SAMPLING)  # waits until it is caught up
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
    count, ahead = len(made.weights.plan.buckets), len(made.weights._sizes)
    assert ahead == 2 if limit == 1 else ahead == count if limit == 1 << 30 else 2 < ahead < count
    assert events[: ahead + 1] == [*(f"pack {number}" for number in range(ahead)), "pause"]
    rest = [event for event in events[ahead + 1 :] if "pack" not in event]
    assert rest == ["load", "loaded"] * count + ["on"]
    for number in range(ahead, count):
        loaded = events[: events.index(f"pack {number}")].count("loaded")
        assert loaded == number - ahead + 1, "while the next load is under way, into the memory of the one before"
    assert (seconds["seconds/sync_pack_paused"] == 0.0) == (ahead == count)
    assert seconds["seconds/sync_paused"] >= seconds["seconds/sync_load"] + seconds["seconds/sync_pack_paused"]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 500))
@settings(deadline=None, max_examples=100)
def test_the_buffers_of_a_plan_fit_its_buckets_and_the_memory(sizes: list[int], limit: int) -> None:
    made = Plan(tuple(Bucket(torch.uint8, (), size) for size in sizes)).buffers(limit)
    assert all(size <= made[number % len(made)] for number, size in enumerate(sizes))
    assert len(made) >= min(2, len(sizes)) and (sum(made) <= limit or len(made) <= 2)
    assert len(made) == len(sizes) or sum(sizes) > limit


def test_in_a_run_other_tensors_are_read_back_each_time(tmp_path: Path) -> None:
    model = llama()
    server = fake(model)
    names = [entry.name for entry in make_plan(model).entries]
    with engine(model, tmp_path, server, compared=3) as made:
        before = len(server.paths("/get_weights_by_name"))
        for step in range(1, 8):
            made.sync(step)
        read = [body["name"] for body in server.paths("/get_weights_by_name")[before:]]
    assert len(read) == 21 and set(read) == set(names), "all are read in turn"


def test_a_server_that_a_dead_trainer_left_paused_goes_on(tmp_path: Path) -> None:
    """A paused one does not answer /health, which generates a token."""
    model = llama()
    server = fake(model)
    server.paused = True
    with engine(model, tmp_path, server) as made:
        assert made.generate(PROMPTS, 2, SAMPLING) and made.said == []
        check_equal(model, server)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_samples_from_before_a_failed_sync_are_asked_for_again(tmp_path: Path, transport: str) -> None:
    """Half of the weights may be new in them, under the old version."""
    model = llama()
    servers = [fake(model), fake(model)]
    limits = {"load_s": 2.0, "broadcast_s": 0.5, "bucket_bytes": 20_000}
    with engine(model, tmp_path, *servers, transport=transport, **limits) as made:
        for server in servers:
            server.faults.append(("/generate", slow(1.0)))
        rollout = made.start(PROMPTS, 2, SAMPLING)
        while sum(server.working for server in servers) < len(PROMPTS):
            time.sleep(0.01)
        lost = servers[0].working
        load = next(path for path, _ in servers[0].asked if path.startswith("/update_weights"))
        servers[0].faults.append((load, times(1, status(400))))
        move(model)
        made.sync(1)
        assert not made.fleet.servers[0].ready or transport == "distributed"
        assert len(rollout.wait()) == len(PROMPTS)
        asked = sum("extra_key" in body for server in servers for body in server.paths("/generate"))
        assert asked == len(PROMPTS) + (lost if transport != "distributed" else 0)


def spoil_once(server: FakeSGLang) -> None:
    """One number of the next load arrives as another."""
    take = server._take

    def spoil(values: dict, body: dict) -> tuple[int, object]:
        answer = take(values, body)
        server._take = take  # type: ignore[method-assign]
        server.weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1e-3
        return answer

    server._take = spoil  # type: ignore[method-assign]


@pytest.mark.parametrize("when", ["checked", "half loaded", "caught up"])
def test_samples_of_weights_in_doubt_are_never_taken(tmp_path: Path, when: str) -> None:
    """They come while what the server holds is not proven: between load and check, or from a server that was drained."""
    model = llama()
    server = fake(model)
    size = 20_000 if when == "half loaded" else 1 << 30
    with engine(model, tmp_path, server, transport="tensor", bucket_bytes=size) as made:
        server.faults.append(("/generate", times(1, slow(0.3))))
        rollout = made.start(PROMPTS[:1], 2, SAMPLING)
        while not server.working:
            time.sleep(0.01)
        (held,) = made.fleet.servers
        if when == "caught up":
            made.fleet.drain(held, "on demand")
            server.weight_version = "lost"
            spoil_once(server)
            made.tend(0.0)
            assert "is not what was sent" in made.fleet.reasons()
        elif when == "checked":
            server.faults.append(("/get_weights_by_name", times(1, slow(0.6))))
            spoil_once(server)
            move(model)
            made.sync(1)
            assert "is not what was sent" in made.fleet.reasons()
        else:  # a request fails there in the middle of the sync, as a cut connection makes it
            drained = times(1, lambda handler, body: bool(made.fleet.drain(held, "on demand")))
            server.faults.append(("/update_weights_from_tensor", drained))
            move(model)
            made.sync(1)
            assert server.weight_version.endswith(".0") and server.paused
        assert len(rollout.wait()) == 1
        assert sum("extra_key" in body for body in server.paths("/generate")) == 2, "asked for again"
        check_equal(model, server)


@pytest.mark.parametrize("fault", [None, status(503), cut, silent], ids=["well", "503", "cut", "silent"])
def test_a_drained_server_that_still_works_is_paused_before_it_is_loaded(
    tmp_path: Path, fault: Fault | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load would wait for the end of all its requests, which nobody waits for any more."""
    monkeypatch.setattr(Fleet.ask, "__defaults__", (None, 0.3))
    model = llama()
    server = fake(model)
    server.faults.append(("/generate", lambda handler, body: body["input_ids"] == [1] and slow(20.0)(handler, body)))
    with engine(model, tmp_path, server) as made, socket.create_connection(server.server_address) as line:
        line.sendall(b'POST /generate HTTP/1.1\r\nContent-Length: 17\r\n\r\n{"input_ids":[1]}')
        while not server.working:
            time.sleep(0.01)
        if fault is not None:
            server.faults.append(("/pause_generation", times(1, fault)))
        made.fleet.drain(made.fleet.servers[0], "on demand")
        server.weight_version, start, before = "lost", time.monotonic(), len(server.asked)
        made.generate(PROMPTS, 2, SAMPLING)
        assert time.monotonic() - start < 5, "it waited for the request"
        paths = [path for path, _ in server.asked[before:] if path.startswith(("/pause", "/update"))]
        tries = ["/pause_generation"] * (1 + (fault is not None))
        assert paths == [*tries, "/update_weights_from_disk"]
        assert not server.paused and server.weight_version == made.weights.tag
        check_equal(model, server)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    model = llama()
    (tmp_path / "engine").write_text("in the way")
    with pytest.raises(RunError, match="could not be written"), engine(model, tmp_path, fake(model)):
        pass


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    model = llama()
    with engine(model, tmp_path, fake(model)) as made:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(RunError, match="could not be written to .*File too large.*make room"):
                made.sync(1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- the plan ----------------------------------------------------------------------------------------------------------


@given(st.integers(64, 200_000), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=25)
def test_the_plan_has_every_weight_once_in_bounded_buckets(size: int, tied: bool, mixed: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    if mixed:
        model.model.norm.to(torch.float64)
    plan = make_plan(model, size)
    own = dict(model.named_parameters())
    assert sorted(entry.name for entry in plan.entries) == sorted(own)
    for bucket in plan.buckets:
        place = 0
        for entry in bucket.entries:
            assert entry.dtype == bucket.dtype == own[entry.name].dtype and entry.shape == own[entry.name].shape
            assert entry.offset == place
            place += entry.count
        assert place == bucket.count
        assert len(bucket.entries) == 1 or bucket.count * bucket.dtype.itemsize <= size


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
