"""The policy and its engine on a GPU against the same on a CPU, in fp32; FlexAttention against SDPA; FSDP2 on one rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.train import flex_attention
from omni_fast.policy import tree_attention
from omni_fast.policy.pack import Share, Trajectory, pack
from omni_fast.policy.sharded import ShardedPolicy
from omni_fast.policy.update import Policy
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.local import LocalEngine
from omni_kernels import LossSpec

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU that PyTorch sees", allow_module_level=True)

pytestmark = pytest.mark.gpu
GPU = "cuda"
Models = Callable[..., LlamaForCausalLM]
Batches = Callable[..., list[Trajectory]]
LOSSES = {
    "dapo": LossSpec.preset("dapo"),
    "grpo with KL": LossSpec.preset("grpo", beta=0.05),
    "dr_grpo with entropy": LossSpec.preset("dr_grpo", length_constant=6.0, entropy_coef=0.02),
    "gspo": LossSpec.preset("gspo"),
    "truncated weights": LossSpec.preset("dapo", rollout="truncate"),
}
METRICS = ("loss", "grad_norm", "entropy", "tokens", "rows", "microbatches", "ratio", "kept")


def policy_of(model: LlamaForCausalLM, device: str, loss: str = "dapo", **options: object) -> Policy:
    settings = {"learning_rate": 1e-2, "dtype": torch.float32, "tokens_per_microbatch": 20, **options}
    return Policy(model.to(device), loss=LOSSES[loss], **settings)  # type: ignore[arg-type]


def gradient(policy: Policy) -> torch.Tensor:
    return torch.cat([slot.sum().flatten() for slot in policy.slots]).cpu()


def same_weights(
    mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> None:
    """By what the steps changed, all together: Adam makes a whole step of a gradient that is rounding noise."""
    ours, others, before = (torch.cat([of[name].cpu().flatten() for name in start]) for of in (mine, theirs, start))
    assert float((ours - others).norm()) <= 5e-2 * float((others - before).norm())


def larger(heads: int = 4, size: int = 32) -> LlamaForCausalLM:
    """Of heads that FlexAttention takes on a GPU."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=23, hidden_size=heads * size, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def long_batch(seed: int) -> list[Trajectory]:
    draw = random.Random(seed)
    batch = []
    for group in range(3):
        prompt = [draw.randrange(23) for _ in range(draw.randint(100, 500))]
        for _ in range(6):
            completion = [draw.randrange(3) for _ in range(draw.randint(1, 200))]
            batch.append(Trajectory(prompt, completion, [-1.0] * len(completion), draw.uniform(-1, 1), group))
    return batch


@pytest.mark.parametrize("share", ["tree", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_that_of_a_cpu(build_model: Models, build_batch: Batches, loss: str, share: Share) -> None:
    steps = []
    start = {name: value.detach().clone() for name, value in build_model().named_parameters()}
    for device in ("cpu", GPU):
        policy = policy_of(build_model(), device, loss, share=share)
        metrics = policy.update(build_batch(1))
        first = gradient(policy)
        policy.update(build_batch(2))
        steps.append((metrics, first, policy.weights(), policy.measure(build_batch(3))))
    (wanted, expected, weights, measured), (found, mine, ours, scored) = steps
    for name in METRICS:
        assert found.get(name) == pytest.approx(wanted.get(name), rel=1e-4, abs=1e-5), name
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * float(expected.norm()))
    same_weights(ours, weights, start)
    for (logp, entropy), (other, theirs) in zip(scored, measured, strict=True):
        assert logp == pytest.approx(other, abs=2e-2) and entropy == pytest.approx(theirs, abs=2e-2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_says_what_it_says_on_a_cpu(build_model: Models, temperature: float) -> None:
    draw = random.Random(0)
    prompts = [Prompt([3, 4, *(draw.randrange(23) for _ in range(draw.randint(1, 20)))], key) for key in range(5)]
    said = []
    for device in ("cpu", GPU):
        engine = LocalEngine(build_model().to(device))
        said.append(engine.generate(prompts, 3, Sampling(24, temperature, (1,), 7)))
    for theirs, mine in zip(*said, strict=True):
        for other, sample in zip(theirs, mine, strict=True):
            assert sample.tokens == other.tokens and sample.finish_reason == other.finish_reason
            assert sample.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("dtype", "heads"),
    [
        (torch.float32, (14, 2, 64)),
        (torch.bfloat16, (14, 2, 64)),
        (torch.bfloat16, (4, 4, 128)),
        (torch.float32, (6, 2, 16)),
    ],
    ids=str,
)
def test_flex_attention_is_sdpa(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    torch.compiler.reset()  # each case is compiled anew, and PyTorch stops compiling after some
    (micro,) = pack(long_batch(0), tokens_per_microbatch=100_000, device=GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    query, key, value = (
        torch.randn(len(micro.layout.place), count, heads[2], generator=generator, device=GPU, dtype=dtype)
        for count in (heads[0], heads[1], heads[1])
    )
    inputs = [states.requires_grad_() for states in (query, key, value)]
    found = []
    for attend in (tree_attention._fused, flex_attention.flex_rows):
        out = attend(*inputs, micro.layout, heads[2] ** -0.5)
        weight = torch.linspace(-1, 1, out.numel(), device=GPU, dtype=dtype).view_as(out)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, weight)])
    for theirs, mine in zip(*found, strict=True):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert float(error) < (2e-2 if dtype == torch.bfloat16 else 3e-4)


def test_a_step_with_flex_attention_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for attend in (tree_attention._fused, flex_attention.flex_rows):
        monkeypatch.setattr(tree_attention, "_fused", attend)
        policy = policy_of(larger(), GPU, tokens_per_microbatch=2000)
        metrics = policy.update(long_batch(0))
        assert metrics["microbatches"] > 1
        found.append((metrics["loss"], gradient(policy)))
    (loss, expected), (other, mine) = found
    assert other == pytest.approx(loss, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4 * float(expected.norm()))


def test_bf16_is_close_to_fp32() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = policy_of(larger(), GPU, dtype=dtype, tokens_per_microbatch=2000)
        policy.update(long_batch(1))
        found.append(gradient(policy))
    assert F.cosine_similarity(found[0], found[1], dim=0) > 0.99


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_of_fsdp2_is_one_process(one_rank: None, tmp_path: Path, build_batch: Batches) -> None:
    settings = {"loss": LOSSES["dapo"], "learning_rate": 1e-2, "dtype": torch.float32, "tokens_per_microbatch": 40}
    alone = Policy(larger().to(GPU), **settings)  # type: ignore[arg-type]
    model = larger().to(GPU)
    ranks = ShardedPolicy(model, **settings)
    for seed in range(2):
        metrics, found = alone.update(build_batch(seed)), ranks.update(build_batch(seed))
        for name in METRICS:
            assert found.get(name) == pytest.approx(metrics.get(name), rel=1e-4, abs=1e-6), name
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    ranks.save(folder)
    ranks.load(folder, ranks.numbers())
    whole = ranks.weights()
    same_weights(whole, alone.weights(), {name: value.detach() for name, value in larger().named_parameters()})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data.cpu(), whole[name], msg=name)
    ranks.close()
