"""What the tests of every backend share: a batch with all that a loss may look at, the losses, the test that row kernels pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omni_kernels import IGNORE, LossSpec, Tokens, reference
from omni_kernels.backends import cpu
from omni_kernels.backends import torch as plain
from omni_kernels.losses import row_wise
from omni_kernels.spec import PRESETS

sys.path.insert(0, str(Path(__file__).parent))  # of `head_problem`

CHANGES: list[dict[str, object]] = [
    {}, {"beta": 0.1, "kl": "k1", "entropy_coef": 0.01}, {"beta": 0.2, "kl": "k2", "z_loss": 0.01},
    {"rollout": "truncate", "beta": 0.1}, {"rollout": "mask", "beta": 0.1, "kl_correction": True}, {"dual_clip": 1.5},
]  # fmt: skip


def _batch_of(n: int, v: int, on_policy: bool = False, device: str = "cpu") -> Tokens:
    """Sequences of four; ignored, masked and zero-advantage tokens; one log-prob that a sampler broke."""
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, v, (n,), generator=g)
    targets[::5] = IGNORE
    level = -torch.tensor(float(v)).log()
    old, ref, rollout = (level + torch.randn(n, generator=g) * 0.5 for _ in range(3))
    advantages = torch.randn(n, generator=g)
    advantages[1::4] = 0
    rollout[3] = torch.nan
    mask = torch.rand(n, generator=g) > 0.2
    columns = (targets, advantages, mask, torch.arange(n) // 4, None if on_policy else old, ref, rollout)
    return Tokens(*(None if c is None else c.to(device) for c in columns))  # type: ignore[arg-type]


def _check_rows(
    rows: object, logits: Tensor, targets: Tensor, inv_t: float | Tensor = 1.0, cap: float | None = None,
    weights: tuple[Tensor, Tensor | None] | None = None, z: float = 0.01, copy: Callable[[Tensor], Tensor] = torch.clone,
    shifted: bool = False,
) -> Tensor:  # fmt: skip
    """Statistics within twice, the gradient within twice (bf16: three times) the error of torch in the same dtype.

    rows: has `rows_forward` and `rows_backward_`. weights: of log-prob and entropy in the loss. copy: places what is to be
    overwritten. shifted: the gradient does not inherit the last bit of lse. Returns the gradient.
    """
    if weights is None:
        a, b = torch.randn(2, len(logits), generator=torch.Generator().manual_seed(2)).to(logits.device)
        weights = a, b
    a, b = weights
    given = copy(logits)
    mine = rows.rows_forward(given, targets, inv_t, cap, True)  # type: ignore[attr-defined]
    assert (mine[0] <= 0).all() and (mine[1] >= -1e-6).all()
    other = plain.rows_forward(logits, targets, inv_t, cap, True)
    u = logits.double().requires_grad_()
    exact = reference.logprob(u, targets, inv_t, cap)
    lse = exact[2].detach().abs()
    largest = float(lse.max())
    for found, theirs, truth in zip(mine, other, exact, strict=True):
        assert found is not None and theirs is not None
        allowed = 2 * (theirs.double() - truth.detach()).abs().max() + 3e-7 * (1 + largest)  # z itself is fp32
        assert float((found.double() - truth.detach()).abs().max()) <= float(allowed)
    loss = a * exact[0] + z * exact[2] ** 2 + (0 if b is None else b * exact[1])
    (truth,) = torch.autograd.grad(loss.sum(), u)
    theirs = logits.clone()
    rows.rows_backward_(given, targets, mine[2], mine[1], a, b, inv_t, cap, z)  # type: ignore[attr-defined]
    plain.rows_backward_(theirs, targets, other[2], other[1], a, b, inv_t, cap, z)
    error, allowed = (float((x.double() - truth).norm()) for x in (given, theirs))
    digits = 2e-7 + (0 if shifted else 2**-23 * largest)  # of p = e^(z - lse)
    size = float((a.abs() + (0 if shifted else 2 * z * lse) + (0 if b is None else b.abs())).norm())
    times = 3 if logits.dtype == torch.bfloat16 else 2
    assert error <= times * allowed + 5e-7 * float(truth.norm()) + digits * size
    return given


ROW_WISE = [
    pytest.param((spec, on_policy), id=f"{preset} {change}{' on-policy' * on_policy}")
    for preset in PRESETS
    for change in CHANGES
    for on_policy in (False, True)
    if row_wise(_batch_of(8, 9, on_policy), spec := LossSpec.preset(preset, **change))
]


@pytest.fixture(params=ROW_WISE)
def loss(request: pytest.FixtureRequest) -> tuple[LossSpec, bool]:
    """A loss whose gradient follows row by row, and whether its batch is on-policy."""
    return request.param


@pytest.fixture(params=cpu.native.instruction_sets() if cpu.reason_unavailable() is None else [])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every call of the C++ kernels runs this instruction set."""
    monkeypatch.setattr(cpu, "ISA", request.param)
    return request.param


@pytest.fixture
def chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """dW is a sum over chunks of however few rows."""
    plan = import_module("omni_kernels.plan")  # where the package has a function of that name
    monkeypatch.setattr(plan, "_LEAST_ROWS", dict.fromkeys(plan._LEAST_ROWS, 1))
    monkeypatch.setattr(plan, "_LEAST_DEVICE_ROWS", 1)


@pytest.fixture(params=[True, False], ids=["chunks of rows", "columns"])
def few_rows(request: pytest.FixtureRequest) -> None:
    """In a small workspace dW is a sum over chunks of rows, or the logits are computed again, some columns at a time."""
    if request.param:
        request.getfixturevalue("chunks_of_rows")


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Tokens]:
    return _batch_of


@pytest.fixture(scope="session")
def check_rows() -> Callable[..., Tensor]:
    return _check_rows
