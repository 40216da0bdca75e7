"""Weights from the trainer to SGLang servers, each sync checked: version echoed, numbers read back.

Four ways. `disk`: one safetensors folder, written whole and then renamed, that every server loads; for any host that
shares the folder. `tensor`: a flat buffer a bucket in shared memory (of the GPU, where the policy is on one), of which
servers on this host get the handle. `distributed`: the buffer is broadcast to all servers at once (`broadcast.py`). Fp32
weights for servers that hold bf16 or fp16 are cast as they are packed. These three pause the servers between two tokens;
what `packed_bytes` of memory hold is packed before that, the rest while the bucket before is under way. `adapter`: only the
LoRA adapter; a server holds the frozen base, loads each version as an adapter of the tag's name beside the one before, and
never stops. Any way old keys and values are not read again, since the cache is salted by the version's tag.

A server that fails at any point is drained, so that it gets no prompt while its weights are in doubt; `catch_up` loads the
current version from disk, for it as for one that was restarted. One sync is under way at a time.

Limits: SGLang shows its weights for the Llama family alone, and no adapter. Of an adapter, 0.5.17 is told the checksum of each
tensor, and loads no other. For all else the version is checked here, the numbers only by the mismatch between the server's
log-probs and the trainer's, which every step's row has (`rollout_kl_k3`).
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Literal

import torch
import torch.multiprocessing
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from omni_fast.checkpoint import published
from omni_fast.errors import UserError
from omni_fast.policy.adapter import save_adapter
from omni_fast.rollout.fleet import ASK_S, OLDEST, Fleet, Json, Server, ServerError, member
from omni_fast.sync import adapter
from omni_fast.sync.broadcast import BroadcastGroup, GroupLost
from omni_fast.sync.plan import BUCKET_BYTES, Bucket, checksum, make_plan, tensors

Transport = Literal["disk", "tensor", "distributed", "adapter"]
PACKED_BYTES = 2 << 30  # of weights that wait for the servers, where the policy is
KEPT = 3  # adapters on a server: the current one, and earlier ones that requests may still be under way with
ROWS = 16  # of a tensor that are read back in a run
CASTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16}  # SGLang's --dtype
HELD_AS = (torch.float32, torch.bfloat16, torch.float16)  # what a server may have rounded to


class WeightSync:
    """The policy's weights on all servers of a fleet; implements `rollout.sglang.Weights`."""

    def __init__(
        self,
        fleet: Fleet,
        model: PreTrainedModel,
        folder: Path,
        *,
        transport: Transport = "disk",
        compared: int | None = 2,
        load_s: float = 300.0,
        broadcast_s: float = 60.0,
        bucket_bytes: int = BUCKET_BYTES,
        packed_bytes: int = PACKED_BYTES,
    ) -> None:
        """folder: made here, for weights on disk; all servers must see it under this path.

        compared: how many tensors are read back after a sync, others each time; None: all of them, whole.
        load_s: limit on one load. broadcast_s: on joining a group, and on the broadcast of one bucket. packed_bytes: bound
        on the memory of packed buckets, of which there are at least two. Raises UserError where a transport does not
        reach a server.
        """
        far = [server.url for server in fleet.servers if not server.here]
        if transport == "tensor" and far:
            raise UserError(
                f"engine.sync 'tensor' shares memory and {far[0]} is not on this host: set it to 'disk' and put the run "
                "folder where all hosts see it"
            )
        if transport == "tensor":
            # By name: a file descriptor cannot be passed to a process that is no child of this one.
            torch.multiprocessing.set_sharing_strategy("file_system")
        self.fleet, self.model, self.folder = fleet, model, folder.absolute()
        self.transport, self.compared, self.load_s, self.broadcast_s = transport, compared, load_s, broadcast_s
        self.bucket_bytes, self.packed_bytes = bucket_bytes, packed_bytes
        self.run = uuid.uuid4().hex[:8]  # no other trainer, and no earlier process of this run, has these tags
        self.tag = f"{self.run}.none"
        self._memory: dict[int, Tensor] = {}  # for packed buckets, by number
        self._group: BroadcastGroup | None = None
        self._adapters: dict[str, list[str]] = {}  # of each server, oldest first
        shown = () if transport == "adapter" else None  # beside an adapter the base alone, which does not change
        self._readable = deque(name for name, _ in tensors(model, shown) if _readable(model, name))  # the next first

    @cached_property
    def plan(self) -> list[Bucket]:
        """Made at the first sync, when all servers have said what they hold: fp32 is cast if that is one other dtype."""
        held = {server.dtype for server in self.fleet.servers if server.known}
        dtype = CASTS.get(held.pop()) if len(held) == 1 else None
        return make_plan(self.model, self.bucket_bytes, dtype)

    def close(self) -> None:
        """While the fleet still runs. Servers keep none of the adapters."""
        self._end_group()
        self.fleet.each(self.fleet.ready, lambda server: self._unload(server, 0, ASK_S)).result()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- before the first step ---------------------------------------------------------------------------------------

    def check(self, server: Server) -> None:
        """Compare architecture, vocabulary, layers and widths with the policy's, without changing anything.

        Raises UserError where they differ, ServerError where the server does not answer.
        """
        if difference := self.fleet.run(self._difference(server)):
            raise UserError(
                f"the engine server {server.url} has another model: it has {difference}. Start it with the policy's model "
                "folder, or correct engine.urls"
            )

    async def _difference(self, server: Server) -> str:
        """The first that is found, in words; empty where there is none."""
        config, own = self.model.config, type(self.model).__name__
        kinds = member(await self.fleet.ask(server, "/model_info"), "architectures")
        if isinstance(kinds, list) and own not in kinds:
            return f"architecture {', '.join(map(str, kinds))}, the policy {own}"
        if (size := await self._vocabulary(server)) not in (config.vocab_size, None):
            return f"a vocabulary of {size}, the policy one of {config.vocab_size}"
        shapes = {name: list(value.shape) for name, value in tensors(self.model)}
        layers = config.num_hidden_layers
        server.shows_weights = await self._rows(server, next(iter(shapes)), 1) is not None
        if not server.shows_weights:
            self.fleet.say(f"{server.url} does not show its weights ({own}): they are checked by log-probs alone")
            count = await self._layers(server)
            return "" if count in (layers, None) else f"{count} layers, the policy {layers}"
        last = [name for name in shapes if f".layers.{layers - 1}." in name]
        for name in [*(name for name in shapes if ".layers." not in name), *last]:
            rows = await self._rows(server, name, 1)
            if rows is None or list(rows.shape[1:]) != shapes[name][1:]:
                has = "no" if rows is None else f"rows of {list(rows.shape[1:])} in"
                return f"{has} {name}, the policy one of {shapes[name]}"
        deeper = last[0].replace(f".layers.{layers - 1}.", f".layers.{layers}.")
        shown = await self._rows(server, deeper, 1)
        return "" if shown is None else f"a layer {layers}, the policy {layers} layers"

    async def _vocabulary(self, server: Server) -> int | None:
        """A server names the valid range when it refuses a token; None where it does not, or words it otherwise."""
        draw: Json = {"max_new_tokens": 1}
        ask: Json = {"input_ids": [0], "sampling_params": draw, "return_logprob": True, "token_ids_logprob": [1 << 30]}
        try:
            await self.fleet.ask(server, "/generate", ask)
        except ServerError as error:
            if error.status != 400:
                raise
            found = re.search(r"valid range is \[0, (\d+)\)", error.reason)
            return int(found[1]) if found else None
        return None

    async def _layers(self, server: Server) -> int | None:
        """By the names in a server's own checksums; None where it makes none."""
        try:
            told = await self.fleet.ask(server, "/weights_checker", {"action": "checksum"}, self.load_s)
        except ServerError as error:
            if error.status not in (400, 404):
                raise
            return None
        return len({*re.findall(r"\.layers\.(\d+)\.", json.dumps(told))}) or None

    async def _rows(self, server: Server, name: str, count: int) -> Tensor | None:
        """The first rows of a server's tensor in fp32; None where it has no such tensor. Raises ServerError."""
        ask: Json = {"name": name, "truncate_size": count}
        try:
            data = await self.fleet.ask(server, "/get_weights_by_name", ask, self.load_s)
        except ServerError as error:
            if error.status == 400:
                return None
            raise
        try:
            return torch.tensor(data, dtype=torch.float32) if isinstance(data, list) else None
        except (TypeError, ValueError) as error:
            raise ServerError(server.url, "/get_weights_by_name", f"shows no numbers of {name}") from error

    # -- one sync ----------------------------------------------------------------------------------------------------

    def push(self, version: int) -> dict[str, float]:
        """The current weights to all ready servers as `version`; those that fail are drained.

        Returns seconds: pack, load, verify, paused (servers stood still), pack_paused (of that, waited for what
        `packed_bytes` had not let be packed before), total.
        """
        self.tag = f"{self.run}.{version}"
        clock = dict.fromkeys(("pack", "load", "verify", "paused", "pack_paused", "total"), 0.0)
        with _timed(clock, "total"):
            if self.transport in ("disk", "adapter"):
                self._push_folder(clock)
            else:
                self._push_buckets(clock)
            with _timed(clock, "verify"):
                own = self._sample()
                self._on_ready(lambda server: self._check_numbers(server, own))
        return clock

    def catch_up(self, server: Server) -> None:
        """The current version from disk to one server that is not ready. Raises ServerError.

        It is paused for that: it would first end all that it works on, which is not taken any more.
        """
        if self._group is not None and server in self._group.servers:  # if it was restarted, it knows no group
            self._end_group()
        self._write()
        for work in (
            (self._pause, self._load_folder, self._go_on) if self.transport != "adapter" else (self._load_adapter,)
        ):
            self.fleet.run(work(server))
        self.fleet.run(self._check_numbers(server, self._sample()))

    @contextmanager
    def _standing_still(self, clock: dict[str, float]) -> Iterator[None]:
        """All ready servers stop between two tokens, and go on afterwards."""
        with _timed(clock, "paused"):
            self._on_ready(self._pause)
            try:
                yield
            finally:
                self._on_ready(self._go_on)

    async def _pause(self, server: Server) -> Json:
        return await self.fleet.ask(server, "/pause_generation", {"mode": "in_place"})

    async def _go_on(self, server: Server) -> Json:
        return await self.fleet.ask(server, "/continue_generation", {})

    def _on_ready(self, work: Callable[[Server], Awaitable[Json]]) -> None:
        for server, result in self.fleet.each(self.fleet.ready, work).result():
            if isinstance(result, ServerError):
                self.fleet.drain(server, f"weight sync: {result.path} {result.reason}")

    # -- disk --------------------------------------------------------------------------------------------------------

    def _push_folder(self, clock: dict[str, float]) -> None:
        with _timed(clock, "pack"):
            self._write()
        still = nullcontext() if self.transport == "adapter" else self._standing_still(clock)
        with still, _timed(clock, "load"):
            self._on_ready(self._load_folder)

    async def _load_folder(self, server: Server) -> Json:
        if self.transport == "adapter":
            return await self._load_adapter(server)
        body: Json = {
            "model_path": str(self._folder), "load_format": "auto",  # whatever the server was started with
            "weight_version": self.tag, "flush_cache": False,
        }  # fmt: skip
        return await self.fleet.ask(server, "/update_weights_from_disk", body, self.load_s)

    async def _load_adapter(self, server: Server) -> Json:
        """The version beside those before it, then the oldest away, which its requests may hold up."""
        path, body = adapter.request(self._folder, self.tag, server)
        try:
            await self.fleet.ask(server, path, body, self.load_s)
        except ServerError as error:
            if "already loaded" not in error.reason:
                raise
        loaded = self._adapters.setdefault(server.url, [])
        if self.tag not in loaded:
            loaded.append(self.tag)
        named: Json = {"new_version": self.tag, "abort_all_requests": False}
        await self.fleet.ask(server, "/update_weight_version", named)
        return await self._unload(server, KEPT, self.load_s)

    async def _unload(self, server: Server, kept: int, limit_s: float) -> Json:
        loaded = self._adapters.get(server.url, [])
        while len(loaded) > kept:
            try:
                await self.fleet.ask(server, "/unload_lora_adapter", {"lora_name": loaded.pop(0)}, limit_s)
            except ServerError as error:
                if error.status != 400:  # it was started again and knows none of them
                    raise
        return None

    @property
    def _folder(self) -> Path:
        return self.folder / self.tag

    def _write(self) -> None:
        """The current weights as a folder of the tag's name, unless it is there; older ones go."""
        if self._folder.is_dir():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with published(self._folder) as work:
            if self.transport == "adapter":
                save_adapter(self.model, work)
            else:
                self.model.config.save_pretrained(work)
                kinds = {entry.name: entry.dtype for bucket in self.plan for entry in bucket.entries}
                values = {name: value.to("cpu", kinds[name]).contiguous() for name, value in tensors(self.model)}
                save_file(values, work / "model.safetensors", {"format": "pt"})

    # -- buckets -----------------------------------------------------------------------------------------------------

    def _push_buckets(self, clock: dict[str, float]) -> None:
        """Bucket after bucket to all servers; those that find no room before the pause are packed as others are loaded.

        When the group of a broadcast is lost, those that did not answer are drained and the others load from disk.
        """
        try:
            self._join()
        except GroupLost as error:
            self._lose(error)
            return self._push_folder(clock)
        count, ahead = len(self.plan), len(self._sizes)
        with ThreadPoolExecutor(1) as packer:
            with _timed(clock, "pack"):
                packed = deque(self._packed(number) for number in range(ahead))
            with self._standing_still(clock):
                self._on_ready(lambda server: self._bracket(server, "/begin_weight_update"))
                try:
                    for number in range(count):
                        next_ = number - 1 + ahead  # into the memory of the bucket that was loaded before this one
                        late = packer.submit(self._packed, next_) if ahead <= next_ < count else None
                        with _timed(clock, "load"):
                            self._load_bucket(number, packed.popleft())
                        if late is not None:
                            with _timed(clock, "pack_paused"):
                                packed.append(late.result())
                    lost = False
                except GroupLost as error:
                    lost = True
                    self._lose(error)
                self._on_ready(lambda server: self._bracket(server, "/end_weight_update"))
                if lost:
                    with _timed(clock, "load"):
                        self._write()
                        self._on_ready(self._load_folder)

    def _load_bucket(self, number: int, flat: Tensor) -> None:
        bucket = self.plan[number]
        last: dict[str, Json] = {"weight_version": self.tag} if bucket is self.plan[-1] else {}
        ask: dict[str, Json] = {"flush_cache": False} | last
        self._join()  # anew, where a server has gone since
        if self._group is not None:
            return self._group.broadcast(bucket, flat, ask)
        views = bucket.views(flat)

        async def load(server: Server) -> Json:
            handles: list[Json] = [_handle(views) for _ in range(server.tensor_parallel)]
            body: Json = ask | {"serialized_named_tensors": handles}
            return await self.fleet.ask(server, "/update_weights_from_tensor", body, self.load_s)

        self._on_ready(load)

    def _join(self) -> None:
        """One group with all ready servers, where weights are broadcast. Raises GroupLost."""
        if self.transport == "distributed" and (self._group is None or self._group.servers != self.fleet.ready):
            self._end_group()
            if self.fleet.ready:
                self._group = BroadcastGroup(self.fleet, self.fleet.ready, self.model.device, self.broadcast_s)

    @cached_property
    def _sizes(self) -> list[int]:
        """In bytes, of the memories that buckets are packed into, bucket k into number k modulo their number: so many that
        `packed_bytes` hold them, and two at least."""
        own = [bucket.size for bucket in self.plan]
        ways = ([max(own[slot::number]) for slot in range(number)] for number in range(len(own), 0, -1))
        return next(sizes for sizes in ways if len(sizes) <= 2 or sum(sizes) <= self.packed_bytes)

    @torch.no_grad()
    def _packed(self, number: int) -> Tensor:
        """The bucket's numbers in one flat buffer, cast as they are copied; in memory that the transport can pass on."""
        bucket = self.plan[number]
        flat = self._buffer(number)[: bucket.size].view(bucket.dtype)
        values = dict(tensors(self.model, {entry.name for entry in bucket.entries}))
        for name, view in bucket.views(flat):
            view.copy_(values[name])
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # readers have streams of their own
        return flat

    def _buffer(self, number: int) -> Tensor:
        """Memory that is kept from sync to sync. But that of a GPU is training's between two syncs, and a reader of another
        process may still copy out of it when it has answered: torch does not use it again before the reader lets go."""
        device, slot = self.model.device, number % len(self._sizes)
        if device.type == "cuda":
            return torch.empty(self.plan[number].size, dtype=torch.uint8, device=device)
        if slot not in self._memory:
            made = torch.empty(self._sizes[slot], dtype=torch.uint8)
            self._memory[slot] = made.share_memory_() if self.transport == "tensor" else made
        return self._memory[slot]

    def _lose(self, lost: GroupLost) -> None:
        self._end_group()
        self.fleet.say(
            f"the broadcast of the weights was given up ({lost}); the servers that are left load them from disk"
        )
        for server, error in lost.failed:
            self.fleet.drain(server, f"weight sync: {error.path} {error.reason}")

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    async def _bracket(self, server: Server, path: str) -> Json:
        """Around the buckets, where the server has brackets and so needs them. One that a dead trainer left open is closed."""
        if server.version > OLDEST:
            try:
                return await self.fleet.ask(server, path, {}, self.load_s)
            except ServerError as error:
                if "already open" in error.reason:
                    await self.fleet.ask(server, "/end_weight_update", {}, self.load_s)
                    return await self.fleet.ask(server, path, {}, self.load_s)
                if error.status != 404:
                    raise
        return None

    # -- proof -------------------------------------------------------------------------------------------------------

    def _sample(self) -> dict[str, Tensor]:
        """The policy's weights to compare with what a server shows this time."""
        names = {*islice(self._readable, self.compared)}
        self._readable.rotate(-len(names))
        return dict(tensors(self.model, names))

    async def _check_numbers(self, server: Server, own: Mapping[str, Tensor]) -> Json:
        """Raises ServerError unless the server says the version and shows the numbers that were sent."""
        held = member(await self.fleet.ask(server, "/model_info"), "weight_version")
        if held != self.tag:
            raise ServerError(server.url, "/model_info", f"holds weights {held!r} instead of {self.tag!r}")
        for name, value in own.items() if server.shows_weights else ():
            count = ROWS if self.compared is not None else 1 << 40
            rows = await self._rows(server, name, count)
            if rows is None or len(rows) < min(count, len(value)):
                raise ServerError(server.url, "/get_weights_by_name", f"has no {name}, or not all of it")
            sent = value[: len(rows)].cpu()
            if checksum(rows) not in {checksum(sent.to(dtype).float()) for dtype in (sent.dtype, *HELD_AS)}:
                raise ServerError(server.url, "/get_weights_by_name", f"{name} is not what was sent")
        server.proven = self.tag
        return None


def _readable(model: PreTrainedModel, name: str) -> bool:
    """SGLang cuts its fused q/k/v by hidden size over heads, which is wrong for a model with another head size."""
    config = model.config
    plain = (getattr(config, "head_dim", None) or 0) in (0, config.hidden_size // config.num_attention_heads)
    return plain or not re.search(r"\.[qkv]_proj\.", name)


def _handle(views: list[tuple[str, Tensor]]) -> str:
    """What one reader needs to map the views: each opening takes one reference, so every reader gets its own."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(views)
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def _timed(clock: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        clock[phase] += time.perf_counter() - start
