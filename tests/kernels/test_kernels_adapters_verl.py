"""verl's two callables against a float64 oracle, on one process and with the vocabulary split over two."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from omni_kernels import IGNORE, reference
from omni_kernels.adapters.verl import FusedLinearForPPO, linear_cross_entropy

B, L, H, V = 3, 7, 20, 90  # H is no multiple of 128, which verl's kernel asks for
EXAMPLE = Path(__file__).parents[2] / "examples" / "embed_verl.py"


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [B, L, H], weight [V, H], labels and temperatures [B, L]."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, L, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(0, V, (B, L), generator=g)
    labels[0, 0], labels[1, 2] = 0, V - 1
    return hidden, weight, labels, 0.5 + torch.rand(B, L, generator=g)


def oracle(temperature: float | Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, entropy, dhidden, dweight) in float64, of the loss in `total`."""
    hidden, weight, labels, _ = problem()
    x, w = (t.double().requires_grad_() for t in (hidden, weight))
    inverse = 1 / temperature.double().flatten() if isinstance(temperature, Tensor) else 1 / temperature
    logp, entropy, _ = reference.head(x.flatten(0, 1), w, labels.flatten(), inv_temperature=inverse)
    logp = {"none": logp, "sum": logp.sum(), "mean": logp.mean()}[reduction]
    total(logp, entropy).backward()
    assert x.grad is not None and w.grad is not None
    return logp.detach(), entropy.detach(), x.grad, w.grad


def total(logp: Tensor, entropy: Tensor) -> Tensor:
    slopes = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype).view_as(logp) if logp.ndim else 1.5
    return (logp * slopes).sum() + 0.3 * (entropy * torch.linspace(0, 1, entropy.numel()).view_as(entropy)).sum()


def close(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert float((mine.double() - theirs).norm()) <= 2e-6 + 1e-6 * float(theirs.norm())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("each", [False, True], ids=["one temperature", "temperature per token"])
def test_linear_cross_entropy(reduction: str, each: bool) -> None:
    hidden, weight, labels, temperatures = problem()
    temperature = temperatures if each else 0.7
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    logp, entropy = linear_cross_entropy(x, w, labels, temperature, reduction, None)
    assert logp.dtype == entropy.dtype == torch.float32
    total(logp, entropy).backward()
    for mine, theirs in zip((logp, entropy, x.grad, w.grad), oracle(temperature, reduction), strict=True):
        close(mine, theirs)


def test_verl_s_defaults_and_bad_input() -> None:
    hidden, weight, labels, _ = problem()
    plain, spelled = (linear_cross_entropy(hidden, weight, labels, *rest) for rest in ((), (None, None, None)))
    assert torch.equal(plain[0], spelled[0]) and plain[0].shape == (B * L,)
    with pytest.raises(ValueError, match="reduction is 'median'; use"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "median")
    labels[1, 3] = IGNORE
    assert linear_cross_entropy(hidden, weight, labels)[0][L + 3] == 0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("each", [False, True], ids=["one temperature", "temperature per token"])
def test_fused_linear_for_ppo(flat: bool, each: bool) -> None:
    hidden, weight, labels, temperatures = problem()
    temperature: float | Tensor = temperatures if each else torch.tensor(0.7)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    given = (
        (x.flatten(0, 1), w, labels.flatten(), temperatures.flatten() if each else 0.7)
        if flat
        else (x, w, labels, temperature)
    )
    logp, entropy = FusedLinearForPPO(chunk_size=4)(*given)
    assert logp.shape == entropy.shape == given[2].shape
    total(logp.flatten(), entropy.flatten()).backward()
    found = logp.flatten(), entropy.flatten(), x.grad, w.grad
    for mine, theirs in zip(found, oracle(temperatures if each else 0.7, "none"), strict=True):
        close(mine, theirs)


def rank_body(rank: int, ranks: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    hidden, weight, labels, temperatures = problem()
    for temperature in (0.7, temperatures):
        expected = oracle(temperature, "none")
        for reduce_dx in (False, True):
            x = hidden.clone().requires_grad_()
            w = weight.chunk(ranks)[rank].clone().requires_grad_()
            logp, entropy = linear_cross_entropy(
                x, w, labels, temperature, "none", dist.group.WORLD, reduce_dx=reduce_dx
            )
            total(logp, entropy).backward()
            assert x.grad is not None and w.grad is not None
            if not reduce_dx:  # a rank's own share, as verl's kernel leaves it
                assert float((x.grad - expected[2]).norm()) > 1e-2
                dist.all_reduce(x.grad)
            close(logp, expected[0]), close(entropy, expected[1])
            close(x.grad, expected[2]), close(w.grad, expected[3].chunk(ranks)[rank])
    dist.destroy_process_group()


def test_a_tensor_parallel_group() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_body, (2, port), nprocs=2)


def test_it_needs_torch_only() -> None:
    code = "import sys; import omni_kernels.adapters, omni_kernels.adapters.verl\n"
    code += "print([m for m in ('transformers', 'trl', 'verl', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    words = capsys.readouterr().out.split()
    assert float(words[words.index("log-prob") + 2]) < 1e-4
