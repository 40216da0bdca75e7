"""Each lever alone: what a phase of a step costs when one of omni_fast's savings is taken away.

All variants work on the same batch with a learning rate of 0 and take turns round by round; the row's `off` is the median
without the lever, `on` that with all of them. What is taken away comes back as others do it, patched in from here: the
trainer itself has no switch for doing more work than it must.
"""

from __future__ import annotations

import importlib.metadata
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import scoreboard
from benchmarks.scoreboard import Run
from benchmarks.train import case as shared
from benchmarks.train import ours
from benchmarks.train.case import Case
from omni_fast.policy import pack as packing
from omni_fast.policy import update
from omni_fast.policy.model import load, stop_tokens
from omni_fast.policy.pack import MicroBatch, Trajectory
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


def measure(case: Case, model_path: str, rounds: int, between: Callable[[], None]) -> list[dict[str, object]]:
    """The rows of one case."""
    torch.set_num_threads(case.threads)
    case = replace(case, learning_rate=0.0)
    model, tokenizer = load(model_path, dtype=torch.float32)
    policy, engine = ours.make_policy(case, model), LocalEngine(model)
    prompts = [shared.prompt_tokens(tokenizer, text) for text in shared.questions(case, tokenizer, 0)[0]]
    sampling = Sampling(case.new_tokens, 1.0, stop_tokens(model, tokenizer), 0)
    once = [Prompt(tokens, number) for number, tokens in enumerate(prompts)]
    repeated = [prompt for prompt in once for _ in range(case.samples)]
    batch, _ = ours.score(tokenizer, prompts, engine.generate(once, case.samples, sampling))
    ragged = _cut(batch)
    baselines = {
        "generate": lambda: engine.generate(once, case.samples, sampling),
        "update": lambda: policy.update(batch),
        "packed": _with(lambda: policy.update(ragged), policy, share="none"),
    }
    levers = (
        Lever("shared prompt in rollout", "generate", "each prompt computed for each of its samples",
              lambda: engine.generate(repeated, 1, sampling), "generate"),
        Lever("2 threads in rollout", "generate", "1 thread", _with(baselines["generate"], engine, threads=1), "generate"),
        Lever("shared prompt in training (prefix tree)", "update", "each sample with its own copy of the prompt",
              _with(baselines["update"], policy, share="none"), "update"),
        Lever("shared beginnings of completions", "update", "only the prompt shared",
              _with(baselines["update"], policy, share="prompt"), "update"),
        Lever("no second forward", "update", "old log-probs by a forward pass of their own",
              lambda: (policy.measure(batch), policy.update(batch)), "update"),
        Lever("no logits (linear_policy_loss)", "update", "fp32 logits, log_softmax and autograd",
              _with(baselines["update"], update, linear_policy_loss=materialised), "update"),
        Lever("head on active rows only", "update", "head on every row, prompts too",
              _with(baselines["update"], update, pack=_every_row), "update"),
        Lever("packing, nothing padded", "update", "samples padded to the longest, none shared",
              _with(_with(lambda: policy.update(ragged), packing, _lay_out=_padded), policy, share="none"), "packed"),
        Lever("2 threads in training", "update", "1 thread", _one_thread(baselines["update"]), "update"),
    )  # fmt: skip
    calls = baselines | {lever.name: lever.call for lever in levers}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks = {}
    for name, call in calls.items():
        call()
        peaks[name] = scoreboard.peak_bytes(Run(call))
        between()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        between()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    step = medians["generate"] + medians["update"]
    rows: list[dict[str, object]] = []
    for lever in levers:
        on, off = medians[lever.against], medians[lever.name]
        rows.append(
            {
                "question": "TRL levers",
                "case": case.name,
                "dtype": "bfloat16",
                "contender": lever.name,
                "phase": lever.phase,
                "without_it": lever.off,
                "seconds_on": round(on, 4),
                "seconds_off": round(off, 4),
                "spread_off": [round(min(seconds[lever.name]), 4), round(max(seconds[lever.name]), 4)],
                "rounds": rounds,
                "times_faster": round(off / on, 3),
                "step_times_faster": round((step - on + off) / step, 3) if lever.against != "packed" else None,
                "peak_bytes_on": peaks[lever.against],
                "peak_bytes_off": peaks[lever.name],
                "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
            }
        )
        print(f"  {case.question}  {lever.name:42} on {on:7.3f} s  off {off:7.3f} s  x{off / on:.2f}", flush=True)
    engine.close()
    return rows


def _cut(batch: Sequence[Trajectory]) -> list[Trajectory]:
    """The batch with completions of mixed length, a quarter to all of their tokens."""
    draw = random.Random(0)
    cut = []
    for sample in batch:
        length = len(sample.completion)
        kept = draw.randint(max(1, length // 4), length)
        cut.append(replace(sample, completion=sample.completion[:kept], logprobs=sample.logprobs[:kept]))
    return cut


@contextmanager
def _changed(owner: object, **values: object) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _with(call: Callable[[], object], owner: object, **values: object) -> Callable[[], object]:
    def changed() -> object:
        with _changed(owner, **values):
            return call()

    return changed


def _one_thread(call: Callable[[], object]) -> Callable[[], object]:
    def alone() -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return alone


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
        used = torch.zeros(micro.input_ids.numel(), dtype=torch.bool)
        used[micro.predicts] = True
        others = (~used).nonzero().squeeze(1)
        zeros = torch.zeros(len(others))
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
