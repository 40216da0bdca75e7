"""Small studies on the digit tasks, a few seconds each: their configuration, and a call that runs one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from omni_fast.study import config as configs
from omni_fast.study import driver
from omni_fast.study.arms import Design
from omni_fast.study.records import Study

SHARED = """
threads = 1
model = {{ path = "{model}", dtype = "float32" }}
rollout = {{ prompts_per_step = 4, samples_per_prompt = 4, max_prompt_tokens = 16 }}
optimizer = {{ learning_rate = {rate} }}
evaluation = {{ select_items = 12, test_items = 16, probe_items = 2, bootstrap_draws = 100 }}
checkpoint = {{ every_steps = 2 }}
judge = {{ backend = "rubric" }}
"""
STUDY = """
curriculum = {{ steps_per_stage = 3, refresh_steps = {refresh}, order = {order} }}
study = {{ seeds = 1, other_seeds = 1, probe_steps = 1, temperatures = [1.0], merge_scales = [1.0, 2.0], arms = {arms} }}
"""
TASK = """
[[tasks]]
name = "{task}"
kind = "python"
cls = "omni_fast.study.tiny:{cls}"
max_new_tokens = 6
"""
TWO = ("sort", "scramble")


def written(
    folder: Path, model: Path, arms: Sequence[str] = (), rate: float = 1e-3, tasks: Sequence[str] = TWO, extra: str = ""
) -> Path:
    """A config with these tasks; of a study if it has arms."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{'-'.join(tasks)}.toml"
    text = SHARED.format(model=model, rate=rate)
    if arms:
        listed = [str(list(names)).replace("'", '"') for names in (tasks, arms)]
        text += STUDY.format(refresh=len(tasks), order=listed[0], arms=listed[1])
    path.write_text(text + extra + "".join(TASK.format(task=task, cls=task.capitalize()) for task in tasks))
    return path


def run(path: Path, folder: Path, *overrides: str) -> tuple[Study, str]:
    """The study as it then stands, and what was told."""
    told = Console(file=io.StringIO(), width=200)
    study = driver.run(Design("small", *configs.load(str(path), overrides)), folder, 1, told)
    return study, told.file.getvalue()  # type: ignore[attr-defined]
