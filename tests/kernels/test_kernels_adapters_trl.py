"""TRL's trainer with our log-probs, and with our loss, against TRL alone: same seeds, same completions, same numbers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="the TRL adapter is tested where trl is installed")
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from omni_kernels.adapters import trl as adapter  # noqa: E402
from omni_kernels.adapters.trl import LinearLogprobGRPOTrainer, LinearLossGRPOTrainer, loss_spec  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed_trl.py"
OURS = (LinearLogprobGRPOTrainer, LinearLossGRPOTrainer)
# fp32 throughout; sums in another order differ by some 1e-6, which 4 steps at a high learning rate multiply. By SGD: Adam
# divides a gradient that is 0 but for rounding by its own size
CLOSE = 1e-4
STEPS = 4


def example() -> ModuleType:
    source = importlib.util.spec_from_file_location("embed_trl", EXAMPLE)
    assert source is not None and source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model and a tokenizer on disk, as TRL loads its reference from there."""
    made = tmp_path_factory.mktemp("toy")
    example().toy_model(made)
    return str(made)


def trainer(kind: type[GRPOTrainer], folder: str, **changes: Any) -> GRPOTrainer:
    settings = {
        "output_dir": f"{folder}/out", "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": STEPS,
        "gradient_accumulation_steps": 2, "max_completion_length": 8, "learning_rate": 0.3, "optim": "sgd",
        "temperature": 0.9, "lr_scheduler_type": "constant", "seed": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    peft_config = changes.pop("peft_config", None)
    args = GRPOConfig(**{**settings, **changes})
    data = Dataset.from_dict({"prompt": ["the cat", "a dog ran", "on the mat", "sat"] * 8})
    return kind(folder, vowels_and_t, args=args, train_dataset=data, peft_config=peft_config)


def vowels_and_t(completions: list[str], **_: object) -> list[float]:
    return [float(sum(letter in "aeiout " for letter in text)) for text in completions]


def history(kind: type[GRPOTrainer], folder: str, **changes: Any) -> list[dict[str, float]]:
    made = trainer(kind, folder, **changes)
    made.train()
    return [row for row in made.state.log_history if "grad_norm" in row]


def apart(mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """The largest relative difference of loss, gradient norm and all of TRL's metrics, in any step."""
    assert len(mine) == len(theirs) == STEPS
    worst = 0.0
    for ours, row in zip(mine, theirs, strict=True):
        assert ours.keys() == row.keys()
        for name in row.keys() - {"step_time"}:
            a, b = ours[name], row[name]
            worst = max(worst, 0.0 if a == b else abs(a - b) / max(abs(b), 0.01))  # an on-policy loss is 0 but for bits
    return worst


TRAININGS: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo, off-policy, entropy bonus": {"num_iterations": 2, "entropy_coef": 0.1, "epsilon": 0.05},
    "grpo, KL, off-policy": {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "epsilon": 0.05},
    "grpo, plain KL": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "dr_grpo, off-policy": {"loss_type": "dr_grpo", "num_iterations": 2, "epsilon": 0.05},
    "bnpo, KL, misaligned generation": {"loss_type": "bnpo", "beta": 0.05, "steps_per_generation": 4},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "epsilon": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_training_gives_the_numbers_of_trl(folder: str, name: str) -> None:
    theirs = history(GRPOTrainer, folder, **TRAININGS[name])
    assert max(row["grad_norm"] for row in theirs) > 0.1
    if "num_iterations" in TRAININGS[name]:
        assert max(row["clip_ratio/region_mean"] for row in theirs) > 0.02
    for kind in OURS:
        assert apart(history(kind, folder, **TRAININGS[name]), theirs) < CLOSE


@pytest.mark.parametrize("change", [{"epsilon": 0.06}, {"temperature": 0.91}, {"beta": 0.11}], ids=str)
def test_the_comparison_sees_a_changed_setting(folder: str, change: dict[str, float]) -> None:
    settings = TRAININGS["grpo, KL, off-policy"]
    theirs = history(GRPOTrainer, folder, **settings)
    for kind in OURS:
        assert apart(history(kind, folder, **{**settings, **change}), theirs) > 10 * CLOSE


def test_a_frozen_head_under_lora(folder: str) -> None:
    peft = pytest.importorskip("peft")
    changes = {"beta": 0.1, "loss_type": "dapo", "num_iterations": 2, "epsilon": 0.01}
    made = [
        history(kind, folder, peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"]), **changes)
        for kind in (GRPOTrainer, *OURS)
    ]
    assert made[0][-1]["grad_norm"] > 0.01
    for mine in made[1:]:
        assert apart(mine, made[0]) < CLOSE


def test_autocast_to_bf16_as_trl_has_it_on_by_default(folder: str) -> None:
    theirs = history(GRPOTrainer, folder, bf16=True, max_steps=1)[0]
    for kind in OURS:
        mine = history(kind, folder, bf16=True, max_steps=1)[0]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)  # bf16 dlogits, rounded elsewhere
        assert mine["entropy"] == pytest.approx(theirs["entropy"], rel=5e-3)


# --- one batch, all parameters' gradients -----------------------------------------------------------------------------

BATCH, PROMPT, LENGTH = 4, 3, 6


def batch(current: Tensor | None = None, **parts: bool) -> dict[str, Tensor]:
    """Inputs as TRL's own preparation makes them: ragged, one completion empty; log-probs near the current ones."""
    g = torch.Generator().manual_seed(0)
    center = torch.full((BATCH, LENGTH), -5.0) if current is None else current
    lengths = torch.tensor([6, 3, 0, 5])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()

    def near(spread: float) -> Tensor:
        return center + spread * torch.randn(BATCH, LENGTH, generator=g)

    made = {
        "prompt_ids": torch.randint(2, 290, (BATCH, PROMPT), generator=g),
        "prompt_mask": torch.ones(BATCH, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(2, 290, (BATCH, LENGTH), generator=g),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.7, 0.3, -1.2]),
        "num_items_in_batch": torch.tensor(31),
        "old_per_token_logps": near(0.3),
        "ref_per_token_logps": near(0.5),
        "sampling_per_token_logps": near(0.3),
    }
    made["sampling_per_token_logps"][0, 1] = torch.nan  # a token that the sampler could not score
    made["sampling_per_token_logps"][3] += 0.5  # far from the current policy
    if parts.get("tools"):
        made["tool_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
        made["tool_mask"][0, 2:4] = 0
    if parts.get("sampler"):
        made["importance_sampling_ratio"] = torch.rand(BATCH, LENGTH, generator=g) * 2
        made["importance_sampling_ratio"][1, 1] = 0.0
    if parts.get("sampler_by_sequence"):
        made["importance_sampling_ratio"] = torch.tensor([[0.7], [2.0], [1.0], [0.0]])
    if parts.get("nothing"):
        made["completion_mask"] = torch.zeros_like(mask)
    if parts.get("on_policy"):
        del made["old_per_token_logps"]
    return made


def step(made: GRPOTrainer, inputs: dict[str, Tensor], vllm: bool = False) -> tuple[float, Tensor]:
    """(loss, all gradients in a row) of one micro-batch."""
    made.use_vllm, made.current_gradient_accumulation_steps = vllm, 2
    made.model.train()
    made.model.zero_grad()
    loss = made.compute_loss(made.model, dict(inputs))
    loss.backward()
    used = [p for p in made.model.parameters() if p.requires_grad]
    return float(loss.detach()), torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used]
    )


def current(made: GRPOTrainer, inputs: dict[str, Tensor]) -> Tensor:
    """Log-probs [BATCH, LENGTH] of the completions; 0 behind their ends."""
    whole, used = (torch.cat([inputs[f"prompt_{k}"], inputs[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    with torch.no_grad():
        return made._get_per_token_logps_and_entropies(made.model, whole, used, LENGTH)[0]


LOSSES: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    **{kind: ({"loss_type": kind}, {}) for kind in ("dapo", "grpo", "dr_grpo", "bnpo", "luspo", "sapo", "vespo")},
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3, "beta": 0.1}, {}),
    "two-sided clip": ({"delta": 1.15, "epsilon": 0.1, "beta": 0.1}, {}),
    "gspo, corrected KL": ({"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.2}, {}),
    "luspo by its paper": ({"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.2}, {}),
    "sapo by sequence": ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, {}),
    "cispo by sequence": ({"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.1}, {}),
    "vespo, KL": ({"loss_type": "vespo", "beta": 0.1, "vespo_k_pos": 1.5}, {"on_policy": True}),
    "off-policy mask": ({"off_policy_mask_threshold": 0.3, "beta": 0.1}, {}),
    "off-policy mask, tools": ({"off_policy_mask_threshold": 0.3, "loss_type": "grpo"}, {"tools": True}),
    "top entropy": ({"top_entropy_quantile": 0.2, "beta": 0.1}, {}),
    "top entropy, nearly none": ({"top_entropy_quantile": 0.0, "loss_type": "grpo", "epsilon": 0.9}, {"tools": True}),
    "entropy bonus": ({"entropy_coef": 0.3}, {"tools": True}),
    "entropy bonus, bnpo": ({"entropy_coef": 0.3, "loss_type": "bnpo"}, {}),
    "adaptive entropy, resting": ({"entropy_coef": 0.3, "use_adaptive_entropy": True, "loss_type": "bnpo"}, {}),
    "tools": ({"loss_type": "bnpo", "beta": 0.1}, {"tools": True}),
    "sampler corrected": ({"use_vllm": True, "beta": 0.1}, {"sampler": True}),
    "sampler corrected, off-policy mask": (
        {"use_vllm": True, "off_policy_mask_threshold": 0.1, "loss_type": "grpo"}, {"sampler": True}),
    "sampler corrected by sequence, gspo": (
        {"use_vllm": True, "importance_sampling_level": "sequence", "loss_type": "grpo"}, {"sampler_by_sequence": True}),
    "sampler corrected, gspo by token": (
        {"use_vllm": True, "importance_sampling_level": "sequence", "loss_type": "grpo"}, {"sampler": True}),
    "on-policy": ({"loss_type": "grpo", "beta": 0.1}, {"on_policy": True}),
    "nothing to train on": ({"beta": 0.1}, {"nothing": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_of_a_batch(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, parts = LOSSES[name]
    settings = dict(settings)
    vllm, plain = settings.pop("use_vllm", False), trainer(GRPOTrainer, folder, **settings)
    inputs = batch(current(plain, batch()), **parts)
    value, gradient = step(plain, inputs, vllm)
    assert (gradient.norm() > 1e-3) != bool(parts.get("nothing"))
    made: list[float] = []

    def recorded(*args: Any, **options: Any) -> Any:
        out = fused(*args, **options)
        made.append(float(out.loss.detach()))
        return out

    fused = adapter.linear_policy_loss
    monkeypatch.setattr(adapter, "linear_policy_loss", recorded)
    for kind in OURS:
        mine, my_gradient = step(trainer(kind, folder, **settings), inputs, vllm)
        assert mine == pytest.approx(value, rel=CLOSE, abs=1e-6)
        assert float((my_gradient - gradient).norm()) <= CLOSE * float(gradient.norm())
    assert made == [pytest.approx(value, rel=CLOSE, abs=1e-6)]  # the fused loss itself, not only TRL's of its log-probs


@pytest.mark.parametrize("name", ["two-sided clip", "off-policy mask", "top entropy", "entropy bonus", "tools"])
def test_the_batch_exercises_the_option(folder: str, name: str) -> None:
    settings, parts = LOSSES[name]
    neutral = {k: v for k, v in settings.items() if k in ("loss_type", "beta", "epsilon")}
    plain = trainer(GRPOTrainer, folder, **neutral)
    near = current(plain, batch())
    _, without = step(plain, batch(near))
    _, with_it = step(trainer(GRPOTrainer, folder, **settings), batch(near, **parts))
    assert float((with_it - without).norm()) > 100 * CLOSE * float(without.norm())


COMMON = {
    "vocab_size": 290, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "own head": LlamaConfig(**COMMON, tie_word_embeddings=False),
    "tied head": Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True),
    "softcap": Gemma2Config(**COMMON, head_dim=16, final_logit_softcapping=2.0),
    "logit scale": CohereConfig(**COMMON, logit_scale=0.3),
    "experts": Qwen3MoeConfig(
        **COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[],
        output_router_logits=True, router_aux_loss_coef=0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_kinds(folder: str, name: str) -> None:
    found = []
    for kind in (GRPOTrainer, *OURS):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MODELS[name])
        made = with_model(kind, folder, model)
        assert made.aux_loss_enabled == (name == "experts")
        found.append(step(made, batch()))
    (value, gradient), *mine = found
    assert gradient.norm() > 1e-2
    for my_value, my_gradient in mine:
        assert my_value == pytest.approx(value, rel=CLOSE)
        assert float((my_gradient - gradient).norm()) <= CLOSE * float(gradient.norm())


def with_model(kind: type[GRPOTrainer], folder: str, model: Any) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=f"{folder}/out", per_device_train_batch_size=4, num_generations=4, use_cpu=True, bf16=False,
        gradient_checkpointing=False, gradient_accumulation_steps=2, report_to="none", temperature=0.7,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["a"] * 8})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return kind(model, vowels_and_t, args=args, train_dataset=data, processing_class=tokenizer)


def test_only_completions_enter_the_head(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    inner = adapter.linear_logprob

    def counted(hidden: Tensor, *args: Any, **options: Any) -> Any:
        rows.append(len(hidden))
        return inner(hidden, *args, **options)

    monkeypatch.setattr(adapter, "linear_logprob", counted)
    inputs = batch(tools=True)
    step(trainer(LinearLogprobGRPOTrainer, folder), inputs)
    assert rows == [int(inputs["completion_mask"].sum())]


def test_evaluation_divides_as_trl_does(folder: str) -> None:
    found = []
    for kind in (GRPOTrainer, *OURS):
        made = trainer(kind, folder, beta=0.1)
        made.model.eval()
        with torch.no_grad():
            found.append(float(made.compute_loss(made.model, batch())))
    assert found[1:] == pytest.approx(found[:1] * 2, rel=CLOSE)


REFUSED: dict[str, dict[str, Any]] = {
    "delta": {"delta": 1.1, "epsilon": 0.2},
    "entropy_coef with loss_type 'grpo'": {"loss_type": "grpo", "entropy_coef": 0.1},
    "entropy_coef with loss_type 'sapo'": {"loss_type": "sapo", "use_adaptive_entropy": True},
    "entropy_coef with top_entropy_quantile": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    "importance_sampling_level 'word'": {"importance_sampling_level": "word"},
    "vllm_importance_sampling_correction with loss_type 'vespo'": {"loss_type": "vespo", "use_vllm": True},
    "loss_type 'unheard'": {"loss_type": "unheard"},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name}.*no exact counterpart"):
        loss_spec(GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **REFUSED[name]))


def test_a_missing_trl_is_named() -> None:
    code = "import sys; sys.modules['trl'] = None\nimport omni_kernels.adapters.trl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: omni_kernels.adapters.trl needs trl (tried with 1.16.0)" in done.stderr


@pytest.mark.parametrize("flags", [[], ["--fused"]], ids=str)
def test_the_example_learns(flags: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "15", *flags], capture_output=True, text=True, check=True, timeout=240,
        env=environment,
    )  # fmt: skip
    words = done.stdout.splitlines()[-1].split()
    assert float(words[7]) > float(words[2]) + 2, done.stdout
