"""Where do the shares of `omni_fast.predict.machines` come from, and how far are predictions from what was measured?

    python benchmarks/predict_fit.py [RUN]    # RUN: a finished quickstart, whose steps are taken into results/steps.json

CPU: least squares with non-negative terms over our own steps (benchmarks/results), each kind left out in turn for the error.
GPU: published steps of NeMo RL; three of them set two shares, the others only test them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from omni_fast.predict.machines import DENSE, EXPERTS, MACHINES, SHAPES, SYNC_BYTES_S, Efficiency, Machine, Shape
from omni_fast.predict.simulate import Simulation
from omni_fast.predict.step import NETWORK_SHARE, OPTIMISER_TRAFFIC, WEIGHT, Server, Trainer, Work


@dataclass(frozen=True)
class Case:
    """A kind of step that was measured, means over `steps` of them. longest: new tokens of the longest sample. prompt_rows:
    tokens of the prompts, each once. scoring_s: what verifiers and judge worked beside it, on the same cores. rows: what the
    update computed for the `trained` completion tokens that had an advantage; all 0 where only generating was measured."""

    name: str
    steps: int
    longest: float
    tokens: float
    prompt_rows: float
    generate_s: float
    scoring_s: float = 0.0
    trained: float = 0.0
    rows: float = 0.0
    update_s: float = 0.0
    sync_s: float = 0.0


@dataclass(frozen=True)
class Published:
    """A published step of a whole run. split: trainer and rollout GPUs, both all of them where they take turns."""

    model: str
    machine: str
    gpus: int
    split: tuple[int, int]
    server_gpus: int
    prompts: int
    mean: int
    cut: int
    staleness: int
    seconds: float
    fitted: bool = False


# NVIDIA-NeMo/RL docs/about/performance-summary.md, v0.6, BF16; 32 samples a prompt; splits from its recipes. Prompts are taken to
# be 100 tokens long; log-probs take a forward pass of their own there and prompts are not shared.
PUBLISHED = (
    Published("qwen3-30b-a3b", "h100", 32, (32, 32), 2, 64, 3203, 4096, 0, 192, fitted=True),
    Published("qwen3-30b-a3b", "h100", 32, (16, 16), 2, 64, 3201, 4096, 1, 152, fitted=True),
    Published("qwen3-30b-a3b", "h100", 192, (128, 64), 2, 64, 3206, 4096, 8, 34.5, fitted=True),
    Published("qwen3-235b-a22b", "h100", 128, (128, 128), 16, 16, 5698, 8192, 0, 395),
    Published("qwen3-235b-a22b", "h100", 256, (256, 256), 16, 16, 5713, 8192, 0, 312),
    Published("qwen3-235b-a22b", "h100", 256, (128, 128), 8, 16, 5721, 8192, 1, 231),
    Published("deepseek-v3", "h100", 256, (256, 256), 32, 16, 701, 1536, 0, 134),
)


def published_seconds(row: Published) -> float:
    """What we would have predicted for it; experts stay on their GPUs there."""
    shape, machine = SHAPES[row.model], MACHINES[row.machine]
    share = EXPERTS if shape.experts else DENSE
    work = Work(row.prompts, 32, 100, row.mean - 100, row.cut - 100, shared=False, forwards=1)
    update = sum(Trainer(shape, machine, share, row.split[0], experts_stay=True).update_s(work).values())
    server = Server(shape, machine, share, row.server_gpus)
    rate = row.server_gpus * NETWORK_SHARE * machine.network if row.split[0] == row.gpus else SYNC_BYTES_S
    sync = WEIGHT * shape.parameters / rate
    return Simulation(server, row.split[1] // row.server_gpus, work, update, sync, row.staleness).run().step


def cases_of_run(folder: Path) -> list[Case]:
    """One case a task from the steps of a finished run that trained one task at a time; steps without any advantage do not count."""
    config = json.loads((folder / "fingerprint.json").read_text(encoding="utf-8"))
    samples = config["rollout"]["samples_per_prompt"]
    seen: dict[str, list[list[float]]] = defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["event"] == "step" and not row["update"]["skipped"]:
            ((name, task),) = row["tasks"].items()
            update, took = row["update"], row["seconds"]
            prompt = (update["sample_tokens"] - update["tokens"]) / (task["mixed_groups"] * task["groups"] * samples)
            seen[name].append(
                [row["new_tokens"], prompt * task["groups"], took["generate"], row["scoring_s"], update["tokens"],
                 update["rows"], took["update"], took["sync"]]
            )  # fmt: skip
    longest = {task["name"]: task["max_new_tokens"] for task in config["tasks"]}
    means = {name: [float(f"{mean(column):.4g}") for column in zip(*rows, strict=True)] for name, rows in seen.items()}
    return [Case(name, len(seen[name]), longest[name], *values) for name, values in means.items()]


def fit(cases: Sequence[Case], shape: Shape, machine: Machine) -> tuple[Efficiency, float]:
    """The shares that explain the cases best, relative errors squared, and what a second of scoring adds to generating.

    One model cannot tell a step's fixed time from the bytes that every step moves: it goes to the bytes.
    """
    updates = [case for case in cases if case.rows]
    decode = _solve([_decode(case, shape, machine) for case in cases], [case.generate_s for case in cases])
    update = _solve([_update(case, shape, machine) for case in updates], [case.update_s for case in updates])
    inverse = [float(f"{1 / value:.2g}") if value > 0 else float("inf") for value in (*decode[:2], *update)]
    return Efficiency(inverse[0], inverse[1], 0.0, inverse[2], inverse[3], f"{len(cases)} kinds of step"), float(
        decode[2]
    )


def error(case: Case, found: tuple[Efficiency, float], shape: Shape, machine: Machine) -> float:
    """Relative error of generate + update."""
    share, scoring = found
    decode = _decode(case, shape, machine) @ [1 / share.decode_bytes, 1 / share.decode_flops, scoring]
    update = _update(case, shape, machine) @ [1 / share.update, 1 / share.optimiser] if case.rows else 0.0
    return float((decode + update) / (case.generate_s + case.update_s) - 1)


def errors(cases: Sequence[Case], shape: Shape, machine: Machine) -> dict[str, tuple[float, float]]:
    """Per case the error with the shares of all cases, and with those of the other cases alone."""
    everything = fit(cases, shape, machine)
    return {
        case.name: (
            error(case, everything, shape, machine),
            error(case, fit([other for other in cases if other is not case], shape, machine), shape, machine),
        )
        for case in cases
    }


def _decode(case: Case, shape: Shape, machine: Machine) -> NDArray[np.float64]:
    """Seconds at full rates: bytes, arithmetic; and of scoring."""
    weights = shape.active_body + shape.head
    flops = 2 * weights * case.tokens + 2 * shape.active_body * case.prompt_rows
    moved = case.longest * WEIGHT * weights
    return np.array([moved / machine.memory_bytes_s, flops / machine.flops, case.scoring_s])


def _update(case: Case, shape: Shape, machine: Machine) -> NDArray[np.float64]:
    """Seconds at full rates: forward and backward, AdamW."""
    flops = 6 * (shape.active_body * case.rows + shape.head * case.trained)
    return np.array([flops / machine.flops, OPTIMISER_TRAFFIC * shape.parameters / machine.memory_bytes_s])


def _solve(rows: Sequence[NDArray[np.float64]], measured: Sequence[float]) -> NDArray[np.float64]:
    scale = 1 / np.array(measured)
    matrix = np.array(rows) * scale[:, None]
    columns = np.linalg.norm(matrix, axis=0)  # of one size, so that no unit decides
    found, _ = nnls(matrix / columns, np.ones(len(measured)))
    return found / columns


def read(results: Path) -> list[Case]:
    """What is committed in benchmarks/results: the steps of a quickstart, and generating alone."""
    steps = json.loads((results / "steps.json").read_text(encoding="utf-8"))["cases"]
    alone = [
        row
        for row in json.loads((results / "generate.json").read_text(encoding="utf-8"))
        if row["contender"] == "local"
    ]
    return [Case(**row) for row in steps] + [_of_generate(row) for row in alone]


def _of_generate(row: dict) -> Case:
    return Case(row["case"], 1, row["steps"], row["new_tokens"], row["prompt_rows"], row["seconds"])


def races(results: Path) -> list[Case]:
    """Steps that no share was fitted to: omni_fast's own of benchmarks/bench_train.py."""
    rows = [
        row for file in sorted(results.glob("train-*.json")) for row in json.loads(file.read_text(encoding="utf-8"))
    ]
    return [_of_race(row) for row in rows if row.get("role") == "ours" and "phases" in row]


def _of_race(row: dict) -> Case:
    prompts, samples = (int(number) for number in re.findall(r"\d+", row["case"])[:2])
    took = {name: part["seconds"] for name, part in row["phases"].items()}
    tokens = prompts * samples * row["completion_tokens"]
    return Case(
        f"{row['question']}, {row['case']}", row["steps"], row["completion_tokens"], tokens, prompts * row["prompt_tokens"],
        took["generate"], 0.0, tokens, row["rows_in_update"], took["update"], took["sync"],
    )  # fmt: skip


def main(results: Path, run: Path | None) -> None:
    """Take the steps of a run into the results; print the fit, and the error of everything that is compared."""
    if run:
        what = {"question": "how long does a step of the quickstart take", "command": "omni-fast quickstart",
                "machine": "AMD EPYC (Zen 5, avx512_bf16), 2 cores", "cases": [asdict(case) for case in cases_of_run(run)]}  # fmt: skip
        (results / "steps.json").write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    cases, shape, machine = read(results), SHAPES["smollm2-135m"], MACHINES["cpu"]
    print(fit(cases, shape, machine))
    for name, (with_it, without_it) in errors(cases, shape, machine).items():
        print(f"{name}: {with_it:+.0%}, left out {without_it:+.0%}")
    for case in races(results):
        print(f"{case.name}: {error(case, fit(cases, shape, machine), shape, machine):+.0%}, never fitted")
    for row in PUBLISHED:
        predicted = published_seconds(row)
        print(f"{row.model} on {row.gpus} x {row.machine}, train and generate {row.split}, staleness {row.staleness}: published "
              f"{row.seconds:g} s, predicted {predicted:.0f} s, {predicted / row.seconds - 1:+.0%}{' (fitted)' if row.fitted else ''}")  # fmt: skip


if __name__ == "__main__":
    main(Path(__file__).with_name("results"), Path(sys.argv[1]) if len(sys.argv) > 1 else None)
