"""One process group of the trainer (rank 0) and engine servers, over which weights are broadcast: gloo on CPU, NCCL on GPU.

SGLang's side is `init_custom_process_group`: a TCP store under the group's name, and torch's own helper below it. Both
sides must build it alike, which is why a private function of torch is called here. Every wait is bounded; a member that
dies or hangs ends the group for all, and whoever owns the weights brings them another way.

Limits: NCCL was written after its documentation and not run; a GPU can be in a NCCL group once, so trainer and servers
need GPUs of their own. It connects its members in the first broadcast, not in the join, without a limit of its own: a
thread that still waits there when ours is over is left behind, with its group. The store listens on all addresses of this
host for as long as the group lives.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from threading import Thread
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import Backend, PrefixStore, TCPStore, destroy_process_group
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

from omni_fast.rollout.fleet import Fleet, Json, Server, ServerError
from omni_fast.sync.plan import Bucket

ANSWER_S = 10.0  # for the answer of a member, after the group's own limit


class GroupLost(Exception):
    """The group cannot be used any more. `failed`: the members that did not answer, with what was wrong."""

    def __init__(self, reason: str, failed: Sequence[tuple[Server, ServerError]]) -> None:
        super().__init__(reason)
        self.failed = failed


class BroadcastGroup:
    """Joined by all `servers` when it is made; of no use after the first `GroupLost`."""

    def __init__(self, fleet: Fleet, servers: Sequence[Server], device: torch.device, limit_s: float) -> None:
        """limit_s: of joining, and of each broadcast. Raises GroupLost where a server does not join."""
        self.fleet, self.servers, self.limit_s = fleet, list(servers), limit_s
        self.name = f"omni-fast-{uuid.uuid4().hex[:8]}"
        backend = "nccl" if device.type == "cuda" else "gloo"
        size = 1 + sum(server.tensor_parallel for server in servers)
        address, limit = _address(servers), timedelta(seconds=limit_s)
        store = TCPStore(address, 0, size, is_master=True, wait_for_workers=False, timeout=limit)
        port, before = store.port, accumulate((server.tensor_parallel for server in servers), initial=1)
        ranks = dict(zip(servers, before, strict=False))

        async def join(server: Server) -> Json:
            ask: Json = {
                "master_address": address, "master_port": port, "rank_offset": ranks[server],
                "world_size": size, "group_name": self.name, "backend": backend,
            }  # fmt: skip
            return await fleet.ask(server, "/init_weights_update_group", ask, limit_s + ANSWER_S)

        joined = fleet.each(self.servers, join)
        try:
            with _errors_in_wait():
                self._group, _ = _new_process_group_helper(
                    size, 0, [], Backend(backend), PrefixStore(self.name, store),
                    group_name=self.name, timeout=limit,  # type: ignore[arg-type]
                )  # fmt: skip
            _world.pg_group_ranks[self._group] = {rank: rank for rank in range(size)}
            reason = ""
        except RuntimeError as error:
            reason = str(error)
        del store  # of a group that failed: those that wait for it give up now
        self._settle(joined.result(), reason)

    def broadcast(self, bucket: Bucket, flat: Tensor, ask: dict[str, Json]) -> None:
        """The packed bucket to all members, each asked by `/update_weights_from_distributed` to take it."""
        body: dict[str, Json] = {
            "names": [entry.name for entry in bucket.entries],
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.entries],
            "shapes": [list(entry.shape) for entry in bucket.entries],
            "group_name": self.name,
            "load_format": "flattened_bucket",
        }

        async def take(server: Server) -> Json:
            return await self.fleet.ask(server, "/update_weights_from_distributed", ask | body, self.limit_s + ANSWER_S)

        taken, sent, group = self.fleet.each(self.servers, take), Future[None](), self._group

        def send() -> None:
            try:
                group.broadcast(flat.view(torch.uint8), 0).wait()
                sent.set_result(None)
            except Exception as error:  # whoever waits gets it
                sent.set_exception(error)

        Thread(target=send, name="broadcast of weights", daemon=True).start()
        reason = ""
        try:
            sent.result(self.limit_s + ANSWER_S / 2)  # gloo has told by then
        except RuntimeError as error:
            reason = str(error)
            self._leave()  # those that wait for the rest of it give up now
        except TimeoutError:
            reason = f"{bucket.size >> 20} MiB were not sent within {self.limit_s:g} s"
            del self._group  # to end it would wait as well
        self._settle(taken.result(), reason)

    def close(self) -> None:
        """Ends the group on all members that still answer."""
        path = "/destroy_weights_update_group"
        self.fleet.each(self.servers, lambda one: self.fleet.ask(one, path, {"group_name": self.name})).result()
        self._leave()

    def _leave(self) -> None:
        if hasattr(self, "_group"):
            destroy_process_group(self._group)
            del self._group

    def _settle(self, results: Sequence[tuple[Server, Json | ServerError]], reason: str) -> None:
        errors = [(server, result) for server, result in results if isinstance(result, ServerError)]
        if errors or reason:
            self._leave()
            told = reason.split("\n")[0][:200] or str(errors[0][1])
            raise GroupLost(told, [(server, error) for server, error in errors if error.status != 400])


def _address(servers: Sequence[Server]) -> str:
    """This host's address as the servers reach it: the loopback, or the one that a route to a far server starts from."""
    for server in servers:
        if not server.here:
            parts = urlsplit(server.url)
            family, kind, *_, there = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:  # sends nothing
                probe.connect(there)
                return str(probe.getsockname()[0])
    return "127.0.0.1"


@contextmanager
def _errors_in_wait() -> Iterator[None]:
    """A NCCL group made inside raises its errors where it is waited for, instead of ending the process from a thread."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
