"""HTTP/1.1 requests over connections that are kept, inside an asyncio loop: as little as JSON to a model server needs.

A general client costs more than the answers it carries: httpx several times what this takes with all that is read out of 8
samples (benchmarks/bench_client.py). Spoken: GET and POST, http and https, bodies by length, in chunks, or up to the end of the
connection. Not spoken: redirects, proxies, compression, cookies. Nothing is ever sent twice: whoever asks decides. So a
connection that the server may be closing just now is not used again.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

LINE = 1 << 16  # bytes of the answer's head, at most
IDLE_S = 2.0  # a connection that nobody used for longer is closed; SGLang's server does it after 5
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Broken(Exception):
    """No whole answer came; `connected` says whether anything listened."""

    def __init__(self, reason: str, connected: bool = True) -> None:
        super().__init__(reason)
        self.connected = connected


class Connections:
    """Idle connections by origin, most recent first. headers: of every request."""

    def __init__(self, headers: dict[str, str]) -> None:
        self._lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._idle: dict[str, list[tuple[float, Streams]]] = defaultdict(list)  # since when

    async def send(self, url: str, body: bytes | None = None) -> tuple[int, bytes]:
        """POST where there is a body, else GET: status and body of the answer. Raises Broken. Bound its time outside."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        size = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body is not None else ""
        head = f"{'GET' if body is None else 'POST'} {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n{self._lines}{size}\r\n"
        message = head.encode("latin-1") + (body or b"")
        streams = self._take(origin) or await self._open(parts)
        return await self._exchange(origin, streams, message)

    def _take(self, origin: str) -> Streams | None:
        """An idle connection that the server has not closed, and is not about to."""
        while self._idle[origin]:
            since, (reader, writer) = self._idle[origin].pop()
            if time.monotonic() - since < IDLE_S and not reader.at_eof():
                return reader, writer
            writer.close()
        return None

    async def _open(self, parts: SplitResult) -> Streams:
        secure = parts.scheme == "https"
        try:
            return await asyncio.open_connection(
                parts.hostname, parts.port or (443 if secure else 80), ssl=secure or None, limit=1 << 20
            )
        except OSError as error:
            raise Broken(error.strerror or str(error), connected=False) from error

    async def _exchange(self, origin: str, streams: Streams, message: bytes) -> tuple[int, bytes]:
        reader, writer = streams
        kept = False
        try:
            writer.write(message)
            status, headers = _parse(await reader.readuntil(b"\r\n\r\n"))
            body, kept = await _read_body(reader, status, headers)
            return status, body
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Broken("cut off") from error
        except (asyncio.LimitOverrunError, ValueError) as error:
            raise Broken("the answer is not HTTP") from error
        finally:
            if kept:
                self._idle[origin].append((time.monotonic(), streams))
            else:
                writer.close()

    def forget(self, url: str) -> None:
        """Close the idle connections to a server: one that died can have its port again the sooner."""
        parts = urlsplit(url)
        for _, (_, writer) in self._idle.pop(f"{parts.scheme}://{parts.netloc}", []):
            writer.close()

    async def close(self) -> None:
        for idle in self._idle.values():
            for _, (_, writer) in idle:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
        self._idle.clear()


def _parse(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    protocol, status, *_ = first.split(" ", 2)
    if not protocol.startswith("HTTP/1.") or len(status) != 3 or len(head) > LINE:
        raise ValueError(first)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if protocol == "HTTP/1.0":
        headers.setdefault("connection", "close")
    return int(status), headers


async def _read_body(reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> tuple[bytes, bool]:
    """The body, and whether the connection can be used again."""
    kept = headers.get("connection", "").lower() != "close"
    if status in (204, 304):
        return b"", kept
    if headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return b"".join(parts), kept
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"])), kept
    return await reader.read(), False
