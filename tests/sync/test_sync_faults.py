"""A sync that goes wrong: what fails is drained, caught up and proven before it is asked again, and nothing doubtful is taken."""

from __future__ import annotations

import re
import resource
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from fake_sglang import FakeSGLang, Fault, Handler, cut, saying, serving, silent, slow, status, times
from syncing import PROMPTS, SAMPLING, SHAPE, TRANSPORTS, check_equal, engine, fake, llama, move
from transformers import Qwen3Config, Qwen3ForCausalLM

from omni_fast.errors import RunError
from omni_fast.rollout.fleet import Fleet
from omni_fast.rollout.sglang import SGLangEngine
from omni_fast.sync import WeightSync, broadcast


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


class Unconnected:
    """A group of NCCL in its first broadcast, of which a member hangs."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def broadcast(self, flat: torch.Tensor, root: int) -> Unconnected:
        return self

    def wait(self) -> None:
        self.released.wait(30)


def test_a_broadcast_that_would_never_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "ANSWER_S", 0.5)
    model, group = llama(), Unconnected()
    servers = [fake(model) for _ in range(2)]
    with engine(model, tmp_path, *servers, transport="distributed", broadcast_s=0.5) as made:
        move(model)
        for server in servers:
            server.faults.append(("/update_weights_from_distributed", times(1, status(400))))
        monkeypatch.setattr(made.weights._group, "_group", group)
        started = time.monotonic()
        made.sync(1)
        assert time.monotonic() - started < 8
        assert "0 MiB were not sent within 0.5 s" in made.said[0] and len(made.fleet.ready) == 2
        for server in servers:
            check_equal(model, server)
        group.released.set()


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
            with pytest.raises(RunError, match="could not be written .*File too large.*Make room"):
                made.sync(1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
