"""omni_fast's side of the comparison: the engine, the policy and the step of `omni_fast.train`, on given prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.train import case as shared
from benchmarks.train.case import Case
from benchmarks.train.worker import Hello, Reporter
from omni_fast.policy.model import load, stop_tokens
from omni_fast.policy.pack import Trajectory
from omni_fast.policy.update import ADAM_EPS, Policy
from omni_fast.rollout.engine import Prompt, Sample, Sampling
from omni_fast.rollout.local import LocalEngine
from omni_kernels import LossSpec

TOKENS_PER_MICROBATCH = 4096
NAME = "omni_fast"


def run(connection: Connection, case: Case, model_path: str, seed: int) -> None:
    torch.set_num_threads(case.threads)
    reporter = Reporter(connection)
    model, tokenizer = load(model_path, dtype=torch.float32)
    policy = make_policy(case, model)
    engine = LocalEngine(model)
    prompts = [
        [shared.prompt_tokens(tokenizer, text) for text in texts] for texts in shared.questions(case, tokenizer, seed)
    ]
    settings: dict[str, object] = {
        "weights": "bf16, fp32 masters", "optimiser": "fused AdamW, fp32", "engine": "LocalEngine",
        "tokens_per_microbatch": TOKENS_PER_MICROBATCH, "share": "tree",
    }  # fmt: skip
    reporter.hello(Hello(settings, state_bytes(policy), prompts))
    sampling = Sampling(case.new_tokens, 1.0, stop_tokens(model, tokenizer), seed)
    for step, asked in enumerate(prompts):
        if not reporter.wait():
            return
        clock = [time.perf_counter()]
        samples = engine.generate(
            [Prompt(ids, step * case.prompts + n) for n, ids in enumerate(asked)], case.samples, sampling
        )
        clock.append(time.perf_counter())
        batch, rewards = score(tokenizer, asked, samples)
        clock.append(time.perf_counter())
        metrics = policy.update(batch)
        clock.append(time.perf_counter())
        engine.sync(step + 1)
        clock.append(time.perf_counter())
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


def make_policy(case: Case, model: torch.nn.Module) -> Policy:
    assert shared.ADAMW["eps"] == ADAM_EPS
    return Policy(
        model, loss=LossSpec(eps_low=shared.EPSILON, eps_high=shared.EPSILON), learning_rate=case.learning_rate,
        betas=shared.ADAMW["betas"], weight_decay=shared.ADAMW["weight_decay"], max_grad_norm=shared.MAX_GRAD_NORM,
        tokens_per_microbatch=TOKENS_PER_MICROBATCH, dtype=torch.bfloat16,
    )  # fmt: skip


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
