"""How many samples a second can the client take off SGLang servers, and how long does each phase of a weight sync take?

    python benchmarks/bench_client.py [--rounds 5] [--output benchmarks/results/engine.json]

Client: groups of n = 8 samples of 64 tokens with log-probs, asked and read as in training, from a server that computes
nothing (tests/rollout/fake_sglang.py, in a process of its own, answering from memory), so that client and server have a
core each. The peers are the parts that no client of this contract is without: parsing the same answers (`json.loads`), and
the same requests through httpx alone. Sync: SmolLM2's shapes with 6 of its 30 layers (49 M weights, fp32), random, by each
transport to the same server, in 7 buckets; `verify` reads two tensors back. `as bf16`: cast on the way, for servers that
hold bf16. `two buffers`: memory for two buckets alone, so that the others are packed while servers stand still. The cast's
peer is a plain copy of the same numbers, both in one thread.
Contenders take turns in every round; medians over rounds, with the spread.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import get_args

import httpx
import scoreboard
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.fleet import Fleet
from omni_fast.rollout.sglang import SGLangEngine, read, request
from omni_fast.sync import Transport, WeightSync
from omni_fast.sync.plan import make_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "rollout"))
from fake_sglang import FakeSGLang, sample

N, TOKENS, GROUPS, IN_FLIGHT = 8, 64, 400, 32
SAMPLING = Sampling(max_new_tokens=TOKENS)
PROMPTS = [Prompt([1 + place % 50, *range(3, 130)], place) for place in range(GROUPS)]
BUCKET_BYTES = 16 << 20
TARGETS = {"client samples/s": 4000}
SHAPES = {
    "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "tie_word_embeddings": True,
}  # fmt: skip


class Quick(FakeSGLang):
    """Answers every prompt with the same bytes, made once for each weight version."""

    def generate(self, body: dict) -> tuple[int, object]:
        if "token_ids_logprob" in body:
            return super().generate(body)
        if self.answered != self.weight_version:
            self.answered = self.weight_version
            self.answer = answer(self.weight_version)
        self.asked.clear()
        return 200, self.answer

    answered = ""
    answer = b""


def answer(tag: str) -> bytes:
    return json.dumps([sample([1, 2], k, {"max_new_tokens": TOKENS}, tag) for k in range(N)]).encode()


def serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    server = Quick(dict(model().named_parameters()), vocabulary=SHAPES["vocab_size"])
    server.start()
    pipe.send(server.url)
    pipe.recv()


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPES))  # type: ignore[arg-type]


async def bare(url: str, tag: str) -> None:
    """The same requests, as many at a time, with nothing looked at."""
    body = request(PROMPTS[0].tokens, N, SAMPLING, tag)
    async with httpx.AsyncClient(timeout=60.0, trust_env=False) as http:

        async def some() -> None:
            for _ in range(GROUPS // IN_FLIGHT):
                (await http.post(f"{url}/generate", json=body)).raise_for_status()

        await asyncio.gather(*(some() for _ in range(IN_FLIGHT)))


def again(work: Callable[..., object], *given: object) -> None:
    for _ in range(GROUPS):
        work(*given)


def main() -> None:
    options, figures = scoreboard.options(__doc__, rounds=5), scoreboard.Figures()
    torch.set_num_threads(1)
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    process.start()
    url = here.recv()
    policy = model()
    numbers = torch.randn(sum(value.numel() for value in policy.parameters()))
    casts = {
        "copy fp32": torch.empty_like(numbers),
        "cast fp32 to bf16": torch.empty_like(numbers, dtype=torch.bfloat16),
    }
    for into in casts.values():
        into.zero_()  # touch the pages

    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet([url], in_flight=IN_FLIGHT, say=print)
        sync = partial(WeightSync, fleet, policy, Path(folder), bucket_bytes=BUCKET_BYTES)
        syncs: dict[str, WeightSync] = {kind: sync(transport=kind) for kind in get_args(Transport)[:3]}
        for kind in ("tensor", "distributed"):
            syncs[f"{kind}, two buffers"] = sync(transport=kind, packed_bytes=1)
            syncs[f"{kind}, as bf16"] = sync(transport=kind)
            syncs[f"{kind}, as bf16"].plan = make_plan(policy, BUCKET_BYTES, torch.bfloat16)
        engine = SGLangEngine(fleet, syncs["tensor"])
        engine.generate(PROMPTS[:50], N, SAMPLING)  # opens the connections
        bytes_ = answer(syncs["tensor"].tag)
        for round_ in range(options.rounds):
            for version, (kind, weights) in enumerate(syncs.items(), 1 + round_ * 9):
                for phase, seconds in weights.push(version).items():
                    figures.note(f"sync {kind} {phase} ms", 1e3 * seconds)
            engine.sync(9 + round_ * 9)
            for name, into in casts.items():
                moved = numbers.numel() * (4 + into.itemsize) / 1e9
                figures.rate(f"{name}, GB/s", moved, into.copy_, numbers)
            started, busy = time.perf_counter(), time.process_time()
            found = engine.generate(PROMPTS, N, SAMPLING)
            took, busy = time.perf_counter() - started, time.process_time() - busy
            assert len(found) == GROUPS and all(len(group) == N for group in found)
            figures.note("client samples/s", GROUPS * N / took)
            figures.note("client tokens/s", GROUPS * N * TOKENS / took)
            figures.note("client busy, share of one core", busy / took)
            tag = syncs["tensor"].tag
            asked = GROUPS // IN_FLIGHT * IN_FLIGHT * N
            figures.rate("httpx alone, samples/s", asked, asyncio.run, bare(url, tag))
            figures.rate("json.loads alone, samples/s", GROUPS * N, again, json.loads, bytes_)
            data = json.loads(answer(tag))
            figures.rate("reading samples alone, samples/s", GROUPS * N, again, read, fleet.servers[0], data, N, tag)
        engine.close()
    here.send(None)
    process.terminate()

    figures.show({name: f"target {target:,}" for name, target in TARGETS.items()})
    print(f"bytes of an answer: {len(bytes_):,}")
    figures.save(options.output, ("httpx", "torch"))


if __name__ == "__main__":
    main()
