"""How many times faster than TRL's GRPOTrainer does one machine train, in how much memory, and what gives how much of it?

    python benchmarks/bench_train.py [--questions "TRL small" "TRL long" "TRL levers"] [--seeds 0] [--steps N] [--output FILE]

TRL small, TRL long   the same weights, prompts, reward, loss and AdamW; both trainers in a process of their own, alive side by
                      side, taking turns step by step. Their settings are in the result. Median over the steps but the first.
TRL levers            each of omni_fast's savings taken away alone, and what the step costs then.
TRL learning          the mean reward per step of both, and how far apart; nothing timed, so the machine may be busy.
TRL settings          a few steps of TRL in each of its settings that bear on speed, to choose --peers by.

The limit is the least time of the step's arithmetic and memory traffic at the rates measured just before (train/case.py). Memory
is what the process holds at a step's peak beyond the imports and beyond weights, gradients and optimiser state.
Results go to benchmarks/results/train-<machine>.json.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scoreboard  # noqa: E402
from benchmarks.train import levers, ours, trl_peer  # noqa: E402
from benchmarks.train.case import CASES  # noqa: E402
from benchmarks.train.race import contender, race, show  # noqa: E402
from benchmarks.train.trl_peer import Setting  # noqa: E402
from omni_fast.policy import smollm2  # noqa: E402

SETTINGS = {
    "TRL small": (
        Setting("bfloat16", 48),
        Setting("float32", 48),
        Setting("bfloat16", 8),
        Setting("float32", 8),
        Setting("float32", 48, checkpointing=True),
    ),
    "TRL long": (Setting("bfloat16", 8), Setting("float32", 8), Setting("bfloat16", 4), Setting("bfloat16", 16)),
}
LEARNING = ("question", "case", "dtype", "contender", "role", "rewards", "learning", "settings", "versions")


def _cpu_levers(setup: levers.Setup) -> list[levers.Lever]:
    return [*levers.savings(setup), *levers.threads(setup)]


def main() -> None:
    parser = scoreboard.parser(__doc__)
    choices = [*CASES, "TRL levers", "TRL learning", "TRL settings"]
    parser.add_argument("--questions", nargs="+", default=[*CASES, "TRL levers"], choices=choices)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="of each trainer; default: what the case says")
    parser.add_argument("--peers", nargs="*", type=int, help="which of TRL's settings (SETTINGS)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="of settings and levers")
    parser.add_argument("--rounds", type=int, default=5, help="of the levers")
    parser.add_argument("--output", type=Path, default=scoreboard.RESULTS / f"train-{scoreboard.machine()}.json")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = str(smollm2.folder())
    for question in options.questions:
        names = [question] if question in CASES else options.cases[:1] if question == "TRL learning" else options.cases
        for name in names:
            case = replace(CASES[name], question=question)
            if question == "TRL levers":
                scoreboard.save(levers.measure(case, model, options.rounds, _cpu_levers), options.output)
                continue
            alone = question == "TRL settings"  # one after the other, and without ours
            case = replace(case, steps=options.steps or (3 if alone else case.steps))
            chosen = SETTINGS[name] if alone else SETTINGS[name][:2]
            chosen = chosen if options.peers is None else [SETTINGS[name][number] for number in options.peers]
            peers = [contender(peer.name, trl_peer.run, case, model, peer) for peer in chosen]
            races = [[peer] for peer in peers] if alone else [[contender(ours.NAME, ours.run, case, model), *peers]]
            torch.set_num_threads(case.threads)
            rows = [row for those in races for row in race(case, those, model, options.seeds)]
            show(rows)
            if question == "TRL learning":
                rows = [{key: row[key] for key in LEARNING if key in row} for row in rows]
            scoreboard.save(rows, options.output)


if __name__ == "__main__":
    main()
