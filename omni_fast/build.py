"""Everything a run needs, made from its config: model, policy, engine, sandbox, judge, tasks.

The only place that knows them all; each of them takes plain arguments and can be used without this file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omni_fast import ranks, serving
from omni_fast.checkpoint import published
from omni_fast.config import Config
from omni_fast.curriculum.stages import Draw
from omni_fast.errors import UserError
from omni_fast.evaluate import EVAL_TOKENS_FACTOR, SHOWN_COMPLETIONS, decode, tokenise
from omni_fast.grading import Grading
from omni_fast.groups import Group, by_task
from omni_fast.policy.model import load, stop_tokens
from omni_fast.policy.sharded import ShardedPolicy
from omni_fast.policy.tiny import tiny_model
from omni_fast.policy.update import Policy
from omni_fast.progress import Progress
from omni_fast.records import Evaluation, Shown, TaskScores
from omni_fast.rollout.engine import Engine, Prompt, Rollout, Sample, Sampling
from omni_fast.rollout.fleet import Fleet
from omni_fast.rollout.local import LocalEngine
from omni_fast.rollout.sglang import SGLangEngine
from omni_fast.run import BASE, Run
from omni_fast.scoring import Scorer
from omni_fast.sync import WeightSync
from omni_fast.tasks import build_tasks
from omni_fast.tasks.base import SPLITS, Item, Split, Task
from omni_fast.tasks.composed import composed
from omni_fast.tasks.jsonl import FileTask
from omni_fast.tasks.tiny import tiny_corpus
from omni_fast.trackers import Trackers
from omni_kernels import LossSpec


@dataclass
class Parts:
    """What the driver works with. holds: the name of the weights that the policy has now."""

    config: Config
    run: Run
    progress: Progress
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tasks: dict[str, Task]
    policy: Policy
    engine: Engine
    scorer: Scorer
    trackers: Trackers
    holds: str = BASE
    _prompts: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    @cached_property
    def items(self) -> dict[str, dict[Split, Sequence[Item]]]:
        """Task -> split -> items, the held-out splits cut to the sizes of the config."""
        sizes = self.config.evaluation
        limits = {"train": None, "select": sizes.select_items, "test": sizes.test_items}
        named = self.tasks.items()
        return {name: {split: task.items(split)[: limits[split]] for split in SPLITS} for name, task in named}

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        return stop_tokens(self.model, self.tokenizer)

    def group(self, draw: Draw) -> Group:
        """An empty group for a drawn prompt."""
        item = self.items[draw.task]["train"][draw.item]
        return Group(draw, item, self.prompt(draw.task, item))

    def prompt(self, task: str, item: Item) -> list[int]:
        """The item's chat-templated tokens."""
        if (task, item.id) not in self._prompts:
            limit = self.config.rollout.max_prompt_tokens
            self._prompts[task, item.id] = tokenise(self.tokenizer, self.tasks[task], item, limit)
        return self._prompts[task, item.id]

    def check_items(self) -> None:
        """Look at everything that the run may ask: a prompt above the limit, or another one than before, is told at once."""
        digests = {}
        for task, splits in self.items.items():
            digest = hashlib.sha256()
            for item in (item for items in splits.values() for item in items):
                self.prompt(task, item)
                told = [item.id, item.prompt, item.prefix, dict(item.answer)]
                digest.update(json.dumps(told, sort_keys=True, default=lambda value: type(value).__name__).encode())
            digests[task] = digest.hexdigest()
        self.run.same_items(digests)

    def check_budget(self) -> None:
        """UserError where a sample to be trained on, or a probe of the entropy, may be longer than a micro-batch.

        Tasks that the run has begun with may go on: their settings cannot change any more.
        """
        budget, probes = self.config.optimizer.tokens_per_microbatch, self.config.evaluation.probe_items
        for task in (task for task in self.items if task not in self.run.state.get("items", {})):
            items = [*self.items[task]["train"], *self.items[task]["select"][:probes]]
            rows = max(len(self.prompt(task, item)) for item in items) + self.tasks[task].max_new_tokens - 1
            if rows > budget:
                raise UserError(
                    f"a sample of {task} may have {rows} tokens and a micro-batch holds {budget}: raise "
                    f"optimizer.tokens_per_microbatch, or lower tasks.{task}.max_new_tokens"
                )

    def start(self, groups: Sequence[Group], name: str) -> list[Rollout]:
        """Ask for the groups' completions; each group goes to the scorer as soon as it is complete. `name` seeds the draws.

        One rollout a task, since each has a length of its own.
        """
        seed = zlib.crc32(f"{self.config.seed}:{name}".encode())
        n, temperature = self.config.rollout.samples_per_prompt, self.config.rollout.temperature
        rollouts = []
        for task, members in by_task(groups).items():
            sampling = Sampling(self.tasks[task].max_new_tokens, temperature, self.stop_token_ids, seed)
            prompts = [Prompt(group.prompt, group.draw.position) for group in members]
            rollouts.append(self.engine.start(prompts, n, sampling, partial(self._complete, members)))
        return rollouts

    def _complete(self, groups: Sequence[Group], place: int, samples: list[Sample]) -> None:
        """In whatever thread the samples come."""
        groups[place].answer(samples, self.tokenizer)
        self.scorer.submit(groups[place])

    def evaluate(self, task: str, items: Sequence[Item], temperature: float = 0.0) -> Evaluation:
        """One completion per item, scored by the task's metric; Ctrl-C takes effect between two tokens, since an evaluation is simply done again."""

        def interruptible(tokens: int, running: int) -> None:
            self.run.raise_if_stopping()
            self.progress.wait(f"{task}: {running} of {len(items)} completions")

        prompts = [Prompt(self.prompt(task, item), key) for key, item in enumerate(items)]
        limit = EVAL_TOKENS_FACTOR * self.tasks[task].max_new_tokens
        sampling = Sampling(limit, temperature, self.stop_token_ids, self.config.seed)
        samples = [one for (one,) in self.engine.generate(prompts, 1, sampling, interruptible)]
        texts = decode(self.tokenizer, items, samples)
        given = np.array(self.tasks[task].metric(items, texts), dtype=np.float64)  # NaN for None
        values = [None if math.isnan(value) else float(value) for value in given]
        rows = list(zip(items, texts, values, strict=True))[:SHOWN_COMPLETIONS]
        shown = [Shown(prompt=item.prompt, completion=text, value=value) for item, text, value in rows]
        truncated = sum(sample.finish_reason == "length" for sample in samples) / len(samples)
        return Evaluation(given, TaskScores(values=values, truncated=truncated, samples=shown))

    def sleep(self) -> None:
        """Let the engine's servers give their GPU memory to the policy until the next sync, where the config says so."""
        if self.config.engine.sleep and isinstance(self.engine, SGLangEngine):
            self.engine.sleep()

    def load_weights(self, name: str) -> None:
        """Put the weights `name` into the policy."""
        if self.holds != name:
            self.policy.load_weights(self.run.weights(name))
            self.holds = name

    def keep_weights(self, name: str) -> None:
        self.run.keep_weights(name, self.policy.weights())
        self.holds = name

    def export(self, folder: Path, name: str) -> None:
        """The weights `name` as transformers and SGLang load them (under LoRA the adapter), published by one rename."""
        self.load_weights(name)
        with published(folder) as work:
            self.model.save_pretrained(work)
            self.tokenizer.save_pretrained(work)


@contextmanager
def build(config: Config, run: Run, progress: Progress, trains: bool = True) -> Iterator[Parts]:
    """Set up everything; what has to be stopped is stopped on the way out. trains: not only evaluates."""
    torch.set_num_threads(config.threads or ranks.threads())
    with ExitStack() as stack:
        stack.enter_context(ranks.together(config.fingerprint()))
        start = time.perf_counter()
        progress.wait(f"the model {config.model.path}")
        model, tokenizer = load_model(config)
        urls = engine_urls(config, model, run, stack, progress)
        progress.wait("the tasks, their verifiers and the judge")
        judged = with_judge(config, urls, str(model.name_or_path))
        grading = Grading(judged, stack, run.folder, model, tokenizer, progress.warn)
        plain = build_tasks(config.tasks, seed=config.seed, resources=grading.resources())
        for task in plain.values():
            if isinstance(task, FileTask) and task.report.dropped:
                progress.warn("\n".join(task.report.lines()))
        tasks = {block.name: composed(plain[block.name], block.reward) for block in config.tasks}
        # SGLang 0.5.17 dies where labels and samples meet in one batch
        scorer = Scorer(tasks, config.rewards, progress, run.raise_if_stopping, hold=config.judge_generates)
        stack.callback(scorer.close)
        progress.wait("the policy's optimiser and the engine")
        policy = make_policy(config, model)
        if isinstance(policy, ShardedPolicy):
            stack.callback(policy.close)
        engine = make_engine(config, urls, model, run, stack, progress)
        trackers = Trackers(config, run.folder, len(run.rows()))
        stack.callback(trackers.close)
        parts = Parts(config, run, progress, model, tokenizer, tasks, policy, engine, scorer, trackers)
        progress.wait("the prompts' tokens")
        if trains:
            parts.check_budget()  # before the run knows its items
        parts.check_items()
        run.add_seconds(setup=time.perf_counter() - start)
        run.bind()
        if run.added:
            progress.say(f"added to what is measured here: {', '.join(run.added)}")
        run.state["facts"] |= grading.facts()
        yield parts


def load_model(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The named model in fp32 (the policy makes its working copy), or the from-scratch one after its warm-up."""
    device = ranks.device() if config.model.device == "auto" else config.model.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"model.device '{device}' cannot be used ({reason}); give 'auto', 'cpu' or 'cuda'") from error
    if config.model.path == "tiny":
        device = "cpu" if config.model.device == "auto" else device  # a GPU would wait for its launches
        return tiny_model(tiny_corpus(config.tasks, config.seed), seed=config.seed, device=device)
    return load(config.model.path, dtype=torch.float32, device=device)


def engine_urls(config: Config, model: PreTrainedModel, run: Run, stack: ExitStack, progress: Progress) -> list[str]:
    """Of the engine's servers, which are started where the config names none, and stopped with `stack`."""
    if config.engine.kind == "local" or config.engine.urls:
        return config.engine.urls
    progress.wait("the engine's servers to start")
    folder, rank = run.folder / "engine", config.adapter_rank
    run.at_once = partial(serving.kill, folder)
    check, path = run.raise_if_stopping, str(model.name_or_path)
    urls = serving.up(config.engine, path, folder, adapter_rank=rank, say=progress.say, check=check)
    stack.callback(partial(serving.down, folder, say=progress.say))
    stack.enter_context(serving.watched(folder, say=progress.warn))
    return urls


def with_judge(config: Config, urls: Sequence[str], model: str) -> Config:
    """The config with the frozen base on the first of the engine's servers as its judge, where it asks for that."""
    if config.judge.backend not in ("openai", "sglang") or config.judge.url:
        return config
    found = {"url": f"{urls[0].rstrip('/').removesuffix('/v1')}/v1", "model": config.judge.model or model}
    return config.model_copy(update={"judge": config.judge.model_copy(update=found)})


def make_engine(
    config: Config, urls: Sequence[str], model: PreTrainedModel, run: Run, stack: ExitStack, progress: Progress
) -> Engine:
    """What the config's [engine] names, with the model's weights; stopped with `stack`."""
    wanted = config.engine
    if wanted.kind == "local":
        local = LocalEngine(model, max_rows=config.rollout.max_rows)
        stack.callback(local.close)
        return local
    key = os.environ.get(serving.KEY_VARIABLE, "")
    fleet = Fleet(urls, api_key=key, in_flight=wanted.in_flight, say=progress.warn)
    stack.callback(fleet.close)
    weights = WeightSync(fleet, model, run.folder / "engine" / "weights", transport=wanted.sync)
    stack.callback(weights.close)
    engine = SGLangEngine(
        fleet, weights, request_s=wanted.request_timeout_s, wait_s=wanted.wait_s, adapter=config.adapter_rank > 0,
        wait=progress.wait, raise_if_stopping=run.raise_if_stopping,
    )  # fmt: skip
    stack.callback(engine.wake, "weights", "kv_cache")
    return engine


def follow(config: Config) -> None:
    """What every rank but the first does in a run that torchrun started: its part of each optimiser step."""
    torch.set_num_threads(config.threads or ranks.threads())
    with ranks.together(config.fingerprint()):
        policy = make_policy(config, load_model(config)[0])
        assert isinstance(policy, ShardedPolicy)
        policy.follow()


def make_policy(config: Config, model: PreTrainedModel) -> Policy:
    loss, optimizer = config.loss, config.optimizer
    # A server's kernels round otherwise than the trainer's: truncated importance sampling.
    behaviour = {} if config.engine.kind == "local" else {"rollout": "truncate"}
    clip = {"eps_low": loss.eps_low, "eps_high": loss.eps_high}
    spec = LossSpec.preset(loss.policy, beta=loss.beta, entropy_coef=loss.entropy_bonus, **clip, **behaviour)
    options = optimizer.model_dump(exclude={"beta1", "beta2"}) | {"betas": (optimizer.beta1, optimizer.beta2)}
    options |= config.model.model_dump(include={"lora_rank", "lora_alpha"})
    dtype = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    kind = ShardedPolicy if ranks.world() > 1 else Policy
    return kind(model, loss=spec, temperature=config.rollout.temperature, dtype=dtype, **options)
