"""Connections to SGLang servers: one event loop in a thread of its own, bounded requests, the least busy server first.

A server is `ready` (it answers and holds the current weights) or drained, with the reason. Only ready servers get prompts;
what is under way on a server that fails is asked elsewhere. Whoever owns the weights brings a drained server back
(`sglang.py`). Every request has a time limit, and every error names the server, the path and what was wrong.

Limits: HTTP/1.1 and JSON. The key goes into one header of every request and into no message.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from omni_fast.errors import UserError
from omni_fast.rollout.wire import Broken, Connections

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Result = TypeVar("Result")

OLDEST = (0, 5, 17)  # SGLang; its contract is the oldest that is tested
PROBE_S, MAX_PROBE_S = 0.5, 15.0  # between two looks at a drained server
ASK_S = 10.0  # for what a server answers at once


class ServerError(Exception):
    """A server did not do what it was asked. status: of HTTP, 0 where there was no whole answer."""

    def __init__(self, url: str, path: str, reason: str, status: int = 0) -> None:
        super().__init__(f"{url}{path}: {reason}")
        self.path, self.reason, self.status = path, reason, status


@dataclass(eq=False, slots=True)
class Server:
    """known: it has said what it is, and is fit for the policy. version: of SGLang. proven: tag of the weights it was
    last seen to hold. in_flight: groups it works on. doubts: how often its weights were in doubt; what was under way there
    then is not taken, and its cache not read again."""

    url: str
    known: bool = False
    version: tuple[int, ...] = ()
    tensor_parallel: int = 1
    dtype: str = "auto"  # of its weights, as it was told to hold them
    shows_weights: bool = True  # /get_weights_by_name, which SGLang has for the Llama family only
    proven: str = ""
    ready: bool = False
    reason: str = "not asked yet"
    in_flight: int = 0
    doubts: int = 0
    asleep: tuple[str, ...] = ()  # what of its memory it has given back, as SGLang names it
    next_probe: float = 0.0
    probe_gap: float = PROBE_S

    @property
    def here(self) -> bool:
        """Whether it is on this host."""
        return urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")

    def look_later(self, wait_s: float) -> None:
        """The next look is after `wait_s`, the gap to the one after it twice as long as before."""
        self.next_probe = time.monotonic() + wait_s
        self.probe_gap = min(2 * self.probe_gap, MAX_PROBE_S)


Waiting = tuple[int, int, asyncio.Future[Server], Collection[Server]]  # turn, place in line, who waits, failed at


class Fleet:
    """The servers and the loop that talks to them; `run` and `each` are for any other thread."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str = "",
        in_flight: int = 32,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """in_flight: bound on a server's groups at a time. say: gets one line when a server goes or comes back."""
        self.servers = [Server(url) for url in map(_checked, urls)]
        if not urls or len({server.url for server in self.servers}) < len(urls):
            raise UserError(f"engine.urls must name at least one server and each once, got {list(urls)}")
        if not (api_key.isascii() and api_key.isprintable()):  # or it would end the header, or could not stand in it
            raise UserError("the engine's key (OMNI_FAST_ENGINE_KEY) holds a line break or is not ASCII: set it again")
        self.bound = in_flight
        self.say = say
        self._queue: list[Waiting] = []  # a heap
        self._places = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-http", daemon=True)
        self._thread.start()
        self._http = Connections({"Authorization": f"Bearer {api_key}"} if api_key else {})

    def close(self) -> None:
        """Give up what is under way, so that servers stop working on it."""
        if self._loop.is_running():
            self.run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # -- from other threads ------------------------------------------------------------------------------------------

    def submit(self, work: Coroutine[None, None, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[None, None, Result]) -> Result:
        return self.submit(work).result()

    def each(
        self, servers: Sequence[Server], work: Callable[[Server], Awaitable[Result]]
    ) -> Future[list[tuple[Server, Result | ServerError]]]:
        """`work` on all servers at the same time: each with its result, or with the error."""

        async def one(server: Server) -> tuple[Server, Result | ServerError]:
            try:
                return server, await work(server)
            except ServerError as error:
                return server, error

        async def together() -> list[tuple[Server, Result | ServerError]]:
            return list(await asyncio.gather(*(one(server) for server in servers)))

        return self.submit(together())

    @property
    def ready(self) -> list[Server]:
        return [server for server in self.servers if server.ready]

    def reasons(self) -> str:
        """Why the drained servers are drained, in one line."""
        return "; ".join(f"{server.url}: {server.reason}" for server in self.servers if not server.ready)

    def drain(self, server: Server, reason: str) -> None:
        """Ask it nothing more until it is back: looked at at once, or later if it has done nothing well since it was last."""
        if server.ready:
            self.say(f"the engine server {server.url} is left out ({reason}); its work goes to the others or waits")
            server.look_later(server.probe_gap - PROBE_S)
        server.ready, server.reason = False, reason
        self._loop.call_soon_threadsafe(self._http.forget, server.url)
        self._loop.call_soon_threadsafe(self._serve)  # those that waited for it alone

    def admit(self, server: Server) -> None:
        """It holds the current weights and may be asked."""
        server.ready, server.reason = True, ""
        self._loop.call_soon_threadsafe(self._serve)

    # -- inside the loop ---------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._http.close()

    async def ask(self, server: Server, path: str, payload: Json = None, timeout_s: float = ASK_S) -> Json:
        """GET, or POST where there is a payload; the answered JSON.

        Raises ServerError for anything but a whole 200, and for one that says of itself that nothing was done.
        """
        try:
            async with asyncio.timeout(timeout_s):
                body = None if payload is None else json.dumps(payload, separators=(",", ":")).encode()
                status, answer = await self._http.send(server.url + path, body)
        except TimeoutError as error:
            raise ServerError(server.url, path, f"no answer within {timeout_s:g} s") from error
        except Broken as error:
            reason = f"the connection broke: {error}" if error.connected else f"nothing answers there: {error}"
            raise ServerError(server.url, path, reason) from error
        if status != 200:
            raise ServerError(server.url, path, _told(status, answer), status)
        try:
            data: Json = json.loads(answer) if answer else None
        except ValueError as error:
            raise ServerError(server.url, path, "the answer is not JSON") from error
        if member(data, "success") is False:
            raise ServerError(server.url, path, _told(status, answer), 400)
        return data

    async def take(self, turn: int = 0, failed: Collection[Server] = ()) -> Server:
        """The ready server with the fewest groups, one more on it now; waits while all are full or drained.

        turn: lower ones go first, whoever waits longer; equal ones in the order they came. failed: not one of these while
        another is ready: who fails quickly is free, and would get everything.
        """
        place: asyncio.Future[Server] = self._loop.create_future()
        heapq.heappush(self._queue, (turn, next(self._places), place, failed))
        self._serve()
        try:
            return await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it got a server in the moment it was given up
                self.give_back(place.result())
            raise

    def give_back(self, server: Server) -> None:
        server.in_flight -= 1
        self._serve()

    def _serve(self) -> None:
        """Free places on ready servers to those that wait."""
        passed = []
        while self._queue and (free := [server for server in self.ready if server.in_flight < self.bound]):
            waiting = heapq.heappop(self._queue)
            *_, place, failed = waiting
            if place.done():
                continue
            others = [server for server in self.ready if server not in failed]
            if fit := [server for server in free if server in others or not others]:
                server = min(fit, key=lambda one: one.in_flight)
                server.in_flight += 1
                place.set_result(server)
            else:
                passed.append(waiting)
        for waiting in passed:
            heapq.heappush(self._queue, waiting)


def member(data: Json, key: str) -> Json:
    """data[key] of a JSON object; None without."""
    return data.get(key) if isinstance(data, dict) else None


def parse_version(text: str) -> tuple[int, ...]:
    """ "0.5.10.post1" -> (0, 5, 10); () where it is no version."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _checked(url: str) -> str:
    if "@" in url:
        raise UserError(
            "engine.urls: an address holds a user or a password, and addresses are printed: give a key in the environment "
            "as OMNI_FAST_ENGINE_KEY"
        )
    try:
        parsed = urlsplit(url)
        name = (parsed.hostname or "").encode("idna")  # or raises, as the port does
        usable = parsed.scheme in ("http", "https") and bool(name) and parsed.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(one.isspace() for one in url):
        raise UserError(f"engine.urls: {url!r} is not an http(s) URL; give something like http://host:30000")
    return url.rstrip("/").removesuffix("/v1")


def _told(status: int, answer: bytes) -> str:
    """Status and, cut short, what the server says about it."""
    text = " ".join(answer.decode("utf-8", "replace").split())
    try:
        data: Json = json.loads(text)
    except ValueError:
        data = None
    for key in ("error", "message", "error_message", "detail"):
        inner = member(data, key)
        data = inner if inner is not None else data
    said = data if isinstance(data, str) else text
    return f"HTTP {status}" + (f" ({said[:300]})" if said else "")
