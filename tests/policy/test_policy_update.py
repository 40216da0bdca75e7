"""The optimiser step: equal to a plain reference step, independent of the split, resumable, safe with bad gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaForCausalLM

from omni_fast.errors import RunError, UserError
from omni_fast.policy.model import working_dtype
from omni_fast.policy.pack import Share, Trajectory
from omni_fast.policy.update import Policy
from omni_kernels import LossSpec, Tokens, policy_loss

Models = Callable[..., LlamaForCausalLM]
Batches = Callable[..., list[Trajectory]]


DAPO = LossSpec.preset("dapo")
LOSSES = {
    "dapo": DAPO,
    "grpo with KL": LossSpec.preset("grpo", beta=0.05),
    "dr_grpo with entropy": LossSpec.preset("dr_grpo", length_constant=6.0, entropy_coef=0.02),
    "gspo": LossSpec.preset("gspo"),
    "truncated weights": LossSpec.preset("dapo", rollout="truncate"),
    "masked weights": LossSpec.preset("dapo", rollout="mask", rollout_min=0.2, rollout_max=3.0),
}


def policy_of(model: LlamaForCausalLM, loss: LossSpec = DAPO, **options: object) -> Policy:
    settings_ = {"learning_rate": 1e-2, "dtype": torch.float32, **options}
    return Policy(model, loss=loss, **settings_)  # type: ignore[arg-type]


def flat_gradient(policy: Policy) -> torch.Tensor:
    return torch.cat([slot.sum().flatten() for slot in policy.slots])


def plain_step(model: LlamaForCausalLM, batch: list[Trajectory], loss: LossSpec, temperature: float) -> torch.Tensor:
    """The same step without any of our machinery: one padded-free forward per sample, autograd, torch's AdamW."""
    reference = copy.deepcopy(model)
    parts: dict[str, list[torch.Tensor]] = {key: [] for key in ("logp", "entropy", "reference")}
    for sample in batch:
        ids = torch.tensor([[*sample.prompt, *sample.completion]])
        target = torch.tensor(sample.completion)[:, None]
        for name, which in (("logp", model), ("reference", reference)):
            logits = which(input_ids=ids[:, :-1]).logits[0, len(sample.prompt) - 1 :] / temperature
            logp = logits.log_softmax(-1)
            parts[name].append(logp.gather(1, target)[:, 0])
            if name == "logp":
                parts["entropy"].append(-(logp.exp() * logp).sum(-1))
    lengths = torch.tensor([len(sample.completion) for sample in batch])
    flat = Tokens(
        torch.tensor([token for sample in batch for token in sample.completion]),
        torch.tensor([sample.advantage for sample in batch]).repeat_interleave(lengths),
        sequences=torch.arange(len(batch)).repeat_interleave(lengths),
        reference=torch.cat(parts["reference"]).detach() if loss.beta else None,
        rollout=torch.tensor([value for sample in batch for value in sample.logprobs]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    policy_loss(torch.cat(parts["logp"]), torch.cat(parts["entropy"]), flat, loss).loss.backward()
    norm = clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return norm


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_step_equals_a_plain_one(build_model: Models, build_batch: Batches, name: str, tied: bool) -> None:
    plain, ours = build_model(tied), build_model(tied)
    batch = build_batch(1, zero_groups=1)
    norm = plain_step(plain, batch, LOSSES[name], temperature=0.8)
    policy = policy_of(
        ours, LOSSES[name], temperature=0.8, weight_decay=0.1, max_grad_norm=0.5, tokens_per_microbatch=18
    )
    metrics = policy.update(batch)
    assert metrics["microbatches"] > 1
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for (parameter, value), (_, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        # Adam divides by the gradient's own size: where that is rounding noise, so is the step. Compare where it is not.
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-4, msg=parameter)


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(LOSSES)),
    budget=st.integers(13, 60),
    share=st.sampled_from(["tree", "prompt", "none"]),
    order=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=30)
def test_split_order_and_sharing_change_nothing(
    build_model: Models, build_batch: Batches, seed: int, name: str, budget: int, share: Share, order: object
) -> None:
    batch = build_batch(seed, zero_groups=seed % 2)
    results = []
    for tokens, sharing, samples in (
        (10_000, "none", batch),
        (budget, share, sorted(batch, key=lambda _: order.random())),
    ):  # type: ignore[attr-defined]
        policy = policy_of(build_model(), LOSSES[name], tokens_per_microbatch=tokens, share=sharing, max_grad_norm=1e9)
        metrics = policy.update(samples)
        results.append((metrics, flat_gradient(policy)))
    (whole, expected), (split, gradient) = results
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6 * max(1.0, whole.get("grad_norm", 1.0)))
    for key in ("loss", "tokens", "entropy", "grad_norm", "kept", "active", "rollout_gap"):
        assert split.get(key) == pytest.approx(whole.get(key), rel=1e-4, abs=1e-5), key


def test_bf16_working_copy_follows_the_masters(build_model: Models, build_batch: Batches) -> None:
    model = build_model()
    policy = policy_of(model, dtype=torch.bfloat16, learning_rate=1e-4)
    before = {name: master.clone() for name, master in policy.weights().items()}
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for seed in range(3):
        policy.update(build_batch(seed))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.data_ptr() == addresses[name]
        master = policy.weights()[name]
        assert not torch.equal(master, before[name])
        assert torch.equal(parameter.data, master.to(torch.bfloat16))
        assert parameter.grad is None


def test_bf16_gradient_is_close_to_fp32(build_model: Models, build_batch: Batches) -> None:
    batch = build_batch(3)
    norms, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        policy = policy_of(build_model(), dtype=dtype)
        norms.append(policy.update(batch)["grad_norm"])
        gradients.append(flat_gradient(policy))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.995


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"tokens_per_microbatch": 20}])
def test_memory_options_change_nothing(build_model: Models, build_batch: Batches, options: dict[str, object]) -> None:
    batch = build_batch(5)
    plain, other = policy_of(build_model()), policy_of(build_model(), **options)
    assert other.update(batch)["loss"] == pytest.approx(plain.update(batch)["loss"], rel=1e-5)
    torch.testing.assert_close(flat_gradient(other), flat_gradient(plain), rtol=1e-4, atol=1e-6)


def test_groups_without_advantage_cost_nothing_but_count(
    build_model: Models, build_batch: Batches, model: LlamaForCausalLM
) -> None:
    batch = build_batch(2, groups=4, zero_groups=2)
    rows = policy_of(model).update(batch)["rows"]
    assert rows == policy_of(build_model()).update([sample for sample in batch if sample.advantage != 0])["rows"]
    with_kl = policy_of(build_model(), replace(DAPO, beta=0.1)).update(batch)
    assert with_kl["rows"] > rows
    assert with_kl["tokens"] == sum(len(sample.completion) for sample in batch)


def test_step_without_any_advantage_leaves_the_weights(build_batch: Batches, model: LlamaForCausalLM) -> None:
    policy = policy_of(model)
    policy.update(build_batch(0))
    before = {name: master.clone() for name, master in policy.weights().items()}
    assert policy.update(build_batch(1, groups=2, zero_groups=2))["skipped"] == 1
    assert all(torch.equal(before[name], master) for name, master in policy.weights().items())
    assert policy.steps == 1


def test_a_step_whose_tokens_are_all_masked_is_skipped(build_batch: Batches, model: LlamaForCausalLM) -> None:
    """Samples of weights too far away: their share of the loss's normaliser is 0."""
    policy = policy_of(model, LossSpec.preset("dapo", rollout="mask", rollout_min=0.5, rollout_max=2.0))
    policy.update(build_batch(0))
    before = {name: master.clone() for name, master in policy.weights().items()}
    far = [replace(sample, logprobs=[-99.0] * len(sample.completion)) for sample in build_batch(1)]
    metrics = policy.update(far)
    assert metrics["skipped"] == 1 and metrics["kept"] == 0 and metrics["loss"] == 0
    assert all(torch.equal(before[name], master) for name, master in policy.weights().items())
    assert policy.steps == 1 and policy.bad_steps == 0


def test_gradients_that_are_not_finite_are_skipped_then_stop_the_run(
    build_batch: Batches, model: LlamaForCausalLM
) -> None:
    policy = policy_of(model, max_bad_steps=2)
    policy.update(build_batch(0))
    before = {name: master.clone() for name, master in policy.weights().items()}
    bad = [replace(sample, advantage=math.inf) for sample in build_batch(1)]
    for count in (1, 2):
        metrics = policy.update(bad)
        assert metrics["skipped"] == 1 and metrics["bad_steps"] == count
        assert "loss" not in metrics and all(map(math.isfinite, metrics.values())), "JSON knows no other"
    assert all(torch.equal(before[name], master) for name, master in policy.weights().items())
    assert policy.update(build_batch(2))["skipped"] == 0  # a good step in between starts the count again
    policy.update(bad)
    policy.update(bad)
    with pytest.raises(RunError, match="not finite in 3 steps"):
        policy.update(bad)
    policy.reset_optimizer()  # another stage, from other weights
    assert policy.numbers()["bad_steps"] == 0


@pytest.mark.parametrize("options", [{}, {"loss": LOSSES["grpo with KL"]}, {"dtype": torch.bfloat16}, {"lora_rank": 2}])
def test_resume_is_bit_for_bit(
    build_model: Models, build_batch: Batches, options: dict[str, object], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    straight = policy_of(build_model(), **options)  # type: ignore[arg-type]
    for seed in range(2):
        straight.update(build_batch(seed))
    straight.save(tmp_path)
    resumed = policy_of(build_model(), **options)  # type: ignore[arg-type]
    resumed.load(tmp_path, straight.numbers())
    for seed in range(2, 4):
        first, second = straight.update(build_batch(seed)), resumed.update(build_batch(seed))
        assert first["loss"] == second["loss"] and first["grad_norm"] == second["grad_norm"]
    for name, master in straight.weights().items():
        assert torch.equal(master, resumed.weights()[name])


def test_weights_of_another_model_are_refused(build_model: Models, model: LlamaForCausalLM, tmp_path: Path) -> None:
    policy = policy_of(model)
    policy_of(build_model(tied=False)).save(tmp_path)
    with pytest.raises(UserError, match="not of this model"):
        policy.load(tmp_path, policy.numbers())
    with pytest.raises(UserError, match="not of this model"):
        policy.load_weights(policy_of(build_model(tied=False)).weights())


def test_reset_optimizer_starts_the_warm_up_again(build_batch: Batches, model: LlamaForCausalLM) -> None:
    policy = policy_of(model, warmup_steps=1)
    rates = [policy.update(build_batch(seed))["learning_rate"] for seed in range(3)]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2])
    policy.reset_optimizer()
    assert policy.update(build_batch(4))["learning_rate"] == pytest.approx(5e-3)


def test_reference_is_the_start(build_batch: Batches, model: LlamaForCausalLM) -> None:
    policy = policy_of(model, replace(DAPO, beta=0.1))
    batch = build_batch(0)
    assert policy.update(batch)["kl"] == pytest.approx(0.0, abs=1e-6)
    assert policy.update(batch)["kl"] > 1e-4


def test_lora_trains_the_adapter_alone_and_its_reference_is_the_base(build_model: Models, build_batch: Batches) -> None:
    model = build_model()
    policy = policy_of(model, replace(DAPO, beta=0.1), lora_rank=2)
    assert all("lora_" in name for name in policy.weights())
    assert policy.reference is None
    base = {name: value.clone() for name, value in model.named_parameters() if "lora_" not in name}
    batch = build_batch(0)
    assert policy.update(batch)["kl"] == pytest.approx(0.0, abs=1e-6)
    policy.update(batch)
    assert policy.update(batch)["kl"] > 1e-5
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in base.items())


def test_measure_gives_the_models_own_logprobs(build_batch: Batches, model: LlamaForCausalLM) -> None:
    policy = policy_of(model, temperature=0.7, tokens_per_microbatch=20)
    batch = build_batch(6)
    for sample, (logp, entropy) in zip(batch, policy.measure(batch), strict=True):
        ids = torch.tensor([[*sample.prompt, *sample.completion]])
        with torch.no_grad():
            full = (model(input_ids=ids[:, :-1]).logits[0, len(sample.prompt) - 1 :] / 0.7).log_softmax(-1)
        expected = full.gather(1, torch.tensor(sample.completion)[:, None])[:, 0]
        assert logp == pytest.approx(expected.tolist(), abs=1e-4)
        assert entropy == pytest.approx((-(full.exp() * full).sum(-1)).tolist(), abs=1e-4)


def test_models_that_tree_attention_or_the_head_would_get_wrong_are_refused(build_model: Models) -> None:
    model = build_model()
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(UserError, match="full attention"):
        policy_of(model)
    model = build_model()
    model.config.sliding_window = 8  # as Mistral says it, whose layers have no kinds
    with pytest.raises(UserError, match="full attention .*sliding"):
        policy_of(model)
    model = build_model()
    model.config.logit_scale = 0.5
    with pytest.raises(UserError, match="logit_scale"):
        policy_of(model)
    with pytest.raises(UserError, match="quantile"):
        policy_of(build_model(), replace(DAPO, top_entropy=0.2))


def test_working_dtype_is_one_of_two() -> None:
    assert working_dtype("cpu") in (torch.float32, torch.bfloat16)
