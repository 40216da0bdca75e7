"""What a study folder holds, typed: the driver writes it, the report reads it with `read`, both from here.

    study.json                the configuration, the arms, the primary contrast, what the machine was
    cells/ARM-sSEED.json      one arm with one training seed: its stages as node names, its cost, its state
    seeds/SEED/nodes/ID.json  one trained policy with its evaluations; arms that pass through it share the file
    seeds/SEED/...            the run folder (weights, checkpoints, metrics) that the nodes come from; not read here

`pack` writes all of it, without completions, into one compressed file that `read` takes as well.

All seeds have the same initial policy and the same items in the same order: a seed draws the prompts' order and the
samples, so scores pair item by item over arms and seeds. Split `select` decides (transfer, order, refresh), `test` is
reported. Every evaluation under `scores` is greedy; `sweep` holds sampled ones.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from omni_fast.checkpoint import write_json
from omni_fast.curriculum.scores import Floats, score
from omni_fast.errors import UserError
from omni_fast.records import Evaluated
from omni_fast.run import read_json

Kind = Literal["base", "single", "sft", "merge", "joint", "order", "refresh", "online", "repeat", "probe"]
Status = Literal["finished", "failed", "pending"]
PACKED = "study.json.gz"


class Arm(NamedTuple):
    """What is compared.

    name: unique. "base", "single:TASK", "sft", "merge:linear" (task_arithmetic, ties, dare), "joint", "solved",
    "reversed", "random", "user", "refresh", "online:sec" (dump, pac, tac), "order:A>B>C" (one of all orders),
    "repeat:TASK" (a second pass of the same task, to test saturation), "probe:TASK" (a short single-task run, a cheap
    proxy of transfer).
    kind: "order" covers solved, reversed, random, user and "order:...".
    every: whether it is there only because all orders are run.
    seeds: the training seeds it is run with.
    """

    name: str
    kind: Kind
    seeds: tuple[int, ...]
    every: bool = False

    @property
    def competes(self) -> bool:
        """Whether the table compares it; the others test assumptions."""
        return not self.every and self.kind not in ("repeat", "probe")


class Scores(NamedTuple):
    """One evaluation. values: split -> task -> item scores [n_items] in 0..1, NaN where the infrastructure failed.

    entropy: task -> mean token entropy (nats per token) on the probe's fixed tokens; in a sweep at that temperature.
    """

    values: dict[str, dict[str, Floats]]
    entropy: dict[str, float]

    def mean(self, split: str, task: str) -> float:
        """Mean over the valid items; NaN where there is none."""
        return score(self.values[split][task]).value


class Node(NamedTuple):
    """One policy of the tree of stages.

    path: the stages from the initial policy, for example ("sort:20", "reverse:20"), () for the initial policy itself;
    tasks: what the last stage trained; weights: SHA-256 of its fp32 weights.
    sketch: random projection of the task's gradient at the initial policy, on nodes of one single-task stage; else None.
    scores: greedy, `select` and `test`.   sweep: temperature -> sampled evaluation, split `test` alone; {} where not made.
    """

    path: tuple[str, ...]
    tasks: tuple[str, ...]
    weights: str
    scores: Scores
    sweep: dict[float, Scores]
    sketch: Floats | None


class Cost(NamedTuple):
    """Of an arm with one seed, or means over its seeds.

    samples_train: completions generated to train this arm (merges: those of the runs merged).
    samples_transfer: further completions that training had to generate to measure transfer (runs that the arm does not
    itself pass through). completions_transfer: evaluation completions on `select` for it.
    seconds: of training, all stages, whichever arm ran them first.
    """

    samples_train: float
    samples_transfer: float
    completions_transfer: float
    seconds: float


class Cell(NamedTuple):
    """One arm with one seed.

    order: the tasks in the order they were trained (empty for arms without one); for solved, reversed and refresh it
    was solved from this seed's own single-task runs on `select`.
    stages: the nodes after the initial policy, in order; those reached so far where the cell is not finished.
    base: the initial policy in this seed's run. final: the last node (the base itself for arm "base").
    reason: why it failed ("" otherwise).
    """

    arm: str
    kind: Kind
    seed: int
    status: Status
    reason: str
    order: tuple[str, ...]
    base: Node | None
    stages: tuple[Node, ...]
    cost: Cost

    @property
    def final(self) -> Node | None:
        return self.stages[-1] if self.stages else self.base


@dataclass(frozen=True, slots=True)
class Study:
    """A study, finished or not.

    config: the resolved configuration with its section `study`. tasks: their names. primary: (arm, arm), declared
    before anything ran. temperatures: of the sweep. facts: machine, versions, judge, sandbox, parameters, seconds.
    nodes: seed -> path -> node, everything that was trained in that seed (assumption tests read pairs from here).
    """

    name: str
    config: dict[str, Any]
    tasks: tuple[str, ...]
    primary: tuple[str, str]
    temperatures: tuple[float, ...]
    arms: tuple[Arm, ...]
    cells: tuple[Cell, ...]
    nodes: dict[int, dict[tuple[str, ...], Node]]
    facts: dict[str, Any]

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def of(self, arm: str, status: Status = "finished") -> list[Cell]:
        """The arm's cells in this state, by seed."""
        return sorted((c for c in self.cells if c.arm == arm and c.status == status), key=lambda cell: cell.seed)

    def pair(self, seed: int, *tasks: str) -> Node | None:
        """The node after stages of these tasks, each at the study's full length, from the initial policy; None if absent."""
        steps = self.config["curriculum"]["steps_per_stage"]
        return self.nodes.get(seed, {}).get(tuple(f"{task}:{steps}" for task in tasks))


def slug(name: str) -> str:
    """A file name for an arm or a path; letters of any script stay."""
    return re.sub(r"[^\w.+-]", "-", name.replace(">", "."))


def cell_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / "cells" / f"{slug(arm)}-s{seed}.json"


def write_cell(folder: Path, cell: Mapping[str, Any]) -> None:
    """cell: the fields of `Cell` but for `kind` and `base`, with node ids for `stages`."""
    path = cell_file(folder, cell["arm"], cell["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, cell)


# What is finished is found by its files, so none is needed.
stored = partial(read_json, remedy="remove it, and the same command makes it again")


def read(place: Path) -> Study:
    """The study in a folder, or in a file that `pack` wrote. UserError when there is none, or it is damaged."""
    try:
        if place.is_file() or (place / PACKED).is_file():
            return _study(json.loads(gzip.decompress((place if place.is_file() else place / PACKED).read_bytes())))
        return _study(_gather(place))
    except FileNotFoundError as error:
        raise UserError(f"{place} holds no study ({error.filename} is missing); give the folder of a study") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the study in {place} is damaged ({error!r}): restore it from a copy") from error


def pack(folder: Path, target: Path) -> Path:
    """Everything `read` gives, in one compressed file in `target`: same bytes for the same study."""
    target.mkdir(parents=True, exist_ok=True)
    path = target / PACKED
    work = target / f".{PACKED}.writing"
    work.write_bytes(gzip.compress(json.dumps(_gather(folder), separators=(",", ":")).encode(), mtime=0))
    return work.replace(path)


def _gather(folder: Path) -> dict[str, Any]:
    """The study's files as one mapping, completions left out."""
    whole: dict[str, Any] = stored(folder / "study.json")
    whole["cells"] = [stored(path) for path in sorted(folder.glob("cells/*.json"))]
    whole["nodes"] = [stored(path) for path in sorted(folder.glob("seeds/*/nodes/*.json"))]
    for node in whole["nodes"]:
        for evaluated in (node["evaluated"], *node["sweep"].values()):
            for tasks in evaluated["splits"].values():
                for kept in tasks.values():
                    kept.pop("samples", None)
    return whole


def _study(whole: dict[str, Any]) -> Study:
    arms = tuple(Arm(**arm | {"seeds": tuple(arm["seeds"])}) for arm in whole["arms"])
    nodes: dict[int, dict[tuple[str, ...], Node]] = {seed: {} for arm in arms for seed in arm.seeds}
    by_id: dict[tuple[int, str], Node] = {}
    for data in whole["nodes"]:
        if data["seed"] not in nodes:
            continue  # the seed was taken out of the study again
        if any(set(whole["tasks"]) - set(tasks) for tasks in data["evaluated"]["splits"].values()):
            continue  # a task was added, on which it is not scored yet, or never will be
        node = _node(data)
        nodes[data["seed"]][node.path] = by_id[data["seed"], data["id"]] = node
    pending = {(arm.name, seed): arm.kind for arm in arms for seed in arm.seeds}
    cells = []
    for data in whole["cells"]:
        arm, seed, status = data["arm"], data["seed"], data["status"]
        if not (kind := pending.pop((arm, seed), None)):
            continue  # of an arm or a seed that was taken out of the study again
        stages = tuple(by_id[seed, node] for node in data["stages"] if (seed, node) in by_id)
        base = nodes[seed].get(())
        if status == "finished" and (base is None or len(stages) < len(data["stages"])):
            status = "pending"  # its files are gone, or a task was added
        cost = Cost(*(data[key] for key in Cost._fields))
        cells.append(Cell(arm, kind, seed, status, data["reason"], tuple(data["order"]), base, stages, cost))
    none = Cost(0, 0, 0, 0.0)
    cells += [Cell(arm, kind, seed, "pending", "", (), None, (), none) for (arm, seed), kind in pending.items()]
    rest: dict[str, Any] = {key: tuple(whole[key]) for key in ("tasks", "primary", "temperatures")}
    rest |= {"arms": arms, "cells": tuple(cells), "nodes": {seed: found for seed, found in nodes.items() if found}}
    return Study(name=whole["name"], config=whole["config"], facts=whole["facts"], **rest)


def _node(data: dict[str, Any]) -> Node:
    return Node(
        path=tuple(data["path"]),
        tasks=tuple(data["tasks"]),
        weights=data["weights"],
        scores=_scores(data["evaluated"]),
        sweep={float(temperature): _scores(found) for temperature, found in data["sweep"].items()},
        sketch=None if data["sketch"] is None else np.array(data["sketch"]),
    )


def _scores(evaluated: Evaluated) -> Scores:
    values = {
        split: {task: np.array(kept["values"], dtype=np.float64) for task, kept in tasks.items()}
        for split, tasks in evaluated["splits"].items()
    }
    return Scores(values, evaluated["entropy"])
