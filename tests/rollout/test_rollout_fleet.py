"""What a fleet is made of, who gets the next free place, and how rollouts grow with the servers, on a clock that only counts what is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from fake_sglang import sample
from hypothesis import given, settings
from hypothesis import strategies as st
from timed_sglang import tailed

from omni_fast.errors import UserError
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.fleet import Fleet, Json, Server, ServerError, parse_version
from omni_fast.rollout.sglang import SGLangEngine

BOUND = 8
SAMPLING = Sampling(max_new_tokens=512)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Time jumps to the next thing that is due as soon as nothing else is to be done."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class SimulatedFleet(Fleet):
    """Servers that need the seconds that `seconds` says for a group, however many they work on."""

    def __init__(self, count: int, seconds: Callable[[Server, list[int]], float], in_flight: int = BOUND) -> None:
        self.seconds = seconds
        self.answered: dict[str, int] = {}
        super().__init__([f"http://127.0.0.1:{port}" for port in range(1, count + 1)], in_flight=in_flight)

    async def ask(self, server: Server, path: str, payload: Json = None, timeout_s: float = 10.0) -> Json:
        if path == "/server_info":
            return {"version": "0.5.17"}
        if path != "/generate":
            return None
        assert isinstance(payload, dict)
        assert server.in_flight <= self.bound
        tokens: list[int] = payload["input_ids"]  # type: ignore[assignment]
        await asyncio.sleep(self.seconds(server, tokens))
        self.answered[server.url] = self.answered.get(server.url, 0) + 1
        return [sample(tokens, k, {"max_new_tokens": 2}, "sim.0") for k in range(2)]  # type: ignore[return-value]


class NoWeights:
    tag = "sim.0"

    def check(self, server: Server) -> None:
        pass

    def push(self, version: int) -> dict[str, float]:
        return {}

    def catch_up(self, server: Server) -> None:
        raise ServerError(server.url, "", "not in this test")


@contextmanager
def simulated(
    count: int, seconds: Callable[[Server, list[int]], float]
) -> Iterator[tuple[SimulatedFleet, SGLangEngine]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", SimulatedLoop)
        fleet = SimulatedFleet(count, seconds)
    try:
        yield fleet, SGLangEngine(fleet, NoWeights())
    finally:
        fleet.close()


def took(count: int, groups: int, seconds: Callable[[Server, list[int]], float]) -> float:
    """Simulated seconds of so many groups on so many servers."""
    with simulated(count, seconds) as (fleet, engine):
        found = engine.generate([Prompt([5, place], place) for place in range(groups)], 2, SAMPLING)
        assert len(found) == groups == sum(fleet.answered.values())
        return fleet._loop.time()


def tail(server: Server, tokens: list[int]) -> float:
    return tailed(tokens, SAMPLING.max_new_tokens) * 0.01


def test_twice_the_servers_make_about_twice_the_rollouts() -> None:
    seconds = {count: took(count, 400, tail) for count in (1, 2, 4, 8)}
    lengths = [tail(Server(""), [5, place]) for place in range(400)]
    assert max(lengths) > 3 * sum(lengths) / len(lengths), "a long tail"
    for count, least in ((1, 0.95), (2, 0.9), (4, 0.85), (8, 0.7)):
        ideal = sum(lengths) / count / BOUND
        assert least * seconds[count] <= ideal <= seconds[count], (count, ideal, seconds[count])
    assert seconds[1] / seconds[2] > 1.85 and seconds[2] / seconds[4] > 1.75


def test_a_straggling_server_gets_less_and_holds_up_little() -> None:
    def one_slow(server: Server, tokens: list[int]) -> float:
        return tail(server, tokens) * (5 if server.url.endswith(":1") else 1)

    with simulated(4, one_slow) as (fleet, engine):
        engine.generate([Prompt([5, place], place) for place in range(400)], 2, SAMPLING)
        slow, seconds = fleet.answered["http://127.0.0.1:1"], fleet._loop.time()
    assert 0 < slow < 400 / 3.2 / 4, "about a fifth of what another one gets"
    assert seconds < 1.6 * took(3, 400, tail)


def test_servers_that_are_silent_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for samples waits for one look at most, however many are gone."""
    with simulated(6, lambda server, tokens: 1.0) as (fleet, engine):
        plain = fleet.ask

        async def silent(server: Server, path: str, payload: Json = None, timeout_s: float = 10.0) -> Json:
            if path != "/model_info":
                return await plain(server, path, payload, timeout_s)
            await asyncio.sleep(timeout_s)
            raise ServerError(server.url, path, "silent")

        monkeypatch.setattr(fleet, "ask", silent)
        for server in fleet.servers[1:]:
            fleet.drain(server, "gone")
        before = fleet._loop.time()
        assert engine.tend(0.0) == 0.0
        assert fleet._loop.time() - before < 4.0
        assert [server.reason for server in fleet.servers] == ["", *["silent"] * 5]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["hold", "cancel"])), min_size=1, max_size=30), st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_places_go_by_turn_and_none_is_lost_whoever_gives_up(asked: list[tuple[int, str]], late: bool) -> None:
    """Two servers with two places each; who waits is served in the order of (turn, arrival), unless it gave up.

    late: they give up in the moment of getting a place.
    """

    async def scenario(fleet: Fleet) -> None:
        order: list[tuple[int, int]] = []

        async def one(turn: int, number: int) -> None:
            server = await fleet.take(turn)
            order.append((turn, number))
            await asyncio.sleep(1.0)
            fleet.give_back(server)

        held = [await fleet.take() for _ in range(4)]
        waiting = [asyncio.create_task(one(turn, number)) for number, (turn, _) in enumerate(asked)]
        await asyncio.sleep(0)
        for server in held if late else []:
            fleet.give_back(server)
        for task, (_, fate) in zip(waiting, asked, strict=True):
            if fate == "cancel":
                task.cancel()
        for server in [] if late else held:
            fleet.give_back(server)
        await asyncio.gather(*waiting, return_exceptions=True)
        wanted = {(turn, number) for number, (turn, fate) in enumerate(asked) if fate == "hold"}
        assert wanted <= set(order) and order == sorted(order)
        assert [server.in_flight for server in fleet.servers] == [0, 0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", SimulatedLoop)
        fleet = SimulatedFleet(2, lambda server, tokens: 1.0, in_flight=2)
    for server in fleet.servers:
        fleet.admit(server)
    try:
        fleet.run(scenario(fleet))
    finally:
        fleet.close()


# -- addresses, keys, versions ------------------------------------------------------------------------------------------


def test_a_url_with_a_password_is_refused_without_printing_it() -> None:
    with pytest.raises(UserError, match="OMNI_FAST_ENGINE_KEY") as told:
        Fleet(["http://me:s3cret@a:1"])
    assert "s3cret" not in str(told.value)


@pytest.mark.parametrize(
    "urls",
    [
        [],
        ["http://a..b:1"],
        ["127.0.0.1:1"],
        ["ftp://a"],
        ["http://"],
        ["http://a", "http://a/"],
        ["http://a", "http://a/v1"],
    ],
)
def test_urls_that_are_none_are_refused(urls: list[str]) -> None:
    with pytest.raises(UserError, match="engine.urls"):
        Fleet(urls)


@pytest.mark.parametrize("key", ["s3cret\n", "s3cr\u00e9t"])
def test_a_key_that_cannot_stand_in_a_header_is_refused_without_saying_it(key: str) -> None:
    with pytest.raises(UserError, match="OMNI_FAST_ENGINE_KEY.*line break") as told:
        Fleet(["http://a"], api_key=key)
    assert "s3cr" not in str(told.value)


def test_versions_are_read() -> None:
    assert parse_version("0.5.10.post1") == (0, 5, 10) and parse_version("0.5.17") == (0, 5, 17)
    assert parse_version("main") == () and parse_version("0.5.21+cpu") == (0, 5, 21)
