"""A real HTTP server with the wire contract of SGLang (0.5.17, or 0.5.21 with brackets) and faults on demand; not a test
module.

It holds tensors, takes them from disk, from shared memory or by broadcast in a real gloo group, shows them, counts their versions, and answers prompts with
tokens and log-probs that follow from the prompt, the sample's number and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import Backend, PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed.distributed_c10d import BackendConfig

Fault = Callable[["Handler", dict], bool]  # handler and request JSON; True: the fault has answered (or cut) itself


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeSGLang

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: dict) -> None:
        fake = self.server
        works = self.path == "/generate"
        with fake.lock:
            fake.asked.append((self.path, body))
            fake.working += works
        try:
            if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                return self.reply(401, {"error": "Unauthorized"})
            for path, fault in list(fake.faults):
                if path == self.path and fault(self, body):
                    return None
            status, answer = getattr(fake, self.path.strip("/").replace("/", "_"), fake.missing)(body)
            self.reply(status, answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with fake.lock:
                fake.working -= works

    def reply(self, status: int, answer: object, cut: int | None = None) -> None:
        """cut: send only so many bytes of the body, then close."""
        data = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.cut()

    def cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        pass


class FakeSGLang(ThreadingHTTPServer):
    """weights: what it starts with, by checkpoint name. Its methods are its paths: request JSON -> status, answer."""

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True

    def __init__(
        self,
        weights: dict[str, Tensor],
        *,
        version: str = "0.5.17",
        vocabulary: int = 640,
        architecture: str = "LlamaForCausalLM",
        key: str = "",
        port: int = 0,
        dtype: str = "auto",
        lora_rank: int = 0,
    ) -> None:
        self.weights = {name: value.clone() for name, value in weights.items()}
        self.version, self.vocabulary, self.architecture, self.key = version, vocabulary, architecture, key
        self.weight_version = "default"
        self.dtype, self.lora_rank = dtype, lora_rank
        self.adapters: dict[str, dict[str, Tensor]] = {}
        self.groups: dict[str, ProcessGroupGloo] = {}
        self.paused = self.session = False
        self.working = 0  # prompts
        self.asleep: set[str] = set()
        self.faults: list[tuple[str, Fault]] = []
        self.asked: list[tuple[str, dict]] = []
        self.lock = threading.Lock()
        self.sockets: list[socket.socket] = []
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self, path: str) -> list[dict]:
        return [body for asked, body in self.asked if asked == path]

    # -- the contract ------------------------------------------------------------------------------------------------

    def missing(self, body: dict) -> tuple[int, object]:
        return 404, {"detail": "Not Found"}

    def health(self, body: dict) -> tuple[int, object]:
        """By generating a token."""
        assert not self.asleep, "asked for health while asleep"
        return 200 if self._goes_on() else 503, None

    def _goes_on(self) -> bool:
        """Waits while it is paused, as a prompt does."""
        until = time.monotonic() + 20
        while self.paused and time.monotonic() < until:
            time.sleep(0.01)
        return not self.paused

    def model_info(self, body: dict) -> tuple[int, object]:
        return 200, {"weight_version": self.weight_version, "architectures": [self.architecture]}

    def server_info(self, body: dict) -> tuple[int, object]:
        return 200, {"version": self.version, "tp_size": 1, "dp_size": 1, "dtype": self.dtype}

    def pause_generation(self, body: dict) -> tuple[int, object]:
        self.paused = True
        return 200, {"message": "Generation paused successfully."}

    def continue_generation(self, body: dict) -> tuple[int, object]:
        self.paused = False
        return 200, {"message": "Generation continued successfully."}

    def begin_weight_update(self, body: dict) -> tuple[int, object]:
        return self._bracket(True, "begin_weight_update: a weight-update session is already open")

    def end_weight_update(self, body: dict) -> tuple[int, object]:
        return self._bracket(False, "end_weight_update called without begin_weight_update")

    def _bracket(self, begins: bool, refusal: str) -> tuple[int, object]:
        if not self.has_brackets:
            return self.missing({})
        if self.session == begins:
            return 400, {"success": False, "message": refusal}
        self.session = begins
        return 200, {"success": True, "message": ""}

    @property
    def has_brackets(self) -> bool:
        return self.version >= "0.5.21"

    def update_weights_from_disk(self, body: dict) -> tuple[int, object]:
        return self._take(load_file(Path(body["model_path"]) / "model.safetensors"), body)

    def update_weights_from_tensor(self, body: dict) -> tuple[int, object]:
        if self.has_brackets and not self.session:
            message = "must run between begin_weight_update() and end_weight_update()"
            return 400, {"success": False, "message": message}
        pairs = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
        return self._take({name: value.clone() for name, value in pairs}, body)

    def init_weights_update_group(self, body: dict) -> tuple[int, object]:
        """As torch's helper does in a process of its own; here several members live in one."""
        name, limit = body["group_name"], timedelta(seconds=20)
        device = next(iter(BackendConfig(Backend(body["backend"])).get_device_backend_map()))
        try:
            store = TCPStore(body["master_address"], body["master_port"], body["world_size"], False, timeout=limit)
            store = PrefixStore(f"{device}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
            group = ProcessGroupGloo(store, body["rank_offset"], body["world_size"], limit)
            group._set_sequence_number_for_group()
        except RuntimeError as error:
            return 400, {"success": False, "message": f"Failed to initialize custom process group: {error}."}
        self.groups[name] = group
        return 200, {"success": True, "message": "Succeeded to initialize custom process group."}

    def destroy_weights_update_group(self, body: dict) -> tuple[int, object]:
        known = self.groups.pop(body["group_name"], None) is not None
        return (200 if known else 400), {"success": known, "message": ""}

    def update_weights_from_distributed(self, body: dict) -> tuple[int, object]:
        if self.has_brackets and not self.session:
            message = "must run between begin_weight_update() and end_weight_update()"
            return 400, {"success": False, "message": message}
        assert body["load_format"] == "flattened_bucket"
        kinds = [getattr(torch, dtype) for dtype in body["dtypes"]]
        sizes = [torch.Size(shape).numel() * kind.itemsize for kind, shape in zip(kinds, body["shapes"], strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        try:
            self.groups[body["group_name"]].broadcast(flat, 0).wait()
        except RuntimeError as error:
            return 400, {"success": False, "message": f"Failed to update parameter online: {error}"}
        parts = [
            part.view(kind).view(shape)
            for part, kind, shape in zip(flat.split(sizes), kinds, body["shapes"], strict=True)
        ]
        return self._take(dict(zip(body["names"], parts, strict=True)), body)

    def release_memory_occupation(self, body: dict) -> tuple[int, object]:
        self.asleep |= set(body["tags"])
        if "weights" in body["tags"]:
            self.weights = {name: torch.full_like(value, torch.nan) for name, value in self.weights.items()}
        return 200, None

    def resume_memory_occupation(self, body: dict) -> tuple[int, object]:
        assert set(body["tags"]) <= self.asleep, "resumed what was not asleep"
        self.asleep -= set(body["tags"])
        return 200, None

    def load_lora_adapter(self, body: dict) -> tuple[int, object]:
        folder = Path(body["lora_path"])
        status, answer = self._fits(body["lora_name"], json.loads((folder / "adapter_config.json").read_text())["r"])
        if status == 200:
            self.adapters[body["lora_name"]] = load_file(folder / "adapter_model.safetensors")
        return status, answer

    def _fits(self, name: str, rank: int) -> tuple[int, object]:
        if not self.lora_rank:
            return 400, {"success": False, "error_message": "LoRA is not enabled. Please set `--enable-lora`."}
        if name in self.adapters:
            return 400, {"success": False, "error_message": "Failed to load LoRA adapter: it is already loaded"}
        if rank > self.lora_rank:
            return 400, {"success": False, "error_message": "rank is not within the configured `--max-lora-rank`"}
        return 200, {"success": True, "error_message": None, "loaded_adapters": {}}

    def load_lora_adapter_from_tensors(self, body: dict) -> tuple[int, object]:
        values = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
        sums = {
            name: hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
            for name, value in values.items()
        }
        if sums != body["expected_checksums"]:
            raise BrokenPipeError("here SGLang dies")
        status, answer = self._fits(body["lora_name"], body["config_dict"]["r"])
        if status == 200:
            self.adapters[body["lora_name"]] = values
        return status, answer

    def unload_lora_adapter(self, body: dict) -> tuple[int, object]:
        known = self.adapters.pop(body["lora_name"], None) is not None
        return (200 if known else 400), {"success": known, "error_message": None}

    def update_weight_version(self, body: dict) -> tuple[int, object]:
        self.weight_version = body["new_version"]
        return 200, {"success": True, "message": f"Weight version updated to {self.weight_version}"}

    def _take(self, values: dict[str, Tensor], body: dict) -> tuple[int, object]:
        """One that is not paused first ends what it works on."""
        assert body["flush_cache"] is False
        while self.working and not self.paused:
            time.sleep(0.01)
        for name, value in values.items():
            if name not in self.weights or self.weights[name].shape != value.shape:
                return 400, {"success": False, "message": f"Failed to update weights: {name}"}
        assert "weights" not in self.asleep, "loaded into memory that was given back"
        self.weights |= values
        self.weight_version = body.get("weight_version", self.weight_version)
        return 200, {"success": True, "message": "Succeeded to update model weights."}

    def get_weights_by_name(self, body: dict) -> tuple[int, object]:
        if body["name"] not in self.weights or self.architecture != "LlamaForCausalLM":
            return 400, {"error": {"message": "Get parameter by name failed"}}
        return 200, self.weights[body["name"]].float()[: body["truncate_size"]].tolist()

    def weights_checker(self, body: dict) -> tuple[int, object]:
        assert body == {"action": "checksum"}
        return 200, {"success": True, "ranks": [{"checksums": dict.fromkeys(self.weights, "5eed")}]}

    def generate(self, body: dict) -> tuple[int, object]:
        if any(token >= self.vocabulary for token in body.get("token_ids_logprob", [])):
            message = f"token_ids_logprob contains out-of-vocabulary token id; valid range is [0, {self.vocabulary})."
            return 400, {"error": {"message": message}}
        assert self._goes_on() and not self.asleep, "a prompt while paused for long, or asleep"
        if (name := body.get("lora_path")) is not None and name not in self.adapters:
            return 400, {"error": {"message": f"Got LoRA adapter that has never been loaded: {name}"}}
        draw = body["sampling_params"]
        if isinstance(body["input_ids"][0], list):
            return 200, [sample(one, k, draw, self.weight_version) for k, one in enumerate(body["input_ids"])]
        rows = [sample(body["input_ids"], k, draw, self.weight_version) for k in range(draw.get("n", 1))]
        return 200, rows if len(rows) > 1 else rows[0]

    # -- life --------------------------------------------------------------------------------------------------------

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

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        self.groups.clear()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        kind = sys.exc_info()[0]
        if kind is not None and issubclass(kind, AssertionError):
            super().handle_error(request, client_address)


def sample(prompt: list[int], number: int, draw: dict, weight_version: str) -> dict:
    """What the fake says: one completion as SGLang words it."""
    generator = random.Random(f"{prompt}:{number}")
    count = draw["max_new_tokens"]
    tokens = [generator.randrange(3, 256) for _ in range(count)]
    pairs = [[-generator.random() * 3, token, None] for token in tokens]
    stops = draw.get("stop_token_ids", [])
    finish: dict = {"type": "length", "length": count}
    if stops and generator.random() < 0.5:
        end = generator.randrange(count)
        tokens, pairs = [*tokens[:end], stops[0]], [*pairs[:end], [-0.5, stops[0], None]]
        finish = {"type": "stop", "matched": stops[0]}
    meta = {"id": "x", "finish_reason": finish, "prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
    meta |= {"weight_version": weight_version, "output_token_logprobs": pairs}
    return {"text": "", "output_ids": tokens, "meta_info": meta}


# -- faults: each says whether it answered ----------------------------------------------------------------------------


def times(count: int, fault: Fault) -> Fault:
    """Only the first `count` requests."""
    left = [count]

    def limited(handler: Handler, body: dict) -> bool:
        with handler.server.lock:
            left[0] -= 1
            on = left[0] >= 0
        return on and fault(handler, body)

    return limited


def status(code: int) -> Fault:
    def refuse(handler: Handler, body: dict) -> bool:
        handler.reply(code, {"error": {"message": f"on demand {code}"}})
        return True

    return refuse


def silent(handler: Handler, body: dict) -> bool:
    time.sleep(1.5)
    handler.cut()
    return True


def cut(handler: Handler, body: dict) -> bool:
    handler.cut()
    return True


def half(handler: Handler, body: dict) -> bool:
    _, answer = handler.server.generate(body)
    data = json.dumps(answer).encode()
    handler.reply(200, data, cut=len(data) // 2)
    return True


def saying(text: bytes, cut: int | None = None, status: int = 200) -> Fault:
    def answer(handler: Handler, body: dict) -> bool:
        handler.reply(status, text, cut)
        return True

    return answer


def slow(seconds: float) -> Fault:
    def wait(handler: Handler, body: dict) -> bool:
        time.sleep(seconds)
        return False

    return wait


def edited(change: Callable[[dict], None]) -> Fault:
    """Answers /generate with every sample changed."""

    def answer(handler: Handler, body: dict) -> bool:
        status, rows = handler.server.generate(body)
        assert isinstance(rows, list)
        for row in rows:
            change(row)
        handler.reply(status, rows)
        return True

    return answer


@contextmanager
def serving(*fakes: FakeSGLang) -> Iterator[None]:
    for fake in fakes:
        fake.start()
    try:
        yield
    finally:
        for fake in fakes:
            fake.kill()


def random_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """As a server that was started with other weights of the same shapes holds them."""
    return {name: torch.randn_like(value) for name, value in model.named_parameters()}
