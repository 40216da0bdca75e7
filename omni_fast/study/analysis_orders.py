"""Orders in a study: forecast against realised, whether order matters at all, and both assumptions of the forecast.

Forecasts are compared only with seeds that transfer was not measured on. All orders of all subsets of the tasks, where
they were realised, form a tree whose checkpoints are drawn together, so a difference between any two is paired.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np
from scipy import stats

from omni_fast.curriculum import order as orders_
from omni_fast.curriculum import predict
from omni_fast.curriculum.predict import ForecastError, forecast_error
from omni_fast.curriculum.scores import Estimate, Floats, ItemScores
from omni_fast.curriculum.transfer import Transfer
from omni_fast.study.analysis import measure, runs, single_runs
from omni_fast.study.analysis_draws import UNKNOWN, Contrast, Draws, Names, joint_draws, over_seeds
from omni_fast.study.records import Node, Study

PERMUTATIONS = 2000
NO_TRANSFER, TWIN, AVERAGE = "no transfer at all", "the same order in another seed", ", average of the tasks"


class ForecastPart(NamedTuple):
    """Forecast against realised scores of seeds that measured nothing of it.

    errors: name -> measures over all (seed, order, task); with AVERAGE over (seed, order), of the average score.   by_seed: the additive forecast's Pearson, seed by seed.
    closer: its mean absolute error minus that of no transfer, over the seeds.
    points: task -> its final score in each order, forecast and realised.
    """

    measured_on: tuple[int, ...]
    realised_on: tuple[int, ...]
    errors: dict[str, ForecastError]
    by_seed: tuple[float, ...]
    closer: Contrast
    points: dict[str, list[tuple[Estimate, Estimate]]]


class OrderPart(NamedTuple):
    """All K! orders, realised. Scores are averages over the tasks.

    means: order -> its score, and that minus the mean of all orders.   sd: of the orders' true scores, from their covariance between seeds (0 when below 0).
    p: of "all orders are equal", by permuting the tree of orders seed by seed.
    gap: best minus worst order, chosen on the other seeds.   solved: the order solved from seeds outside `seeds`, and
    its score minus the mean of all orders (None when there are no such seeds).
    """

    seeds: tuple[int, ...]
    means: dict[Names, tuple[Estimate, Contrast]]
    sd: float
    p: float
    gap: Contrast
    solved: tuple[Names, Contrast] | None

    @property
    def ranked(self) -> list[tuple[Names, Estimate, Contrast]]:
        """Best first."""
        return sorted(((order, *both) for order, both in self.means.items()), key=lambda row: -row[1].value)


class Spread(NamedTuple):
    """Values of one quantity over `starts` checkpoints and several seeds (two-way analysis of variance).

    sd: between the starts, noise removed.   noise: of one value.   p: of "the same from every start"; NaN with one seed.
    """

    starts: int
    sd: float
    noise: float
    p: float


class AssumptionPart(NamedTuple):
    """constant: "trained → scored" -> (T from the initial policy, its mean change once `scored` has been trained, spread).

    saturation: task -> spread of its score right after its own stage.   second_pass: task -> change by a second pass.
    """

    constant: dict[str, tuple[float, Contrast, Spread]]
    saturation: dict[str, Spread]
    second_pass: dict[str, Contrast]


class Realised(NamedTuple):
    """Where orders were realised, and on which other seeds transfer was measured.

    transfer: None where it was measured in the same seeds alone.   leaves: (seed, order) -> node after all of its stages.
    complete: the orders that every seed of `seeds` has.   tree: joint draws of all orders of all subsets of the tasks that
    every seed has, the initial policy ("") included.
    """

    measured_on: tuple[int, ...]
    transfer: Transfer | None
    seeds: tuple[int, ...]
    leaves: dict[tuple[int, Names], Node]
    complete: tuple[Names, ...]
    tree: Draws | None


def paths(study: Study, seed: int) -> dict[Names, Node]:
    """Orders of some of the tasks, each at its full length, that a seed has gone through -> node after them."""
    place = {f"{task}:{study.config['curriculum']['steps_per_stage']}": k for k, task in enumerate(study.tasks)}
    found = {
        tuple(place[stage] for stage in path): node
        for path, node in study.nodes.get(seed, {}).items()
        if set(path) <= set(place) and len(set(path)) == len(path)
    }
    ranked = sorted(found, key=lambda order: (len(order), order))
    return {tuple(study.tasks[k] for k in order): found[order] for order in ranked}


def realised(study: Study) -> Realised | None:
    """Seeds with the most orders are compared with transfer of the rest; if they are all the seeds, of their first half."""
    went = {seed: paths(study, seed) for seed in study.nodes}
    whole = {seed: [path for path in own if len(path) == len(study.tasks)] for seed, own in went.items()}
    most = max(map(len, whole.values()), default=0)
    if not most:
        return None
    seeds = sorted(seed for seed, own in whole.items() if len(own) == most)
    single = single_runs(study, sorted(study.nodes)).values()
    measured = sorted(set.intersection(*(set(by_seed) for by_seed in single)))
    measured_on = [seed for seed in measured if seed not in seeds]
    if not measured_on:
        half = (len(seeds) + 1) // 2
        first, seeds = seeds[:half], seeds[half:] or seeds
        measured_on = [seed for seed in first if seed in measured and seed not in seeds]
    pooled = measure(single_runs(study, measured_on), study.tasks)
    shared = [path for path in went[seeds[0]] if all(path in went[seed] for seed in seeds)]
    arms = {">".join(path): {seed: went[seed][path].scores.values["test"] for seed in seeds} for path in shared}
    return Realised(
        measured_on=tuple(measured_on),
        transfer=pooled[0] if pooled else None,
        seeds=tuple(seeds),
        leaves={(seed, path): went[seed][path] for seed in seeds for path in whole[seed]},
        complete=tuple(path for path in shared if path in whole[seeds[0]]),
        tree=joint_draws(arms, study.tasks),
    )


def predicted(transfer: Transfer, order: Names) -> dict[str, Floats]:
    """Name of a forecast -> final scores [K] of an order, inside 0..1."""
    stages = [transfer.tasks.index(task) for task in order]
    out = {form: predict.walk(transfer.scores_MK, transfer.n_K, stages, form)[-1] for form in get_args(predict.Form)}
    return {name: np.clip(scores, 0.0, 1.0) for name, scores in (out | {NO_TRANSFER: transfer.own_K}).items()}


def forecast_part(study: Study, at: Realised) -> ForecastPart | None:
    """None without transfer from a seed that realised nothing of what is forecast."""
    if at.transfer is None:
        return None
    transfer, keys = at.transfer, sorted(at.leaves)
    realised_NK = np.array([[at.leaves[key].scores.mean("test", task) for task in study.tasks] for key in keys])
    told = {order: predicted(transfer, order) for _, order in keys}
    sides = {
        form: (np.stack([told[order][form] for _, order in keys]), realised_NK)
        for form in ("additive", "multiplicative", NO_TRANSFER)
    }
    row = {key: k for k, key in enumerate(keys)}
    twins = [
        (row[a, order], row[b, order])
        for a, b in itertools.combinations(at.seeds, 2)
        for order in told
        if (a, order) in row and (b, order) in row
    ]
    if twins:
        sides[TWIN] = (realised_NK[[a for a, _ in twins]], realised_NK[[b for _, b in twins]])
    errors = {name: forecast_error(*pair) for name, pair in sides.items()}
    errors |= {
        f"{name}{AVERAGE}": forecast_error(*(x.mean(axis=1)[:, None] for x in pair)) for name, pair in sides.items()
    }
    by_seed, closer = [], []
    for seed in at.seeds:
        own = [k for k, key in enumerate(keys) if key[0] == seed]
        additive, none = (forecast_error(*(x[own] for x in sides[form])) for form in ("additive", NO_TRANSFER))
        by_seed.append(additive.pearson)
        closer.append(additive.mean_absolute - none.mean_absolute)
    points: dict[str, list[tuple[Estimate, Estimate]]] = {task: [] for task in study.tasks}
    for order in sorted(told, key=lambda o: [study.tasks.index(task) for task in o]):
        items = {seed: at.leaves[seed, order].scores.values["test"] for seed in at.seeds if (seed, order) in at.leaves}
        draws, forecasts = joint_draws({"leaf": items}, study.tasks), predict.forecast(transfer, order)
        assert draws is not None  # a seed went through it
        for task in study.tasks:
            points[task].append((forecasts[task], draws.mean("leaf", task)))
    return ForecastPart(at.measured_on, at.seeds, errors, tuple(by_seed), over_seeds(np.array(closer)), points)


def order_part(study: Study, at: Realised) -> OrderPart | None:
    """None unless all K! orders were realised in two seeds or more."""
    draws = at.tree
    if draws is None or len(at.seeds) < 2 or len(at.complete) < math.factorial(len(study.tasks)):
        return None
    orders = at.complete
    leaf = [draws.arms.index(">".join(order)) for order in orders]
    average_SO = draws.seeds_SAK[:, leaf].mean(axis=-1)
    if not np.isfinite(average_SO).all():
        return None
    centred_SO = average_SO - average_SO.mean(axis=1, keepdims=True)
    pairs = itertools.combinations(centred_SO, 2)
    covariance = float(np.mean([(a * b).sum() for a, b in pairs])) / (len(orders) - 1)
    chosen: dict[str, dict[int, ItemScores]] = {"best": {}, "worst": {}}
    for k, seed in enumerate(at.seeds):
        others = np.delete(centred_SO, k, axis=0).mean(axis=0)
        for name, place in (("best", others.argmax()), ("worst", others.argmin())):
            chosen[name][seed] = at.leaves[seed, orders[int(place)]].scores.values["test"]
    gap = joint_draws(chosen, study.tasks)

    def against_all(order: Names) -> Contrast:
        k = leaf[orders.index(order)]
        return draws.contrast(lambda x: (x[..., k, :] - x[..., leaf, :].mean(axis=-2)).mean(axis=-1))

    best = tuple(study.tasks[k] for k in orders_.exact(at.transfer.matrix_KK).order) if at.transfer else None
    return OrderPart(
        seeds=at.seeds,
        means={order: (draws.mean(">".join(order)), against_all(order)) for order in orders},
        sd=math.sqrt(max(0.0, covariance)),
        p=order_p_value(centred_SO, orders),
        gap=gap.gain("best", "worst") if gap else UNKNOWN,
        solved=(best, against_all(best)) if best else None,
    )


def order_p_value(centred_SO: Floats, orders: Sequence[Names], permutations: int = PERMUTATIONS) -> float:
    """p-value of the spread of the orders' means against that after relabelling the tree of orders, seed by seed.

    Orders share the stages of their common start, so plain permutation would call shared noise an effect. A relabelling
    that shuffles the branches below each node keeps who shares what with whom.
    """
    rng = np.random.default_rng(0)
    place = {order: k for k, order in enumerate(orders)}
    canonical = sorted(orders[0])

    def shuffled(start: Names, rest: Sequence[str]) -> list[int]:
        if not rest:
            return [place[start]]
        branches = [rest[k] for k in rng.permutation(len(rest))]
        return [leaf for task in branches for leaf in shuffled((*start, task), [t for t in rest if t != task])]

    aligned = centred_SO[:, [place[order] for order in itertools.permutations(canonical)]]
    observed = float(np.var(aligned.mean(axis=0)))
    larger = 0
    for _ in range(permutations):
        moved = [aligned[0], *(row[shuffled((), canonical)] for row in centred_SO[1:])]
        larger += float(np.var(np.mean(moved, axis=0))) >= observed - 1e-15
    return (larger + 1) / (permutations + 1)


def spread(values_SP: Floats) -> Spread:
    """Two-way analysis of variance without replication: S seeds, P starts."""
    seeds, starts = values_SP.shape
    if starts < 2 or not np.isfinite(values_SP).all():
        return Spread(starts, math.nan, math.nan, math.nan)
    between = seeds * float(np.var(values_SP.mean(axis=0), ddof=1))
    if seeds < 2:
        return Spread(starts, math.sqrt(between), math.nan, math.nan)
    residual = values_SP - values_SP.mean(axis=0) - values_SP.mean(axis=1, keepdims=True) + values_SP.mean()
    freedom = (seeds - 1) * (starts - 1)
    within = float((residual**2).sum()) / freedom
    p = float(stats.f.sf(between / within, starts - 1, freedom)) if within > 1e-15 else float(between < 1e-15)
    return Spread(starts, math.sqrt(max(0.0, between - within) / seeds), math.sqrt(within), p)


def assumption_part(study: Study, at: Realised) -> AssumptionPart | None:
    """Both assumptions on every checkpoint of the tree that allows it; None while no stage starts from a trained one."""
    draws = at.tree
    if draws is None:
        return None
    place = {tuple(arm.split(">")) if arm else (): k for k, arm in enumerate(draws.arms)}
    constant, saturation = {}, {}
    for j, scored in enumerate(study.tasks):
        ends = [(path, (*path, scored)) for path in place if (*path, scored) in place]
        if len(ends) > 1:
            saturation[scored] = spread(draws.seeds_SAK[:, [place[end] for _, end in ends], j])
        for trained in study.tasks:
            steps = [(path, (*path, trained)) for path in place if trained != scored and (*path, trained) in place]
            before, after = [place[path] for path, _ in steps], [place[end] for _, end in steps]
            later = [k for k, (path, _) in enumerate(steps) if scored in path]
            if later and () in place and (trained,) in place:
                constant[f"{trained} → {scored}"] = _effect(draws, before, after, later, j)
    second = {}
    for task in study.tasks:
        pair = joint_draws({"once": runs(study, f"single:{task}"), "twice": runs(study, f"repeat:{task}")}, (task,))
        if pair is not None:
            second[task] = pair.gain("twice", "once")
    if not constant and not second:
        return None
    return AssumptionPart(constant, saturation, second)


def _effect(
    draws: Draws, before: list[int], after: list[int], later: list[int], j: int
) -> tuple[float, Contrast, Spread]:
    """A row of `AssumptionPart.constant`. before, after: checkpoints, the initial policy first; later: of these starts."""

    def moved(x: Floats) -> Floats:
        return np.asarray(x[..., after, j] - x[..., before, j])

    change = draws.contrast(lambda x: moved(x)[..., later].mean(axis=-1) - moved(x)[..., 0])
    deltas_SP = moved(draws.seeds_SAK)
    return float(deltas_SP[:, 0].mean()), change, spread(deltas_SP)
