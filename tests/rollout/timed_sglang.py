"""Fake servers that take their time, a task to train on them, and a config that does; not a test module.

A `TimedSGLang` makes the tokens of a group one after the other. It stands still between two of them while it is paused, its
weights may change meanwhile, and its answer says which version made which token, as the real one does.
"""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fake_sglang import FakeSGLang, random_weights, sample
from torch import Tensor
from transformers import PreTrainedModel

from omni_fast.config import Config, load
from omni_fast.policy.tiny import tiny_model
from omni_fast.rewards.compose import Composition
from omni_fast.rewards.score import Part, Score
from omni_fast.rollout.fleet import Fleet, Server, ServerError
from omni_fast.tasks.base import Item

Length = Callable[[list[int], int], int]  # a prompt and max_new_tokens -> tokens of its longest sample


def tailed(prompt: list[int], most: int) -> int:
    """Lengths as reasoning models have them: the median a quarter of the limit, the longest cut by it."""
    return min(most, max(1, round(most / 4 * random.Random(str(prompt)).lognormvariate(0.0, 0.8))))


class TimedSGLang(FakeSGLang):
    """token_s: seconds of one token, however many groups are under way."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        *,
        token_s: float = 0.001,
        length: Length = lambda prompt, most: most,
        **options: object,
    ) -> None:
        self.token_s, self.length = token_s, length
        self.moment = threading.Condition()
        super().__init__(weights, **options)  # type: ignore[arg-type]

    def pause_generation(self, body: dict) -> tuple[int, object]:
        with self.moment:
            return super().pause_generation(body)

    def continue_generation(self, body: dict) -> tuple[int, object]:
        with self.moment:
            self.moment.notify_all()
            return super().continue_generation(body)

    def _take(self, values: dict[str, Tensor], body: dict) -> tuple[int, object]:
        with self.moment:
            assert self.paused or not self.busy, "weights change while tokens are made"
            self.moment.notify_all()
            return super()._take(values, body)

    busy = 0  # groups under way

    def generate(self, body: dict) -> tuple[int, object]:
        if "token_ids_logprob" in body:
            return super().generate(body)
        salt, held = (int(tag.rpartition(".")[2]) for tag in (body["extra_key"], self.weight_version))
        assert salt <= held, "a cache entry of these weights would be read under newer ones"
        draw = dict(body["sampling_params"])
        draw["max_new_tokens"] = self.length(body["input_ids"], draw["max_new_tokens"])
        rows = [sample(body["input_ids"], k, draw, "") for k in range(draw.get("n", 1))]
        spans = self._decode(max(len(row["output_ids"]) for row in rows))
        for row in rows:
            meta, count = row["meta_info"], len(row["output_ids"])
            own = [span | {"end": min(span["end"], count)} for span in spans if span["start"] < count]
            meta["weight_version"] = spans[-1]["version"]
            if self.has_brackets:
                meta["weight_version"], meta["weight_versions"] = own[-1]["version"], own
        return 200, rows if len(rows) > 1 else rows[0]

    def _decode(self, tokens: int) -> list[dict]:
        """Makes so many tokens; which version made which."""
        spans: list[dict] = []
        made = 0.0
        with self.moment:
            self.busy += 1
            while made < tokens:
                self.moment.wait_for(lambda: not self.paused)
                held, began = self.weight_version, time.monotonic()
                self.moment.wait_for(lambda: self.paused, (tokens - made) * self.token_s)
                made += (time.monotonic() - began) / self.token_s
                end = min(tokens, int(made))
                if end > (spans[-1]["end"] if spans else 0):
                    if spans and spans[-1]["version"] == held:
                        spans[-1]["end"] = end
                    else:
                        spans.append({"version": held, "start": spans[-1]["end"] if spans else 0, "end": end})
            self.busy -= 1
        return spans


class NamedWeights:
    """Weights that are only a name, for servers made by `nameless`; pauses and drains as `WeightSync` does."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.tag = fleet, ""

    def check(self, server: Server) -> None:
        pass

    def push(self, version: int) -> dict[str, float]:
        self.tag = f"named.{version}"
        for server in self.fleet.ready:
            try:
                self.catch_up(server)
            except ServerError as error:
                self.fleet.drain(server, error.reason)
        return {}

    def catch_up(self, server: Server) -> None:
        load = {"model_path": "", "weight_version": self.tag, "flush_cache": False}
        for path, body in (("pause_generation", {}), ("update_weights_from_disk", load), ("continue_generation", {})):
            self.fleet.run(self.fleet.ask(server, f"/{path}", body))
        server.proven = self.tag


def nameless(**options: Any) -> TimedSGLang:
    """A server without numbers, of which only the version changes."""
    server = TimedSGLang({}, **options)
    server.update_weights_from_disk = lambda body: server._take({}, body)  # type: ignore[method-assign]
    return server


class Letters:
    """A task without sense: the reward follows from the text alone, so that groups are mixed. judge_s: of a group."""

    system = ""
    composition = Composition("additive", {"correct": 1.0})
    judge_s = 0.0

    def __init__(self, name: str, seed: int, max_new_tokens: int) -> None:
        self.name, self.seed, self.max_new_tokens = name, seed, max_new_tokens
        self._items = [Item(str(number), f"{number}?", {}) for number in range(48)]

    def items(self, split: str) -> Sequence[Item]:
        return {"train": self._items[:40], "select": self._items[40:44]}.get(split, self._items[44:])

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        time.sleep(self.judge_s)
        return [Score({"correct": Part(value)}) for value in self._values(completions)]

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        return list(self._values(completions))

    def _values(self, completions: Sequence[str]) -> list[float]:
        return [zlib.crc32(text.encode()) % 5 / 4 for text in completions]


def small_model(folder: Path) -> PreTrainedModel:
    """A chat model hardly trained, with its tokenizer in `folder`."""
    model, tokenizer = tiny_model([(f"{number}?", "yes", "no") for number in range(10)], seed=0, steps=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def timed(model: torch.nn.Module, **options: object) -> TimedSGLang:
    """With other weights of the model's shapes."""
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return TimedSGLang(random_weights(model), vocabulary=size, **options)  # type: ignore[arg-type]


def config_for(folder: Path, model: Path, urls: Sequence[str], staleness: int, **more: object) -> Config:
    """One stage on `Letters` behind the servers; more: dotted overrides, with __ for the dots."""
    path = folder / "job.toml"
    path.write_text(
        f"""
        threads = 1
        [model]
        path = "{model}"
        dtype = "float32"
        [engine]
        kind = "sglang"
        urls = {list(urls)}
        wait_s = 20
        request_timeout_s = 10
        [rollout]
        prompts_per_step = 4
        samples_per_prompt = 2
        max_staleness = {staleness}
        [curriculum]
        mode = "joint"
        steps_per_stage = 5
        [evaluation]
        select_items = 2
        test_items = 2
        probe_items = 0
        bootstrap_draws = 50
        [checkpoint]
        every_steps = 2
        [judge]
        backend = "rubric"
        [[tasks]]
        name = "letters"
        kind = "python"
        cls = "timed_sglang:Letters"
        max_new_tokens = 8
        """,
        encoding="utf-8",
    )
    return load(str(path), tuple(f"{key.replace('__', '.')}={value}" for key, value in more.items()))
