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
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scoreboard  # noqa: E402
from benchmarks.train import levers, ours, trl_peer  # noqa: E402
from benchmarks.train.case import CASES, Case  # noqa: E402
from benchmarks.train.race import Row, contender, race, save, show, versions  # noqa: E402
from benchmarks.train.trl_peer import Setting  # noqa: E402
from benchmarks.train.worker import Worker  # noqa: E402
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


def sweep(case: Case, numbers: Sequence[int], model: str, gate: Gate) -> list[Row]:
    """TRL alone in each setting, one after the other: which is its best?"""
    rows: list[Row] = []
    with gate.held():
        for setting in (SETTINGS[case.question][number] for number in numbers):
            worker = Worker(setting.name, trl_peer.run, case, model, 0, setting)
            hello = worker.hello()
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
                    "peak_bytes_above_state": peak - hello.state_bytes,
                    "settings": hello.settings,
                    "versions": versions(),
                }
            )
            print(
                json.dumps({key: rows[-1][key] for key in ("case", "contender", "seconds", "peak_bytes_above_state")}),
                flush=True,
            )
    return rows


def _cpu_levers(setup: levers.Setup) -> list[levers.Lever]:
    return [*levers.savings(setup), *levers.threads(setup)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*CASES, "TRL levers", "TRL learning", "TRL settings"]
    parser.add_argument("--questions", nargs="+", default=[*CASES, "TRL levers"], choices=choices)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="of each trainer; default: what the case says")
    parser.add_argument("--peers", nargs="*", type=int, help="which of TRL's settings (SETTINGS)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="of settings and levers")
    parser.add_argument("--threads", type=int, help="of each trainer; default: what the case says")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="after which no step of a race begins; three of each seed are made",
    )
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
            contenders = [contender(ours.NAME, ours.run, case, model)]
            contenders += [contender(peer.name, trl_peer.run, case, model, peer) for peer in peers]
            with gate.held():
                end = time.monotonic() + 60 * arguments.minutes
                rows = race(case, contenders, model, arguments.seeds, gate.between, end)
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
                    rows = levers.measure(CASES[name], model, arguments.rounds, _cpu_levers, gate.between)
                    save(rows, arguments.output)


if __name__ == "__main__":
    main()
