"""The entropy probe: fixed completions of the initial policy on which every later policy's entropy is read.

The same tokens at every stage, so a change of the mean entropy is a change of the policy and not of what it happened to write.
"""

from __future__ import annotations

import numpy as np

from omni_fast.build import Parts
from omni_fast.policy.pack import Trajectory
from omni_fast.records import ProbeRow
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.run import Run


def entropies(run: Run, parts: Parts) -> dict[str, float]:
    """Task -> mean token entropy, in nats, of the policy as it is now on the probe (split `select`)."""
    if not run.state["probe"] and parts.config.evaluation.probe_items:
        run.keep_probe(_sample(parts))
    rows = [
        Trajectory(row["prompt"], row["tokens"], [0.0] * len(row["tokens"]), 0.0, number, row["task"])
        for number, row in enumerate(run.state["probe"])
    ]
    found: dict[str, list[float]] = {}
    for row, (_, entropy) in zip(rows, parts.policy.measure(rows), strict=True):
        found.setdefault(row.task, []).extend(entropy)
    return {task: float(np.mean(values)) for task, values in found.items()}


def _sample(parts: Parts) -> list[ProbeRow]:
    """One completion for each of the first `select` items; the first caller has the initial policy."""
    rows: list[ProbeRow] = []
    for name, task in parts.tasks.items():
        items = parts.items[name]["select"][: parts.config.evaluation.probe_items]
        prompts = [Prompt(parts.prompt(name, item), key) for key, item in enumerate(items)]
        sampling = Sampling(task.max_new_tokens, stop_token_ids=parts.stop_token_ids, seed=parts.config.seed)
        for prompt, samples in zip(prompts, parts.engine.generate(prompts, 1, sampling), strict=True):
            rows.append(ProbeRow(task=name, prompt=list(prompt.tokens), tokens=samples[0].tokens))
    return rows
