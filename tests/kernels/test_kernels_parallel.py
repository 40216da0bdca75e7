"""Heads over several processes (gloo): vocabulary-parallel with uneven shards, DTensor and FSDP2, against one process."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from omni_kernels import IGNORE, LossSpec, Tokens, linear_logprob, linear_policy_loss
from omni_kernels.backends import cpu
from omni_kernels.parallel import (
    PolicyHead,
    VocabShard,
    vocab_parallel_logprob,
    vocab_parallel_policy_loss,
    vocab_shard,
)

N, H, V = 40, 12, 101
BOUNDS = {2: (0, 77, 101), 3: (0, 1, 60, 101)}  # uneven, one of them a single row


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tokens, Tensor]:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[::5], targets[3] = IGNORE, 0
    hidden, weight = torch.randn(N, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    old, near = (-4 + 0.3 * torch.randn(N, generator=g) for _ in range(2))
    tokens = Tokens(targets, torch.randn(N, generator=g), None, torch.randint(0, 4, (N,), generator=g), old, near)
    return hidden, weight, torch.randn(V, generator=g).to(dtype), tokens, torch.rand(N, generator=g) + 0.5


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def close(mine: Tensor, theirs: Tensor) -> None:
    assert float((mine - theirs).detach().norm()) <= 2e-6 + 1e-5 * float(theirs.detach().norm())


def refused(*_: object) -> None:
    raise AssertionError("a shard's exponentials are not those of all logits")


def losses_of_a_shard(rank: int, world: int, backend: str | None) -> None:
    hidden, weight, bias, tokens, scale = problem()
    low, high = BOUNDS[world][rank : rank + 2]
    shard = VocabShard(dist.group.WORLD, low, V)
    options = {"inv_temperature": scale, "softcap": 7.0, "workspace_bytes": 9 * V * 4 // world}
    x, w, b = leaves(hidden, weight, bias)
    logp, entropy = linear_logprob(x, w, tokens.targets, bias=b, **options)
    (logp * tokens.advantages + 0.3 * entropy).sum().backward()
    x1, w1, b1 = leaves(hidden, weight[low:high], bias[low:high])
    mine, mine_entropy = vocab_parallel_logprob(x1, w1, tokens.targets, shard, bias=b1, backend=backend, **options)
    (mine * tokens.advantages + 0.3 * mine_entropy).sum().backward()
    close(mine, logp), close(mine_entropy, entropy), close(x1.grad, x.grad)
    close(w1.grad, w.grad[low:high]), close(b1.grad, b.grad[low:high])
    for spec in (
        LossSpec(beta=0.1, entropy_coef=0.1, z_loss=1e-3),
        LossSpec.preset("gspo", beta=0.1, eps_high=0.3),
    ):
        x, w, b = leaves(hidden, weight, bias)
        whole = linear_policy_loss(x, w, tokens, spec, bias=b, **options)
        whole.loss.backward()
        x1, w1, b1 = leaves(hidden, weight[low:high], bias[low:high])
        with patch.object(cpu, "linear_exponentials", refused, create=True):
            out = vocab_parallel_policy_loss(
                x1, w1, tokens, spec, shard, bias=b1, return_tokens=True, backend=backend, **options
            )
        out.loss.backward()
        close(out.loss, whole.loss), torch.testing.assert_close(out.metrics, whole.metrics, rtol=1e-5, atol=1e-4)
        close(x1.grad, x.grad), close(w1.grad, w.grad[low:high]), close(b1.grad, b.grad[low:high])
        everywhere = [torch.empty_like(out.logp) for _ in range(world)]
        dist.all_gather(everywhere, out.logp)
        assert all(torch.equal(other, out.logp) for other in everywhere)


def vocab_parallel(rank: int, world: int) -> None:
    hidden, weight, bias, tokens, _ = problem()
    low, high = BOUNDS[world][rank : rank + 2]
    shard = VocabShard(dist.group.WORLD, low, V)
    plan = import_module("omni_kernels.plan")  # where the package has a function of that name
    few = plan._LEAST_ROWS
    for backend, least in (("torch", few), (None, few), (None, dict.fromkeys(few, 1))):  # columns, chunks of rows
        with patch.object(plan, "_LEAST_ROWS", least):
            losses_of_a_shard(rank, world, backend)
    cut = bias.clone()
    cut[BOUNDS[world][-2] :] = -torch.inf  # the last shard has no probability, as padding of a vocabulary has none
    used = torch.where(tokens.targets < BOUNDS[world][-2], tokens.targets, IGNORE)
    x, w, x1, w1 = *leaves(hidden, weight), *leaves(hidden, weight[low:high])
    linear_logprob(x, w, used, bias=cut)[1].sum().backward()
    vocab_parallel_logprob(x1, w1, used, shard, bias=cut[low:high])[1].sum().backward()
    close(x1.grad, x.grad), close(w1.grad, w.grad[low:high])
    x2, w2 = leaves(hidden, weight[low:high])
    vocab_parallel_logprob(x2, w2, tokens.targets, shard, reduce_dx=False)[0].sum().backward()
    dist.all_reduce(x2.grad)
    x, w = leaves(hidden, weight)
    linear_logprob(x, w, tokens.targets)[0].sum().backward()
    close(x2.grad, x.grad)


def one_collective(rank: int, world: int) -> None:
    """A pass over one chunk gathers once and reduces once, and moves three numbers a token and rank, not the logits."""
    hidden, weight, _, tokens, _ = problem()
    low, high = BOUNDS[world][rank : rank + 2]
    calls: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce
    dist.all_gather_into_tensor = lambda out, *a, **k: (calls.append(("gather", out.numel())), gather(out, *a, **k))[1]
    dist.all_reduce = lambda t, *a, **k: (calls.append(("reduce", t.numel())), reduce(t, *a, **k))[1]
    x, w = leaves(hidden, weight[low:high])
    vocab_parallel_policy_loss(x, w, tokens, LossSpec(), VocabShard(dist.group.WORLD, low, V)).loss.backward()
    used = int((tokens.targets != IGNORE).sum())
    assert calls == [("gather", 3 * world * used), ("reduce", N * H)]


def dtensor(rank: int, world: int) -> None:
    hidden, weight, _, tokens, _ = problem()
    mesh = init_device_mesh("cpu", (world,))
    sharded = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    local, shard = vocab_shard(sharded)
    vocab_parallel_policy_loss(*leaves(hidden), local, tokens, LossSpec(beta=0.1), shard).loss.backward()
    x, w = leaves(hidden, weight)
    linear_policy_loss(x, w, tokens, LossSpec(beta=0.1)).loss.backward()
    assert isinstance(sharded.grad, DTensor)
    close(sharded.grad.full_tensor(), w.grad)
    with pytest.raises(ValueError, match="DTensor"):
        linear_policy_loss(hidden, sharded, tokens, LossSpec())


def fsdp(rank: int, world: int) -> None:
    """Each rank has its own tokens; the global normaliser makes the summed gradient that of one process."""
    hidden, weight, bias, tokens, _ = problem()
    count = float((tokens.targets != IGNORE).sum())
    tokens = replace(tokens, sequences=None, denominator=count)
    x, w, b = leaves(hidden, weight, bias)
    linear_policy_loss(x, w, tokens, LossSpec(beta=0.1), bias=b).loss.backward()
    head = PolicyHead(nn.Parameter(weight.clone()), nn.Parameter(bias.clone()))
    fully_shard(head, mesh=init_device_mesh("cpu", (world,)))
    head.set_gradient_divide_factor(1.0)
    head.set_force_sum_reduction_for_comms(True)
    part = slice(rank * N // world, (rank + 1) * N // world)
    cut = {f: getattr(tokens, f)[part] for f in ("targets", "advantages", "old", "reference")}
    (mine,) = leaves(hidden[part])
    head(mine, Tokens(**cut, denominator=count), LossSpec(beta=0.1)).loss.backward()
    close(mine.grad, x.grad[part])
    close(head.weight.grad.full_tensor(), w.grad), close(head.bias.grad.full_tensor(), b.grad)


def _rank(rank: int, world: int, port: int, bodies: tuple[Callable[[int, int], None], ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for body in bodies:
        body(rank, world)
    dist.barrier()  # a rank that leaves while another still talks to it can abort in gloo's threads
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "bodies"), [(2, (vocab_parallel, one_collective, fsdp)), (3, (vocab_parallel, dtensor))], ids=["2", "3"]
)
def test_spread_over_processes(world: int, bodies: tuple[Callable[[int, int], None], ...]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (world, port, bodies), nprocs=world)


def test_a_shard_outside_the_vocabulary_is_named() -> None:
    hidden, weight, _, tokens, _ = problem()
    with pytest.raises(ValueError, match=r"rows \[50, 151\) of a vocabulary of 101"):
        vocab_parallel_logprob(hidden, weight, tokens.targets, VocabShard(None, 50, V))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias is \[3\] on cpu; give \[V\] = \[101\]"):
        vocab_parallel_logprob(
            hidden,
            weight,
            tokens.targets,
            VocabShard(None, 0, V),
            bias=torch.ones(3),  # type: ignore[arg-type]
        )
