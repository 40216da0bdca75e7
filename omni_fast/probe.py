"""The entropy probe: fixed completions of the initial policy on which every later policy's entropy is read.

The same tokens at every stage, so a change of the mean entropy is a change of the policy and not of what it happened to write.
"""

from __future__ import annotations

import numpy as np

from omni_fast.build import Parts
from omni_fast.policy.pack import Trajectory
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.run import Run
from omni_fast.tasks.base import Json

PHASE = "probe"


def entropies(run: Run, parts: Parts) -> dict[str, float]:
    """Task -> mean token entropy, in nats, of the policy as it is now on the probe (split `select`)."""
    rows = [
        Trajectory(row["prompt"], row["tokens"], [0.0] * len(row["tokens"]), 0.0, number, row["task"])
        for number, row in enumerate(_probe(run, parts))
    ]
    found: dict[str, list[float]] = {}
    for row, (_, entropy) in zip(rows, parts.policy.measure(rows), strict=True):
        found.setdefault(row.task, []).extend(entropy)
    return {task: float(np.mean(values)) for task, values in found.items()}


def _probe(run: Run, parts: Parts) -> list[dict[str, Json]]:
    """Sampled once, from the initial policy, and kept in the run folder."""
    if not run.finished(PHASE):
        rows: list[dict[str, Json]] = []
        for name, task in parts.tasks.items():
            items = parts.items[name]["select"][: parts.config.evaluation.probe_items]
            prompts = [Prompt(parts.prompt(name, item), key) for key, item in enumerate(items)]
            sampling = Sampling(task.max_new_tokens, stop_token_ids=parts.stop_token_ids, seed=parts.config.seed)
            for prompt, samples in zip(prompts, parts.engine.generate(prompts, 1, sampling), strict=True):
                rows.append({"task": name, "prompt": list(prompt.tokens), "tokens": samples[0].tokens})
        run.finish(PHASE, rows)
    return run.result(PHASE)
