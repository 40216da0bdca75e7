"""A real HTTP server that speaks the judge protocol as a test tells it to; not a test module."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Behaviour = Callable[["Handler", dict, int], None]  # handler, request JSON, number of the request from 1


def sides(payload: dict) -> tuple[str, str]:
    """Replies A and B as the judge sees them, found by the marks."""
    content = payload["messages"][-1]["content"]
    mark = re.search(r"between the marks (\w+)", content)[1]
    quoted = re.findall(rf"<{mark}>\n(.*?)\n</{mark}>", content, re.DOTALL)
    assert len(quoted) == 3
    return quoted[1], quoted[2]


def honest(payload: dict) -> str:
    """Prefers the side with more different letters: arbitrary, and the same in both orders."""
    a, b = (len(set(text)) for text in sides(payload))
    return "A" if a > b else "B" if b > a else "tie"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.count += 1
            number = self.server.count
            self.server.requests.append(body)
        try:
            self.server.behave(self, body, number)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def verdict(self, text: str) -> None:
        self.reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())

    def honest(self, payload: dict) -> None:
        self.verdict(json.dumps({"verdict": honest(payload)}))

    def log_message(self, *args: object) -> None:
        pass


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, behave: Behaviour, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.behave = behave
        self.lock = threading.Lock()
        self.count = 0
        self.requests: list[dict] = []
        self.sockets: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        self.sockets.append(connection)
        return connection, address

    def server_close(self) -> None:
        """Dies for good: connections that are kept alive are cut too."""
        super().server_close()
        for connection in self.sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def serving(behave: Behaviour, port: int = 0) -> Iterator[JudgeServer]:
    server = JudgeServer(behave, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
