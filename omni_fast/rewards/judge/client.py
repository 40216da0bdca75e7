"""Many JSON requests to one HTTP server that may be slow, down, or lying, without losing one of them.

Each request has a time limit over everything, some attempts with growing, jittered pauses, and honours Retry-After.
After `breaker_failures` failures in a row the circuit opens: everything waits, single probes go out, a line says so,
and work goes on where it was when the server is back. After `pause_s` without an answer the rest fails with a reason;
the next call tries again. No failure is ever a verdict, and nothing here raises for what a server does.
Several threads may call at once (one a task): they share what is known of the server, each has its own connections.
Limits: a body beyond `MAX_BODY` bytes is refused.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from omni_fast.errors import UserError
from omni_fast.rewards.judge.pairwise import Json, Verdict

MAX_BODY = 1 << 20

Read = Callable[[Json], Verdict]  # of an answered JSON; ValueError when it is none
Keep = Callable[[int, Verdict], None]  # place of the payload, its verdict


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Times in seconds. timeout_s: of one attempt, all in. pause_s: how long a call waits for a server that is down."""

    concurrency: int = 16
    timeout_s: float = 60.0
    attempts: int = 4
    backoff_s: float = 0.5
    backoff_max_s: float = 20.0
    breaker_failures: int = 4
    pause_s: float = 600.0


class Unclear(ValueError):
    """The server answered as it should, the model did not: it is asked again, and does not count as a down server."""


@dataclass(eq=False)
class Failure(Exception):
    """Why a request has no value: timeout, unreachable, http_503, bad_json, wrong_schema, unclear, down, ..."""

    reason: str
    retry: bool = True
    outage: bool = True
    retry_after_s: float = 0.0


class JsonClient:
    """say: gets one line when the server goes down, and one when it is back."""

    def __init__(
        self,
        url: str,
        api_key: str = "",
        limits: ClientLimits | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError(f"judge url {url!r} is not an http(s) URL; give something like http://host:port/v1")
        self.url, self.limits, self.say = url.rstrip("/"), limits or ClientLimits(), say
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._failures = 0  # in a row
        self._down_since: float | None = None
        self._hold_until = 0.0  # as the server asked: nothing goes out before
        self._probe_at = 0.0  # of an open circuit: one request goes out then
        self._probe_gap_s = min(self.limits.backoff_max_s, self.limits.pause_s / 8)
        self._calls: dict[asyncio.Task[object], asyncio.AbstractEventLoop] = {}
        self._jitter = random.Random(0)

    def ask(self, path: str, payloads: Iterable[Json], read: Read, keep: Keep) -> list[Verdict | Failure]:
        """A verdict or a failure for every payload, in order; keep: called with each verdict as it comes."""
        asked = list(payloads)
        return asyncio.run(self._ask(path, asked, read, keep)) if asked else []

    def close(self) -> None:
        """End the calls that are under way in other threads; each raises CancelledError there."""
        for task, loop in list(self._calls.items()):
            with suppress(RuntimeError):  # it ended by itself meanwhile
                loop.call_soon_threadsafe(task.cancel)

    @property
    def _broken(self) -> bool:
        return self._failures >= self.limits.breaker_failures

    async def _ask(self, path: str, payloads: Sequence[Json], read: Read, keep: Keep) -> list[Verdict | Failure]:
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = asyncio.get_running_loop()
        task.add_done_callback(self._calls.pop)
        self._down_since = time.monotonic() if self._failures else None
        slots = asyncio.Semaphore(self.limits.concurrency)
        async with httpx.AsyncClient(headers=self._headers, timeout=None) as http:

            async def one(index: int, payload: Json) -> Verdict | Failure:
                async with slots:
                    answer = await self._with_retries(http, path, payload, read)
                if not isinstance(answer, Failure):
                    keep(index, answer)
                return answer

            return await asyncio.gather(*map(one, range(len(payloads)), payloads))

    async def _with_retries(self, http: httpx.AsyncClient, path: str, payload: Json, read: Read) -> Verdict | Failure:
        limits, attempt = self.limits, 0
        while True:
            if not await self._admitted():
                return Failure("down", retry=False)
            try:
                verdict = await self._send(http, path, payload, read)
                self._succeeded()
                return verdict
            except Failure as failure:
                self._failed(failure)
                attempt += not self._broken  # one against a server that is down is none of its own
                if not failure.retry or attempt >= limits.attempts:
                    return failure
            pause = min(limits.backoff_max_s, limits.backoff_s * 2 ** max(0, attempt - 1))
            await asyncio.sleep(pause * self._jitter.uniform(0.5, 1.0))

    async def _admitted(self) -> bool:
        """Wait until a request may go out: at once, after a Retry-After, or as the probe of an open circuit."""
        while True:
            now = time.monotonic()
            if self._broken and self._down_since is not None and now - self._down_since > self.limits.pause_s:
                return False
            if now >= self._hold_until and (not self._broken or now >= self._probe_at):
                self._probe_at = now + self._probe_gap_s
                return True
            await asyncio.sleep(min(0.1, self.limits.backoff_s))

    def _succeeded(self) -> None:
        if self._broken and self._down_since is not None:
            self.say(f"the judge at {self.url} answers again after {time.monotonic() - self._down_since:.0f} s")
        self._failures, self._down_since = 0, None

    def _failed(self, failure: Failure) -> None:
        now = time.monotonic()
        self._failures += failure.outage
        self._hold_until = max(self._hold_until, now + min(failure.retry_after_s, self.limits.pause_s))
        self._down_since = self._down_since or (now if failure.outage else None)
        if failure.outage and self._failures == self.limits.breaker_failures:
            self.say(
                f"the judge at {self.url} fails ({failure.reason}); waiting for it, up to {self.limits.pause_s:.0f} s. "
                "Nothing is scored 0 for it"
            )

    async def _send(self, http: httpx.AsyncClient, path: str, payload: Json, read: Read) -> Verdict:
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                async with http.stream("POST", self.url + path, json=payload) as response:
                    if response.status_code != 200:
                        raise _refusal(response)
                    body = bytearray()
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        if len(body) > MAX_BODY:
                            raise Failure("too_large")
        except TimeoutError as error:
            raise Failure("timeout") from error
        except httpx.HTTPError as error:
            raise Failure("unreachable" if isinstance(error, httpx.ConnectError) else "cut_off") from error
        try:
            data: Json = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Failure("bad_json") from error
        try:
            return read(data)
        except Unclear as error:
            raise Failure("unclear", outage=False) from error
        except ValueError as error:
            raise Failure("wrong_schema") from error


def _refusal(response: httpx.Response) -> Failure:
    """429 and 5xx pass; any other status will be the same next time. 400-like ones may be one request's own fault."""
    status = response.status_code
    again = status in (408, 409, 425, 429) or status >= 500
    wait = _retry_after(response.headers.get("retry-after", "").strip()) if again else 0.0
    return Failure(f"http_{status}", again, again or status in (401, 403, 404), wait)


def _retry_after(text: str) -> float:
    """Seconds, of a header that gives seconds or a date; 0 for one in the past and for nonsense."""
    if text.isdecimal() and len(text) < 8:
        return float(text)
    with suppress(ValueError, OverflowError):
        when = parsedate_to_datetime(text)
        return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return 0.0
