"""How many times faster than TRL's GRPOTrainer does one machine train, in how much memory, and what gives how much of it?

    python benchmarks/bench_train.py [--questions "TRL small" "TRL long" "TRL levers"] [--seeds 0] [--steps N] [--output FILE]

TRL small, TRL long   the same weights, prompts, reward, loss and AdamW; both trainers in a process of their own, alive side by
                      side, taking turns step by step. Their settings are in the result. Median over the steps but the first.
TRL levers            each of omni_fast's savings taken away alone, and what the step costs then.
TRL learning          the mean reward per step of both, and how far apart; nothing timed, so the machine may be busy.
TRL settings          a few steps of TRL in each of its settings that bear on speed, to choose --peers by.

The limit is the least time of the step's arithmetic and memory traffic at the rates measured just before (train/case.py). Memory
is what the process holds at a step's peak beyond the imports and beyond weights, gradients and optimiser state.
Results go to benchmarks/results/train-<machine>.json. --gate FILE: hold an advisory lock on FILE while measuring and let go of
it every few minutes, so that timed work of others has its turn.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scoreboard  # noqa: E402
from benchmarks.train import levers, ours, trl_peer  # noqa: E402
from benchmarks.train.case import CASES, Case, Limits  # noqa: E402
from benchmarks.train.trl_peer import Setting  # noqa: E402
from benchmarks.train.worker import Step, Worker  # noqa: E402
from omni_fast.policy import smollm2  # noqa: E402

SETTINGS = {
    "TRL small": (
        Setting("bfloat16", 48),
        Setting("float32", 48),
        Setting("bfloat16", 8),
        Setting("float32", 8),
        Setting("float32", 48, checkpointing=True),
    ),
    "TRL long": (
        Setting("bfloat16", 8),
        Setting("float32", 8),
        Setting("bfloat16", 4),
        Setting("bfloat16", 16),
    ),
}
TURN_S = 280.0  # how long a --gate is held at most before the others have their turn
PAUSE_S = 3.0

LEARNING = ("question", "case", "dtype", "contender", "role", "rewards", "learning", "settings", "versions")
Row = dict[str, object]


class Gate:
    """An advisory lock on a file that is let go between two measurements after `TURN_S`; without a file, nothing."""

    def __init__(self, path: Path | None) -> None:
        self.handle = path.open("a") if path else None
        self.since = 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        self._take()
        yield
        if self.handle:
            fcntl.flock(self.handle, fcntl.LOCK_UN)

    def between(self) -> None:
        if self.handle and time.monotonic() - self.since > TURN_S:
            fcntl.flock(self.handle, fcntl.LOCK_UN)
            time.sleep(PAUSE_S)
            self._take()

    def _take(self) -> None:
        if self.handle:
            fcntl.flock(self.handle, fcntl.LOCK_EX)
        self.since = time.monotonic()


def race(
    case: Case, peers: Sequence[Setting], model: str, seeds: Sequence[int], gate: Gate, minutes: float = math.inf
) -> list[Row]:
    """Both trainers in turns, step by step; with more than one seed each starts again for each.

    minutes: of a seed, after which no further step begins (three are made in any case).
    """
    names = [ours.NAME, *(peer.name for peer in peers)]
    steps: dict[str, dict[int, list[Step]]] = {name: {} for name in names}
    hellos = {}
    with gate.held():
        limits = Limits.measured()
        print(f"GEMM {limits.gemm / 1e12:.2f} TFLOP/s, copy {limits.copy / 1e9:.0f} GB/s", flush=True)
        for seed in seeds:
            workers = [
                Worker(ours.NAME, ours.run, case, model, seed),
                *(Worker(peer.name, trl_peer.run, case, model, seed, peer) for peer in peers),
            ]
            asked, started = workers[0].hello.prompts, time.monotonic()
            for worker in workers:
                if worker.hello.prompts != asked:
                    raise SystemExit(f"{worker.name} does not see the prompts that {ours.NAME} sees")
                hellos[worker.name] = worker.hello
                steps[worker.name][seed] = worker.steps
            for number in range(case.steps):
                for worker in workers:
                    done = worker.step()
                    print(
                        f"  {case.question} seed {seed} step {number + 1:2} {worker.name:44} {done.seconds:6.2f} s  "
                        f"reward {done.reward:.3f}  {done.tokens / case.batch:4.1f} tokens",
                        flush=True,
                    )
                gate.between()
                if number >= 2 and time.monotonic() - started > 60 * minutes:
                    break
            for worker in workers:
                worker.close()
    config = AutoConfig.from_pretrained(model)
    rows = [_row(case, name, steps[name], hellos[name], asked, limits, config, steps[ours.NAME]) for name in names]
    best = min(float(str(row["seconds"])) for row in rows[1:]) if peers else None
    for row in rows:
        row["ratio_to_best_peer"] = best and round(best / float(str(row["seconds"])), 3)
    for row in rows[1:]:
        row["learning"] = _learning(steps[ours.NAME], steps[str(row["contender"])])
    return rows


def _row(case, name, by_seed, hello, asked, limits: Limits, config: PretrainedConfig, own) -> Row:
    timed = [step for steps in by_seed.values() for step in steps[1:]]
    seconds = [step.seconds for step in timed]
    median = statistics.median(seconds)
    phases = {phase: statistics.median(step.phases.get(phase, 0.0) for step in timed) for phase in timed[-1].phases}
    phases["update"] = statistics.median(
        step.seconds - sum(step.phases.get(phase, 0.0) for phase in ("generate", "reward", "sync")) for step in timed
    )
    phases.setdefault("sync", 0.0)
    prompt_rows = sum(len(ids) for ids in asked[0])
    own_rows = statistics.fmean(step.rows for steps in own.values() for step in steps[1:])
    tokens = round(statistics.fmean(step.tokens for step in timed))
    limit = limits.seconds(case, config, prompt_rows, round(own_rows), tokens)
    peak = max(step.peak_bytes for step in timed)
    return {
        "question": case.question,
        "case": case.name,
        "dtype": "bfloat16",
        "contender": name,
        "role": "ours" if name == ours.NAME else "peer",
        "seconds": round(median, 4),
        "seconds_low": round(min(seconds), 4),
        "seconds_high": round(max(seconds), 4),
        "steps": len(seconds),
        "samples_per_s": round(case.batch / median, 3),
        "phases": {
            phase: {"seconds": round(value, 4), "share": round(value / median, 3)}
            for phase, value in sorted(phases.items())
        },
        "rows_in_update": round(statistics.fmean(step.rows for step in timed)),
        "completion_tokens": round(tokens / case.batch, 2),
        "prompt_tokens": round(prompt_rows / case.prompts, 1),
        "peak_bytes": peak,
        "state_bytes": hello.state_bytes,
        "peak_bytes_above_state": peak - hello.state_bytes,
        "ratio_to_best_peer": None,
        "ratio_to_limit": round(sum(limit.values()) / median, 3),
        "limit_seconds": {phase: round(value, 4) for phase, value in limit.items()},
        "limits": limits.record(),
        "settings": hello.settings | {"learning_rate": case.learning_rate, "threads": case.threads},
        "rewards": {str(seed): [round(step.reward, 4) for step in steps] for seed, steps in by_seed.items()},
        "versions": versions(),
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


def sweep(case: Case, numbers: Sequence[int], model: str, gate: Gate) -> list[Row]:
    """TRL alone in each setting, one after the other: which is its best?"""
    rows: list[Row] = []
    with gate.held():
        for setting in (SETTINGS[case.question][number] for number in numbers):
            worker = Worker(setting.name, trl_peer.run, case, model, 0, setting)
            for _ in range(case.steps):
                worker.step()
            worker.close()
            gate.between()
            timed = worker.steps[1:]
            peak = max(step.peak_bytes for step in timed)
            rows.append(
                {
                    "question": "TRL settings",
                    "case": case.name,
                    "dtype": "bfloat16",
                    "contender": setting.name,
                    "seconds": round(statistics.median(step.seconds for step in timed), 4),
                    "steps": len(timed),
                    "peak_bytes_above_state": peak - worker.hello.state_bytes,
                    "settings": worker.hello.settings,
                    "versions": versions(),
                }
            )
            print(
                json.dumps({key: rows[-1][key] for key in ("case", "contender", "seconds", "peak_bytes_above_state")}),
                flush=True,
            )
    return rows


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "accelerate", "datasets")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def save(rows: Sequence[Row], path: Path) -> None:
    """Replaces the rows of the same question and case, leaves the others."""
    asked = {(row["question"], row["case"]) for row in rows}
    kept = [row for row in json.loads(path.read_text())] if path.exists() else []
    kept = [row for row in kept if (row["question"], row["case"]) not in asked] + list(rows)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(sorted(kept, key=lambda row: (str(row["question"]), str(row["case"]))), indent=1) + "\n")


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        phases = row["phases"]
        assert isinstance(phases, dict)
        shares = "  ".join(f"{name} {value['seconds']:.2f}" for name, value in phases.items())
        print(f"{row['question']}  {row['contender']}: {row['seconds']} s  {row['samples_per_s']} samples/s  "
              f"x{row['ratio_to_best_peer']} of the best peer  {row['ratio_to_limit']} of the limit  "
              f"{float(str(row['peak_bytes_above_state'])) / 2**20:.0f} MiB above its state\n    {shares}")  # fmt: skip
        if "learning" in row:
            print(f"    {row['learning']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*CASES, "TRL levers", "TRL learning", "TRL settings"]
    parser.add_argument("--questions", nargs="+", default=[*CASES, "TRL levers"], choices=choices)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="of each trainer; default: what the case says")
    parser.add_argument("--peers", nargs="*", type=int, help="which of TRL's settings (SETTINGS)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="of settings and levers")
    parser.add_argument("--threads", type=int, help="of each trainer; default: what the case says")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no step of a race begins")
    parser.add_argument("--rounds", type=int, default=5, help="of the levers")
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--output", type=Path, default=scoreboard.RESULTS / f"train-{scoreboard.machine()}.json")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model, gate = str(smollm2.folder()), Gate(arguments.gate)
    for question in arguments.questions:
        if question in CASES or question == "TRL learning":
            name = question if question in CASES else arguments.cases[0]
            case = replace(CASES[name], steps=arguments.steps or CASES[name].steps)
            case = replace(case, threads=arguments.threads or case.threads)
            torch.set_num_threads(case.threads)
            peers = [SETTINGS[name][number] for number in ((0, 1) if arguments.peers is None else arguments.peers)]
            rows = race(case, peers, model, arguments.seeds, gate, arguments.minutes)
            show(rows)
            if question == "TRL learning":
                rows = [{key: row[key] for key in LEARNING if key in row} | {"question": question} for row in rows]
            save(rows, arguments.output)
        elif question == "TRL settings":
            for name in arguments.cases:
                numbers = range(len(SETTINGS[name])) if arguments.peers is None else arguments.peers
                save(sweep(replace(CASES[name], steps=arguments.steps or 3), numbers, model, gate), arguments.output)
        else:
            with gate.held():
                for name in arguments.cases:
                    save(levers.measure(CASES[name], model, arguments.rounds, gate.between), arguments.output)


if __name__ == "__main__":
    main()
