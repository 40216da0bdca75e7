"""Each lever alone: what a phase of a step costs when one of omni_fast's savings is taken away.

All variants work on the same batch with a learning rate of 0 and take turns round by round; the row's `off` is the median
without the lever, `on` that with all of them, each timed just before its `off`; `times_faster` is the median of their ratios.
What is taken away comes back as others do it, patched in from here: the trainer itself has no switch for doing more work than
it must.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import scoreboard
from benchmarks.scoreboard import Run
from benchmarks.train import case as shared
from benchmarks.train import ours
from benchmarks.train.case import Case
from benchmarks.train.race import Row, head
from benchmarks.train.worker import message
from omni_fast.policy import pack as packing
from omni_fast.policy import update
from omni_fast.policy.model import load, stop_tokens
from omni_fast.policy.pack import MicroBatch, Trajectory
from omni_fast.policy.update import Policy
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.local import LocalEngine
from omni_kernels import LossOutput, LossSpec, Tokens, policy_loss


@dataclass(frozen=True)
class Lever:
    """What is taken away, of which phase, against which other variant; `call` runs the phase without it."""

    name: str
    phase: str
    off: str
    call: Callable[[], object]
    against: str = "all"


@dataclass(frozen=True)
class Setup:
    """What the variants share. calls: the phases with all savings; "packed" has completions of mixed length, none shared."""

    case: Case
    policy: Policy
    engine: LocalEngine
    sampling: Sampling
    prompts: list[Prompt]
    batch: list[Trajectory]
    ragged: list[Trajectory]
    calls: dict[str, Callable[[], object]]


def measure(
    case: Case,
    model_path: str,
    rounds: int,
    which: Callable[[Setup], Sequence[Lever]],
    end: float = math.inf,
) -> list[Row]:
    """The rows of one case. A variant that fails gets a row with the reason.

    end: on the monotonic clock; half of the time until then is for trying each once. What no time is left for gets a row that
    says so.
    """
    torch.set_num_threads(case.threads)
    case = replace(case, learning_rate=0.0)
    model, tokenizer = load(model_path, dtype=torch.float32, device=case.device)
    policy, engine = ours.make_policy(case, model), ours.local_engine(case, model)
    asked = [shared.prompt_tokens(tokenizer, text) for text in shared.questions(case, tokenizer, 0)[0]]
    sampling = Sampling(case.new_tokens, 1.0, stop_tokens(model, tokenizer), 0)
    prompts = [Prompt(tokens, number) for number, tokens in enumerate(asked)]
    batch, _ = ours.score(tokenizer, asked, engine.generate(prompts, case.samples, sampling))
    ragged = _cut(batch)
    baselines = {
        "generate": lambda: engine.generate(prompts, case.samples, sampling),
        "update": lambda: policy.update(batch),
        "packed": changed(lambda: policy.update(ragged), policy, share="none"),
    }
    levers = which(Setup(case, policy, engine, sampling, prompts, batch, ragged, baselines))
    calls = baselines | {lever.name: lever.call for lever in levers}
    seconds, before, peaks, failed = _timed(case, calls, {x.name: x.against for x in levers}, rounds, end)
    if lost := [f"{name}: {failed[name]}" for name in ("generate", "update") if name in failed]:
        raise RuntimeError("; ".join(lost))
    medians = {name: statistics.median(values) for name, values in seconds.items() if name not in failed}
    step = medians["generate"] + medians["update"]
    rows: list[Row] = []
    for lever in levers:
        row = head(case, lever.name) | {"phase": lever.phase, "without_it": lever.off}
        if reason := failed.get(lever.name) or failed.get(lever.against):
            print(f"  {case.question}  {lever.name}: {reason}", flush=True)
            rows.append(row | {"error": reason})
            continue
        on, off = statistics.median(before[lever.name]), medians[lever.name]
        times = statistics.median(b / a for a, b in zip(before[lever.name], seconds[lever.name], strict=True))
        of_step = lever.against in ("generate", "update")
        rows.append(
            row
            | {
                "seconds_on": round(on, 4),
                "seconds_off": round(off, 4),
                "spread_off": [round(min(seconds[lever.name]), 4), round(max(seconds[lever.name]), 4)],
                "rounds": len(seconds[lever.name]),
                "times_faster": round(times, 3),
                "step_times_faster": round(1 + (times - 1) * medians[lever.against] / step, 3) if of_step else None,
                "peak_bytes_on": peaks[lever.against],
                "peak_bytes_off": peaks[lever.name],
            }
        )
        print(f"  {case.question}  {lever.name:42} on {on:7.3f} s  off {off:7.3f} s  x{times:.2f}", flush=True)
    engine.close()
    return rows


def _timed(
    case: Case,
    calls: dict[str, Callable[[], object]],
    against: dict[str, str],
    rounds: int,
    end: float,
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int | None], dict[str, str]]:
    """Seconds by round of each call, and of what it stands `against` just before it (the speed of a shared machine drifts);
    peak memory of each, and why those failed that did."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    before: dict[str, list[float]] = {name: [] for name in against}
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    middle = (begun := time.monotonic()) + (end - begun) / 2
    for number in range(-1, rounds):  # the first time nothing is timed
        for name, call in calls.items():
            late = time.monotonic() > (middle if number < 0 else end)
            if late and not seconds[name]:
                failed.setdefault(name, "left out: no time")
            if late or name in failed or against.get(name) in failed:
                continue
            try:
                if number < 0:
                    call()
                    peaks[name] = scoreboard.peak_bytes(Run(call))
                    continue
                first = scoreboard.timed(calls[against[name]]) if name in against else None
                seconds[name].append(scoreboard.timed(call))
                if first is not None:
                    before[name].append(first)
            except Exception as error:  # whatever it is, the other variants are still worth measuring
                failed[name] = message(error)
                if case.device == "cuda":
                    torch.cuda.empty_cache()
    return seconds, before, peaks, failed


def savings(setup: Setup) -> tuple[Lever, ...]:
    """Those that every device has."""
    policy, engine, sampling = setup.policy, setup.engine, setup.sampling
    learn, ragged = setup.calls["update"], setup.ragged
    repeated = [prompt for prompt in setup.prompts for _ in range(setup.case.samples)]
    return (
        Lever("shared prompt in rollout", "generate", "each prompt computed for each of its samples",
              lambda: engine.generate(repeated, 1, sampling), "generate"),
        Lever("shared prompt in training (prefix tree)", "update", "each sample with its own copy of the prompt",
              changed(learn, policy, share="none"), "update"),
        Lever("shared beginnings of completions", "update", "only the prompt shared",
              changed(learn, policy, share="prompt"), "update"),
        Lever("no second forward", "update", "old log-probs by a forward pass of their own",
              lambda: (policy.measure(setup.batch), policy.update(setup.batch)), "update"),
        Lever("no logits (linear_policy_loss)", "update", "fp32 logits, log_softmax and autograd",
              changed(learn, update, linear_policy_loss=materialised), "update"),
        Lever("head on active rows only", "update", "head on every row, prompts too",
              changed(learn, update, pack=_every_row), "update"),
        Lever("packing, nothing padded", "update", "samples padded to the longest, none shared",
              changed(changed(lambda: policy.update(ragged), packing, _lay_out=_padded), policy, share="none"), "packed"),
    )  # fmt: skip


def threads(setup: Setup) -> tuple[Lever, ...]:
    """Those of a CPU besides."""
    generate, learn = setup.calls["generate"], setup.calls["update"]
    return (
        Lever("2 threads in rollout", "generate", "1 thread", changed(generate, setup.engine, threads=1), "generate"),
        Lever("2 threads in training", "update", "1 thread", partial(_one_thread, learn), "update"),
    )


def _cut(batch: Sequence[Trajectory]) -> list[Trajectory]:
    """The batch with completions of mixed length, a quarter to all of their tokens."""
    draw = random.Random(0)
    cut = []
    for sample in batch:
        length = len(sample.completion)
        kept = draw.randint(max(1, length // 4), length)
        cut.append(replace(sample, completion=sample.completion[:kept], logprobs=sample.logprobs[:kept]))
    return cut


def changed(call: Callable[[], object], owner: object, **values: object) -> Callable[[], object]:
    """`call` with other attributes of `owner`."""

    def inside() -> object:
        with patch.multiple(owner, **values):
            return call()

    return inside


def _one_thread(call: Callable[[], object]) -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


def materialised(hidden: Tensor, weight: Tensor, tokens: Tokens, spec: LossSpec, **settings: object) -> LossOutput:
    """The loss as it is usually written: all logits in fp32, log_softmax, and autograd back through them."""
    logps = torch.log_softmax(F.linear(hidden, weight).float() * settings["inv_temperature"], dim=-1)
    logp = logps.gather(1, tokens.targets[:, None]).squeeze(1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
    output = policy_loss(logp, entropy, tokens, spec)
    return LossOutput(output.loss, output.metrics, logp.detach(), entropy)


def _every_row(batch: Sequence[Trajectory], **settings) -> list[MicroBatch]:
    """Packed as ever, with a head output for each row that predicts no completion token (its advantage is 0)."""
    micro_batches = packing.pack(batch, **settings)
    for micro in micro_batches:
        used = torch.zeros(micro.input_ids.numel(), dtype=torch.bool, device=micro.predicts.device)
        used[micro.predicts] = True
        others = (~used).nonzero().squeeze(1)
        zeros = torch.zeros(len(others), device=micro.predicts.device)
        micro.predicts = torch.cat((micro.predicts, others))
        micro.targets = torch.cat((micro.targets, micro.input_ids[0, others]))
        micro.advantages, micro.rollout = torch.cat((micro.advantages, zeros)), torch.cat((micro.rollout, zeros))
        micro.sequences = torch.cat((micro.sequences, zeros.long()))
    return micro_batches


_lay_out = packing._lay_out


def _padded(trajectories, trees, device) -> MicroBatch:
    """As a padded batch: every sample's rows filled up to those of the longest."""
    longest = max(len(tree.tokens) for tree in trees)
    for tree in trees:
        while len(tree.tokens) < longest:
            tree.add(len(tree.tokens) - 1, 0)
    return _lay_out(trajectories, trees, device)
