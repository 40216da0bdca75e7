"""The engine behind SGLang servers: prompts out, samples with their log-probs and weight versions back.

One request is one group: a prompt and its n samples, on one server, so that the prompt is computed once. Groups go to the
ready server with the fewest of them; what a server fails at is asked elsewhere, at most `ATTEMPTS` times. Results keep
their order and their count. A server that failed is looked at again and again and, when it answers, gets the current
weights before it gets prompts. When none is ready the engine waits, says so, and gives up after `wait_s`.

Every weight version has a tag of its own, unique to this engine, which the server echoes with each sample and which, with
how often that server's weights have been in doubt, salts its prefix cache: a sample with a token of weights older than those
it was asked under is never taken, and its prompt never reads keys and values of older ones. Where a sync comes while groups are under way, they go on with the new weights; the
version spans of a sample say so.
The trainer does not import SGLang; see docs/engine.md for what a server needs.

Limits: draws are the server's and are not repeated by a resumed run, whatever `Sampling.seed` is. A server that does not
tell spans (before 0.5.21) tells the version of the end alone: all tokens before it count as of the weights asked under.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from omni_fast.errors import RunError, UserError
from omni_fast.rollout.engine import Engine, Finished, Progress, Prompt, Sample, Sampling
from omni_fast.rollout.fleet import ASK_S, OLDEST, PROBE_S, Fleet, Json, Server, ServerError, member, parse_version

ATTEMPTS = 4  # of one group
REFUSED = (400, 401, 403, 404, 413, 422)  # by HTTP status: the request itself, as another server would refuse it
NO_ADAPTER = "never been loaded"  # says a server that was started again meanwhile
MAX_HEALTH_S = 3.0  # of a server that may be back; a healthy one takes 1
LOOK_S = 0.05  # between two looks at drained servers, at what has come back, and whether a sync has ended
Done = tuple[int, list[Sample]]


class Weights(Protocol):
    """Brings the policy's weights to servers (`omni_fast.sync.WeightSync`)."""

    tag: str  # of the current version, as servers echo it: this engine's own name, a dot, the version

    def check(self, server: Server) -> None:
        """Raises UserError where the server's model is not the policy's, ServerError where it does not answer."""

    def push(self, version: int) -> dict[str, float]:
        """The current weights to all ready servers, draining those that fail; seconds by phase."""

    def catch_up(self, server: Server) -> None:
        """The current weights to one server that has others. Raises ServerError."""


class SGLangEngine(Engine):
    """Implements `Engine`. Used from one thread; what it asked for goes on while that one does something else."""

    def __init__(
        self,
        fleet: Fleet,
        weights: Weights,
        *,
        request_s: float = 300.0,
        wait_s: float = 600.0,
        adapter: bool = False,
        wait: Callable[[str], None] = lambda what: None,
        raise_if_stopping: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits for the servers, checks each, and gives all of them the weights as version 0.

        A server that is not there after `wait_s` joins when it comes, if others are there. request_s: limit on one group.
        wait_s: how long to wait for servers that start, or are all down. adapter: each version is a LoRA adapter of its
        tag's name, which requests ask for. wait: gets what is being waited for.
        raise_if_stopping: called all the time while waiting for servers. Raises UserError where no server comes, or one
        is too old, or of another model.
        """
        self.fleet, self.weights = fleet, weights
        self.request_s, self.wait_s, self.adapter = request_s, wait_s, adapter
        self.wait, self.raise_if_stopping = wait, raise_if_stopping
        self.version = 0
        self._tag = ""  # of the weights that every ready server holds, or newer ones
        self._syncing = False
        self._turns = itertools.count()
        self._ends: set[int] = set()  # tokens that were told of
        self._connect()
        self.sync(0)
        if any(server.known and not server.ready for server in fleet.servers):
            remedy = " (they need --enable-lora, --max-lora-rank and --lora-target-modules)" if adapter else ""
            raise UserError(
                f"the engine's servers did not take the policy's weights: {fleet.reasons()}: look into their logs, start "
                f"them as the policy needs{remedy}"
            )

    def _connect(self) -> None:
        end, missing = time.monotonic() + self.wait_s, self.fleet.servers
        while missing:
            self.wait(f"the engine server {missing[0].url} to be ready, up to {self.wait_s:.0f} s")
            limit = min(ASK_S, max(1.0, end - time.monotonic()))
            for server, answer in self.fleet.each(missing, partial(self._health, limit_s=limit)).result():
                self._meet(server, answer)
            missing = [server for server in missing if not server.known]
            if time.monotonic() > end:
                break
            self.raise_if_stopping()
            time.sleep(0.2 if missing else 0.0)
        for server in missing:
            told = f"the engine server {server.url} is not ready after {self.wait_s:.0f} s ({server.reason})"
            if not self.fleet.ready:
                raise UserError(f"{told}: start it, look into its log, or correct engine.urls")
            self.fleet.say(f"{told}: it is left out until it answers")

    def _meet(self, server: Server, answer: ServerError | None) -> None:
        """Takes it in if it is up; else `server.reason` says why not."""
        try:
            if answer is not None:
                raise answer
            self._introduce(server)
            self.fleet.admit(server)
        except ServerError as error:
            if error.status in (401, 403):
                raise UserError(
                    f"{error}; set the servers' key in the environment variable OMNI_FAST_ENGINE_KEY"
                ) from error
            if answer is None:
                raise UserError(f"{error}; is this an SGLang server? Correct engine.urls or the key") from error
            server.reason = error.reason

    async def _health(self, server: Server, limit_s: float) -> None:
        """SGLang answers after a token that it generates. One that a failed sync, or a trainer that died in one, has left
        paused would never do that: it goes on first, which no prompt of ours sees."""
        with suppress(ServerError):
            await self.fleet.ask(server, "/continue_generation", {}, limit_s)
        await self.fleet.ask(server, "/health", timeout_s=limit_s)

    def _introduce(self, server: Server) -> None:
        """Ask who it is. Raises UserError where it is not fit for the policy, ServerError where it does not answer."""
        info = self.fleet.run(self.fleet.ask(server, "/server_info"))
        server.version = parse_version(str(member(info, "version")))
        if server.version < OLDEST:
            told, oldest = (".".join(map(str, version)) or "unknown" for version in (server.version, OLDEST))
            raise UserError(
                f"the engine server {server.url} runs SGLang {told}; {oldest} is the oldest supported: start a newer one, "
                "for example by `omni-fast engine up`"
            )
        size, replicas = member(info, "tp_size"), member(info, "dp_size")
        server.tensor_parallel = size if isinstance(size, int) else 1
        server.dtype = str(member(info, "dtype") or "auto")
        if isinstance(replicas, int) and replicas > 1:
            raise UserError(
                f"the engine server {server.url} has --dp-size {replicas}, whose weights cannot be updated: "
                "start one server a replica and list them all in engine.urls"
            )
        self.weights.check(server)
        server.known = True

    def start(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, arrived: Finished | None = None
    ) -> ServedRollout:
        """Asks for `n` samples for each prompt, after those of rollouts that were started before.

        arrived: called in the engine's own thread with each complete group; what it raises, `wait` raises.
        Raises UserError for a prompt without tokens.
        """
        for number, prompt in enumerate(prompts):
            if not prompt.tokens:
                raise UserError(f"prompt {number} has no tokens: give each at least one (a BOS token, for example)")
        came: queue.SimpleQueue[Done] = queue.SimpleQueue()
        turn = next(self._turns)

        async def one(place: int) -> None:
            samples = await self._group(place, prompts[place].tokens, n, sampling, turn)
            if arrived is not None:
                arrived(place, samples)
            came.put((place, samples))

        async def together() -> None:
            tasks = [asyncio.create_task(one(place)) for place in range(len(prompts))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        return ServedRollout(self, self.fleet.submit(together()), came, len(prompts), n)

    def sync(self, version: int) -> dict[str, float]:
        """The policy's weights to every server as `version`; seconds/sync_PHASE. A server that fails is drained."""
        taking, self._syncing = self.fleet.ready, True
        try:
            self.wake("weights")
            seconds = self.weights.push(version)
            self.wake("kv_cache")
            self.version, self._tag = version, self.weights.tag
        finally:
            for server in taking:
                server.doubts += not server.ready  # whatever drained it, a request that failed meanwhile for example
            self._syncing = False
        ready = {"engine_servers": float(len(self.fleet.ready))}
        return {f"seconds/sync_{phase}": value for phase, value in seconds.items()} | ready

    def sleep(self) -> None:
        """Until the next `sync` the servers' GPU memory is free for others. Nothing may be under way."""
        tags: tuple[str, ...] = ("kv_cache",) if self.adapter else ("kv_cache", "weights")  # no sync brings a base back
        for server in self.fleet.ready:
            server.asleep = tags
        self._memory("/release_memory_occupation", self.fleet.ready, tags)

    def wake(self, *tags: str) -> None:
        """Memory again for the "weights", of which the next sync makes sense, or the "kv_cache", where it was given back."""
        for tag in tags:
            sleepers = [server for server in self.fleet.ready if tag in server.asleep]
            self._memory("/resume_memory_occupation", sleepers, (tag,))
            for server in sleepers:
                if server.ready:
                    server.asleep = tuple(other for other in server.asleep if other != tag)

    def _memory(self, path: str, servers: Sequence[Server], tags: tuple[str, ...]) -> None:
        told = self.fleet.each(servers, lambda one: self.fleet.ask(one, path, {"tags": list(tags)}, self.request_s))
        for server, result in told.result():
            if isinstance(result, ServerError):
                self.fleet.drain(server, f"{path} {result.reason}")

    def close(self) -> None:
        self.fleet.close()

    def _look_at_ends(self, server: Server, samples: Sequence[Sample], sampling: Sampling) -> None:
        """Say once of each token that a server ends at and the policy's tokenizer does not."""
        ends = {sample.tokens[-1] for sample in samples if sample.finish_reason == "stop"} - {*sampling.stop_token_ids}
        for token in ends - self._ends:
            self.fleet.say(
                f"the engine server {server.url} ends samples at token {token}, which is no end to the policy: has it another "
                "tokenizer or generation_config.json? Start it with the policy's model folder"
            )
        self._ends |= ends

    # -- servers that went away --------------------------------------------------------------------------------------

    def tend(self, dark: float) -> float:
        """Look at drained servers that are due. dark, and returned: since when no server is ready, 0 while one is.

        Only while the policy stands still: a server that comes back gets its weights.
        """
        now = time.monotonic()
        due = [server for server in self.fleet.servers if not server.ready and now >= server.next_probe]
        told = self.fleet.each(due, lambda server: self.fleet.ask(server, "/model_info", timeout_s=MAX_HEALTH_S))
        for server, info in told.result():
            try:
                self._bring_back(server, info)
            except ServerError as error:
                server.reason = error.reason
                server.look_later(server.probe_gap)
            except UserError as error:  # it comes late and is not fit
                server.reason, server.next_probe = str(error), math.inf
                self.fleet.say(f"{error}. It stays left out")
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

    def _bring_back(self, server: Server, info: Json | ServerError) -> None:
        """info: what it has just said of itself."""
        if isinstance(info, ServerError):
            raise info
        how = "is back" if server.known else "has joined"
        held = member(info, "weight_version")
        tags: list[Json] = [*server.asleep]
        server.asleep = ()  # asked once: one that was not asleep any more would die of it again and again
        if tags and number(held, self.weights.tag) >= 0:  # the process that fell asleep: a new one has no tag of ours
            server.proven = ""
            self.fleet.run(self.fleet.ask(server, "/resume_memory_occupation", {"tags": tags}))
        self.fleet.run(self._health(server, MAX_HEALTH_S))  # with all of its memory, since it generates
        if not server.known:
            self._introduce(server)
        if server.proven != self.weights.tag or held != self.weights.tag:
            server.doubts, server.proven = server.doubts + 1, ""
            self.weights.catch_up(server)
        self.fleet.admit(server)
        self.fleet.say(f"the engine server {server.url} {how}, with weight version {self.version}")

    # -- inside the loop ---------------------------------------------------------------------------------------------

    async def _group(self, place: int, tokens: Sequence[int], n: int, sampling: Sampling, turn: int) -> list[Sample]:
        told: list[str] = []
        failed: list[Server] = []
        for _ in range(ATTEMPTS):
            server = await self.fleet.take(turn, failed)
            tag, doubts = self._tag, server.doubts  # before the answer, servers may come to hold newer weights
            try:
                body = request(tokens, n, sampling, f"{doubts}:{tag}", tag if self.adapter else None)
                data = await self.fleet.ask(server, "/generate", body, self.request_s)
                while self._syncing:  # what its server holds is known afterwards
                    await asyncio.sleep(LOOK_S)
                if server.doubts > doubts:  # and perhaps its tag is still the old one
                    raise Aborted(server.url, "/generate", "its weights were in doubt meanwhile")
                samples = read(server, data, n, tag, self.adapter)
                self._look_at_ends(server, samples, sampling)
                server.probe_gap = PROBE_S
                return samples
            except Aborted as error:
                told.append(str(error))
            except ServerError as error:
                if error.status in REFUSED and NO_ADAPTER not in error.reason:
                    raise UserError(
                        f"an engine server refuses prompt {place} of {len(tokens)} tokens: {error}. Is it too long for the "
                        "server? Raise --context-length there, or lower rollout.max_prompt_tokens or max_new_tokens"
                    ) from error
                told.append(str(error))
                failed.append(server)
                self.fleet.drain(server, error.reason)
            finally:
                self.fleet.give_back(server)
        raise RunError(f"prompt {place} failed {ATTEMPTS} times: {'; '.join(told)}. Look into the servers' logs")


class ServedRollout:
    """Groups under way on the servers. While it waits, servers that went away are brought back."""

    def __init__(
        self, engine: SGLangEngine, job: Future[None], came: queue.SimpleQueue[Done], count: int, n: int
    ) -> None:
        self.engine, self.job, self.came, self.count, self.n = engine, job, came, count, n

    def wait(self, progress: Progress | None = None) -> list[list[Sample]]:
        """progress: called in this thread with each complete group; what it raises ends the requests.

        Raises UserError for a prompt that a server refuses, RunError when no server is left for `wait_s`.
        """
        results: list[list[Sample]] = [[] for _ in range(self.count)]
        left, tokens, dark, look = self.count, 0, 0.0, 0.0
        try:
            while left:
                if time.monotonic() > look:
                    self.engine.raise_if_stopping()
                    dark = self.engine.tend(dark)
                    look = time.monotonic() + LOOK_S
                try:
                    place, samples = self.came.get(timeout=LOOK_S)
                except queue.Empty:
                    if self.job.done():
                        self.job.result()
                else:
                    results[place] = samples
                    left -= 1
                    tokens += sum(len(sample.tokens) for sample in samples)
                    if progress is not None:
                        progress(tokens, left * self.n)
        finally:
            self.cancel()
        return results

    def cancel(self) -> None:
        self.job.cancel()


class Aborted(ServerError):
    """The server ended the request itself; it is otherwise well."""


def request(tokens: Sequence[int], n: int, sampling: Sampling, salt: str, adapter: str | None = None) -> Json:
    """The body of /generate, by the adapter of that name or by the weights. All that has a default and matters is said.

    salt: of the prefix cache; what is not equal in it shares no keys and values. With an adapter, n requests in one: SGLang
    0.5.17 counts its users wrongly for n > 1, and never lets it be unloaded.
    """
    return {
        "input_ids": list(tokens) if adapter is None else [list(tokens)] * n,
        "sampling_params": {
            "n": n if adapter is None else 1,
            "max_new_tokens": sampling.max_new_tokens,  # the server's default is 128
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "stop_token_ids": list(sampling.stop_token_ids),
        },
        "return_logprob": True,
        "extra_key": salt,
        "lora_path": adapter,
        "stream": False,
    }


def read(server: Server, data: Json, n: int, tag: str, adapter: bool = False) -> list[Sample]:
    """The samples of an answer to what was asked under the weights of `tag`.

    Raises ServerError for anything else, a token of older weights or of another engine's among it.
    """
    wrong = partial(ServerError, server.url, "/generate")
    rows = data if isinstance(data, list) else [data]
    if len(rows) != n:
        raise wrong(f"{len(rows)} samples instead of {n}")
    samples = []
    for row in rows:
        meta = member(row, "meta_info")
        kind = member(member(meta, "finish_reason"), "type")
        if kind == "abort":
            raise Aborted(server.url, "/generate", "the server aborted the request")
        pairs: Any = member(meta, "output_token_logprobs")
        ids = member(row, "output_ids")
        if not isinstance(pairs, list) or not isinstance(ids, list) or not pairs or kind not in ("stop", "length"):
            raise wrong("a sample without tokens, log-probs or a reason for its end")
        try:
            logprobs, tokens = [float(pair[0]) for pair in pairs], [pair[1] for pair in pairs]
            fit = tokens == ids and all(isinstance(token, int) for token in tokens)
        except (TypeError, ValueError, LookupError):
            fit = False
        if not fit:
            raise wrong(f"tokens and log-probs of a sample are not of each other: {str(pairs)[:60]}")
        if not math.isfinite(sum(logprobs)):
            raise wrong("a log-prob of a sample is not finite")
        spans = _spans(meta, len(tokens), tag)
        if isinstance(spans, str):
            raise wrong(spans)
        if adapter:  # the request named it, whatever the server has come to hold since
            spans = [(number(tag, tag), 0, len(tokens))]
        samples.append(Sample(tokens, logprobs, "stop" if kind == "stop" else "length", spans))
    return samples


def number(held: Json, tag: str) -> int:
    """The version that the tag `held` is of; -1 where it is no tag of the engine that `tag` is one of."""
    run, _, digits = held.rpartition(".") if isinstance(held, str) else ("", "", "")
    return int(digits) if digits.isdecimal() and run == tag.rpartition(".")[0] else -1


def _spans(meta: Json, count: int, tag: str) -> list[tuple[int, int, int]] | str:
    """(weight version, start, end) over `count` tokens, none older than that of `tag`; or what is wrong."""
    version, last, told = number(tag, tag), member(meta, "weight_version"), member(meta, "weight_versions")
    newest = number(last, tag)
    if newest < version:
        return f"a sample of weights {last!r} instead of {tag!r}"
    if not isinstance(told, list):  # the weights changed at the last token or before it: the oldest that can be is said
        if newest == version or count == 1:
            return [(version, 0, count)]
        return [(version, 0, count - 1), (newest, count - 1, count)]
    spans, end = [], 0
    for span in told:
        held, start, stop = (member(span, key) for key in ("version", "start", "end"))
        if number(held, tag) < version:
            return f"a sample of weights {held!r} instead of {tag!r}"
        if start != end or not isinstance(stop, int) or stop <= end:
            return f"spans of weight versions that do not follow each other: {str(told)[:200]}"
        spans.append((number(held, tag), end, stop))
        end = stop
    return spans if end == count else f"spans of weight versions over {end} of {count} tokens"
