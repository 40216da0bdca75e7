"""The HTTP client against bytes as servers really send them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.rollout import wire
from omni_fast.rollout.wire import Broken, Connections


def talk(answers: list[bytes], work: Callable, close_after: int = 99) -> tuple[object, list[bytes], int]:
    """Run `work(connections, url)` against a server that gives `answers` in turn; its result, requests, connections."""
    heads: list[bytes] = []
    opened = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        for _ in range(close_after):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            size = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0)
            heads.append(head + await reader.readexactly(size))
            answer = answers[len(heads) - 1]
            writer.write(answer)
            await writer.drain()
            if b"ontent-" not in answer and b"chunked" not in answer:
                break
        writer.close()

    async def main() -> object:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        connections = Connections({"Authorization": "Bearer k"})
        try:
            async with asyncio.timeout(10):
                return await work(connections, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a/b")
        finally:
            await connections.close()
            server.close()

    return asyncio.run(main()), heads, opened


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def test_get_and_post_over_one_connection() -> None:
    async def work(connections: Connections, url: str) -> list:
        return [await connections.send(url), await connections.send(url, b'{"a":1}')]

    found, heads, opened = talk([OK, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad"], work)
    assert found == [(200, b"ok"), (400, b"bad")] and opened == 1
    assert heads[0].startswith(b"GET /a/b HTTP/1.1\r\nHost: 127.0.0.1:") and b"Authorization: Bearer k\r\n" in heads[0]
    assert heads[1].startswith(b"POST /a/b") and heads[1].endswith(b'\r\n\r\n{"a":1}')


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: 1\r\n\r\n", (200, b"abcde")),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", (200, b"to the end")),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", (200, b"ok")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
        (b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", (200, b"")),
    ],
    ids="chunked end http10 nothing empty".split(),
)  # fmt: skip
def test_bodies_of_every_kind(answer: bytes, wanted: tuple[int, bytes]) -> None:
    found, _, _ = talk([answer], lambda connections, url: connections.send(url))
    assert found == wanted


def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used() -> None:
    async def work(connections: Connections, url: str) -> list:
        found = []
        for _ in range(3):
            found.append(await connections.send(url))
            await asyncio.sleep(0.05)
        return found

    found, _, opened = talk([OK] * 3, work, close_after=1)
    assert found == [(200, b"ok")] * 3 and opened == 3


def test_a_connection_that_the_server_may_be_closing_now_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request on it would be lost, and a server that is well would be drained for it."""
    monkeypatch.setattr(wire, "IDLE_S", 0.1)

    async def work(connections: Connections, url: str) -> list:
        found = [await connections.send(url), await connections.send(url)]
        await asyncio.sleep(0.2)
        return [*found, await connections.send(url)]

    found, _, opened = talk([OK] * 3, work)
    assert found == [(200, b"ok")] * 3 and opened == 2


@given(st.integers(0, len(OK) - 1))
@settings(deadline=None, max_examples=20)
def test_no_part_of_an_answer_is_taken_for_the_whole(size: int) -> None:
    with pytest.raises(Broken):
        talk([OK[:size]], lambda connections, url: connections.send(url), close_after=1)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=60)
def test_any_bytes_are_an_answer_or_broken(data: bytes) -> None:
    with pytest.raises(Broken):
        talk([b"HTTP/2.9 hello\r\n" + data], lambda connections, url: connections.send(url), close_after=1)


def test_nothing_listening_is_said() -> None:
    async def work() -> None:
        await Connections({}).send("http://127.0.0.1:9/")

    with pytest.raises(Broken) as told:
        asyncio.run(work())
    assert not told.value.connected
