"""omni_fast's side of the comparison: the engine, the policy and the step of `omni_fast.train`, on given prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.train import case as shared
from benchmarks.train.case import Case
from benchmarks.train.worker import Hello, Reporter
from omni_fast.policy import update
from omni_fast.policy.model import load, stop_tokens
from omni_fast.policy.pack import Trajectory
from omni_fast.policy.slots import Clock
from omni_fast.policy.update import ADAM_EPS, Policy
from omni_fast.rollout.engine import Engine, Prompt, Sample, Sampling
from omni_fast.rollout.local import LocalEngine
from omni_kernels import LossSpec

TOKENS_PER_MICROBATCH = 2048  # the long case splits into two, for two thirds of its memory and no time
NAME = "omni_fast"


def run(connection: Connection, case: Case, model_path: str, seed: int, server: str | None = None) -> None:
    """server: the URL of an SGLang server of this model; without one the engine is in this process."""
    torch.set_num_threads(case.threads)
    reporter = Reporter(connection, case.device)
    model, tokenizer = load(model_path, dtype=torch.float32, device=case.device)
    policy = make_policy(case, model)
    engine = (
        local_engine(case, model)
        if server is None
        else served_engine(case, model, server, Path(model_path) / "weights")
    )
    if case.device == "cuda":
        update.Clock = SettledClock  # type: ignore[misc]
    prompts = [
        [shared.prompt_tokens(tokenizer, text) for text in texts] for texts in shared.questions(case, tokenizer, seed)
    ]
    settings: dict[str, object] = {
        "weights": "bf16, fp32 masters", "optimiser": "fused AdamW, fp32", "engine": type(engine).__name__,
        "tokens_per_microbatch": policy.tokens_per_microbatch, "share": policy.share,
    }  # fmt: skip
    reporter.hello(Hello(settings, state_bytes(policy), prompts))
    sampling = Sampling(case.new_tokens, 1.0, stop_tokens(model, tokenizer), seed)
    for step, asked in enumerate(prompts):
        if not reporter.wait():
            break
        clock = [reporter.now()]
        samples = engine.generate(
            [Prompt(ids, step * case.prompts + n) for n, ids in enumerate(asked)], case.samples, sampling
        )
        clock.append(reporter.now())
        batch, rewards = score(tokenizer, asked, samples)
        clock.append(reporter.now())
        metrics = policy.update(batch)
        clock.append(reporter.now())
        engine.sync(step + 1)
        clock.append(reporter.now())
        names = ("generate", "reward", "update", "sync")
        reporter.step.phases = {name: end - start for name, start, end in zip(names, clock, clock[1:], strict=False)}
        reporter.step.phases |= {
            f"update/{name.removeprefix('seconds/')}": value
            for name, value in metrics.items()
            if name.startswith("seconds/") and name != "seconds/update"
        }
        reporter.step.reward = statistics.fmean(rewards)
        reporter.step.tokens = sum(len(sample.completion) for sample in batch)
        reporter.step.rows = int(metrics["rows"])
        reporter.done()
    engine.close()


def make_policy(case: Case, model: PreTrainedModel) -> Policy:
    assert shared.ADAMW["eps"] == ADAM_EPS
    return Policy(
        model, loss=LossSpec(eps_low=shared.EPSILON, eps_high=shared.EPSILON), learning_rate=case.learning_rate,
        betas=shared.ADAMW["betas"], weight_decay=shared.ADAMW["weight_decay"], max_grad_norm=shared.MAX_GRAD_NORM,
        tokens_per_microbatch=case.rows_per_pass or TOKENS_PER_MICROBATCH, dtype=torch.bfloat16,
    )  # fmt: skip


def local_engine(case: Case, model: PreTrainedModel) -> LocalEngine:
    """On a GPU all rows decode together."""
    if case.device == "cpu" or case.prompt_tokens is None:
        return LocalEngine(model)
    columns = case.prompt_tokens + case.new_tokens
    return LocalEngine(model, max_rows=case.batch, tokens_in_flight=case.batch * columns)


def served_engine(case: Case, model: PreTrainedModel, url: str, folder: Path) -> Engine:
    from omni_fast.rollout.fleet import Fleet
    from omni_fast.rollout.sglang import SGLangEngine
    from omni_fast.sync import WeightSync

    fleet = Fleet([url], in_flight=case.batch)
    weights = WeightSync(fleet, model, folder, transport="tensor" if case.device == "cuda" else "disk")
    return SGLangEngine(fleet, weights, request_s=120, wait_s=10)


class SettledClock(Clock):
    """Waits for the GPU before it is read."""

    def lap(self, part: str) -> None:
        shared.settle("cuda")
        super().lap(part)


def score(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], groups: Sequence[list[Sample]]
) -> tuple[list[Trajectory], list[float]]:
    """What the policy trains on, and the rewards."""
    batch: list[Trajectory] = []
    rewards: list[float] = []
    for number, (prompt, samples) in enumerate(zip(prompts, groups, strict=True)):
        texts = tokenizer.batch_decode([sample.tokens for sample in samples], skip_special_tokens=True)
        scores = [shared.reward(text) for text in texts]
        rewards += scores
        batch += [
            Trajectory(prompt, sample.tokens, sample.logprobs, advantage, number)
            for sample, advantage in zip(samples, shared.advantages(scores), strict=True)
        ]
    return batch, rewards


def state_bytes(policy: Policy) -> int:
    """Working weights, fp32 masters, gradient sums and AdamW's two moments."""
    masters = sum(slot.master.nbytes for slot in policy.slots)
    return 4 * masters + sum(parameter.nbytes for parameter in policy.model.parameters())
