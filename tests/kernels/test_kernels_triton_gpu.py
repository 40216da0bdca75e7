"""The Triton kernels on a GPU, against the float64 oracle and against torch in the same dtype; graphs, and no host sync."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from omni_kernels import (
    IGNORE,
    LossSpec,
    Tokens,
    backends,
    head_rows,
    linear_logprob,
    linear_policy_loss,
    logits_logprob,
    reference,
)
from omni_kernels.backends import torch as plain
from omni_kernels.losses import coefficients, prepare, row_wise
from omni_kernels.spec import PRESETS

if not torch.cuda.is_available() or backends.reason_unavailable("triton") is not None:
    pytest.skip(str(backends.reason_unavailable("triton")), allow_module_level=True)

from omni_kernels.backends import triton as backend

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
GPU = torch.device("cuda")
FEW, MANY = 1 << 20, 1  # processors: more than rows, so that rows are split, or fewer


def draw(n: int, v: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0, offset: float = 0.0) -> Tensor:
    g = torch.Generator(GPU).manual_seed(seed)
    return (torch.randn(n, v, generator=g, device=GPU) * spread + offset).to(dtype)


def aims(n: int, v: int, seed: int = 1) -> Tensor:
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed)).to(GPU)


def check(
    logits: Tensor, targets: Tensor, inv_t: float | Tensor = 1.0, cap: float | None = None, z: float = 0.01
) -> None:
    """Values within twice, gradients within twice (bf16: three times) the error of torch in the same dtype."""
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(len(logits), generator=g).to(GPU) for _ in range(2))
    mine = backend.rows_forward(logits, targets, inv_t, cap, True)
    other = plain.rows_forward(logits, targets, inv_t, cap, True)
    u = logits.double().requires_grad_()
    exact = reference.logprob(u, targets, inv_t, cap)
    for found, theirs, truth in zip(mine, other, exact, strict=True):
        assert found is not None and theirs is not None
        allowed = 2 * (theirs.double() - truth).abs().max() + 3e-7 * (1 + exact[2].abs().max())
        assert float((found.double() - truth).abs().max()) <= float(allowed)
    (truth,) = torch.autograd.grad((a * exact[0] + b * exact[1] + z * exact[2] ** 2).sum(), u)
    gradient, theirs = logits.clone(), logits.clone()
    backend.rows_backward_(gradient, targets, mine[2], mine[1], a, b, inv_t, cap, z)
    plain.rows_backward_(theirs, targets, other[2], other[1], a, b, inv_t, cap, z)
    times = 3 if logits.dtype == torch.bfloat16 else 2
    error, allowed = (float((x.double() - truth).norm()) for x in (gradient, theirs))
    digits = 2e-7 + 2**-23 * float(exact[2].abs().max())
    size = float((a.abs() + b.abs() + 2 * z * exact[2].abs()).norm())
    assert error <= times * allowed + 5e-7 * float(truth.norm()) + digits * size


@every_dtype
@pytest.mark.parametrize("v", [1, 2, 7, 8, 1000, 5003, 49_152, 50_257, 151_936, 262_144])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_rows_against_the_oracle(dtype: torch.dtype, v: int, cap: float | None) -> None:
    n = 300 if v < 40_000 else 37
    inv_t = torch.rand(n, generator=torch.Generator().manual_seed(3)).to(GPU) + 0.5
    check(draw(n, v, dtype), aims(n, v), inv_t, cap)


@every_dtype
@pytest.mark.parametrize("late", [0, 1, 3, 8])
@pytest.mark.parametrize("gap", [0, 1, 16])
def test_rows_that_start_anywhere(dtype: torch.dtype, late: int, gap: int) -> None:
    """Whatever the alignment; and nothing beside the rows is touched."""
    n, v = 70, 4999
    store = torch.full((n * (v + gap) + 32,), torch.nan, dtype=dtype, device=GPU)
    logits = store.as_strided((n, v), (v + gap, 1), late).copy_(draw(n, v, dtype))
    targets, values = aims(n, v), logits.clone()
    logp, entropy, lse = backend.rows_forward(logits, targets)
    expected = plain.rows_forward(values, targets, 1.0, None, True)
    torch.testing.assert_close(logp, expected[0], rtol=2e-6, atol=2e-6)
    a = torch.ones(n, device=GPU)
    backend.rows_backward_(logits, targets, lse, entropy, a, a)
    plain.rows_backward_(values, targets, lse, entropy, a, a, 1.0, None)
    torch.testing.assert_close(logits, values, rtol=1e-2 if dtype == torch.bfloat16 else 2e-5, atol=1e-7)
    assert int(store.isnan().sum()) == store.numel() - n * v


@every_dtype
@pytest.mark.parametrize("offset", [-104.0, -5000.0, 5000.0])
def test_offsets(dtype: torch.dtype, offset: float) -> None:
    check(draw(9, 20_000, dtype, offset=offset), aims(9, 20_000), z=0.0)


@every_dtype
def test_a_sure_target(dtype: torch.dtype) -> None:
    """1 - p of p = 0.999 and nearer to 1 has its digits, to the last bit of 1."""
    logits, targets = draw(16, 5000, dtype, spread=0.1), aims(16, 5000)
    logits[torch.arange(16), targets] = torch.arange(14.0, 22.0, 0.5, device=GPU).to(dtype)
    u = logits.clone().requires_grad_()
    logp, _ = logits_logprob(u, targets, backend="triton")
    (mine,) = torch.autograd.grad(logp.sum(), u)
    exact = -torch.expm1(reference.logprob(logits, targets)[0])
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(mine[torch.arange(16), targets].double(), exact, rtol=rounding, atol=5e-7)


@every_dtype
def test_ignored_idle_and_hopeless_rows(dtype: torch.dtype) -> None:
    logits = draw(8, 60_001, dtype)
    logits[0, :59_000], logits[1, 2500:] = -torch.inf, -torch.inf
    logits[2, 17], logits[3, 1234], logits[4] = torch.nan, torch.inf, -torch.inf
    logits[5] = logits[6] = torch.nan
    targets = torch.tensor([59_500, 0, 1, 2, 3, IGNORE, 5, 60_000], device=GPU)
    logp, entropy, lse = backend.rows_forward(logits, targets)
    assert entropy is not None
    assert logp[[0, 1, 7]].isfinite().all() and logp[[2, 3, 4, 6]].isnan().all() and entropy[[2, 3, 4]].isnan().all()
    assert not any(float(x[5]) for x in (logp, entropy, lse))
    a = torch.ones(8, device=GPU)
    a[6] = 0  # idle: not read
    backend.rows_backward_(logits, targets, lse, entropy, a)
    assert not logits[[5, 6]].any() and logits[[0, 1, 7]].isfinite().all() and logits[2:5].isnan().any(1).all()
    assert not logits[0, :59_000].any() and not logits[1, 2500:].any()


def test_a_target_outside_the_vocabulary_is_nan() -> None:
    logits = draw(3, 100, torch.float32)
    logp, _, lse = backend.rows_forward(logits, torch.tensor([0, 100, -1], device=GPU))
    assert logp.isnan().tolist() == [False, True, True] and lse.isfinite().all()


def batch_of(n: int, v: int, on_policy: bool = False) -> Tokens:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, v, (n,), generator=g)
    level = -torch.tensor(float(v)).log()
    old, ref, rollout = ((level + torch.randn(n, generator=g) * 0.5).to(GPU) for _ in range(3))
    advantages = torch.randn(n, generator=g)
    advantages[1::4] = 0
    rollout[3] = torch.nan
    mask = torch.rand(n, generator=g) > 0.2
    targets = torch.where(mask, targets, IGNORE)
    targets[::5] = IGNORE
    columns = (x.to(GPU) for x in (targets, advantages, mask, torch.arange(n) // 4))
    return Tokens(*columns, None if on_policy else old, ref, rollout)


CHANGES = [
    {}, {"beta": 0.1, "kl": "k1", "entropy_coef": 0.01}, {"beta": 0.2, "kl": "k2", "z_loss": 0.01},
    {"rollout": "mask", "beta": 0.1, "kl_correction": True}, {"dual_clip": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("on_policy", [False, True])
def test_one_sweep_equals_two(preset: str, change: dict[str, object], on_policy: bool) -> None:
    n, v, cap = 300, 40_001, 20.0
    tokens, spec = batch_of(n, v, on_policy), LossSpec.preset(preset, **change)
    if not row_wise(tokens, spec):
        return
    batch, logits = prepare(tokens, spec, torch.float32), draw(n, v, torch.float32)
    inv_t, swept = torch.rand(n, generator=torch.Generator().manual_seed(3)).to(GPU) + 0.5, logits.clone()
    logp, entropy, lse = backend.rows_policy_loss_(swept, tokens.targets, batch, spec, inv_t, cap)
    expected = backend.rows_forward(logits, tokens.targets, inv_t, cap)
    torch.testing.assert_close((logp, entropy, lse), expected, rtol=2e-6, atol=2e-6)
    known = coefficients(logp, entropy, lse, batch, spec)
    assert known.a.any()
    z = torch.zeros_like(lse) if known.z is None else known.z
    plain.rows_backward_(logits, tokens.targets, lse, entropy, known.a, known.b, inv_t, cap, z)
    torch.testing.assert_close(swept, logits, rtol=5e-5, atol=1e-7)


@every_dtype
@pytest.mark.parametrize("v", [151_936, 50_257])
def test_splitting_company_and_repetition_do_not_change_a_bit(
    dtype: torch.dtype, v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 300
    logits, targets, spec = draw(n, v, dtype), aims(n, v), LossSpec(entropy_coef=0.01)
    one = torch.ones(n, device=GPU)
    batch = prepare(Tokens(targets, one, one > 0, torch.arange(n, device=GPU), denominator=7.0), spec, torch.float32)
    results = []
    for rows, processors in ((slice(None), MANY), (slice(None), MANY), (slice(150, 157), MANY), (slice(150, 157), FEW)):
        monkeypatch.setattr(backend, "_processors", lambda device, count=processors: count)
        swept = logits[rows].clone()
        results.append((*backend.rows_policy_loss_(swept, targets[rows], batch.rows(rows), spec), swept))
    for whole, again, few, split in zip(*results, strict=True):
        assert whole is not None and again is not None and few is not None and split is not None
        assert torch.equal(whole, again) and torch.equal(whole[150:157], few)
        assert torch.equal(few, split)
    alone, together = (backend.rows_forward(logits[r], targets[r]) for r in (slice(150, 157), slice(None)))
    for few, whole in zip(alone, together, strict=True):
        assert few is not None and whole is not None and torch.equal(few, whole[150:157])


def test_more_than_two_to_the_31_logits() -> None:
    n, v = 8200, 262_144
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device=GPU)
    logits[-1, -1] = 8.0
    targets = torch.full((n,), v - 1, device=GPU)
    logp, _, lse = backend.rows_forward(logits, targets)
    exact = reference.logprob(logits[-2:], targets[-2:])[0]
    torch.testing.assert_close(logp[-2:].double(), exact, rtol=1e-6, atol=1e-6)
    one = torch.ones(n, device=GPU)
    tokens = Tokens(targets, one, one > 0, torch.arange(n, device=GPU), denominator=1.0)
    swept, spec = logits.clone(), LossSpec()
    backend.rows_policy_loss_(swept, targets, prepare(tokens, spec, torch.float32), spec)
    backend.rows_backward_(logits, targets, lse, None, -one)
    for gradient in (logits, swept):
        assert abs(float(gradient[-1, -1]) - float(torch.expm1(exact[-1]))) < 1e-2 and not gradient.isnan().any()


def head(n: int = 700, h: int = 64, v: int = 5003) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).to(GPU, torch.bfloat16) for shape in ((n, h), (v, h)))
    return hidden.requires_grad_(), (weight.detach() / 8).requires_grad_()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("workspace", [None, 5003 * 2 * 300])
def test_linear_policy_loss_is_as_exact_as_torch(preset: str, workspace: int | None) -> None:
    """Against the float64 oracle, at most three times the error of the torch backend, dlogits being bf16."""
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003), LossSpec.preset(preset, beta=0.05, entropy_coef=0.01)
    host = Tokens(*(None if x is None else x.cpu() for x in (
        tokens.targets, tokens.advantages, tokens.mask, tokens.sequences, tokens.old, tokens.reference, tokens.rollout
    )))  # fmt: skip
    leaves = [x.detach().cpu().double().requires_grad_() for x in (hidden, weight)]
    logp, entropy, lse = reference.head(*leaves, host.targets)
    truth = torch.autograd.grad(reference.policy_loss(logp, entropy, host, spec, lse), leaves)
    errors = []
    for name in ("triton", "torch"):
        out = linear_policy_loss(hidden, weight, tokens, spec, backend=name, workspace_bytes=workspace)
        found = torch.autograd.grad(out.loss, (hidden, weight))
        errors.append([float((f.cpu().double() - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)])
    for mine, theirs in zip(*errors, strict=True):
        assert mine <= 3 * theirs + 1e-3


def steps(hidden: Tensor, weight: Tensor, tokens: Tokens, spec: LossSpec) -> tuple[Tensor, ...]:
    """One pass forward and backward of each linear operator."""
    loss = linear_policy_loss(hidden, weight, tokens, spec, backend="triton", workspace_bytes=5003 * 2 * 300).loss
    logp, entropy = linear_logprob(hidden, weight, tokens.targets, backend="triton", softcap=30.0)
    assert entropy is not None
    return (
        loss, *torch.autograd.grad(loss, (hidden, weight)),
        logp, *torch.autograd.grad((logp + 0.1 * entropy).sum(), (hidden, weight)),
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["dapo", "gspo", "cispo"])
def test_nothing_waits_for_the_gpu(preset: str) -> None:
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003), LossSpec.preset(preset, beta=0.05, entropy_coef=0.01)
    steps(hidden, weight, tokens, spec)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(hidden, weight, tokens, spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("preset", ["dapo", "cispo"])
def test_forward_and_backward_are_captured_into_a_graph(preset: str) -> None:
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003), LossSpec.preset(preset, beta=0.05, entropy_coef=0.01)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            steps(hidden, weight, tokens, spec)
    torch.cuda.current_stream().wait_stream(aside)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps(hidden, weight, tokens, spec)
    with torch.no_grad():
        hidden.mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    for then, now in zip(captured, steps(hidden, weight, tokens, spec), strict=True):
        torch.testing.assert_close(then, now)


def test_rows_of_the_packer_and_master_gradients() -> None:
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003), LossSpec()
    full = linear_policy_loss(hidden, weight, tokens, spec, backend="triton")
    few = linear_policy_loss(
        hidden, weight, Tokens(**{**vars(tokens), "rows": head_rows(tokens, spec)}), spec, backend="triton"
    )
    torch.testing.assert_close(full.loss, few.loss)
    main = torch.zeros(weight.shape, device=GPU)
    (dw,) = torch.autograd.grad(full.loss, weight)
    linear_policy_loss(hidden, weight, tokens, spec, backend="triton", main_grad=main, grad_scale=1.0)
    torch.testing.assert_close(main.bfloat16(), dw, rtol=2e-2, atol=float(dw.abs().max()) * 1e-2)


def test_every_launch_fits_the_card() -> None:
    """What `ptxas` promised holds for the widest rows there are, on this card."""
    for dtype in (torch.float32, torch.bfloat16):
        n, v = 300, 262_144
        logits, targets, one = draw(n, v, dtype), aims(n, v), torch.ones(n, device=GPU)
        tokens, spec = Tokens(targets, one, one > 0, torch.arange(n, device=GPU)), LossSpec(entropy_coef=0.1)
        logp, _, _ = backend.rows_policy_loss_(logits, targets, prepare(tokens, spec, torch.float32), spec, 1.0, 30.0)
        assert logp.isfinite().all() and logits.isfinite().all()


def test_bad_input_is_one_sentence() -> None:
    logits, targets = draw(4, 10, torch.float32), aims(4, 10)
    for call, words in (
        (lambda: backend.rows_forward(logits.half(), targets), "float32 or bfloat16"),
        (lambda: backend.rows_forward(logits.cpu(), targets), "takes CUDA tensors"),
        (lambda: backend.rows_forward(logits.T, targets), "unit column stride"),
        (lambda: backend.rows_forward(logits, targets[:3]), "contiguous vector of length 4"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call()
    assert len(backend.rows_forward(logits[:0], targets[:0])[0]) == 0
