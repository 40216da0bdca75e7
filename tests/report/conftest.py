"""A realistic fake run: item scores drawn with real interference, its metrics rows, its samples."""

from __future__ import annotations

import numpy as np
import pytest

from omni_fast.curriculum.decide import Plan, decide
from omni_fast.curriculum.stages import build_stages
from omni_fast.curriculum.transfer import measure
from omni_fast.report.result import assemble

TASKS = ["math", "code", "qa", "writing"]
BASE = {"math": 0.21, "code": 0.13, "qa": 0.38, "writing": 0.30}
OWN = {"math": 0.55, "code": 0.22, "qa": 0.52, "writing": 0.31}
EFFECT = {
    "math": {"code": 0.03, "qa": -0.02, "writing": -0.06},
    "code": {"math": 0.04, "qa": 0.0, "writing": -0.05},
    "qa": {"math": -0.08, "code": -0.03, "writing": 0.0},
    "writing": {"math": -0.15, "code": -0.06, "qa": -0.03},
}
STEPS = 14


def _moved(items: np.ndarray, target: float, rng: np.random.Generator) -> np.ndarray:
    """The items with as many flipped as brings the mean to `target`, plus a few flips both ways."""
    out = items.copy()
    gap = round((target - out.mean()) * out.size)
    pool = np.flatnonzero(out == (0 if gap > 0 else 1))
    out[rng.permutation(pool)[: abs(gap)]] = 1.0 if gap > 0 else 0.0
    churn = rng.permutation(out.size)[: out.size // 20]
    out[churn] = out[rng.permutation(churn)]
    return out


def _scores(rng: np.random.Generator, n: int) -> tuple[dict, dict]:
    base = {t: (rng.random(n) < p).astype(float) for t, p in BASE.items()}
    single = {i: {j: _moved(base[j], OWN[j] if i == j else BASE[j] + EFFECT[i][j], rng) for j in TASKS} for i in TASKS}
    return base, single


def _metrics(rng: np.random.Generator, order: list[str]) -> list[dict]:
    rows = []
    stages = [(f"single:{t}", t) for t in TASKS] + [(f"curriculum:{k + 1}:{t}", t) for k, t in enumerate(order) if k]
    for stage, task in stages:
        for step in range(1, STEPS + 1):
            share = step / STEPS
            reward = BASE[task] + (OWN[task] - BASE[task]) * (1 - np.exp(-3 * share)) + rng.normal(0, 0.04)
            entropy = (1.1 - 0.5 * share if task in ("math", "code") else 1.6 + 0.2 * share) + rng.normal(0, 0.03)
            parts = {"generate": 4.1, "reward": 0.6 if task != "code" else 1.9, "update": 3.2, "sync": 0.1}
            seconds = {name: value * float(rng.uniform(0.9, 1.1)) for name, value in parts.items()}
            rows.append(
                {
                    "event": "step",
                    "stage": stage,
                    "step": step,
                    "tasks": {
                        task: {
                            "reward": float(np.clip(reward, 0, 1)),
                            "entropy": float(entropy),
                            "mixed_groups": 0.6,
                            "invalid": 0,
                            "completion_tokens": 61.0,
                            "parts": {"correct": float(np.clip(reward, 0, 1)), "format": 0.9},
                            "spreads": {"correct": 0.4, "format": 0.1},
                            "signals": {
                                "words": 20.0 + 2 * step,
                                "drift": 0.0,
                                "repeated": 0.02 * step,
                                "identical": 0.3,
                                "stuffed": 0.0,
                                "disagreement": 0.1 if task == "writing" else None,
                            },
                            "signs": {"repeated": f"{0.02 * step:.0%} <b>repeat</b>"} if step > 10 else {},
                        }
                    },
                    "update": {"loss": float(rng.normal(0, 0.01)), "grad_norm": float(rng.uniform(0.3, 0.6))},
                    "seconds": {**seconds, "total": sum(seconds.values())},
                    "tokens_per_s": 1850.0,
                }
            )
    return rows


def _planned(base_select: dict, single_select: dict, steps: int, order: tuple[str, ...] = ()) -> Plan:
    """The plan of the solved order, or of another one."""
    transfer = measure(base_select, single_select)
    decision = decide(transfer)
    stages = build_stages("order", transfer.tasks, steps, order=order or decision.order, weights={})
    return Plan(stages, decision.statement, transfer, decision)


@pytest.fixture(scope="session")
def planned():
    return _planned


class FakeRun(tuple):
    """A plain tuple that hypothesis can name without printing it all."""

    def __repr__(self) -> str:
        return "FakeRun(...)"


@pytest.fixture(scope="session")
def fake_run() -> FakeRun:
    """(result, metrics, samples) of a finished four-task run."""
    rng = np.random.default_rng(11)
    base_select, single_select = _scores(rng, 100)
    base, single_test = _scores(rng, 100)
    plan = _planned(base_select, single_select, STEPS)
    order = [task for stage in plan.stages for task in stage.own]
    level, rows = dict(BASE), [base]
    for task in order:
        level = {t: OWN[t] if t == task else level[t] + EFFECT[task][t] for t in TASKS}
        rows.append({t: _moved(rows[-1][t], float(np.clip(level[t], 0.02, 1)), rng) for t in TASKS})
    result = assemble(
        TASKS,
        single_test=single_test,
        rows_test=rows,
        trained=plan.stages,
        plan=plan,
    )
    result |= {
        "status": "finished",
        "reused": [f"curriculum:1:{order[0]}"],
        "seconds": {"setup": 41.0, "transfer": 431.0, "train": 402.0, "eval": 176.0, "total": 761.0},
        "throughput": {"rollout_tokens_per_s": 1834.2, "train_tokens_per_s": 2210.8},
        "peak_bytes": 6_412_345_678,
        "sandbox": "bubblewrap",
        "judge": "embedded (policy's frozen base)",
        "versions": {"omni_fast": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        "config": {
            "model": {"path": "SmolLM2-135M"},
            "curriculum": {"mode": "order"},
            "loss": {"clip_low": 0.2, "clip_high": 0.28},
        },
        "entropy": {
            "base": {"math": 1.1, "code": 0.9, "qa": 1.4, "writing": 1.6},
            **{f"curriculum:{k + 1}:{t}": {u: 1.0 - 0.1 * k for u in TASKS} for k, t in enumerate(order)},
        },
        "truncated": {"base": dict.fromkeys(TASKS, 0.12), f"curriculum:4:{order[-1]}": dict.fromkeys(TASKS, 0.03)},
    }
    samples = [
        {
            "task": "math",
            "prompt": "Tom has 3 boxes of 12 eggs. He breaks 5. How many are whole?",
            "before": "Tom has 3 boxes.\nSo he has 12 eggs.\nThe answer is 12.",
            "after": "3 boxes of 12 eggs are 36 eggs.\n36 - 5 = 31\nThe answer is 31.",
            "score_before": 0.0,
            "score_after": 1.0,
        },
        {
            "task": "code",
            "prompt": "Write `def is_even(n)`.",
            "before": "def is_even(n):\n    return n % 2",
            "after": "def is_even(n):\n    return n % 2 == 0",
            "score_before": 0.0,
            "score_after": 1.0,
        },
        {
            "task": "writing",
            "prompt": "Write two sentences about the sea.",
            "before": "<script>alert('sea')</script> & <b>waves</b>",
            "after": "The sea breathes. It keeps its own time.",
            "score_before": 0.5,
            "score_after": 0.5,
        },
    ]
    return FakeRun((result, _metrics(rng, order), samples))
