"""The analysis of a study against studies whose truth is known."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_study import Builder, World, planted, write

from omni_fast.study import analysis_orders, records
from omni_fast.study.analysis import measure, missing, single_runs, table, transfer_part, warnings
from omni_fast.study.analysis_draws import joint_draws
from omni_fast.study.analysis_entropy import entropy_part

EFFECT = World(base=0.5, own=0.75, matrix=planted(4) / 2, joint=0.55, merge=0.5, noise=0.015, heat=0.3)
NULL = World(base=0.5, own=0.7, matrix=np.zeros((4, 4)), joint=0.7, merge=0.7, noise=0.015)


@pytest.fixture(scope="module")
def whole():
    return Builder(EFFECT).whole()


@pytest.fixture(scope="module")
def effect(whole, tmp_path_factory):
    return records.read(write(tmp_path_factory.mktemp("effect"), whole))


@pytest.fixture(scope="module")
def null(tmp_path_factory):
    return records.read(write(tmp_path_factory.mktemp("null"), Builder(NULL, seed=1).whole()))


def _arms(rng, gains, seeds, n=60, seed_sd=0.03):
    """An arm per gain on two tasks; noise of the seed, of the item, and of both together."""
    difficulty = {task: rng.random(n) for task in "ab"}
    return {
        str(k): {
            s: {
                task: (d + rng.normal(0, 0.1, n) < 0.5 + gain + rng.normal(0, seed_sd)).astype(float)
                for task, d in difficulty.items()
            }
            for s in range(seeds)
        }
        for k, gain in enumerate(gains)
    }


@given(st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_contrast_is_its_mirror_and_lies_in_its_interval(seeds, seed):
    arms = _arms(np.random.default_rng(seed), (0.0, 0.05), seeds)
    draws = joint_draws(arms, ("a", "b"), draws=300)
    there, back = draws.gain("1", "0"), draws.gain("0", "1")
    expected = np.mean([np.mean(arms["1"][s][t] - arms["0"][s][t]) for s in range(seeds) for t in "ab"])
    assert there.value == pytest.approx(expected) == pytest.approx(-back.value)
    assert there.low <= there.value <= there.high
    assert there.low == pytest.approx(-back.high) and there.p == pytest.approx(back.p, nan_ok=True)
    assert math.isnan(there.p) == (seeds == 1)
    same = draws.gain("1", "1")
    assert (same.value, same.n, same.low, same.high) == (0.0, 120, 0.0, 0.0)
    assert there.seeds == seeds
    lone = draws.mean("0", "a")
    assert 0 <= lone.low <= lone.value <= lone.high <= 1


@pytest.mark.parametrize("seeds", [2, 5])
def test_a_null_is_rarely_rejected_and_an_effect_is_found(seeds):
    rng = np.random.default_rng(seeds)
    p = {gain: [] for gain in (0.0, 0.2)}
    for gain, found in p.items():
        for _ in range(150):
            found.append(joint_draws(_arms(rng, (0.0, gain), seeds), ("a", "b"), draws=300).gain("1", "0").p)
    assert np.mean(np.array(p[0.0]) < 0.05) <= (0.09 if seeds == 5 else 0.15)
    assert np.mean(np.array(p[0.2]) < 0.05) >= (0.9 if seeds == 5 else 0.4)


def test_failed_items_leave_all_arms_and_a_failed_task_is_not_known():
    arms = _arms(np.random.default_rng(0), (0.0, 0.1), 3)
    arms["0"][1]["a"][:10] = np.nan
    draws = joint_draws(arms, ("a", "b"), draws=100)
    assert draws.n_K == (50, 60) and draws.dropped_K == (10, 0)
    arms["1"][2]["b"][:] = np.nan
    broken = joint_draws(arms, ("a", "b"), draws=100)
    assert math.isnan(broken.gain("1", "0").value) and broken.gain("1", "0").n == 0
    assert math.isfinite(broken.gain("1", "0", "a").value)
    assert joint_draws({"x": {0: {}}, "y": {1: {}}}, ("a",)) is None, "no seed in common"
    assert joint_draws({}, ("a",)) is None, "seeds that share no order"


def test_the_table_finds_what_was_planted(effect):
    rows, primary = table(effect)
    by_name = {row.arm.name: row for row in rows}
    assert not any(name.startswith(("order:", "repeat:", "probe:")) for name in by_name)
    assert primary.value == pytest.approx(0.2, abs=0.03) and primary.low > 0.1 and primary.p < 0.001
    solved = by_name["solved"]
    assert solved.relative_joint.value == pytest.approx(0.2 / 0.55, abs=0.08)
    assert solved.relative_merge.value == pytest.approx(0.25 / 0.5, abs=0.1)
    assert math.isnan(solved.p_holm) and by_name["merge:linear"].p_holm < 0.05
    for name, row in by_name.items():
        if math.isfinite(row.p_holm):
            assert row.p_holm >= row.over_joint.p and name not in ("solved", "joint")
    assert by_name["reversed"].bwt.high < -0.05 < solved.bwt.value
    assert solved.orders == {EFFECT.best: 5} and solved.cost.samples_transfer == 3 * 1280
    lost, gained = solved.flips["math"]
    assert gained > 100 and lost < 20


@pytest.mark.parametrize(
    ("primary", "alone"),
    [(("joint", "solved"), {"solved"}), (("solved", "reversed"), set()), (("sft", "joint"), {"sft"})],
)
def test_only_the_declared_contrast_leaves_the_family(effect, primary, alone):
    rows, _ = table(replace(effect, primary=primary))
    assert {row.arm.name for row in rows if math.isnan(row.p_holm)} == alone | {"joint"}


def test_backward_transfer_of_a_refresh_counts_the_tasks_trained_before_the_last(effect):
    (row,) = (row for row in table(effect)[0] if row.arm.name == "refresh")
    expected = []
    for cell in effect.of("refresh"):
        for k, task in enumerate(cell.order[:-1]):
            after, final = (node.scores.mean("test", task) for node in (cell.stages[k], cell.stages[-1]))
            expected.append(final - after)
    assert len(expected) == 6 and row.bwt.value == pytest.approx(np.mean(expected))


@pytest.mark.timeout(60)
def test_ten_tasks_are_analysed_without_listing_their_orders(effect):
    """10! orders, of which two were run."""
    tasks = tuple("abcdefghij")
    items = dict.fromkeys(tasks, np.array([0.0, 1.0]))
    node = effect.pair(0)._replace(scores=records.Scores({"select": items, "test": items}, {}))
    ran = {tuple(f"{task}:20" for task in order[:k]): node for order in (tasks, tasks[::-1]) for k in range(11)}
    study = replace(effect, tasks=tasks, nodes={0: ran, 1: ran})
    at = analysis_orders.realised(study)
    assert at.complete == (tasks, tasks[::-1]) and len(analysis_orders.paths(study, 0)) == 21


def test_no_difference_is_called_none(null):
    rows, primary = table(null)
    assert primary.low < 0 < primary.high and primary.p > 0.05
    arms = [row for row in rows if row.arm.kind in ("merge", "order", "online", "sft")]
    assert len(arms) >= 5 and not any(row.over_joint.p < 0.05 for row in arms)


def test_transfer_and_its_cheap_forms(effect):
    part = transfer_part(effect)
    truth = EFFECT.matrix
    inside = [
        effect_.low <= truth[EFFECT.tasks.index(i), EFFECT.tasks.index(j)] <= effect_.high
        for (i, j), effect_ in part.effects.items()
        if i != j
    ]
    assert len(inside) == 12 and sum(inside) >= 9
    assert part.decision.order == EFFECT.best
    proxies = {row.name: row for row in part.proxies}
    assert len(proxies) == 5 and all(-1 <= row.agreement.spearman <= 1 for row in part.proxies)
    whole, sketch = proxies["the full measurement, one seed"], proxies["cosine of gradient sketches"]
    assert whole.agreement.pairs > 0.9 and whole.agreement.regret < 0.1
    assert sketch.agreement.pairs == pytest.approx(0.5), "a symmetric proxy leaves every pair open"
    assert proxies["short probe runs"].training == pytest.approx(0.25)
    assert 0 <= part.saved < 1 and 0 <= part.settled <= 1


def test_sequential_stopping_saves_where_the_order_is_clear(tmp_path):
    world = World(tasks=("a", "b"), matrix=np.array([[0, 0], [-0.4, 0]]), base=0.5, seeds=(0, 1), order_seeds=(0,))
    part = transfer_part(records.read(write(tmp_path, Builder(world).whole())))
    assert part.saved > 0.4 and part.settled == 1.0 and part.same_order == 1.0


def test_forecasts_meet_seeds_they_do_not_know(effect, null):
    at = analysis_orders.realised(effect)
    assert at.measured_on == (2, 3, 4) and at.seeds == (0, 1) and len(at.complete) == 24
    errors = analysis_orders.forecast_part(effect, at).errors
    assert errors["additive"].n == 2 * 24 * 4 and errors["the same order in another seed"].n == 24 * 4
    assert errors["additive"].mean_absolute < 0.7 * errors["no transfer at all"].mean_absolute
    assert errors["additive"].pearson > 0.7 and abs(errors["additive"].bias) < 0.03
    part = analysis_orders.forecast_part(null, analysis_orders.realised(null))
    assert part.errors["additive"].pearson < 0.4
    assert part.errors["additive"].mean_absolute >= 0.9 * part.errors["no transfer at all"].mean_absolute
    assert [len(points) for points in part.points.values()] == [24] * 4


def test_all_seeds_with_all_orders_are_split_and_one_seed_forecasts_nothing(whole, tmp_path):
    world = World(tasks=("a", "b"), matrix=planted(2), seeds=(0, 1, 2), order_seeds=(0, 1, 2))
    study = records.read(write(tmp_path / "all", Builder(world).whole()))
    at = analysis_orders.realised(study)
    assert at.measured_on == (0, 1) and at.seeds == (2,)
    single = World(tasks=("a", "b"), matrix=planted(2), seeds=(0,), order_seeds=(0,))
    study = records.read(write(tmp_path / "one", Builder(single).whole()))
    at = analysis_orders.realised(study)
    assert at.measured_on == () and analysis_orders.forecast_part(study, at) is None


def test_order_matters_where_it_was_planted_to(effect, null):
    for study, matters in ((effect, True), (null, False)):
        at = analysis_orders.realised(study)
        part = analysis_orders.order_part(study, at)
        assert len(part.means) == 24 and (part.p < 0.05) == matters
        if matters:
            order, gain = part.solved
            assert order == EFFECT.best and gain.value > 0.05
            truth = [orders_value(order) for order in part.means]
            assert part.sd == pytest.approx(np.std(truth, ddof=1), rel=0.35)
            assert part.gap.value > 0.08


def orders_value(order):
    """Average true score of an order in the planted world."""
    where = [EFFECT.tasks.index(task) for task in order]
    return 0.75 + sum(EFFECT.matrix[i, j] for a, j in enumerate(where) for i in where[a + 1 :]) / 4


def test_shared_beginnings_are_not_taken_for_an_effect_of_order():
    """Noise of a stage that six orders share would look like an effect to a plain permutation."""
    rng = np.random.default_rng(3)
    orders = list(itertools.permutations("abcd"))
    p = []
    for _ in range(60):
        noise = {}
        rows = []
        for seed in range(2):
            for order in orders:
                for k in range(1, 5):
                    noise.setdefault((seed, order[:k]), rng.normal())
            rows.append([sum(noise[seed, order[:k]] for k in range(1, 5)) for order in orders])
        p.append(analysis_orders.order_p_value(np.array(rows) - np.mean(rows, axis=1, keepdims=True), orders, 200))
    assert np.mean(np.array(p) < 0.05) <= 0.12
    assert np.mean(np.array(p) < 0.5) == pytest.approx(0.5, abs=0.2)


def test_spread_separates_starts_from_noise():
    rng = np.random.default_rng(0)
    flat = [analysis_orders.spread(rng.normal(0, 0.03, (3, 12))) for _ in range(200)]
    assert np.mean([s.p < 0.05 for s in flat]) == pytest.approx(0.05, abs=0.04)
    level = rng.normal(0, 0.05, 40)
    found = analysis_orders.spread(level + rng.normal(0, 0.02, (5, 40)))
    assert found.sd == pytest.approx(level.std(ddof=1), rel=0.1) and found.noise == pytest.approx(0.02, rel=0.2)
    assert found.p < 1e-6
    assert math.isnan(analysis_orders.spread(level[None]).p)


def test_assumptions_hold_where_they_were_built_in_and_fail_where_not(effect):
    at = analysis_orders.realised(effect)
    part = analysis_orders.assumption_part(effect, at)
    assert len(part.constant) == 12 and len(part.saturation) == len(part.second_pass) == 4
    assert sum(s.p < 0.05 / 12 for _, _, s in part.constant.values()) <= 1
    assert all(c.p > 0.01 for c in part.second_pass.values())


def test_a_second_pass_that_gains_rejects_saturation(whole, tmp_path):
    changed = copy.deepcopy(whole)
    for node in changed["nodes"]:
        if len(node["path"]) == 2 and node["path"][0] == node["path"][1]:
            kept = node["evaluated"]["splits"]["test"][node["tasks"][0]]
            kept["values"] = [1.0] * len(kept["values"])
    study = records.read(write(tmp_path, changed))
    at = analysis_orders.realised(study)
    part = analysis_orders.assumption_part(study, at)
    assert sum(c.low > 0.05 for c in part.second_pass.values()) >= 3


def test_temperature_correction_helps_where_heat_was_the_cause(effect, null):
    at = analysis_orders.realised(effect)
    part = entropy_part(effect, at)
    assert part.tau["solved"].shape == (5, 4) and part.tau["solved"][0] == pytest.approx(1.0)
    assert part.tau["reversed"][1] == pytest.approx(0.85), "the first stage of the reversed order is math"
    whole = part.residuals["all tasks"]
    assert len(part.residuals) == 5 and whole.at_edge == 0 and whole.after < 0.9 * whole.before
    assert whole.change.value == pytest.approx(whole.after - whole.before)
    assert set(part.ablation) == {0.02, 0.05, 0.1, 0.2, 0.5}
    at = analysis_orders.realised(null)
    assert abs(entropy_part(null, at).residuals["all tasks"].change.value) < 0.01


def test_a_short_sweep_corrects_as_far_as_it_reaches(whole, tmp_path):
    short = copy.deepcopy(whole)
    for node in short["nodes"]:
        node["sweep"] = {t: found for t, found in node["sweep"].items() if float(t) in (0.75, 1.0)}
    study = records.read(write(tmp_path, short))
    found = entropy_part(study, analysis_orders.realised(study)).residuals["all tasks"]
    assert found.at_edge == 1.0, "every policy ends colder than the initial one, and nothing above 1 was swept"
    assert found.after == found.before and found.change.value == 0.0


def test_a_constant_task_failed_arms_and_missing_seeds_are_named(whole, tmp_path):
    damaged = copy.deepcopy(whole)
    for node in damaged["nodes"]:
        for evaluated in (node["evaluated"], *node["sweep"].values()):
            for split in evaluated["splits"].values():
                split["qa"]["values"] = [0.0] * len(split["qa"]["values"])
                split["math"]["values"][0] = None
    damaged["cells"] = [c for c in damaged["cells"] if (c["arm"], c["seed"]) != ("joint", 3)]
    for cell in damaged["cells"]:
        if cell["arm"] == "merge:linear":
            cell |= {"status": "failed", "reason": "the weights are not finite"}
    study = records.read(write(tmp_path, damaged))
    rows, primary = table(study)
    by_name = {row.arm.name: row for row in rows}
    assert primary.seeds == 4 and [cell.seed for cell in study.of("joint", "pending")] == [3]
    assert "merge:linear" not in by_name and math.isnan(by_name["solved"].relative_merge.value)
    told = " ".join(warnings(study))
    assert (
        "qa scores 0.000 on every item" in told
        and "Failed: merge:linear (seed 0)" in told
        and "and 2 more: the weights" in told
    )
    assert "math" in told and "left out" in told
    assert "joint (seed 3)" in missing(study) and transfer_part(study) is not None


def test_an_arm_that_diverged_leaves_the_others_alone(whole, tmp_path):
    damaged = copy.deepcopy(whole)
    for node in damaged["nodes"]:
        if node["path"] in (["joint:80"], ["math:20"]):
            for split in node["evaluated"]["splits"].values():
                for kept in split.values():
                    kept["values"] = [None] * len(kept["values"])
    study = records.read(write(tmp_path, damaged))
    rows, primary = table(study)
    by_name = {row.arm.name: row for row in rows}
    assert math.isnan(primary.p) and math.isnan(by_name["joint"].average.value)
    assert math.isfinite(by_name["solved"].relative_merge.value)
    assert measure(single_runs(study, [0, 1]), study.tasks) is None and transfer_part(study) is None
