"""Contenders race: each in a process of its own, alive side by side, taking turns step by step; a row of JSON for each.

A contender that fails gets a row with the reason, and the others go on.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from transformers import AutoConfig, PretrainedConfig

from benchmarks import scoreboard
from benchmarks.train import ours
from benchmarks.train.case import Case, Limits, Work
from benchmarks.train.worker import Failed, Hello, Step, Worker

Row = dict[str, object]
Start = Callable[[int], Worker]  # of a seed
Answer = TypeVar("Answer")
LEAST_STEPS = 3
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "liger-kernel", "flash-attn")


def contender(
    name: str, target: Callable[..., None], case: Case, model: str, *more: object, answer_s: float = 1800.0
) -> Start:
    """`target(connection, case, model, seed, *more)` in a process of its own."""
    return lambda seed: Worker(name, target, case, model, seed, *more, answer_s=answer_s)


def race(
    case: Case,
    contenders: Sequence[Start],
    model: str,
    seeds: Sequence[int],
    end: float = math.inf,
) -> list[Row]:
    """All contenders in turns, step by step; with more than one seed each starts again for each.

    end: on the monotonic clock; after it no step begins, but `LEAST_STEPS` of each seed are made in any case. Rows of omni_fast (whose names begin with it) have the role "ours".
    """
    steps: dict[str, dict[int, list[Step]]] = {}
    hellos: dict[str, Hello] = {}
    failed: dict[str, str] = {}
    limits = Limits.measured(case.device)
    print(f"GEMM {limits.gemm / 1e12:.2f} TFLOP/s, copy {limits.copy / 1e9:.0f} GB/s", flush=True)
    asked: list[list[list[int]]] = []
    for seed in seeds:
        workers = [start(seed) for start in contenders]
        asked = []
        for worker, hello in _answers(workers, Worker.hello, failed):
            asked = asked or hello.prompts
            hellos[worker.name] = hello
            steps.setdefault(worker.name, {})[seed] = worker.steps
            if hello.prompts != asked:
                _leave(worker, workers, "does not see the prompts that the first contender sees", failed)
        for number in range(case.steps):
            for worker, done in _answers(workers, Worker.step, failed):
                print(
                    f"  {case.question} seed {seed} step {number + 1:2} {worker.name:44} {done.seconds:6.2f} s  "
                    f"reward {done.reward:.3f}  {done.tokens / case.batch:4.1f} tokens",
                    flush=True,
                )
            if number + 1 >= LEAST_STEPS and time.monotonic() > end:
                break
        for worker in workers:
            worker.close()
    config = AutoConfig.from_pretrained(model)
    measured = [name for name in steps if name not in failed]
    own = next((steps[name] for name in measured if _is_ours(name)), None)
    found = {name: _row(case, name, steps[name], hellos[name], asked, limits, config, own) for name in measured}
    best = min((float(str(row["seconds"])) for name, row in found.items() if not _is_ours(name)), default=None)
    for name, row in found.items():
        row["ratio_to_best_peer"] = best and round(best / float(str(row["seconds"])), 3)
        if own and not _is_ours(name):
            row["learning"] = _learning(own, steps[name])
    return [
        *found.values(),
        *(head(case, name) | {"role": role(name), "error": reason} for name, reason in failed.items()),
    ]


def _answers(
    workers: list[Worker], ask: Callable[[Worker], Answer], failed: dict[str, str]
) -> Iterator[tuple[Worker, Answer]]:
    """One after the other; those that fail leave."""
    for worker in list(workers):
        try:
            answer = ask(worker)
        except Failed as reason:
            _leave(worker, workers, str(reason), failed)
        else:
            yield worker, answer


def _leave(worker: Worker, workers: list[Worker], reason: str, failed: dict[str, str]) -> None:
    print(f"  {worker.name}: {reason}", flush=True)
    failed[worker.name] = reason
    workers.remove(worker)
    worker.close()


def _is_ours(name: str) -> bool:
    return name.startswith(ours.NAME)


def role(name: str) -> str:
    return "ours" if _is_ours(name) else "peer"


def head(case: Case, name: str) -> Row:
    """What every row begins with."""
    return {
        "question": case.question, "case": case.name, "model": case.model, "dtype": "bfloat16", "contender": name,
        "machine": scoreboard.machine(), "versions": scoreboard.versions(*PACKAGES),
    }  # fmt: skip


def _row(
    case: Case,
    name: str,
    by_seed: dict[int, list[Step]],
    hello: Hello,
    asked: list[list[list[int]]],
    limits: Limits,
    config: PretrainedConfig,
    own: dict[int, list[Step]] | None,
) -> Row:
    timed = [step for steps in by_seed.values() for step in steps[1:]]
    seconds = [step.seconds for step in timed]
    median = statistics.median(seconds)
    phases = {phase: statistics.median(step.phases.get(phase, 0.0) for step in timed) for phase in timed[-1].phases}
    phases["update"] = statistics.median(
        step.seconds - sum(step.phases.get(phase, 0.0) for phase in ("generate", "reward", "sync")) for step in timed
    )
    phases.setdefault("sync", 0.0)
    prompt_rows = sum(len(ids) for ids in asked[0])
    rows = round(statistics.fmean(step.rows for step in timed))
    tokens = round(statistics.fmean(step.tokens for step in timed))
    needed = [step.rows for steps in (own or by_seed).values() for step in steps[1:]]
    limit = limits.seconds(case, config, prompt_rows, round(statistics.fmean(needed)), tokens)
    naive_rows = prompt_rows * case.samples + tokens
    works = {
        "computed": Work.of(case, config, prompt_rows, tokens, rows, _is_ours(name)),
        "naive": Work.of(case, config, prompt_rows, tokens, naive_rows, False),
    }
    peak = max(step.peak_bytes for step in timed)
    return head(case, name) | {
        "role": role(name),
        "seconds": round(median, 4),
        "seconds_low": round(min(seconds), 4),
        "seconds_high": round(max(seconds), 4),
        "steps": len(seconds),
        "samples_per_s": round(case.batch / median, 3),
        "phases": {
            phase: {"seconds": round(value, 4), "share": round(value / median, 3)}
            for phase, value in sorted(phases.items())
        },
        "rows_in_update": rows,
        "rows_naive": naive_rows,
        "completion_tokens": round(tokens / case.batch, 2),
        "prompt_tokens": round(prompt_rows / case.prompts, 1),
        "flops": {of: {"generate": work.generate, "update": work.update} for of, work in works.items()},
        "mfu": {
            of: {
                "update": round(work.update / phases["update"] / limits.gemm, 4),
                "step": round((work.generate + work.update) / median / limits.gemm, 4),
            }
            for of, work in works.items()
        },
        "peak_bytes": peak,
        "state_bytes": hello.state_bytes,
        "peak_bytes_above_state": peak - hello.state_bytes,
        "ratio_to_best_peer": None,
        "ratio_to_limit": round(sum(limit.values()) / median, 3),
        "limit_seconds": {phase: round(value, 4) for phase, value in limit.items()},
        "limits": limits.record(),
        "settings": hello.settings | {"learning_rate": case.learning_rate, "threads": case.threads},
        "rewards": {str(seed): [round(step.reward, 4) for step in steps] for seed, steps in by_seed.items()},
    }


def _learning(ours_by_seed: dict[int, list[Step]], theirs_by_seed: dict[int, list[Step]]) -> Row:
    """How far apart the curves are: paired differences of the mean reward, over all steps and over the last third."""
    pairs = [
        (number, a.reward - b.reward)
        for seed in ours_by_seed
        for number, (a, b) in enumerate(zip(ours_by_seed[seed], theirs_by_seed[seed], strict=True))
    ]
    steps = 1 + max(number for number, _ in pairs)
    last = steps - max(2, steps // 3)

    def difference(values: list[float]) -> Row:
        error = statistics.stdev(values) / math.sqrt(len(values))
        return {"mean": round(statistics.fmean(values), 4), "standard_error": round(error, 4), "pairs": len(values)}

    return {
        "ours_minus_theirs": difference([value for _, value in pairs]),
        "ours_minus_theirs_last_third": difference([value for number, value in pairs if number >= last]),
        "rise_ours": _rise(ours_by_seed),
        "rise_theirs": _rise(theirs_by_seed),
    }


def _rise(by_seed: dict[int, list[Step]]) -> float:
    """Mean reward of the last quarter of the steps less that of the first."""
    parts = []
    for steps in by_seed.values():
        quarter = max(1, len(steps) // 4)
        rewards = [step.reward for step in steps]
        parts.append(statistics.fmean(rewards[-quarter:]) - statistics.fmean(rewards[:quarter]))
    return round(statistics.fmean(parts), 4)


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        if "error" in row:
            print(f"{row['question']}  {row['contender']}: {row['error']}")
            continue
        phases, mfu = row["phases"], row["mfu"]
        assert isinstance(phases, dict) and isinstance(mfu, dict)
        shares = "  ".join(f"{name} {value['seconds']:.2f}" for name, value in phases.items())
        print(f"{row['question']}  {row['contender']}: {row['seconds']} s  {row['samples_per_s']} samples/s  "
              f"x{row['ratio_to_best_peer']} of the best peer  {row['ratio_to_limit']} of the limit  "
              f"MFU of the update {mfu['computed']['update']}, of the step {mfu['computed']['step']}, by naive rows "
              f"{mfu['naive']['update']}, {mfu['naive']['step']}  "
              f"{float(str(row['peak_bytes_above_state'])) / 2**20:.0f} MiB above its state\n    {shares}")  # fmt: skip
        if "learning" in row:
            print(f"    {row['learning']}")
