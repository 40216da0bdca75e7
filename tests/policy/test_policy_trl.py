"""Several optimiser steps against TRL's GRPOTrainer on the samples it drew: the same weights, step by step."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from omni_fast.policy.pack import Trajectory
from omni_fast.policy.update import ADAM_EPS, Policy
from omni_kernels import LossSpec

pytest.importorskip("trl", reason="steps are compared with TRL's where trl is installed")
from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

STEPS = 4
SAMPLES = 4
RATE, BETAS, CLIP = 1e-3, (0.9, 0.95), 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's random model and its tokenizer."""
    made = tmp_path_factory.mktemp("toy")
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "embed_trl.py"))["toy_model"](made)
    return made


def trl_steps(folder: Path, output: Path) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """What each step of TRL trained on, and the weights after it."""
    inputs: list[dict[str, Tensor]] = []
    weights: list[dict[str, Tensor]] = []

    class Watched(GRPOTrainer):
        def compute_loss(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            inputs.append({name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)})
            return super().compute_loss(model, batch, *args, **kwargs)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_post_hook(
                lambda *_: weights.append({name: w.detach().clone() for name, w in self.model.named_parameters()})
            )
            return optimizer

    prompts = ["the cat", "a dog ran far", "on the mat", "sat"]
    Watched(
        str(folder), lambda completions, **_: [float(sum(letter in "aeiout " for letter in text)) for text in completions],
        args=GRPOConfig(
            output_dir=str(output), per_device_train_batch_size=len(prompts) * SAMPLES, num_generations=SAMPLES, max_steps=STEPS,
            gradient_accumulation_steps=1, max_completion_length=8, temperature=1.0, top_p=1.0, top_k=0, beta=0.0,
            loss_type="dapo", epsilon=0.2, scale_rewards="group", learning_rate=RATE, lr_scheduler_type="constant",
            optim="adamw_torch", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=ADAM_EPS, weight_decay=0.0,
            max_grad_norm=CLIP, seed=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts * STEPS}),
    ).train()  # fmt: skip
    return inputs, weights


def trajectories(batch: dict[str, Tensor]) -> list[Trajectory]:
    groups: dict[tuple[int, ...], int] = {}
    found = []
    for row, advantage in enumerate(batch["advantages"].tolist()):
        prompt, completion = (
            batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()].tolist() for part in ("prompt", "completion")
        )
        group = groups.setdefault(tuple(prompt), len(groups))
        found.append(Trajectory(prompt, completion, [0.0] * len(completion), advantage, group))
    return sorted(found, key=lambda sample: sample.group)


def test_steps_are_those_of_trl(tmp_path: Path, folder: Path) -> None:
    inputs, theirs = trl_steps(folder, tmp_path)
    assert len(inputs) == len(theirs) == STEPS
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    policy = Policy(
        model, loss=LossSpec(eps_low=0.2, eps_high=0.2), learning_rate=RATE, betas=BETAS, weight_decay=0.0, max_grad_norm=CLIP,
        tokens_per_microbatch=64, dtype=torch.float32,
    )  # fmt: skip
    for batch, after in zip(inputs, theirs, strict=True):
        assert batch["advantages"].abs().max() > 0.1
        policy.update(trajectories(batch))
        ours = torch.cat([(slot.master - start[slot.name]).flatten() for slot in policy.slots])
        wanted = torch.cat([(after[slot.name] - start[slot.name]).flatten() for slot in policy.slots])
        # 1e-5 here; more where AdamW divides a gradient that is 0 but for rounding by its own size
        assert float((ours - wanted).norm()) <= 1e-3 * float(wanted.norm())
