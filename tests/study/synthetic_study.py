"""Studies with known truth, in the form that `records.read` takes: both assumptions of the forecast hold but for noise.

A policy's true score on task j starts at `base`; a stage of i adds T[i, j] plus noise of the seed and sets task i to
`own` plus noise. Items have fixed difficulties that all policies share, so scores pair. Sampled at temperature t a policy
of effective temperature tau scores `heat * (tau * t - 1)` less, so that decoding at 1 / tau undoes what training did.
"""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from omni_fast.curriculum import order as orders
from omni_fast.study.records import PACKED

STEPS, PROBE, SAMPLES = 20, 5, 1280
GRID = (0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass
class World:
    """The truth. joint, merge: score that those arms have on every task.   noise: of a stage, on every task."""

    tasks: tuple[str, ...] = ("math", "code", "qa", "writing")
    base: float = 0.3
    own: float = 0.7
    matrix: np.ndarray = field(default_factory=lambda: planted(4))
    joint: float = 0.45
    merge: float = 0.4
    noise: float = 0.02
    items: int = 120
    heat: float = 0.0
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    order_seeds: tuple[int, ...] = (0, 1)

    @property
    def best(self) -> tuple[str, ...]:
        return tuple(self.tasks[k] for k in orders.exact(self.matrix).order)


def planted(k: int) -> np.ndarray:
    """Task i hurts the tasks before it a lot and those after it not at all: the order 0, 1, 2 ... is worst."""
    return np.triu(np.zeros((k, k)), 1) + np.tril(np.full((k, k), -0.15), -1)


class Builder:
    """The packed form of a study of one world."""

    def __init__(self, world: World, seed: int = 0) -> None:
        self.world, self.rng = world, np.random.default_rng(seed)
        difficulty = (np.arange(world.items) + 0.5) / world.items
        self.difficulty = {
            split: {task: self.rng.permutation(difficulty) for task in world.tasks} for split in ("select", "test")
        }
        self.nodes: dict[tuple[int, tuple[str, ...]], dict] = {}
        self.levels: dict[tuple[int, tuple[str, ...]], np.ndarray] = {}
        self.taus: dict[tuple[int, tuple[str, ...]], np.ndarray] = {}
        self.cells: list[dict] = []
        self.arms: list[dict] = []

    def scores(self, level: np.ndarray, splits: tuple[str, ...], entropy: np.ndarray) -> dict:
        blur = 0.05
        return {
            "splits": {
                split: {
                    task: {
                        "values": (d + self.rng.normal(0, blur, d.size) < level[k]).astype(float).tolist(),
                        "truncated": 0.0,
                        "samples": [{"prompt": "p", "completion": "c", "value": 1.0}],
                    }
                    for k, (task, d) in enumerate(self.difficulty[split].items())
                }
                for split in splits
            },
            "entropy": dict(zip(self.world.tasks, entropy.tolist(), strict=True)),
        }

    def node(self, seed: int, path: tuple[str, ...]) -> str:
        """The node after the stages of a path ("TASK:STEPS" each, or a free name), made with what it starts from."""
        w, k = self.world, len(self.world.tasks)
        identity = f"{'.'.join(path) or 'base'}".replace(":", "-")
        if (seed, path) in self.nodes:
            return identity
        noise = self.rng.normal(0, w.noise, k)
        name, _, steps = path[-1].partition(":") if path else ("", "", "0")
        if not path:
            level, tau = np.full(k, w.base), np.ones(k)
        elif name in w.tasks:
            self.node(seed, path[:-1])
            i, share = w.tasks.index(name), min(1.0, int(steps) / STEPS)
            level = self.levels[seed, path[:-1]] + share * w.matrix[i] + noise * share
            level[i] = (1 - share) * self.levels[seed, path[:-1]][i] + share * (w.own + noise[i])
            tau = self.taus[seed, path[:-1]] * (0.85 if i < 2 else 1.1) ** share
        else:
            level, tau = np.full(k, w.merge if name.startswith("merge") else w.joint) + noise, np.full(k, 0.9)
        self.levels[seed, path], self.taus[seed, path] = level, tau
        entropy = 0.8 * tau
        self.nodes[seed, path] = {
            "id": identity,
            "seed": seed,
            "path": list(path),
            "tasks": [name] if name in w.tasks else list(w.tasks) if path else [],
            "steps": int(steps or 0),
            "samples": SAMPLES if path else 0,
            "seconds": 10.0,
            "weights": "",
            "evaluated": self.scores(level, ("select", "test"), entropy),
            "sweep": {
                str(t): self.scores(level - w.heat * (tau * t - 1), ("test",), 0.8 * tau * t)
                for t in (GRID if len(path) in (0, 1, k) else ())
            },
            "sketch": self.rng.normal(size=16).tolist() if len(path) == 1 and name in w.tasks else None,
        }
        return identity

    def arm(self, name: str, kind: str, seeds: tuple[int, ...], path: tuple[str, ...], every: bool = False) -> None:
        """An arm that ends at a path; each stage of it is a node of the path's start."""
        w = self.world
        self.arms.append({"name": name, "kind": kind, "seeds": list(seeds), "every": every})
        tree = kind in ("single", "order", "refresh", "repeat", "probe")
        for seed in seeds:
            starts = [path[: n + 1] for n in range(len(path))] if tree else [path] if path else []
            stages = [self.node(seed, start) for start in starts]
            order = [part.split(":")[0] for part in path][: len(w.tasks)] if kind in ("order", "refresh") else []
            self.cells.append(
                {
                    "arm": name,
                    "kind": kind,
                    "seed": seed,
                    "status": "finished",
                    "reason": "",
                    "order": order,
                    "base": self.node(seed, ()),
                    "stages": stages,
                    "samples_train": SAMPLES * len(w.tasks) if path else 0,
                    "samples_transfer": SAMPLES * (len(w.tasks) - 1) if name in ("solved", "reversed") else 0,
                    "completions_transfer": 0,
                    "seconds": 10.0 * len(stages),
                }
            )

    def whole(self) -> dict:
        w = self.world
        steps = lambda order, n=STEPS: tuple(f"{task}:{n}" for task in order)  # noqa: E731
        self.arm("base", "base", w.seeds, ())
        for task in w.tasks:
            self.arm(f"single:{task}", "single", w.seeds, steps([task]))
        self.arm("sft", "sft", w.seeds[:2], ("sft:20",))
        self.arm("merge:linear", "merge", w.seeds, ("merge-linear",))
        self.arm("joint", "joint", w.seeds, ("joint:80",))
        self.arm("solved", "order", w.seeds, steps(w.best))
        self.arm("reversed", "order", w.seeds, steps(w.best[::-1]))
        self.arm("refresh", "refresh", w.seeds[:2], (*steps(w.best), f"{w.best[0]}:{PROBE}"))
        self.arm("online:sec", "online", w.seeds[:2], ("online-sec:80",))
        for task in w.tasks:
            self.arm(f"repeat:{task}", "repeat", w.seeds[:2], steps([task, task]))
            self.arm(f"probe:{task}", "probe", w.seeds[:2], steps([task], PROBE))
        for order in itertools.permutations(w.tasks):
            self.arm(f"order:{'>'.join(order)}", "order", w.order_seeds, steps(order), every=True)
        return {
            "name": "synthetic",
            "config": {"curriculum": {"steps_per_stage": STEPS}, "study": {"probe_steps": PROBE}},
            "tasks": list(w.tasks),
            "primary": ["solved", "joint"],
            "temperatures": list(GRID),
            "arms": self.arms,
            "cells": self.cells,
            "nodes": list(self.nodes.values()),
            "facts": {"machine": "nowhere", "versions": {"omni_fast": "0"}},
        }


def write(folder: Path, whole: dict) -> Path:
    """The folder, with the study in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PACKED).write_bytes(gzip.compress(json.dumps(whole).encode()))
    return folder
