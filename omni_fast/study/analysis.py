"""What a study's records say: the arms in the paper's form, and transfer with what can be had for less.

Every number comes out of item scores through `analysis_draws`; nothing here knows what it should come out as. A part that
the records do not (yet) support is None or unknown, and `missing` names what it waits for. Split `select` feeds what
decides (transfer), split `test` what is reported. Orders and forecast: `analysis_orders`; entropy: `analysis_entropy`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from omni_fast.curriculum.decide import Decision, decide
from omni_fast.curriculum.order import order_value
from omni_fast.curriculum.proxy import Agreement, agreement, cosine_matrix
from omni_fast.curriculum.scores import Estimate, Floats, flips, holm, own_stages
from omni_fast.curriculum.sequential import settle_order
from omni_fast.curriculum.transfer import Transfer
from omni_fast.study.analysis_draws import UNKNOWN, Contrast, Draws, Names, Runs, joint_draws
from omni_fast.study.records import Arm, Cell, Cost, Study

JOINT, MERGE, BASE = "joint", "merge:linear", "base"
FEW_SEEDS = 5
ITEMS = {"the full measurement, one seed": 1, "half of the items": 2, "a quarter of the items": 4}  # every n-th of them


class ArmRow(NamedTuple):
    """One arm in the table. p_holm: of `over_joint`; NaN where that is the primary contrast, whose p stands alone.

    bwt: backward transfer, for arms of several stages.
    flips: task -> items (lost, gained) from the initial to the final policy, summed over the seeds.
    orders: realised order -> seeds.
    """

    arm: Arm
    seeds: tuple[int, ...]
    scores: dict[str, Estimate]
    average: Estimate
    over_joint: Contrast
    p_holm: float
    relative_joint: Contrast
    relative_merge: Contrast
    bwt: Contrast
    flips: dict[str, tuple[int, int]]
    cost: Cost
    orders: dict[Names, int]


class ProxyRow(NamedTuple):
    """A cheap stand-in for the transfer matrix: agreement with the matrix of the other seeds, mean over the seeds.

    training, evaluation: its cost as a share of the full measurement's.
    """

    name: str
    agreement: Agreement
    training: float
    evaluation: float


class TransferPart(NamedTuple):
    """Pooled transfer and what can be had for less. The sequential figures are means over the seeds, each alone.

    effects: (trained, scored) -> T.   lead: summed forecast of the best order minus that of the second best.
    saved: share of evaluations; settled, same_order: share of the seeds.
    """

    transfer: Transfer
    seeds: tuple[int, ...]
    effects: dict[tuple[str, str], Contrast]
    decision: Decision
    lead: Contrast
    proxies: tuple[ProxyRow, ...]
    saved: float
    settled: float
    same_order: float


def runs(study: Study, arm: str, split: str = "test") -> Runs:
    """Seed -> item scores of the arm's final policy."""
    return {cell.seed: cell.final.scores.values[split] for cell in study.of(arm) if cell.final}


def competitors(study: Study) -> list[Arm]:
    """The arms that the table compares."""
    return [arm for arm in study.arms if arm.competes]


def table(study: Study) -> tuple[list[ArmRow], Contrast]:
    """A row per arm with a finished seed, and the primary contrast."""
    finished = {arm.name: found for arm in competitors(study) if (found := runs(study, arm.name))}
    rows = [_row(study, arm, finished) for arm in competitors(study) if arm.name in finished]
    adjusted = holm({row.arm.name: row.over_joint.p for row in rows if not declared(study, row.arm.name)})
    rows = [row._replace(p_holm=adjusted.get(row.arm.name, math.nan)) for row in rows]
    return rows, compare(study, *study.primary)


def declared(study: Study, arm: str) -> bool:
    """Whether the arm's difference to joint training is the primary contrast, either way round."""
    return {arm, JOINT} == set(study.primary)


def compare(study: Study, arm: str, over: str) -> Contrast:
    """Average score of `arm` minus that of `over` on their common seeds."""
    draws = joint_draws({name: runs(study, name) for name in (arm, over)}, study.tasks)
    return draws.gain(arm, over) if draws else UNKNOWN


def _row(study: Study, arm: Arm, finished: Mapping[str, Runs]) -> ArmRow:
    cells, tasks, name = study.of(arm.name), study.tasks, arm.name
    own = joint_draws({name: finished[name]}, tasks)
    assert own is not None  # it has a seed
    joint, merge = (
        joint_draws({each: finished.get(each, {}) for each in (name, other)}, tasks) if name != other else None
        for other in (JOINT, MERGE)
    )
    return ArmRow(
        arm,
        own.seeds,
        {task: own.mean(name, task) for task in tasks},
        own.mean(name),
        joint.gain(name, JOINT) if joint else UNKNOWN,
        math.nan,
        joint.relative(name, JOINT) if joint else UNKNOWN,
        merge.relative(name, MERGE) if merge else UNKNOWN,
        _backward_transfer(cells, tasks),
        {task: _flips(cells, task) for task in tasks},
        Cost(*np.mean([cell.cost for cell in cells], axis=0).tolist()),
        dict(Counter(cell.order for cell in cells if cell.order)),
    )


def _flips(cells: Sequence[Cell], task: str) -> tuple[int, int]:
    pairs = [
        flips(cell.base.scores.values["test"][task], cell.final.scores.values["test"][task])
        for cell in cells
        if cell.base and cell.final
    ]
    return sum(lost for lost, _ in pairs), sum(gained for _, gained in pairs)


def _backward_transfer(cells: Sequence[Cell], tasks: Names) -> Contrast:
    """BWT over the seeds: the task trained last counts as it ends, so it adds 0 and leaves K - 1 tasks to average."""
    own: dict[int, dict[str, Floats]] = {}
    final: dict[int, dict[str, Floats]] = {}
    for cell in cells:
        stages = own_stages([node.tasks for node in cell.stages])
        if len(cell.order) == len(tasks) > 1 and set(stages) == set(tasks) and len(set(stages.values())) > 1:
            final[cell.seed] = end = cell.stages[-1].scores.values["test"]
            after = {task: cell.stages[stage - 1].scores.values["test"][task] for task, stage in stages.items()}
            own[cell.seed] = after | {task: end[task] for task in [max(stages, key=lambda task: stages[task])]}
    draws = joint_draws({"own": own, "final": final}, tasks)
    share = len(tasks) / max(len(tasks) - 1, 1)
    return draws.contrast(lambda x: share * (x[..., 1, :] - x[..., 0, :]).mean(axis=-1)) if draws else UNKNOWN


def measure(policies: Mapping[str, Runs], tasks: Names) -> tuple[Transfer, Draws] | None:
    """Transfer over the seeds that the initial policy ("base") and every run (by task name) share."""
    draws = joint_draws({name: policies.get(name, {}) for name in (BASE, *tasks)}, tasks)
    if draws is None or not np.isfinite(draws.value_AK).all():
        return None
    return Transfer(tasks, draws.value_AK, draws.draws_BAK, draws.n_K, draws.dropped_K), draws


def single_runs(study: Study, seeds: Sequence[int]) -> dict[str, Runs]:
    """BASE and each task -> seed -> item scores on `select` after one stage of it from the initial policy."""
    paths = {BASE: (), **{task: (task,) for task in study.tasks}}
    return {
        name: {seed: node.scores.values["select"] for seed in seeds if (node := study.pair(seed, *path)) is not None}
        for name, path in paths.items()
    }


def transfer_part(study: Study) -> TransferPart | None:
    """The matrix over all seeds with single-task runs; None while a task has none."""
    policies = single_runs(study, list(study.nodes))
    pooled = measure(policies, study.tasks)
    if pooled is None:
        return None
    transfer, draws = pooled
    effects = {(i, j): draws.gain(i, BASE, j) for i in study.tasks for j in study.tasks}
    decision = decide(transfer)
    assert decision.second is not None  # a study has two tasks or more, and few enough to solve
    best, second = ([study.tasks.index(task) for task in order] for order in (decision.order, decision.second))

    def ahead(x: Floats) -> Floats:
        moved = x[..., 1:, :] - x[..., :1, :]
        return order_value(moved, best) - order_value(moved, second)

    sequential = np.array([_sequential(study, seed) for seed in draws.seeds], dtype=np.float64).mean(axis=0)
    proxies = tuple(_proxies(study, draws.seeds))
    return TransferPart(transfer, draws.seeds, effects, decision, draws.contrast(ahead), proxies, *sequential.tolist())


def _sequential(study: Study, seed: int) -> tuple[float, bool, bool]:
    """One seed's stored scores replayed in batches: the share saved, whether it settled, whether on the full order."""
    policies = single_runs(study, [seed])
    stacks = {task: np.stack([policies[name][seed][task] for name in (BASE, *study.tasks)]) for task in study.tasks}
    stacks = {task: rows[:, ~np.isnan(rows).any(axis=0)] for task, rows in stacks.items()}
    sizes = {task: rows.shape[1] for task, rows in stacks.items()}
    outcome = settle_order(study.tasks, sizes, lambda task, start, stop: stacks[task][:, start:stop])
    alone = measure(policies, study.tasks)
    return outcome.saved, outcome.settled, alone is not None and outcome.decision.order == decide(alone[0]).order


def _proxies(study: Study, seeds: Sequence[int]) -> list[ProxyRow]:
    """Each seed's cheap matrices against the full matrix of the other seeds (its own where there is no other)."""
    found: dict[tuple[str, float, float], list[Agreement]] = {}
    for seed in seeds:
        truth = measure(single_runs(study, [other for other in seeds if other != seed] or [seed]), study.tasks)
        assert truth is not None  # `seeds` are those with a full matrix
        for name, training, evaluation, matrix_KK in _cheap(study, seed):
            found.setdefault((name, training, evaluation), []).append(agreement(truth[0].matrix_KK, matrix_KK))
    return [
        ProxyRow(name, Agreement(*np.mean(rows, axis=0).tolist()), training, evaluation)
        for (name, training, evaluation), rows in found.items()
    ]


def _cheap(study: Study, seed: int) -> Iterator[tuple[str, float, float, Floats]]:
    """Name, cost of training and of evaluation as shares of the full measurement's, and the matrix."""
    policies = single_runs(study, [seed])
    for name, step in ITEMS.items():
        for start in range(step):
            part = {
                who: {seed: {task: items[start::step] for task, items in by_seed[seed].items()}}
                for who, by_seed in policies.items()
            }
            if some := measure(part, study.tasks):
                yield name, 1.0, 1.0 / step, some[0].matrix_KK
    probes = {task: runs(study, f"probe:{task}", "select") for task in study.tasks}
    if all(seed in own for own in probes.values()) and (
        short := measure({BASE: policies[BASE], **probes}, study.tasks)
    ):
        share = study.config["study"]["probe_steps"] / study.config["curriculum"]["steps_per_stage"]
        yield "short probe runs", share, 1.0, short[0].matrix_KK
    nodes = [study.pair(seed, task) for task in study.tasks]
    sketches = [node.sketch for node in nodes if node is not None and node.sketch is not None]
    if len(sketches) == len(study.tasks):
        yield "cosine of gradient sketches", 0.0, 0.0, cosine_matrix(sketches)


def warnings(study: Study) -> list[str]:
    """What limits the numbers: constant tasks, failed items, few seeds, a failed arm."""
    out = []
    nodes = [node for by_path in study.nodes.values() for node in by_path.values()]
    for task in study.tasks:
        items = np.concatenate([np.empty(0), *(node.scores.values["test"][task] for node in nodes)])
        valid = items[~np.isnan(items)]
        if items.size and not valid.size:
            out.append(f"Task {task} has no score at all: its verifier or judge failed on every item.")
        elif valid.size and np.ptp(valid) == 0:
            out.append(
                f"Task {task} scores {valid[0]:.3f} on every item at every checkpoint: it cannot tell arms apart, and"
                " the averages are pulled together by it."
            )
        if 0 < valid.size < items.size:
            out.append(f"Task {task}: {items.size - valid.size} of {items.size} item scores failed and are left out.")
    failed: dict[str, list[str]] = {}
    for cell in study.cells:
        if cell.status == "failed":
            failed.setdefault(" ".join(cell.reason.split()), []).append(f"{cell.arm} (seed {cell.seed})")
    for reason, cells in failed.items():
        more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
        out.append(f"Failed: {', '.join(cells[:3])}{more}: {reason}")
    counts = {arm.name: len(study.of(arm.name)) for arm in competitors(study)}
    if few := [f"{name} ({n})" for name, n in counts.items() if 0 < n < FEW_SEEDS]:
        out.append(f"Fewer than {FEW_SEEDS} seeds, so their intervals are rough: {', '.join(few)}.")
    return out


def missing(study: Study) -> list[str]:
    """Cells that were planned and are not finished, by arm; those of all orders as one."""
    out, orders = [], 0
    for arm in study.arms:
        done = {cell.seed for cell in study.of(arm.name)}
        left = [str(seed) for seed in arm.seeds if seed not in done]
        orders += len(left) if arm.every else 0
        if left and not arm.every:
            out.append(f"{arm.name} (seed {', '.join(left)})")
    return [*out, *([f"{orders} runs of all orders"] if orders else [])]
