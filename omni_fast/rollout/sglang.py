"""The engine behind SGLang servers: prompts out, samples with their log-probs and weight versions back.

One request is one group: a prompt and its n samples, on one server, so that the prompt is computed once. Groups go to the
ready server with the fewest of them; what a server fails at is asked elsewhere, at most `ATTEMPTS` times. Results keep
their order and their count. A server that failed is looked at again and again and, when it answers, gets the current
weights before it gets prompts. When none is ready the engine waits, says so, and gives up after `wait_s`.

Every weight version has a tag of its own, unique to this engine, which the server echoes with each sample and which salts
its prefix cache: a sample of other weights is never taken, and keys and values of older weights are never read.
The trainer does not import SGLang; see docs/engine.md for what a server needs.

Limits: strictly on-policy (a sample must be of the current weights whole); draws are the server's and are not repeated by
a resumed run, whatever `Sampling.seed` is.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from omni_fast.errors import RunError, UserError
from omni_fast.rollout.engine import Finished, Progress, Prompt, Sample, Sampling
from omni_fast.rollout.fleet import MAX_PROBE_S, OLDEST, Fleet, Json, Server, ServerError, member, parse_version

ATTEMPTS = 4  # of one group
LOOK_S = 0.05  # between two looks at drained servers, and at what has come back
Done = tuple[int, list[Sample]]


class Weights(Protocol):
    """Brings the policy's weights to servers (`omni_fast.sync.WeightSync`)."""

    tag: str  # of the current version, as servers echo it

    def check(self, server: Server) -> None:
        """Raises UserError where the server's model is not the policy's, ServerError where it does not answer."""
        ...

    def push(self, version: int) -> dict[str, float]:
        """The current weights to all ready servers, draining those that fail; seconds by phase."""
        ...

    def catch_up(self, server: Server) -> None:
        """The current weights to one server that has others. Raises ServerError."""
        ...


class SGLangEngine:
    """Implements `Engine`. Used from one thread."""

    def __init__(
        self,
        fleet: Fleet,
        weights: Weights,
        *,
        request_s: float = 300.0,
        wait_s: float = 600.0,
        wait: Callable[[str], None] = lambda what: None,
        raise_if_stopping: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits until every server answers, checks each, and gives all of them the weights as version 0.

        request_s: limit on one group. wait_s: how long to wait for servers that start, or are all down. wait: gets
        what is being waited for. raise_if_stopping: called all the time while waiting for servers. Raises UserError where a server is missing, too old, or of another model.
        """
        self.fleet, self.weights = fleet, weights
        self.request_s, self.wait_s = request_s, wait_s
        self.wait, self.raise_if_stopping = wait, raise_if_stopping
        self.version = 0
        self._connect()
        self.sync(0)
        if len(fleet.ready) < len(fleet.servers):
            raise UserError(f"the engine's servers did not take the policy's weights: {fleet.reasons()}")

    def _connect(self) -> None:
        end = time.monotonic() + self.wait_s
        for server in self.fleet.servers:
            self.wait(f"the engine server {server.url} to be ready, up to {self.wait_s:.0f} s")
            while True:
                self.raise_if_stopping()
                try:
                    self.fleet.run(self.fleet.ask(server, "/health"))
                    break
                except ServerError as error:
                    if error.status in (401, 403):
                        raise UserError(
                            f"{error}; set the servers' key in the environment variable OMNI_FAST_ENGINE_KEY"
                        ) from error
                    if time.monotonic() > end:
                        raise UserError(
                            f"the engine server {server.url} is not ready after {self.wait_s:.0f} s ({error.reason}): "
                            "start it, look into its log, or correct engine.urls"
                        ) from error
                    time.sleep(0.2)
            try:
                self._introduce(server)
                self.weights.check(server)
            except ServerError as error:
                raise UserError(f"{error}; is this an SGLang server? Correct engine.urls or the key") from error
            self.fleet.admit(server)

    def _introduce(self, server: Server) -> None:
        info = self.fleet.run(self.fleet.ask(server, "/server_info"))
        server.version = parse_version(str(member(info, "version")))
        if server.version < OLDEST:
            told, oldest = (".".join(map(str, version)) or "unknown" for version in (server.version, OLDEST))
            raise UserError(f"the engine server {server.url} runs SGLang {told}; {oldest} is the oldest supported")
        size, replicas = member(info, "tp_size"), member(info, "dp_size")
        server.tensor_parallel = size if isinstance(size, int) else 1
        server.dtype = str(member(info, "dtype") or "auto")
        if isinstance(replicas, int) and replicas > 1:
            raise UserError(
                f"the engine server {server.url} has --dp-size {replicas}, whose weights cannot be updated: "
                "start one server a replica and list them all in engine.urls"
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[list[Sample]]:
        """`n` samples for each prompt, in the order of the prompts.

        progress, finished: called in this thread, with each complete group. What they raise ends the requests.
        Raises UserError for a prompt that a server refuses, RunError when no server is left for `wait_s`.
        """
        for number, prompt in enumerate(prompts):
            if not prompt.tokens:
                raise UserError(
                    f"prompt {number} has no tokens: give each prompt at least one (a BOS token, for example)"
                )
        results: list[list[Sample]] = [[] for _ in prompts]
        came: queue.SimpleQueue[Done] = queue.SimpleQueue()
        job = self.fleet.submit(self._all(prompts, n, sampling, came))
        left, tokens, dark, look = len(prompts), 0, 0.0, 0.0
        try:
            while left:
                if time.monotonic() > look:
                    self.raise_if_stopping()
                    dark = self._tend(dark)
                    look = time.monotonic() + LOOK_S
                try:
                    place, samples = came.get(timeout=LOOK_S)
                except queue.Empty:
                    if job.done():
                        job.result()
                else:
                    results[place] = samples
                    left -= 1
                    tokens += sum(len(sample.tokens) for sample in samples)
                    if finished is not None:
                        finished(place, samples)
                    if progress is not None:
                        progress(tokens, left * n)
        finally:
            job.cancel()
        return results

    def sync(self, version: int) -> dict[str, float]:
        """The policy's weights to every server as `version`; seconds/sync_PHASE. A server that fails is drained."""
        seconds = self.weights.push(version)
        self.version = version
        ready = {"engine_servers": float(len(self.fleet.ready))}
        return {f"seconds/sync_{phase}": value for phase, value in seconds.items()} | ready

    def close(self) -> None:
        self.fleet.close()

    # -- servers that went away --------------------------------------------------------------------------------------

    def _tend(self, dark: float) -> float:
        """Look at drained servers that are due. dark, and returned: since when no server is ready, 0 while one is."""
        now = time.monotonic()
        for server in self.fleet.servers:
            if not server.ready and now >= server.next_probe:
                try:
                    self._bring_back(server)
                except ServerError as error:
                    server.reason = error.reason
                    server.next_probe = time.monotonic() + server.probe_gap
                    server.probe_gap = min(2 * server.probe_gap, MAX_PROBE_S)
        if self.fleet.ready:
            return 0.0
        if not dark:
            dark = now
            self.wait(f"an engine server to come back, up to {self.wait_s:.0f} s")
        if now - dark > self.wait_s:
            raise RunError(
                f"no engine server has been ready for {self.wait_s:.0f} s ({self.fleet.reasons()}): stopped before the "
                "step, nothing is lost. Bring one back, and run the same command again"
            )
        return dark

    def _bring_back(self, server: Server) -> None:
        self.fleet.run(self.fleet.ask(server, "/health", timeout_s=2.0))
        info = self.fleet.run(self.fleet.ask(server, "/model_info", timeout_s=2.0))
        if server.proven != self.weights.tag or member(info, "weight_version") != self.weights.tag:
            self.weights.catch_up(server)
        self.fleet.admit(server)
        self.fleet.say(f"the engine server {server.url} is back, with weight version {self.version}")

    # -- inside the loop ---------------------------------------------------------------------------------------------

    async def _all(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, came: queue.SimpleQueue[Done]) -> None:
        waiting = deque(range(len(prompts)))

        async def work() -> None:
            while waiting:
                place = waiting.popleft()
                came.put((place, await self._group(place, prompts[place].tokens, n, sampling)))

        workers = min(len(prompts), self.fleet.bound * len(self.fleet.servers))
        tasks = [asyncio.create_task(work()) for _ in range(workers)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _group(self, place: int, tokens: Sequence[int], n: int, sampling: Sampling) -> list[Sample]:
        payload = request(tokens, n, sampling, self.weights.tag)
        told: list[str] = []
        for _ in range(ATTEMPTS):
            server = await self.fleet.take()
            try:
                data = await self.fleet.ask(server, "/generate", payload, self.request_s)
                return read(server, data, n, self.version, self.weights.tag)
            except Aborted as error:
                told.append(str(error))
            except ServerError as error:
                if error.own_fault:
                    raise UserError(
                        f"an engine server refuses prompt {place} of {len(tokens)} tokens: {error}"
                    ) from error
                told.append(str(error))
                self.fleet.drain(server, error.reason)
            finally:
                self.fleet.give_back(server)
        raise RunError(f"prompt {place} failed {ATTEMPTS} times: {'; '.join(told)}. Look into the servers' logs")


class Aborted(ServerError):
    """The server ended the request itself; it is otherwise well."""


def request(tokens: Sequence[int], n: int, sampling: Sampling, tag: str) -> Json:
    """The body of /generate. All that has a default on the server and matters is said."""
    draw: dict[str, Json] = {
        "n": n,
        "max_new_tokens": sampling.max_new_tokens,  # the server's default is 128
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    return {
        "input_ids": list(tokens),
        "sampling_params": draw,
        "return_logprob": True,
        "extra_key": tag,
        "stream": False,
    }


def read(server: Server, data: Json, n: int, version: int, tag: str) -> list[Sample]:
    """The samples of an answer, all of them of the weights `tag`. Raises ServerError for anything else."""

    def wrong(what: str) -> ServerError:
        return ServerError(server.url, "/generate", what)

    rows = data if isinstance(data, list) else [data]
    if len(rows) != n:
        raise wrong(f"{len(rows)} samples instead of {n}")
    samples = []
    for row in rows:
        meta = member(row, "meta_info")
        kind = member(member(meta, "finish_reason"), "type")
        if kind == "abort":
            raise Aborted(server.url, "/generate", "the server aborted the request")
        pairs, ids = member(meta, "output_token_logprobs"), member(row, "output_ids")
        if not isinstance(pairs, list) or not isinstance(ids, list) or not pairs or kind not in ("stop", "length"):
            raise wrong("a sample without tokens, log-probs or a reason for its end")
        tokens, logprobs = [], []
        for pair in pairs:
            if not isinstance(pair, list) or not isinstance(pair[0], float | int) or not isinstance(pair[1], int):
                raise wrong(f"{str(pair)[:60]} instead of a log-prob and a token")
            logprobs.append(float(pair[0]))
            tokens.append(pair[1])
        if tokens != ids:
            raise wrong("tokens and log-probs of a sample are not of each other")
        spans = member(meta, "weight_versions")
        held = [member(span, "version") for span in spans] if isinstance(spans, list) else []
        if strange := [one for one in [*held, member(meta, "weight_version")] if one != tag]:
            raise wrong(f"a sample of weights {strange[0]!r} instead of {tag!r}")
        versions = [(version, 0, len(tokens))]
        samples.append(Sample(tokens, logprobs, "stop" if kind == "stop" else "length", versions))
    return samples
