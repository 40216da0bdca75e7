"""A step shared by several processes (gloo) against one: same metrics, weights and moments; resumed on another number."""

from __future__ import annotations

import copy
import json
import os
import resource
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from omni_fast.errors import RunError, UserError
from omni_fast.policy import shards
from omni_fast.policy.pack import Trajectory
from omni_fast.policy.sharded import ShardedPolicy
from omni_fast.policy.update import Policy
from omni_kernels import LossSpec

Batches = Callable[..., list[Trajectory]]
LOSSES = {
    "dapo": (LossSpec.preset("dapo", rollout="truncate"), {}),
    "gspo with entropy": (LossSpec.preset("gspo", entropy_coef=0.02), {}),
    "grpo with KL under LoRA": (LossSpec.preset("grpo", beta=0.05), {"lora_rank": 2}),
    "masked weights": (LossSpec.preset("dapo", rollout="mask", rollout_min=0.2, rollout_max=3.0), {}),
}
HOW = ("rows", "microbatches")  # a rank without work adds a row
BUDGET = 40  # several micro-batches a step, and not a multiple of the ranks


def settings(name: str, budget: int = BUDGET) -> dict[str, Any]:
    loss, more = LOSSES[name]
    return {
        "loss": loss, "learning_rate": 1e-2, "dtype": torch.float32, "tokens_per_microbatch": budget,
        "max_grad_norm": 0.5, "weight_decay": 0.1, **more,
    }  # fmt: skip


def drive(policy: Policy, batches: list[list[Trajectory]]) -> list[Any]:
    found: list[Any] = [policy.measure(batches[0])]
    for batch in batches:
        metrics = policy.update(batch)
        found.append({key: metrics[key] for key in metrics if key not in HOW and not key.startswith("seconds")})
    return [*found, policy.measure(batches[0])]


def tensors(policy: Policy) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as name:
        policy.save(Path(name))
        whole = {key: torch.empty(shape) for key, shape in shards.shapes(Path(name)).items()}
        shards.read(Path(name), whole)
    return whole


def on_rank(rank: int, world: int, port: int, body: Callable[[int], None], step_s: float, ends_well: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=step_s))
    body(rank)
    if ends_well:
        dist.barrier()  # a rank that leaves while another still talks to it can abort in gloo's threads
    dist.destroy_process_group()


def on_ranks(world: int, body: Callable[[int], None], step_s: float = 600.0, ends_well: bool = True) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(on_rank, (world, port, body, step_s, ends_well), nprocs=world)


def same(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-5)  # rounding shows where AdamW divides tiny gradients


def steps_as_one(
    folder: Path, build: Callable[[], LlamaForCausalLM], batches: list[list[Trajectory]], rank: int
) -> None:
    """All ranks: three steps for each loss; then the state of one process, loaded, goes on as it does there."""
    for name in LOSSES:
        model = build()
        policy = ShardedPolicy(model, **settings(name))
        whole = sum(slot.shape.numel() for slot in policy.slots)
        assert sum(slot.master.numel() for slot in policy.slots) < 0.75 * whole, "each rank holds a part"
        if rank:
            policy.follow()
            continue
        plain_model = build()
        plain = Policy(plain_model, **settings(name))
        first = {key: value.clone() for key, value in plain.weights().items()}
        same(drive(policy, batches), drive(plain, batches))
        same(tensors(policy), tensors(plain))
        same(policy.weights(), plain.weights())
        for mine, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
            same(mine.data, theirs.data)  # what the engine reads
        (folder / name).mkdir()
        policy.save(folder / name)
        (folder / f"{name}.json").write_text(json.dumps(policy.numbers()))
        policy.reset_optimizer()
        for each in (policy, plain):
            each.load_weights(first)
        same(policy.measure(batches[1]), plain.measure(batches[1]))  # nothing of the last measurement's weights is left
        policy.close()


def resumed_as_one(
    folder: Path, build: Callable[[], LlamaForCausalLM], batches: list[list[Trajectory]], rank: int
) -> None:
    """What two ranks saved goes on here as it does in one process, and what one process saved here."""
    for name in LOSSES:
        policy = ShardedPolicy(build(), **settings(name))
        if rank:
            policy.follow()
            continue
        numbers = json.loads((folder / f"{name}.json").read_text())
        policy.load(folder / name, numbers)
        plain = Policy(build(), **settings(name))
        plain.load(folder / name, numbers)
        assert tensors(policy).keys() == tensors(plain).keys()
        torch.testing.assert_close(tensors(policy), tensors(plain), rtol=0, atol=0)
        drive(policy, batches), drive(plain, batches)
        same(tensors(policy), tensors(plain))
        with pytest.raises(UserError, match="not of this model"):
            policy.load_weights({"other": torch.zeros(3)})
        (folder / f"{name} of one").mkdir()
        plain.save(folder / f"{name} of one")
        policy.load(folder / f"{name} of one", plain.numbers())
        torch.testing.assert_close(tensors(policy), tensors(plain), rtol=0, atol=0)
        assert policy.numbers() == plain.numbers()
        policy.close()


def compiled_layers_step_as_one(batches: list[list[Trajectory]], rank: int) -> None:
    """Layers that the compiled kernels take: their weights come and go with each layer's turn.

    A token of the prompts is what the model pads with, and the model comes in the working dtype.
    """
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        config = LlamaConfig(
            vocab_size=23, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
            num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1, pad_token_id=1,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
        given = settings("dapo") | {"dtype": dtype}
        plain = Policy(copy.deepcopy(model), **given)
        policy = ShardedPolicy(model, **given)
        assert all(slot.master.dtype == torch.float32 for slot in policy.slots)
        if rank:
            policy.follow()
            continue
        mine, theirs = policy.update(batches[0]), plain.update(batches[0])
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=bound)
        found, exact = tensors(policy), tensors(plain)
        for name in exact:
            if name.startswith("mean."):
                assert (found[name] - exact[name]).norm() < bound * exact[name].norm(), name
        policy.close()


def mistakes_reach_rank_0(build: Callable[[], LlamaForCausalLM], batches: list[list[Trajectory]], rank: int) -> None:
    with pytest.raises(UserError, match="needs model.lora_rank > 0"):
        ShardedPolicy(build(), loss=LossSpec.preset("grpo", beta=0.1), learning_rate=0.1)
    policy = ShardedPolicy(build(), **settings("dapo", budget=3), max_bad_steps=1)
    if rank:
        return policy.follow()
    before = tensors(policy)
    with pytest.raises(UserError, match="a micro-batch may hold 3"):
        policy.update(batches[0])
    same(tensors(policy), before)
    policy.close()


def a_disk_that_is_full_on_one_rank(
    folder: Path, build: Callable[[], LlamaForCausalLM], batches: list[list[Trajectory]], rank: int
) -> None:
    """One message instead of DCP's tracebacks, and the ranks stay together."""
    policy = ShardedPolicy(build(), **settings("dapo"))
    if rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        return policy.follow()
    with pytest.raises(RunError, match="could not be written .*run the same command again"):
        policy.save(folder)
    assert policy.update(batches[0])["skipped"] == 0
    policy.close()


def a_gradient_that_is_not_finite_on_one_rank(
    build: Callable[[], LlamaForCausalLM], batches: list[list[Trajectory]], rank: int
) -> None:
    """All ranks skip the step, count it, and stop after as many as one process would."""
    policy = ShardedPolicy(build(), **settings("dapo"), max_bad_steps=1)
    if rank:
        plain = policy._loss_backward

        def poisoned(*given: Any) -> Any:
            found = plain(*given)
            policy.slots[0].sum().fill_(torch.nan)
            return found

        policy._loss_backward = poisoned  # type: ignore[method-assign]
        return policy.follow()
    before = tensors(policy)
    assert policy.update(batches[0])["skipped"] == 1
    with pytest.raises(RunError, match="not finite in 2 steps"):
        policy.update(batches[1])
    same(tensors(policy), before)
    policy.close()


def rank_0_fails_alone(build: Callable[[], LlamaForCausalLM], batches: list[list[Trajectory]], rank: int) -> None:
    """As where its memory is full: it waits for nobody, and the others, in the middle of the step, as long as a step may."""
    policy = ShardedPolicy(build(), **settings("dapo"))
    if rank:
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            policy.follow()
        assert time.monotonic() - started < 7, "less than rank 0 stays"
        return

    def full(*given: Any) -> Any:
        raise RuntimeError("out of memory")

    policy._gathered = full  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        policy.update(batches[0])
    started = time.monotonic()
    policy.close()
    assert time.monotonic() - started < 1
    time.sleep(9)  # gloo's threads may abort where a rank leaves while another waits for it


def a_rank_that_is_gone(build: Callable[[], LlamaForCausalLM], batches: list[list[Trajectory]], rank: int) -> None:
    """As where it is killed while rank 0 generates, and torchrun stops the others: no traceback hides why."""
    policy = ShardedPolicy(build(), **settings("dapo"))
    if rank:
        os._exit(0)
    time.sleep(1.0)
    policy.close()


@pytest.fixture
def batches(build_batch: Batches) -> list[list[Trajectory]]:
    return [build_batch(seed, zero_groups=1) for seed in (1, 2, 3)]


def test_the_ranks_step_as_one_process_and_any_number_goes_on(
    build_model: Callable[..., LlamaForCausalLM], batches: list[list[Trajectory]], tmp_path: Path
) -> None:
    on_ranks(2, partial(steps_as_one, tmp_path, build_model, batches))
    on_ranks(4, partial(resumed_as_one, tmp_path, build_model, batches))


def test_ranks_on_compiled_layers_step_as_one_process(batches: list[list[Trajectory]]) -> None:
    on_ranks(2, partial(compiled_layers_step_as_one, batches))


def mistakes(folder: Path, build: Callable[[], LlamaForCausalLM], batches: list[list[Trajectory]], rank: int) -> None:
    mistakes_reach_rank_0(build, batches, rank)
    a_gradient_that_is_not_finite_on_one_rank(build, batches, rank)
    a_disk_that_is_full_on_one_rank(folder, build, batches, rank)


def test_a_mistake_is_raised_on_rank_0_and_leaves_the_ranks_together(
    build_model: Callable[..., LlamaForCausalLM], batches: list[list[Trajectory]], tmp_path: Path
) -> None:
    on_ranks(2, partial(mistakes, tmp_path, build_model, batches))


def test_a_rank_that_fails_alone_is_not_waited_for_longer_than_a_step(
    build_model: Callable[..., LlamaForCausalLM], batches: list[list[Trajectory]]
) -> None:
    on_ranks(2, partial(rank_0_fails_alone, build_model, batches), step_s=3.0, ends_well=False)


def test_a_rank_that_is_gone_is_let_go(
    build_model: Callable[..., LlamaForCausalLM], batches: list[list[Trajectory]]
) -> None:
    on_ranks(2, partial(a_rank_that_is_gone, build_model, batches), ends_well=False)
