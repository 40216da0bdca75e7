"""The closed-form loss against float64 autograd, over every loss, KL form, level, normaliser, correction and mask."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels import IGNORE, PRESETS, LossSpec, Tokens, finalise, normaliser_count, policy_loss, reference
from omni_kernels.losses import head_rows


def ragged(
    seed: int, n: int = 41, on_policy: bool = False, spread: float = 0.4
) -> tuple[Tensor, Tensor, Tensor, Tokens]:
    """(logp, entropy, lse, tokens): interleaved sequences of unequal length, a third masked, one sequence wholly."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(n, generator=g, dtype=torch.float64)  # noqa: E731
    logp = -normal().abs() - 0.1
    sequences = torch.randint(0, 4, (n,), generator=g) * 2
    mask = torch.rand(n, generator=g) < 0.7
    mask &= sequences != 4
    targets = torch.randint(0, 9, (n,), generator=g)
    targets[0] = IGNORE
    old, near, far = logp + spread * normal(), logp + spread * normal(), logp + spread * normal()
    garbage = torch.where(mask, 0.0, torch.nan)
    far[5:7] = -torch.inf
    tokens = Tokens(
        targets,
        normal() + garbage,
        mask,
        sequences,
        None if on_policy else old + garbage,
        near + garbage,
        far + garbage,
    )
    return logp.requires_grad_(), normal().abs().requires_grad_(), normal().requires_grad_(), tokens


def assert_same(spec: LossSpec, logp: Tensor, entropy: Tensor, lse: Tensor, tokens: Tokens) -> None:
    ours = policy_loss(logp, entropy, tokens, spec, lse)
    truth = reference.policy_loss(logp, entropy, tokens, spec, lse)
    assert float((ours.loss - truth).detach()) == pytest.approx(0, abs=1e-12)
    inputs = (logp, entropy, lse)
    if not truth.requires_grad:
        return
    found = torch.autograd.grad(3.0 * ours.loss, inputs, allow_unused=True)
    wanted = torch.autograd.grad(3.0 * truth, inputs, allow_unused=True)
    for mine, theirs in zip(found, wanted, strict=True):
        mine = torch.zeros_like(logp) if mine is None else mine
        theirs = torch.zeros_like(logp) if theirs is None else theirs
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


POLICIES = [
    {"policy": "clip"}, {"policy": "clip", "dual_clip": 1.3}, {"policy": "cispo", "cispo_max": 1.2}, {"policy": "sapo"},
    {"policy": "vespo"}, {"policy": "gmpo"}, {"policy": "reinforce"},
]  # fmt: skip
KLS = [{}, *({"beta": 0.3, "kl": k} for k in ("k1", "k2", "k3")), {"beta": 0.3, "kl_correction": True}]
CORRECTIONS = [
    {},
    *(
        {"rollout": how, "rollout_level": level, "rollout_min": 0.6, "rollout_max": 1.5}
        for how, level in itertools.product(("truncate", "mask", "reject"), ("token", "sequence", "geometric"))
    ),
    {"off_policy_threshold": 0.02}, {"top_entropy": 0.4}, {"drop_covariance": 0.15},
    {"rollout": "truncate", "off_policy_threshold": 0.02, "top_entropy": 0.5, "drop_covariance": 0.1},
]  # fmt: skip
SHAPES = [
    {"level": level, "aggregation": aggregation, "denominator": denominator}
    for level, aggregation, denominator in itertools.product(
        ("token", "sequence"), ("token", "sequence"), ("kept", "all")
    )
]


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: "-".join(map(str, p.values())))
def test_value_and_gradient_equal_autograd(policy: dict[str, object], on_policy: bool) -> None:
    for k, (kl, correction, shape) in enumerate(itertools.product(KLS, CORRECTIONS, SHAPES)):
        extra = {"entropy_coef": 0.05 * (k % 2), "z_loss": 0.01 * (k % 3)}
        spec = LossSpec(**policy, **kl, **correction, **shape, **extra, normaliser=("tokens", "sequences")[k % 5 % 2])
        assert_same(spec, *ragged(k % 11, on_policy=on_policy))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_autograd(name: str) -> None:
    for seed in range(5):
        assert_same(LossSpec.preset(name, beta=0.1, length_constant=9.0), *ragged(seed))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_spec_on_any_batch_equals_autograd(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 30))
    spread = data.draw(st.sampled_from([0.01, 0.5, 3.0, 30.0]))  # 30 goes far beyond the bound on log-ratios
    spec = LossSpec(
        **data.draw(st.sampled_from(POLICIES)),
        **data.draw(st.sampled_from(KLS)),
        **data.draw(st.sampled_from(CORRECTIONS[:-1])),
        **data.draw(st.sampled_from(SHAPES)),
    )
    logp, entropy, lse, tokens = ragged(data.draw(st.integers(0, 999)), max(n, 8), data.draw(st.booleans()), spread)
    ours = policy_loss(logp, entropy, tokens, spec, lse)
    assert ours.loss.isfinite() and ours.metrics.isfinite().all()
    truth = reference.policy_loss(logp, entropy, tokens, spec, lse)
    torch.testing.assert_close(ours.loss, truth, rtol=1e-9, atol=1e-12)
    if truth.requires_grad:
        (mine,) = torch.autograd.grad(ours.loss, logp)
        (theirs,) = torch.autograd.grad(truth, logp, allow_unused=True)
        torch.testing.assert_close(mine, torch.zeros_like(logp) if theirs is None else theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: "-".join(map(str, p.values())))
@pytest.mark.parametrize("normaliser", ["tokens", "sequences"])
def test_splitting_into_micro_batches_changes_nothing(
    policy: dict[str, object], shape: dict[str, str], normaliser: str
) -> None:
    spec = LossSpec(
        **policy,
        **shape,
        normaliser=normaliser,
        beta=0.2,
        entropy_coef=0.1,
        rollout="mask",
        rollout_min=0.7,
        rollout_max=1.4,
    )
    logp, entropy, _, tokens = ragged(3)
    tokens = replace(tokens, denominator=normaliser_count(tokens, spec))
    whole = policy_loss(logp, entropy, tokens, spec)
    (wanted,) = torch.autograd.grad(whole.loss, logp)
    counts, loss, metrics, gradient = 0.0, 0.0, torch.zeros_like(whole.metrics), torch.zeros_like(logp)
    assert tokens.sequences is not None
    for part in (tokens.sequences < 3, tokens.sequences >= 3):
        cut = {f: getattr(tokens, f)[part] for f in ("targets", "advantages", "mask", "old", "reference", "rollout")}
        ids = tokens.sequences[part].unique(return_inverse=True)[1]
        piece = Tokens(**cut, sequences=ids)
        counts = counts + normaliser_count(piece, spec)
        output = policy_loss(logp[part], entropy[part], replace(piece, denominator=tokens.denominator), spec)
        loss, metrics = loss + output.loss, metrics + output.metrics
        gradient += torch.autograd.grad(output.loss, logp)[0]
    torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(metrics, whole.metrics, rtol=1e-11, atol=1e-12)
    assert counts == tokens.denominator


def test_a_count_that_needs_current_log_probs_is_refused() -> None:
    *_, tokens = ragged(0)
    with pytest.raises(ValueError, match="denominator='all'"):
        normaliser_count(tokens, LossSpec(top_entropy=0.5))
    assert normaliser_count(tokens, LossSpec(top_entropy=0.5, denominator="all")) == tokens.trained().sum()


def test_order_of_tokens_changes_nothing() -> None:
    logp, entropy, _, tokens = ragged(1)
    spec = LossSpec.preset("gspo", beta=0.1)
    order = torch.randperm(len(logp), generator=torch.Generator().manual_seed(0))
    names = ("targets", "advantages", "mask", "sequences", "old", "reference", "rollout")
    shuffled = Tokens(**{f: getattr(tokens, f)[order] for f in names})
    one, two = policy_loss(logp, entropy, tokens, spec), policy_loss(logp[order], entropy[order], shuffled, spec)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(one.metrics, two.metrics, rtol=1e-12, atol=1e-13)


def test_metrics_by_hand() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0, -9.0])
    logp = torch.tensor([-0.5, -1.5, -0.5, -1.5, -3.0])
    tokens = Tokens(
        torch.tensor([1, 1, 1, 1, IGNORE]), torch.tensor([1.0, 1.0, -1.0, -1.0, 5.0]), None, None, old,
        reference=torch.full((5,), -1.0), rollout=torch.tensor([-1.0, -1.0, -1.2, -torch.inf, 0.0]),
    )  # fmt: skip
    out = policy_loss(logp, torch.full((5,), 2.0), tokens, LossSpec(dual_clip=1.5, rollout="truncate", rollout_max=1.1))
    got = finalise(out.metrics)
    assert got["tokens"] == 4 and got["kept"] == 0.75 and got["entropy"] == 2.0 and got["logp"] == pytest.approx(-1)
    assert got["clip_high"] == 0.25 and got["clip_low"] == 0.25 and got["clip_dual"] == 0.25
    assert (
        got["active"] == 0.25
    )  # row 1; row 0 is clipped high, row 2 beyond the dual bound, row 3 dropped (and clipped)
    up, down = torch.exp(torch.tensor([0.5, -0.5])).tolist()
    assert got["ratio"] == pytest.approx((up + down) / 2)
    assert got["ratio_ess"] == pytest.approx((2 * up + 2 * down) ** 2 / (4 * (2 * up**2 + 2 * down**2)))
    assert got["old_kl_k1"] == pytest.approx(0) and got["reference_kl_k2"] == pytest.approx(0.125)
    assert got["rollout_weight"] == pytest.approx((1 + 1 + 1.1) / 3) and got["rollout_gap"] == pytest.approx(0.2 / 3)


def test_fully_masked_batch_is_exactly_zero() -> None:
    logp, entropy, lse, tokens = ragged(0)
    tokens = replace(tokens, mask=torch.zeros(len(logp), dtype=torch.bool))
    for name in PRESETS:
        out = policy_loss(logp, entropy, tokens, LossSpec.preset(name, beta=0.1, entropy_coef=0.1))
        assert out.loss == 0 and torch.autograd.grad(out.loss, logp)[0].abs().max() == 0
        assert finalise(out.metrics) == {"loss": 0.0, "tokens": 0.0}


def test_a_step_of_which_nothing_counts_has_a_normaliser_of_zero() -> None:
    logp, entropy, _, tokens = ragged(0)
    spec = LossSpec(beta=0.1, entropy_coef=0.1)
    tokens = replace(tokens, mask=torch.zeros(len(logp), dtype=torch.bool))
    count = normaliser_count(tokens, spec)
    for n in (count, count.item(), 0):
        out = policy_loss(logp, entropy, replace(tokens, denominator=n), spec)
        assert out.loss == 0 and torch.autograd.grad(out.loss, logp)[0].abs().max() == 0


def test_empty_batch() -> None:
    none = torch.zeros(0)
    out = policy_loss(none, none, Tokens(none.long(), none), LossSpec())
    assert out.loss == 0


def test_double_backward_is_an_error() -> None:
    logp, entropy, _, tokens = ragged(0)
    (grad,) = torch.autograd.grad(policy_loss(logp, entropy, tokens, LossSpec()).loss, logp, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_upstream_dtype_is_kept() -> None:
    logp, entropy, _, tokens = ragged(0)
    half = logp.detach().bfloat16().requires_grad_()
    policy_loss(half, None, tokens, LossSpec()).loss.backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_head_rows_drop_only_what_cannot_matter() -> None:
    tokens = Tokens(torch.tensor([1, 2, IGNORE, 3]), torch.tensor([0.0, 1.0, 1.0, -1.0]))
    assert head_rows(tokens, LossSpec()).tolist() == [1, 3]
    assert head_rows(tokens, LossSpec(), skip_zero_advantage=False).tolist() == [0, 1, 3]
    assert head_rows(tokens, LossSpec(entropy_coef=0.1)).tolist() == [0, 1, 3]
    assert head_rows(tokens, LossSpec.preset("gspo")).tolist() == [0, 1, 3]


def test_specs_are_checked_and_travel_as_strings() -> None:
    spec = LossSpec.preset("dapo", beta=0.1, vespo_positive=(1.0, 2.0), rollout="mask")
    assert LossSpec.decode(spec.encoded) == spec and hash(spec) == hash(LossSpec.decode(spec.encoded))
    with pytest.raises(ValueError, match="dual_clip is 1.1; use at least"):
        LossSpec(dual_clip=1.1)
    with pytest.raises(ValueError, match="policy is 'ppo'; use one of 'clip'"):
        LossSpec(policy="ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kl_correction"):
        LossSpec(kl="k1", kl_correction=True)
    with pytest.raises(ValueError, match="preset"):
        LossSpec.preset("gpro")
    for field, value in {"eps_low": math.nan, "beta": math.nan, "beta ": "0.1", "vespo_negative": (1.0,)}.items():
        with pytest.raises(ValueError, match=f"LossSpec.{field.strip()} is .*; use (a|two) number"):
            LossSpec(**{field.strip(): value})  # type: ignore[arg-type]


def test_numbers_of_all_kinds_make_the_same_spec() -> None:
    spec = LossSpec(beta=np.float32(0.5), eps_low=0, vespo_positive=[2, 3])  # type: ignore[arg-type]
    assert spec == LossSpec(beta=0.5, eps_low=0.0) and hash(spec) and LossSpec.decode(spec.encoded) == spec
    assert spec.encoded == LossSpec(beta=0.5, eps_low=0.0).encoded


def test_bad_tokens_are_named() -> None:
    logp, entropy, _, tokens = ragged(0)
    with pytest.raises(ValueError, match=r"Tokens.old is \[3\]"):
        policy_loss(logp, entropy, replace(tokens, old=torch.zeros(3)), LossSpec())
    with pytest.raises(ValueError, match="Tokens.mask is torch.float32; give bool"):
        policy_loss(logp, entropy, replace(tokens, mask=torch.ones(len(logp))), LossSpec())
    with pytest.raises(ValueError, match="sequences holds 99; give numbers in"):
        policy_loss(logp, entropy, replace(tokens, sequences=torch.full((len(logp),), 99)), LossSpec())
    with pytest.raises(ValueError, match="reference is None"):
        policy_loss(logp, entropy, replace(tokens, reference=None), LossSpec(beta=0.1))
    with pytest.raises(ValueError, match="rollout is None"):
        policy_loss(logp, entropy, replace(tokens, rollout=None), LossSpec(rollout="mask"))
    with pytest.raises(ValueError, match="entropy is None"):
        policy_loss(logp, None, tokens, LossSpec(entropy_coef=0.1))
    with pytest.raises(ValueError, match="lse is None"):
        policy_loss(logp, entropy, tokens, LossSpec(z_loss=0.1))
