"""How much a run has to do (`work`), and `--dry-run`: the resolved config and what it would do, without loading anything.

Memory is counted; time is scaled by parameters and cores from what the quickstart took on two cores with AVX512-BF16, which other
lengths, batch sizes and processors can miss by half.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from omni_fast.config import Config

PARAMETERS = {"smollm2-135m-instruct": 134_515_008, "tiny": 700_000}
BYTES_PER_WEIGHT = {"train": 4 + 8 + 4 + 2, "lora": 2}  # fp32 master, two AdamW moments, fp32 gradient, bf16 copy
ENGINE_BYTES_PER_WEIGHT = 2
# Of the quickstart on two cores: tokens per second, every sample counted at its longest; what any model pays besides.
TRAIN_TOKENS_PER_S, EVAL_TOKENS_PER_S, MEASURED_PARAMETERS, MEASURED_CORES = 760.0, 2400.0, 134_515_008, 2
SETUP_S, STEP_S, EVALUATION_S = 60.0, 0.3, 0.5


class Work(NamedTuple):
    """singles, stages: how many single-task runs there are, and stages after them. steps: of the optimiser. items: completions
    to score, in so many evaluations of one task on one split."""

    singles: int
    stages: int
    steps: int
    items: int
    evaluations: int


def work(config: Config, reused: int = 0) -> Work:
    """Of the whole run, without a refresh; reused: stages that are a single-task run."""
    tasks, curriculum, limits = len(config.tasks), config.curriculum, config.evaluation
    singles, stages = tasks if curriculum.measures_transfer else 0, 1 if curriculum.mode == "joint" else tasks
    selected, tested = tasks * (1 + singles), tasks * (1 + singles + stages - reused)
    items = selected * limits.select_items + tested * limits.test_items
    return Work(singles, stages, curriculum.steps_per_stage * (singles + tasks - reused), items, selected + tested)


def describe(config: Config, folder: Path) -> str:
    """The config as TOML-like lines, then the plan."""
    reused = int(config.curriculum.measures_transfer)  # the first stage of the solved order is its task's own run
    singles, stages, steps, items, evaluations = work(config, reused)
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    new_tokens = sum(task.max_new_tokens for task in config.tasks) / len(config.tasks)
    lines = [
        *(_section(name, value) for name, value in config.model_dump(mode="json").items()),
        "",
        f"run folder       {folder}",
        f"tasks            {', '.join(task.name for task in config.tasks)}",
        f"stages           {singles} single-task runs + {stages} of mode {config.curriculum.mode}"
        + (", the first of which is one of them" if reused else ""),
        f"steps            {steps} x {samples} samples x up to {new_tokens:.0f} new tokens"
        f" = {steps * samples * new_tokens:,.0f} new tokens at most",
        f"evaluation       {items:,} completions of up to twice the length",
    ]
    parameters = PARAMETERS.get(config.model.path)
    if parameters is None:
        lines.append(f"memory, time     depend on {config.model.path}, which is not loaded here")
    else:
        per_weight = BYTES_PER_WEIGHT["lora" if config.model.lora_rank else "train"] + ENGINE_BYTES_PER_WEIGHT
        lines.append(f"memory           {parameters * per_weight / 2**30:.1f} GiB: weights, gradients, moments, engine")
        size = parameters / MEASURED_PARAMETERS * MEASURED_CORES / (config.threads or len(os.sched_getaffinity(0)))
        tokens_s = steps * samples * new_tokens / TRAIN_TOKENS_PER_S + items * 2 * new_tokens / EVAL_TOKENS_PER_S
        seconds = SETUP_S + steps * STEP_S + evaluations * EVALUATION_S + size * tokens_s
        lines.append(f"time             about {max(1, round(seconds / 60))} min, the first download not counted")
    return "\n".join(lines)


def _section(name: str, value: object) -> str:
    if not isinstance(value, dict | list):
        return f"{name} = {value!r}"
    head, blocks = (f"[[{name}]]", value) if isinstance(value, list) else (f"[{name}]", [value])
    return "\n".join(line for block in blocks for line in (head, *(f"{key} = {item!r}" for key, item in block.items())))
