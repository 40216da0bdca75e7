"""Entropy and temperature in a study: what stages do to entropy, and whether that explains what the forecast missed.

`H[i, j]` is the mean token entropy, in nats, of policy i on a fixed probe set of task j, row 0 the initial policy. The
effective temperature of a trained policy on a task is that at which the initial policy has the entropy that the trained
one has at 1. If training mostly moved the temperature, decoding each policy at 1 / tau should shrink what the forecast
missed. So base, single-task runs and final policies are all scored by sampling, once at temperature 1 and once each at
1 / its own effective temperature (between swept temperatures the score is interpolated, beyond them the last one is
taken); the forecast is made anew from either, and the residuals are compared. Entropy-aware order: solved with a price
on collapsing entropy, looked up in the tree of realised orders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from omni_fast.curriculum import order as orders_
from omni_fast.curriculum.predict import walk
from omni_fast.curriculum.scores import Floats
from omni_fast.study.analysis import competitors
from omni_fast.study.analysis_draws import UNKNOWN, Contrast, Names, over_seeds
from omni_fast.study.analysis_orders import Realised
from omni_fast.study.records import Node, Study

ALL = "all tasks"
WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.5)  # score per nat


class Residual(NamedTuple):
    """Mean |realised - forecast| at temperature 1 and corrected; the change over seeds.

    at_edge: share of the final scores that are corrected only as far as the sweep reaches.
    """

    before: float
    after: float
    change: Contrast
    at_edge: float


class EntropyPart(NamedTuple):
    """Means over seeds. H and tau by stage: [stages + 1, K] per arm, row 0 the initial policy; NaN tau: not in the sweep.

    single: H [K + 1, K] of the initial policy and after each single-task run.   sweep: policy -> test scores [T, K].
    residuals: task, or ALL of them -> what the forecast misses; {} without the sweeps.
    ablation: weight -> (order, its score minus that of the order solved on transfer alone; None: the same order).
    """

    single: Floats | None
    by_stage: dict[str, Floats]
    tau: dict[str, Floats]
    sweep: dict[str, Floats]
    residuals: dict[str, Residual]
    ablation: dict[float, tuple[Names, Contrast | None]]


def entropy_part(study: Study, at: Realised | None) -> EntropyPart | None:
    """None while no node has an entropy or a sweep."""
    tasks = study.tasks
    by_stage: dict[str, Floats] = {}
    tau: dict[str, Floats] = {}
    sweep: dict[str, Floats] = {}
    for arm in competitors(study):
        paths = [(cell.base, *cell.stages) for cell in study.of(arm.name) if cell.base is not None]
        if arm.kind in ("order", "refresh", "joint", "online") and len({len(path) for path in paths}) == 1:
            by_stage[arm.name] = _mean([[_entropies(node, tasks) for node in path] for path in paths])
            tau[arm.name] = _mean([[_taus(path[0], node, tasks) for node in path] for path in paths])
        swept = [[[_at(path[-1], task, t) for task in tasks] for t in study.temperatures] for path in paths]
        if known := [table for table in swept if np.isfinite(table).any()]:
            sweep[arm.name] = _mean(known)
    single = _single(study, list(study.nodes))
    by_stage, tau = (
        {arm: table for arm, table in each.items() if np.isfinite(table).any()} for each in (by_stage, tau)
    )
    if single is None and not by_stage and not sweep:
        return None
    residuals, ablation = (_correction(study, at), _ablation(study, at)) if at else ({}, {})
    return EntropyPart(single, by_stage, tau, sweep, residuals, ablation)


def _mean(tables: Sequence[Sequence[Sequence[float]]]) -> Floats:
    return np.array(np.mean(np.array(tables, dtype=np.float64), axis=0))


def _entropies(node: Node, tasks: Names) -> list[float]:
    return [node.scores.entropy.get(task, math.nan) for task in tasks]


def _taus(base: Node, node: Node, tasks: Names) -> list[float]:
    """Effective temperature of a node per task, on the initial policy's sweep."""
    grid = sorted(base.sweep)
    rows = [[base.sweep[t].entropy.get(task, math.nan) for t in grid] for task in tasks]
    return [effective_temperature(grid, row, h) for row, h in zip(rows, _entropies(node, tasks), strict=True)]


def _at(node: Node, task: str, temperature: float) -> float:
    """Sampled test score at a temperature, linear between swept ones; NaN outside."""
    grid = sorted(node.sweep)
    values = [node.sweep[t].mean("test", task) for t in grid]
    return float(np.interp(temperature, grid, values, left=math.nan, right=math.nan)) if grid else math.nan


def _singles(study: Study, seed: int) -> list[Node]:
    """The initial policy and the K single-task runs of a seed; [] when one is absent."""
    nodes = [study.pair(seed), *(study.pair(seed, task) for task in study.tasks)]
    found = [node for node in nodes if node is not None]
    return found if len(found) == len(nodes) else []


def _single(study: Study, seeds: Sequence[int]) -> Floats | None:
    tables = [[_entropies(node, study.tasks) for node in nodes] for seed in seeds if (nodes := _singles(study, seed))]
    return _mean(tables) if np.isfinite(tables).any() else None


def _correction(study: Study, at: Realised) -> dict[str, Residual]:
    tasks = study.tasks
    measured = [nodes for seed in at.measured_on if (nodes := _singles(study, seed)) and all(n.sweep for n in nodes)]
    bases = {seed: base for seed in at.seeds if (base := study.pair(seed)) and base.sweep}
    leaves = {key: node for key, node in at.leaves.items() if node.sweep and key[0] in bases}
    if not measured or not leaves:
        return {}

    def missed(corrected: bool) -> Floats:
        """|realised - forecast| per leaf and task."""
        scores_MK = _mean([[_decoded(nodes[0], node, tasks, corrected) for node in nodes] for nodes in measured])
        told = [walk(scores_MK, (), [tasks.index(task) for task in order])[-1] for _, order in leaves]
        realised = [_decoded(bases[seed], node, tasks, corrected) for (seed, _), node in leaves.items()]
        return np.abs(np.array(realised) - np.clip(told, 0.0, 1.0))

    before_NK, after_NK = missed(corrected=False), missed(corrected=True)
    seed_N = np.array([seed for seed, _ in leaves])
    edge_NK = np.array(
        [[_correcting(bases[seed], node, task)[1] for task in tasks] for (seed, _), node in leaves.items()]
    )
    columns = {task: [k] for k, task in enumerate(tasks)} | {ALL: list(range(len(tasks)))}
    return {name: _residual(before_NK[:, k], after_NK[:, k], edge_NK[:, k], seed_N) for name, k in columns.items()}


def _decoded(base: Node, node: Node, tasks: Names, corrected: bool) -> list[float]:
    """Score of each task, sampled at temperature 1 or at the one that undoes the policy's own."""
    return [_at(node, task, _correcting(base, node, task)[0] if corrected else 1.0) for task in tasks]


def _correcting(base: Node, node: Node, task: str) -> tuple[float, bool]:
    """1 / the effective temperature, as far as both sweeps reach, and whether it lies beyond them."""
    grid, own = sorted(base.sweep), sorted(node.sweep)
    tau = _taus(base, node, (task,))[0]
    target, coldest = _entropies(node, (task,))[0], base.sweep[grid[0]].entropy.get(task, math.nan)
    known = tau if math.isfinite(tau) else grid[0] if target < coldest else grid[-1] if target >= coldest else math.nan
    inside = float(np.clip(1.0 / known, own[0], own[-1]))
    return inside, not (math.isfinite(tau) and inside == 1.0 / tau)


def _residual(before_NK: Floats, after_NK: Floats, edge_NK: Floats, seed_N: Floats) -> Residual:
    """Compared on points known both ways; the seeds are what the interval is over, orders of one seed share stages."""
    known = np.isfinite(before_NK) & np.isfinite(after_NK)
    before, after = (np.where(known, x, np.nan) for x in (before_NK, after_NK))
    by_seed = [(after - before)[seed_N == seed] for seed in np.unique(seed_N)]
    changes = np.array([np.nanmean(x) for x in by_seed if np.isfinite(x).any()])
    if not known.any():
        return Residual(math.nan, math.nan, UNKNOWN, math.nan)
    edge = float(edge_NK[known].mean())
    return Residual(float(np.nanmean(before)), float(np.nanmean(after)), over_seeds(changes), edge)


def _ablation(study: Study, at: Realised) -> dict[float, tuple[Names, Contrast | None]]:
    transfer, draws, entropy_MK = at.transfer, at.tree, _single(study, at.measured_on)
    if transfer is None or draws is None or entropy_MK is None or not np.isfinite(entropy_MK).all():
        return {}

    def solved(weight: float) -> Names:
        aware = entropy_aware(transfer.matrix_KK, entropy_MK, weight)
        return tuple(study.tasks[k] for k in orders_.exact(aware).order)

    plain, out = solved(0.0), {}
    for weight in WEIGHTS:
        names = [">".join(order) for order in (solved(weight), plain)]
        if set(names) <= set(draws.arms):
            out[weight] = solved(weight), None if names[0] == names[1] else draws.gain(*names)
    return out


def effective_temperature(temperatures: Sequence[float], entropies: Sequence[float], target: float) -> float:
    """The temperature at which the initial policy's entropy is `target`, linear between measured points.

    temperatures: increasing.   entropies: the initial policy's at each of them, in nats; noise that makes them fall is
    smoothed to a running maximum, since entropy rises with temperature. NaN when the target lies outside what was
    measured.
    """
    rising = np.maximum.accumulate(np.asarray(entropies, dtype=np.float64))
    inside = len(rising) > 1 and rising[0] <= target <= rising[-1]
    return float(np.interp(target, rising, temperatures)) if inside else math.nan


def entropy_aware(matrix_KK: Floats, entropy_MK: Floats, weight: float) -> Floats:
    """Transfer with a price on collapsing the entropy that an earlier task needs; solve the order on it as an ablation.

    matrix_KK: T.   entropy_MK: H [K + 1, K], row 0 the initial policy, row i + 1 after the run of task i.
    A task needs entropy if its own run raises it. Placing i after such a j costs weight * (the entropy j loses to i,
    nats).
    """
    base_K, after_KK = entropy_MK[0], entropy_MK[1:]
    needs_K = np.diagonal(after_KK) > base_K
    lost_KK = np.maximum(0.0, base_K[None, :] - after_KK)
    return np.asarray(matrix_KK - weight * lost_KK * needs_K[None, :])
