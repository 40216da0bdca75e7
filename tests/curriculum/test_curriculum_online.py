"""Online schedulers: whole allocations, resumable, drawn to what still teaches; gradient sketches are unbiased."""

import json

import numpy as np
import pytest
import torch

from omni_fast.curriculum.online import Feedback, Pac, Tac, build_scheduler
from omni_fast.curriculum.sketch import gradient_sketch

TASKS = ("math", "code", "qa", "writing")
METHODS = ("sec", "dump", "pac", "tac")


def _world(step: int, allocation: dict[str, int]) -> dict[str, Feedback]:
    """math still teaches (advantage, rising reward, gradient like qa's); writing is dead; the others are in between."""
    advantage = {"math": 0.8, "code": 0.3, "qa": 0.4, "writing": 0.0}
    rise = {"math": 0.02, "code": 0.0, "qa": 0.005, "writing": 0.0}
    direction = {"math": [1, 0.2, 0], "code": [0, 1, 0], "qa": [1, 0, 0.2], "writing": [0, 0, -1]}
    return {
        task: Feedback(n, 0.2 + rise[task] * step, advantage[task], np.array(direction[task], dtype=float))
        for task, n in allocation.items()
        if n
    }


@pytest.mark.parametrize("method", METHODS)
def test_prefers_what_teaches_and_allocates_whole_steps(method):
    scheduler = build_scheduler(method, TASKS, seed=0, steps=100)
    totals = dict.fromkeys(TASKS, 0)
    for step in range(100):
        allocation = scheduler.allocate(16)
        assert set(allocation) == set(TASKS) and sum(allocation.values()) == 16
        assert all(n >= 0 for n in allocation.values())
        if step >= 30:
            for task, n in allocation.items():
                totals[task] += n
        scheduler.observe(_world(step, allocation))
    assert max(totals, key=totals.get) == "math"
    assert totals["math"] > 1.5 * totals["writing"]


@pytest.mark.parametrize("method", METHODS)
def test_resume_allocates_as_if_never_stopped(method):
    whole = build_scheduler(method, TASKS, seed=3, steps=40)
    first = build_scheduler(method, TASKS, seed=3, steps=40)
    for step in range(40):
        if step == 23:
            state = json.loads(json.dumps(first.state_dict()))
            first = build_scheduler(method, TASKS, seed=3, steps=40)
            first.load_state_dict(state)
        expected = whole.allocate(12)
        assert first.allocate(12) == expected
        assert first.allocate(12) == expected, "asking twice changes nothing"
        whole.observe(_world(step, expected))
        first.observe(_world(step, expected))


def test_pac_starts_even_and_posterior_follows_its_formula():
    pac = Pac(("a", "b"), seed=0, cold=2)
    assert sorted(pac.allocate(7).values()) == [3, 4]
    pac.observe({"a": Feedback(6, 0.5, 0.4), "b": Feedback(2, 0.5, 0.0)})
    # rho = c / (B / N): 6 / 4 and 2 / 4; no slope yet, so u = s_adv
    assert pac.value("a", "mean") == pytest.approx(1.5 * 0.4 / 2.5)
    assert pac.value("a", "variance") == pytest.approx(1 / 2.5 + 0.02)
    assert pac.value("b", "variance") == pytest.approx(1 / 1.5 + 0.02)
    pac.observe({"a": Feedback(8, 0.7, 0.4)})
    assert pac.value("b", "variance") == pytest.approx(1 / 1.5 + 0.04), "an unseen task only drifts"
    # slope of a is 0.2 per step and the only one: progress share 1
    rho, mean, variance = 2.0, 0.24, 0.42
    assert pac.value("a", "mean") == pytest.approx((mean / variance + rho * 2 * 0.4) / (1 / variance + rho))


def test_tac_takes_one_task_a_step_in_turn_first():
    tac = Tac(TASKS, seed=0)
    for task in TASKS:
        assert tac.allocate(8) == {name: 8 if name == task else 0 for name in TASKS}
        tac.observe(_world(0, {task: 8}))
    assert sum(n > 0 for n in tac.allocate(8).values()) == 1
    aligned = {task: tac.value(task, "alignment") for task in TASKS}
    assert aligned["qa"] > aligned["writing"]


def test_sketch_estimates_dot_products_without_bias():
    generator = torch.Generator().manual_seed(0)
    x = {"w": torch.randn(300, 70, generator=generator), "b": torch.randn(9, generator=generator)}
    y = {name: 0.6 * g + 0.8 * torch.randn(g.shape, generator=generator) for name, g in x.items()}
    true = sum(float((x[name] * y[name]).sum()) for name in x)
    estimates = [
        gradient_sketch(x.items(), size=64, seed=seed) @ gradient_sketch(y.items(), size=64, seed=seed)
        for seed in range(300)
    ]
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(true, abs=4 * error)
    assert np.std(estimates) < 3 * true / np.sqrt(64) * 2
    big = gradient_sketch(x.items(), size=2048)
    cosine = (big @ gradient_sketch(y.items(), size=2048)) / (
        np.linalg.norm(big) * np.linalg.norm(gradient_sketch(y.items(), size=2048))
    )
    assert cosine == pytest.approx(0.6, abs=0.08)
    assert np.array_equal(big, gradient_sketch(x.items(), size=2048)), "the projection is fixed by seed and names"


def test_sketch_keeps_small_tensors_apart():
    """Two biases of one number each must not always cancel or add."""
    places = {int(np.flatnonzero(gradient_sketch([(f"b{k}", torch.ones(1))], size=256))[0]) for k in range(40)}
    assert len(places) > 30
