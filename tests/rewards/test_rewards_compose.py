"""Composition: totals, advantages, invalid samples, statistics."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.errors import UserError
from omni_fast.rewards.compose import (
    Composition,
    batch_normalise,
    group_advantages,
    group_statistics,
    part_statistics,
    total,
)
from omni_fast.rewards.score import Part, Score

ADDITIVE = Composition("additive", {"correct": 1.0, "format": 0.2})
GATED = Composition("gated", {"correct": 1.0, "format": 0.2}, gate="correct")
NORMALISED = Composition("normalised", {"correct": 1.0, "format": 0.2})


def score(correct: float | None, form: float | None = 1.0, reason: str = "ok") -> Score:
    return Score({"correct": Part(correct, reason), "format": Part(form, reason)})


parts = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(-10, 10))
groups = st.lists(st.tuples(parts, parts).map(lambda pair: score(*pair)), max_size=12)
compositions = st.sampled_from([ADDITIVE, GATED, NORMALISED])


def test_total_by_kind():
    assert total(score(1.0, 1.0), ADDITIVE) == pytest.approx(1.2)
    assert total(score(0.0, 1.0), ADDITIVE) == pytest.approx(0.2)
    assert total(score(0.0, 1.0), GATED) == 0.0, "format cannot be farmed without the gate"
    assert total(score(1.0, 1.0), GATED) == pytest.approx(1.2)
    assert total(score(0.5, 1.0), Composition("gated", {"correct": 1.0, "format": 1.0}, "correct", 0.5)) == 1.5
    assert total(score(None), ADDITIVE) is None
    assert total(score(float("nan")), ADDITIVE) is None


def test_unweighted_part_does_not_count_but_its_loss_does():
    only = Composition("additive", {"correct": 1.0})
    assert total(score(1.0, 0.0), only) == 1.0
    assert total(score(1.0, None), only) is None


def test_part_missing_from_the_score_is_a_users_mistake():
    with pytest.raises(UserError, match="tests"):
        total(score(1.0), Composition("additive", {"tests": 1.0}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Composition("additive", {}),
        lambda: Composition("additive", {"a": math.inf}),
        lambda: Composition("additive", {"a": 1e200}),  # its square is no number
        lambda: Composition("gated", {"a": 1.0}, gate="a", gate_threshold=math.nan),  # always open
        lambda: Composition("gated", {"a": 1.0}),
        lambda: Composition("gated", {"a": 1.0}, gate="b"),
        lambda: Composition("additive", {"a": 1.0}, gate="a"),
        lambda: Composition("product", {"a": 1.0}),  # type: ignore[arg-type]
    ],
)
def test_bad_compositions_are_refused(make):
    with pytest.raises(UserError):
        make()


@settings(deadline=None, max_examples=300)
@given(groups, compositions, st.sampled_from(["std", "none"]))
def test_advantages_keep_order_centre_and_drop_the_invalid(group, composition, scale):
    advantages = group_advantages(group, composition, scale)
    assert len(advantages) == len(group)
    valid = [s for s in group if s.valid]
    if len(valid) < 2:
        assert advantages == [None] * len(group)
        return
    assert [a is not None for a in advantages] == [s.valid for s in group]
    given_ = [a for a in advantages if a is not None]
    assert all(math.isfinite(a) for a in given_)
    assert sum(given_) == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None, max_examples=200)
@given(groups, compositions)
def test_an_invalid_sample_never_changes_the_others(group, composition):
    """Infrastructure failure is absence: with and without it the valid ones get the same advantages."""
    valid = [s for s in group if s.valid]
    kept = [a for a, s in zip(group_advantages(group, composition), group, strict=True) if s.valid]
    assert kept == group_advantages(valid, composition)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=16))
def test_std_scale_has_unit_deviation_or_is_zero(values):
    advantages = group_advantages([score(v, 0.0) for v in values], ADDITIVE)
    square = sum(a * a for a in advantages if a is not None) / len(values)
    assert square == pytest.approx(1.0) if len(set(values)) > 1 else advantages == [0.0] * len(values)


def test_rounding_noise_is_not_an_advantage():
    noisy = [
        Score({"correct": Part(0.1 + 0.2), "format": Part(0.0)}),
        Score({"correct": Part(0.3), "format": Part(0.0)}),
    ]
    assert group_advantages(noisy, ADDITIVE) == [0.0, 0.0]


def test_normalised_keeps_apart_what_a_sum_merges():
    """(1, 0) and (0, 1) sum to the same reward; with a rare first part they deserve different advantages (GDPO)."""
    equal = Composition("additive", {"correct": 1.0, "format": 1.0})
    gdpo = Composition("normalised", {"correct": 1.0, "format": 1.0})
    group = [score(1.0, 0.0), score(0.0, 1.0), score(0.0, 1.0), score(0.0, 1.0), score(0.0, 0.0), score(0.0, 1.0)]
    summed, separate = group_advantages(group, equal), group_advantages(group, gdpo)
    assert summed[0] == pytest.approx(summed[1])
    assert separate[0] is not None and separate[1] is not None and separate[0] != pytest.approx(separate[1])


def test_batch_normalise_leaves_none_and_zero_groups_alone():
    result = batch_normalise([[2.0, -2.0, None], [0.0, 0.0], [None, None]])
    assert result == [[1.0, -1.0, None], [0.0, 0.0], [None, None]]
    assert batch_normalise([[0.0, 0.0]]) == [[0.0, 0.0]]


def test_statistics_count_what_was_lost_and_why():
    group = [score(1.0), score(0.0, reason="wrong"), score(None, None, "judge_down")]
    stats = group_statistics([group, [score(1.0), score(1.0)], [score(None), score(1.0)]], ADDITIVE)
    assert (stats.groups, stats.mixed, stats.dropped, stats.invalid) == (3, 1, 1, 2)
    assert stats.mixed_share == 0.5
    assert stats.invalid_reasons == {"correct:judge_down": 1, "format:judge_down": 1, "correct:ok": 1}
    per_part = part_statistics(group)
    assert per_part["correct"].mean == 0.5
    assert per_part["correct"].reasons == {"wrong": 1, "judge_down": 1}
    assert group_statistics([], ADDITIVE).mixed_share == 0.0 and part_statistics([]) == {}


def test_a_number_that_is_not_finite_is_an_invalid_part_and_says_so():
    for value in (math.nan, math.inf, -math.inf):
        part = Part(value)
        assert part == Part(None, "not_finite") and not part.valid
    assert Part(0.0).valid
