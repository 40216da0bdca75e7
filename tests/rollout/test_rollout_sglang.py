"""The engine over SGLang servers: what it asks, what it takes, and what it does when servers fail."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from fake_sglang import (
    FakeSGLang,
    Fault,
    Handler,
    cut,
    edited,
    half,
    sample,
    saying,
    serving,
    silent,
    slow,
    status,
    times,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from timed_sglang import NamedWeights

from omni_fast.errors import RunError, UserError
from omni_fast.rollout import sglang
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.fleet import Fleet, Server, ServerError
from omni_fast.rollout.sglang import SGLangEngine, read, request

SAMPLING = Sampling(max_new_tokens=6, temperature=0.7, stop_token_ids=(2,), seed=1)


def fake(**options: object) -> FakeSGLang:
    server = FakeSGLang({}, **options)  # type: ignore[arg-type]
    server.update_weights_from_disk = lambda body: server._take({}, body)  # type: ignore[method-assign]
    return server


@contextmanager
def engine(*fakes: FakeSGLang, key: str = "", **options: float) -> Iterator[SGLangEngine]:
    said: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(serving(*fakes))
        fleet = Fleet([one.url for one in fakes], api_key=key, in_flight=4, say=said.append)
        stack.callback(fleet.close)
        limits = {"request_s": 0.5, "wait_s": 5.0} | options
        made = SGLangEngine(fleet, NamedWeights(fleet), **limits)
        made.said = said  # type: ignore[attr-defined]
        yield made


def prompts(count: int) -> list[Prompt]:
    return [Prompt([5 + place, 7, 9], place) for place in range(count)]


def check_whole(found: list, count: int, n: int, tag: str) -> None:
    """Order and count kept, each sample the one that a server gives for this prompt and number."""
    assert len(found) == count and all(len(group) == n for group in found)
    for prompt, group in zip(prompts(count), found, strict=True):
        for number, got in enumerate(group):
            draw = {"max_new_tokens": SAMPLING.max_new_tokens, "stop_token_ids": [2]}
            wanted = sample(list(prompt.tokens), number, draw, tag)
            assert got.tokens == wanted["output_ids"]
            assert got.logprobs == [pair[0] for pair in wanted["meta_info"]["output_token_logprobs"]]
            assert got.finish_reason == wanted["meta_info"]["finish_reason"]["type"]


def test_samples_come_in_order_with_log_probs_and_versions() -> None:
    servers = [fake(), fake()]
    with engine(*servers) as made:
        made.sync(3)
        done: list[int] = []
        seen: list[tuple[int, int]] = []
        threads = set()

        def progress(tokens: int, running: int) -> None:
            threads.add(threading.current_thread())
            seen.append((tokens, running))

        found = made.generate(prompts(20), 4, SAMPLING, progress, lambda place, group: done.append(place))
        check_whole(found, 20, 4, "named.3")
        assert all(got.versions == [(3, 0, len(got.tokens))] for group in found for got in group)
        assert sorted(done) == list(range(20)) and threads == {threading.current_thread()}
        assert seen[-1] == (sum(len(got.tokens) for group in found for got in group), 0)
        assert made.generate([], 4, SAMPLING) == []


def test_one_group_is_one_request_that_says_all_that_matters() -> None:
    server = fake()
    with engine(server) as made:
        made.generate(prompts(1), 3, SAMPLING)
    (asked,) = server.paths("/generate")
    assert asked == request([5, 7, 9], 3, SAMPLING, "0:named.0")
    assert asked["sampling_params"]["max_new_tokens"] == 6 and asked["sampling_params"]["stop_token_ids"] == [2]
    assert asked["extra_key"] == "0:named.0" and asked["return_logprob"] is True and "text" not in asked


def test_the_least_busy_server_gets_the_next_group_and_none_more_than_its_bound() -> None:
    busy, servers = {}, [fake(), fake(), fake()]
    most: dict[str, int] = {}
    lock = threading.Lock()
    for place, server in enumerate(servers):

        def counted(
            body: dict, server: FakeSGLang = server, seconds: float = 0.01 + 0.03 * place
        ) -> tuple[int, object]:
            with lock:
                busy[server.url] = busy.get(server.url, 0) + 1
                most[server.url] = max(most.get(server.url, 0), busy[server.url])
            time.sleep(seconds)
            with lock:
                busy[server.url] -= 1
            return FakeSGLang.generate(server, body)

        server.generate = counted  # type: ignore[method-assign]
    with engine(*servers) as made:
        check_whole(made.generate(prompts(60), 2, SAMPLING), 60, 2, "named.0")
    shares = [len(server.paths("/generate")) for server in servers]
    assert sum(shares) == 60 and shares[0] > shares[2] > 0
    assert max(most.values()) <= 4


FAULTS = {
    "500": (status(500), "HTTP 500 (on demand 500)"),
    "503": (status(503), "HTTP 503 (on demand 503)"),
    "dead": (cut, "the connection broke: cut off"),
    "half": (half, "the connection broke: cut off"),
    "silent": (silent, "no answer within 0.5 s"),
    "nonsense": (saying(b"<html>"), "the answer is not JSON"),
    "a page": (saying(b"<h1>\n  Bad\n</h1>\n", status=502), "HTTP 502 (<h1> Bad </h1>)"),
}


@pytest.mark.parametrize(("fault", "told"), FAULTS.values(), ids=FAULTS)
def test_what_a_server_fails_at_is_asked_elsewhere(fault: Fault, told: str) -> None:
    servers = [fake(), fake()]
    servers[0].faults.append(("/generate", times(2, fault)))
    with engine(*servers) as made:
        check_whole(made.generate(prompts(30), 2, SAMPLING), 30, 2, "named.0")
        url = servers[0].url
        assert made.said[0] == f"the engine server {url} is left out ({told}); its work goes to the others or waits"


def not_sglang(handler: Handler, body: dict) -> bool:
    handler.wfile.write(b"220 mail.example.org ready\r\n\r\n")
    return cut(handler, body)


STARTS = {
    "silent": (silent, r"is not ready after 0 s \(no answer within 0.2 s\): start it, look into its log, or correct"),
    "half": (saying(b"{}", cut=1), r"is not ready after 0 s \(the connection broke: cut off\)"),
    "loads": (status(503), r"is not ready after 0 s \(HTTP 503 \(on demand 503\)\)"),
    "another service": (not_sglang, r"is not ready after 0 s \(the connection broke: the answer is not HTTP\)"),
}


@pytest.mark.parametrize(("fault", "told"), STARTS.values(), ids=STARTS)
def test_a_server_that_does_not_get_ready_is_told_before_the_first_step(
    fault: Fault, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang, "ASK_S", 0.2)
    server = fake()
    server.faults.append(("/health", fault))
    with pytest.raises(UserError, match=told), engine(server, wait_s=0.3):
        pass


@pytest.mark.parametrize("change", "version spans tokens null short empty nan infinite count kind".split())
def test_an_answer_that_is_not_right_is_never_taken(change: str) -> None:
    server = Server("http://a")
    rows = [sample([1, 2], number, {"max_new_tokens": 4}, "t.1") for number in range(2)]
    assert len(read(server, rows, 2, "t.1")) == 2
    meta = rows[1]["meta_info"]
    if change == "version":
        meta["weight_version"] = "t.0"
    elif change == "spans":
        meta["weight_versions"] = [{"version": "t.0", "start": 0, "end": 2}, {"version": "t.1", "start": 2, "end": 4}]
    elif change == "tokens":
        rows[1]["output_ids"] = rows[1]["output_ids"][:-1]
    elif change == "null":
        meta["output_token_logprobs"][2][0] = None
    elif change == "short":
        del meta["output_token_logprobs"][2][1:]
    elif change == "empty":
        meta["output_token_logprobs"][2] = []
    elif change in ("nan", "infinite"):
        meta["output_token_logprobs"][2][0] = math.nan if change == "nan" else -math.inf
    elif change == "count":
        rows.pop()
    else:
        meta["finish_reason"] = None
    with pytest.raises(ServerError):
        read(server, rows, 2, "t.1")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["meta_info", "output_ids", "output_token_logprobs", "finish_reason", "type"]), inner
        )
    ),
    max_leaves=12,
)


@given(json_values)
@settings(deadline=None, max_examples=300)
def test_no_json_breaks_the_reader(data: object) -> None:
    with pytest.raises(ServerError):
        read(Server("http://a"), data, 2, "t.0")  # type: ignore[arg-type]


def test_a_sample_of_other_weights_drains_the_server_until_it_has_the_right_ones() -> None:
    server = fake()
    with engine(server) as made:
        server.weight_version = "someone-else.9"
        check_whole(made.generate(prompts(5), 2, SAMPLING), 5, 2, "named.0")
        assert len(server.paths("/update_weights_from_disk")) == 2
        assert any("someone-else.9" in line for line in made.said)
        salts = [body["extra_key"] for body in server.paths("/generate")]
        assert salts[0] == "0:named.0" and salts[-1] == "1:named.0", "keys and values of the other weights are not read"


def test_a_prompt_that_is_asked_in_the_moment_of_a_sync_is_of_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the engine has come to by then: its salt is of the version that its samples say."""
    server = fake()
    with engine(server) as made:
        asked: list[sglang.ServedRollout] = []

        def ask(one: SGLangEngine, name: str, value: object) -> None:
            object.__setattr__(one, name, value)
            asked.append(one.start([Prompt([5, 7, 9], 0)], 2, SAMPLING))
            time.sleep(0.05)

        with monkeypatch.context() as patch:
            patch.setattr(SGLangEngine, "__setattr__", ask)
            made.sync(1)
        found = [rollout.wait()[0] for rollout in asked]
        assert len(found) >= 2
        for body, group in zip(server.paths("/generate"), found, strict=True):
            salt = int(str(body["extra_key"]).removeprefix("0:named."))
            assert {one.versions[0][0] for one in group} == {salt}


def test_closing_gives_up_what_is_under_way() -> None:
    server = fake()
    server.faults.append(("/generate", slow(1.0)))
    with engine(server, request_s=5.0) as made:
        made.start(prompts(3), 2, SAMPLING)
        while server.working < 3:
            time.sleep(0.01)
        made.fleet.close()
        assert not asyncio.all_tasks(made.fleet._loop)


def test_an_aborted_request_is_asked_again_and_the_server_stays() -> None:
    server = fake()

    def abort(row: dict) -> None:
        row["meta_info"]["finish_reason"] = {"type": "abort", "message": "on demand"}

    server.faults.append(("/generate", times(2, edited(abort))))
    with engine(server) as made:
        check_whole(made.generate(prompts(4), 2, SAMPLING), 4, 2, "named.0")
        assert made.said == []


def test_a_server_that_dies_in_mid_batch_and_comes_back_empty_gets_the_weights_first() -> None:
    first, second = fake(), fake()
    for server in (first, second):
        server.faults.append(("/generate", slow(0.01)))
    with engine(first, second) as made:
        made.sync(5)
        again: list[FakeSGLang] = []

        def finished(place: int, group: list) -> None:
            if not again:
                first.kill()
                again.append(fake(port=first.server_address[1]))
                again[0].faults.append(("/generate", slow(0.01)))
                again[0].start()

        found = made.generate(prompts(300), 2, SAMPLING, finished=finished)
        check_whole(found, 300, 2, "named.5")
        assert again[0].weight_version == "named.5" and again[0].paths("/generate")
        salts = [body["extra_key"] for body in again[0].paths("/generate")]
        assert salts[-1] == "1:named.5" and all(salt.endswith(":named.5") for salt in salts)
        again[0].kill()


def test_no_server_left_is_a_bounded_wait_and_one_clear_error() -> None:
    server = fake()
    with engine(server, wait_s=0.5) as made:
        waits: list[str] = []
        made.wait = waits.append
        server.faults += [("/generate", cut), ("/health", status(503))]
        start = time.monotonic()
        with pytest.raises(RunError, match=r"no engine server has been ready for 0 s|ready for 1 s"):
            made.generate(prompts(3), 2, SAMPLING)
        assert time.monotonic() - start < 10 and any("come back" in text for text in waits)


def test_a_prompt_that_fails_everywhere_is_given_up_with_its_reasons() -> None:
    server = fake()
    server.faults.append(("/generate", half))
    with engine(server) as made, pytest.raises(RunError, match=r"prompt 0 failed 4 times.*connection broke"):
        made.generate(prompts(1), 2, SAMPLING)


def test_a_server_that_fails_at_everything_costs_no_prompt() -> None:
    """It is free again at once, and answers that it is well: without more ado it would get each prompt four times."""
    servers = [fake(), fake()]
    servers[0].faults.append(("/generate", status(500)))
    servers[1].faults.append(("/generate", slow(0.5)))
    with engine(*servers, request_s=5.0) as made:
        check_whole(made.generate(prompts(16), 2, SAMPLING), 16, 2, "named.0")
        assert len(servers[0].paths("/generate")) <= 16, "each at most once"
        assert sum("left out" in line for line in made.said) < 10, "it is looked at less and less"


def test_a_refused_prompt_is_the_users_and_ends_everything_at_once() -> None:
    server = fake()
    server.faults.append(("/generate", status(400)))
    with (
        engine(server) as made,
        pytest.raises(UserError, match="refuses prompt 0 of 3 tokens.*on demand 400.*--context-length"),
    ):
        made.generate(prompts(1), 2, SAMPLING)
    with engine(fake()) as made, pytest.raises(UserError, match="prompt 1 has no tokens"):
        made.generate([Prompt([1], 0), Prompt([], 1)], 2, SAMPLING)


def test_what_progress_raises_ends_the_requests_and_the_engine_still_works() -> None:
    server = fake()
    server.faults.append(("/generate", times(8, slow(0.3))))

    def stop(tokens: int, running: int) -> None:
        raise KeyboardInterrupt

    with engine(server) as made:
        with pytest.raises(KeyboardInterrupt):
            made.generate(prompts(8), 2, SAMPLING, progress=stop)
        check_whole(made.generate(prompts(8), 2, SAMPLING), 8, 2, "named.0")
        assert made.fleet.servers[0].in_flight == 0


def test_a_server_that_starts_late_is_waited_for() -> None:
    server = fake()
    server.faults.append(("/health", times(3, status(503))))
    with engine(server) as made:
        assert made.fleet.ready and len(server.paths("/health")) == 4


def test_a_silent_server_is_waited_for_no_longer_than_was_said() -> None:
    """Each question took its own ten seconds, whatever was left."""
    server = fake()
    server.faults += [("/continue_generation", slow(15.0)), ("/health", slow(15.0))]
    started = time.monotonic()
    with pytest.raises(UserError, match=r"not ready after 0 s \(no answer within 1 s\)"), engine(server, wait_s=0.4):
        pass
    assert time.monotonic() - started < 8


def test_servers_that_cannot_be_used_are_told_before_the_first_step() -> None:
    with pytest.raises(UserError, match="SGLang 0.5.9; 0.5.17 is the oldest.*engine up"), engine(fake(version="0.5.9")):
        pass
    with pytest.raises(UserError, match=r"not ready after 0 s \(nothing answers there.*\)"), serving():
        fleet = Fleet(["http://127.0.0.1:9"])
        SGLangEngine(fleet, NamedWeights(fleet), wait_s=0.1)
    replicated = fake()
    replicated.server_info = lambda body: (200, {"version": "0.5.17", "dp_size": 2})  # type: ignore[method-assign]
    with pytest.raises(UserError, match="--dp-size 2"), engine(replicated):
        pass
    silent_health = fake()
    silent_health.server_info = silent_health.missing  # type: ignore[method-assign]
    with pytest.raises(UserError, match="is this an SGLang server"), engine(silent_health):
        pass


def test_the_key_goes_with_every_request_and_into_no_message() -> None:
    server = fake(key="s3cret")
    with engine(server, key="s3cret") as made:
        check_whole(made.generate(prompts(2), 2, SAMPLING), 2, 2, "named.0")
        server.faults.append(("/generate", status(403)))
        with pytest.raises(UserError) as told:
            made.generate(prompts(1), 2, SAMPLING)
        assert "s3cret" not in str(told.value) + " ".join(made.said)
    with pytest.raises(UserError, match="OMNI_FAST_ENGINE_KEY") as told, engine(fake(key="s3cret"), key="wr0ng"):
        pass
    assert "wr0ng" not in str(told.value)


@given(st.lists(st.sampled_from(["ok", "500", "cut", "half", "abort"]), max_size=12), st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_whatever_fails_nothing_is_lost_doubled_or_reordered(faults: list[str], n: int) -> None:
    """Faults hit successive requests; two servers share them."""
    plan = iter(faults)
    lock = threading.Lock()
    servers = [fake(), fake()]

    def abort(row: dict) -> None:
        row["meta_info"]["finish_reason"] = {"type": "abort"}

    kinds = {"500": status(500), "cut": cut, "half": half, "abort": edited(abort)}

    def next_fault(handler: object, body: dict) -> bool:
        with lock:
            kind = next(plan, "ok")
        return kind in kinds and (kind != "abort" or n > 1) and kinds[kind](handler, body)  # type: ignore[arg-type]

    for server in servers:
        server.faults.append(("/generate", next_fault))
    with engine(*servers) as made:
        done: list[int] = []
        try:
            found = made.generate(prompts(12), n, SAMPLING, finished=lambda place, group: done.append(place))
        except RunError as error:
            assert "failed 4 times" in str(error)
        else:
            check_whole(found, 12, n, "named.0")
            assert sorted(done) == list(range(12))


def test_torch_is_not_what_the_engine_needs() -> None:
    """The client's modules stand on httpx alone; the trainer's torch is loaded by the tests."""
    import omni_fast.rollout.fleet as fleet
    import omni_fast.rollout.sglang as sglang

    assert torch.__version__
    assert not [name for module in (fleet, sglang) for name in vars(module) if name in ("torch", "transformers")]


def test_a_user_who_stops_does_not_wait_for_servers() -> None:
    server = fake()
    with engine(server, wait_s=60.0) as made:
        server.faults += [("/generate", cut), ("/health", status(503))]
        looks: list[float] = []

        def stop() -> None:
            looks.append(time.monotonic())
            if not made.fleet.ready:
                raise RunError("stopped")

        made.raise_if_stopping = stop
        with pytest.raises(RunError, match="stopped"):
            made.generate(prompts(3), 2, SAMPLING)
        assert looks


def test_a_server_with_another_tokenizer_is_told_once_by_where_it_ends() -> None:
    server = fake()

    def other_end(row: dict) -> None:
        row["output_ids"][-1] = row["meta_info"]["output_token_logprobs"][-1][1] = 7
        row["meta_info"]["finish_reason"] = {"type": "stop", "matched": 7}

    server.faults.append(("/generate", edited(other_end)))
    with engine(server) as made:
        made.generate(prompts(6), 2, SAMPLING)
        assert len(made.said) == 1 and "ends samples at token 7, which is no end to the policy" in made.said[0]
