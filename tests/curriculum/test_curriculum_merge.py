"""Merging against its formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.curriculum.merge import merge


def _models(seed=0, count=3, shape=(40, 30)):
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(shape, generator=generator), "steps": torch.tensor([3])}
    models = [
        {"w": base["w"] + torch.randn(shape, generator=generator), "steps": torch.tensor([9])} for _ in range(count)
    ]
    return base, models


def test_linear_is_the_mean_and_task_arithmetic_scales_it():
    base, models = _models()
    mean = torch.stack([m["w"] for m in models]).mean(dim=0)
    assert torch.allclose(merge("linear", base, models)["w"], mean, atol=1e-5)
    assert torch.allclose(merge("task_arithmetic", base, models)["w"], mean, atol=1e-5)
    half = merge("task_arithmetic", base, models, scale=0.5)["w"]
    assert torch.allclose(half, base["w"] + 0.5 * (mean - base["w"]), atol=1e-5)


def test_ties_by_hand():
    base = {"w": torch.zeros(4)}
    a, b = {"w": torch.tensor([4.0, -1.0, 3.0, 0.1])}, {"w": torch.tensor([2.0, 5.0, -1.0, 0.2])}
    c = {"w": torch.tensor([-1.0, 4.0, 0.5, 6.0])}
    # the largest half of each: a keeps 4, 3; b keeps 2, 5; c keeps 4, 6. Signs all agree: mean of those present.
    assert merge("ties", base, [a, b, c], density=0.5)["w"].tolist() == pytest.approx([3.0, 4.5, 3.0, 6.0])
    # nothing trimmed: position 0 elects +, c's -1 is left out; position 2 elects +, b's -1 is left out
    assert merge("ties", base, [a, b, c], density=1.0)["w"].tolist() == pytest.approx([3.0, 4.5, 1.75, 2.1])


@given(st.sampled_from(["linear", "task_arithmetic", "ties", "dare", "dare_ties"]), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_one_model_at_full_density_is_that_model(method, seed):
    base, models = _models(seed, count=1, shape=(5, 4))
    assert torch.allclose(merge(method, base, models, density=1.0)["w"], models[0]["w"], atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare", "dare_ties"])
def test_equal_models_stay_and_other_tensors_come_from_the_base(method):
    base, models = _models(count=1)
    out = merge(method, base, [models[0], models[0]], density=1.0)
    assert torch.allclose(out["w"], models[0]["w"], atol=1e-5) and out["steps"].item() == 3
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in base.items()}
    assert merge(method, half, models)["w"].dtype == torch.bfloat16


def test_dare_keeps_the_expectation_and_is_seeded():
    base, models = _models(count=1, shape=(200, 200))
    delta = models[0]["w"] - base["w"]
    out = merge("dare", base, models, density=0.25, seed=1)["w"] - base["w"]
    kept = out.abs() > 1e-6
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.allclose(out[kept], 4 * delta[kept], atol=1e-3)
    assert (out * delta).sum().item() == pytest.approx((delta * delta).sum().item(), rel=0.03)
    assert torch.equal(out, merge("dare", base, models, density=0.25, seed=1)["w"] - base["w"])
    assert not torch.equal(out, merge("dare", base, models, density=0.25, seed=2)["w"] - base["w"])


def test_dare_drops_each_model_on_its_own():
    base, models = _models(count=1, shape=(100, 100))
    out = merge("dare", base, [models[0], models[0]], density=0.5)["w"] - base["w"]
    assert (out.abs() > 1e-6).float().mean().item() == pytest.approx(0.75, abs=0.03)
