"""The CUDA kernels on a GPU of compute capability 9.0, against the float64 oracle and against torch in the same dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from omni_kernels import IGNORE, LossSpec, Tokens, backends, linear_policy_loss, logits_logprob, reference
from omni_kernels.backends import torch as plain
from omni_kernels.losses import coefficients, prepare, row_wise
from omni_kernels.spec import PRESETS

if backends.reason_unavailable("cuda") is not None:
    pytest.skip(str(backends.reason_unavailable("cuda")), allow_module_level=True)

from omni_kernels.backends import cuda

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
GPU = torch.device("cuda")


def draw(n: int, v: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0, offset: float = 0.0) -> Tensor:
    g = torch.Generator(GPU).manual_seed(seed)
    return (torch.randn(n, v, generator=g, device=GPU) * spread + offset).to(dtype)


def aims(n: int, v: int, seed: int = 1) -> Tensor:
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed)).to(GPU)


def check(
    logits: Tensor, targets: Tensor, inv_t: float | Tensor = 1.0, cap: float | None = None, z: float = 0.01
) -> None:
    """Values within twice, gradients within twice (bf16: three times) the error of torch in the same dtype."""
    n = len(logits)
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(n, generator=g).to(GPU) for _ in range(2))
    mine = cuda.rows_forward(logits, targets, inv_t, cap, True)
    other = plain.rows_forward(logits, targets, inv_t, cap, True)
    u = logits.double().requires_grad_()
    exact = reference.logprob(u, targets, inv_t, cap)
    for found, theirs, truth in zip(mine, other, exact, strict=True):
        assert found is not None and theirs is not None
        allowed = 2 * (theirs.double() - truth).abs().max() + 3e-7 * (1 + exact[2].abs().max())
        assert float((found.double() - truth).abs().max()) <= float(allowed)
    (truth,) = torch.autograd.grad((a * exact[0] + b * exact[1] + z * exact[2] ** 2).sum(), u)
    gradient, theirs = logits.clone(), logits.clone()
    assert mine[1] is not None
    cuda.rows_backward_(gradient, targets, mine[2], mine[1], a, b, inv_t, cap, z)
    plain.rows_backward_(theirs, targets, other[2], other[1], a, b, inv_t, cap, z)
    times = 3 if logits.dtype == torch.bfloat16 else 2
    error, allowed = (float((x.double() - truth).norm()) for x in (gradient, theirs))
    digits = 2e-7 + 2**-23 * float(exact[2].abs().max())
    size = float((a.abs() + b.abs() + 2 * z * exact[2].abs()).norm())
    assert error <= times * allowed + 5e-7 * float(truth.norm()) + digits * size


@every_dtype
@pytest.mark.parametrize("v", [1, 2, 7, 8, 9, 1000, 5003, 49_152, 49_157, 151_936, 262_144])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_rows_against_the_oracle(dtype: torch.dtype, v: int, cap: float | None) -> None:
    n = 300 if v < 50_000 else 37
    inv_t = torch.rand(n, generator=torch.Generator().manual_seed(3)).to(GPU) + 0.5
    check(draw(n, v, dtype), aims(n, v), inv_t, cap)


@every_dtype
@pytest.mark.parametrize("late", range(8))
@pytest.mark.parametrize("gap", [0, 1, 5])
def test_rows_that_start_anywhere(dtype: torch.dtype, late: int, gap: int) -> None:
    """Whatever the alignment; and nothing beside the rows is touched."""
    n, v = 70, 4999
    store = torch.full((n * (v + gap) + 32,), torch.nan, dtype=dtype, device=GPU)
    logits = store[late:].as_strided((n, v), (v + gap, 1), late).copy_(draw(n, v, dtype))
    targets, values = aims(n, v), logits.clone()
    logp, entropy, lse = cuda.rows_forward(logits, targets)
    expected = plain.rows_forward(values, targets, 1.0, None, True)
    torch.testing.assert_close(logp, expected[0], rtol=2e-6, atol=2e-6)
    a = torch.ones(n, device=GPU)
    cuda.rows_backward_(logits, targets, lse, entropy, a, a)
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
    logp, _ = logits_logprob(u, targets, backend="cuda")
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
    logp, entropy, lse = cuda.rows_forward(logits, targets)
    assert entropy is not None
    assert logp[[0, 1, 7]].isfinite().all() and logp[[2, 3, 4, 6]].isnan().all() and entropy[[2, 3, 4]].isnan().all()
    assert not any(float(x[5]) for x in (logp, entropy, lse))
    a = torch.ones(8, device=GPU)
    a[6] = 0  # idle: not read
    cuda.rows_backward_(logits, targets, lse, entropy, a)
    assert not logits[[5, 6]].any() and logits[[0, 1, 7]].isfinite().all() and logits[2:5].isnan().any(1).all()
    assert not logits[0, :59_000].any() and not logits[1, 2500:].any()


def test_a_target_outside_the_vocabulary_is_nan() -> None:
    logits = draw(3, 100, torch.float32)
    logp, _, lse = cuda.rows_forward(logits, torch.tensor([0, 100, -1], device=GPU))
    assert logp.isnan().tolist() == [False, True, True] and lse.isfinite().all()


def batch_of(n: int, v: int, on_policy: bool) -> Tokens:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, v, (n,), generator=g)
    targets[::5] = IGNORE
    level = -torch.tensor(float(v)).log()
    old, ref, rollout = ((level + torch.randn(n, generator=g) * 0.5).to(GPU) for _ in range(3))
    advantages = torch.randn(n, generator=g)
    advantages[1::4] = 0
    rollout[3] = torch.nan
    mask = torch.rand(n, generator=g) > 0.2
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
    n, v, cap = 300, 9001, 20.0
    tokens, spec = batch_of(n, v, on_policy), LossSpec.preset(preset, **change)
    if not row_wise(tokens, spec):
        return
    batch, logits = prepare(tokens, spec, torch.float32), draw(n, v, torch.float32)
    inv_t, swept = torch.rand(n, generator=torch.Generator().manual_seed(3)).to(GPU) + 0.5, logits.clone()
    mine = cuda.rows_policy_loss_(swept, tokens.targets, batch, spec, inv_t, cap)
    logp, entropy, lse = cuda.rows_forward(logits, tokens.targets, inv_t, cap)
    for x, y in zip(mine, (logp, entropy, lse), strict=True):
        assert x is not None and y is not None and torch.equal(x, y)
    known = coefficients(logp, entropy, lse, batch, spec)
    assert known.a.any()
    z = torch.zeros_like(lse) if known.z is None else known.z
    plain.rows_backward_(logits, tokens.targets, lse, entropy, known.a, known.b, inv_t, cap, z)
    torch.testing.assert_close(swept, logits, rtol=5e-5, atol=1e-7)


@every_dtype
def test_company_and_repetition_do_not_change_a_bit(dtype: torch.dtype) -> None:
    n, v = 1000, 50_000
    logits, targets, spec = draw(n, v, dtype), aims(n, v), LossSpec(entropy_coef=0.01)
    one = torch.ones(n, device=GPU)
    batch = prepare(Tokens(targets, one, one > 0, torch.arange(n, device=GPU), denominator=7.0), spec, torch.float32)
    results = []
    for rows in (slice(None), slice(None), slice(300, 307)):
        swept = logits[rows].clone()
        results.append((*cuda.rows_policy_loss_(swept, targets[rows], batch.rows(rows), spec), swept))
    for whole, again, few in zip(*results, strict=True):
        assert whole is not None and again is not None and few is not None
        assert torch.equal(whole, again) and torch.equal(whole[300:307], few)


def test_more_than_two_to_the_31_logits() -> None:
    n, v = 8200, 262_144
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device=GPU)
    logits[-1, -1] = 8.0
    targets = torch.full((n,), v - 1, device=GPU)
    logp, _, lse = cuda.rows_forward(logits, targets)
    exact = reference.logprob(logits[-2:], targets[-2:])[0]
    torch.testing.assert_close(logp[-2:].double(), exact, rtol=1e-6, atol=1e-6)
    cuda.rows_backward_(logits, targets, lse, None, torch.ones(n, device=GPU))
    assert abs(float(logits[-1, -1]) + float(torch.expm1(exact[-1]))) < 1e-2 and not logits.isnan().any()


def test_it_is_captured_into_a_graph() -> None:
    n, v = 64, 20_000
    targets, spec, one = aims(n, v), LossSpec(), torch.ones(n, device=GPU)
    batch = prepare(Tokens(targets, one, one > 0, torch.arange(n, device=GPU)), spec, torch.float32)
    source, logits = draw(n, v, torch.bfloat16), draw(n, v, torch.bfloat16)
    cuda.rows_policy_loss_(logits, targets, batch, spec)  # records the loss, which looks at dummy values
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits.copy_(source)
        logp, _, _ = cuda.rows_policy_loss_(logits, targets, batch, spec)
    source.copy_(draw(n, v, torch.bfloat16, seed=9))
    graph.replay()
    expected = source.clone()
    logp_now, _, _ = cuda.rows_policy_loss_(expected, targets, batch, spec)
    assert torch.equal(logp, logp_now) and torch.equal(logits, expected)


def test_the_head_on_this_backend() -> None:
    n, h, v = 200, 64, 5003
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=g).to(GPU, torch.bfloat16) for shape in ((n, h), (v, h)))
    w = w / 8
    tokens = replace(batch_of(n, v, True), rollout=None)
    spec = LossSpec(beta=0.05, entropy_coef=0.01)
    results = []
    for backend in ("cuda", "torch"):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        out = linear_policy_loss(*leaves, tokens, spec, backend=backend)
        out.loss.backward()
        results.append((out.loss.detach(), *(leaf.grad for leaf in leaves)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=float(theirs.abs().max()) * 1e-2)


def head(n: int, h: int, v: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator(GPU).manual_seed(seed)
    x, w = (torch.randn(*shape, generator=g, device=GPU) for shape in ((n, h), (v, h)))
    return x.to(torch.bfloat16), (w * 4 / h**0.5).to(torch.bfloat16)


@pytest.mark.parametrize("n, h, v", [
    (1, 64, 1), (3, 64, 255), (64, 64, 256), (129, 128, 257), (300, 576, 1000), (1000, 1024, 20_001), (2100, 896, 49_152),
])  # fmt: skip
@pytest.mark.parametrize("cap, biased", [(None, False), (None, True), (20.0, True)])
def test_the_linear_kernel_against_the_oracle(n: int, h: int, v: int, cap: float | None, biased: bool) -> None:
    """Its logits are never rounded: near the error of fp32 logits in fp32 maths, where bf16 logits are off by 4e-2."""
    x, w = head(n, h, v)
    bias = torch.randn(v, generator=torch.Generator().manual_seed(4)).to(GPU) if biased else None
    targets, inv_t = aims(n, v), torch.rand(n, generator=torch.Generator().manual_seed(3)).to(GPU) + 0.5
    targets[n // 2] = IGNORE
    mine = cuda.linear_forward(x, w, bias, targets, inv_t, cap, True)
    exact = reference.head(x, w, targets, bias, inv_t, cap)
    logits = x.float() @ w.float().T
    theirs = plain.rows_forward(logits if bias is None else logits + bias, targets, inv_t, cap, True)
    for found, other, truth in zip(mine, theirs, exact, strict=True):
        assert found is not None and other is not None
        allowed = 2 * (other.double() - truth).abs().max() + 1e-5 * (1 + exact[2].abs().max())
        assert float((found.double() - truth).abs().max()) <= float(allowed)


def test_the_linear_kernel_is_batch_invariant_and_repeats() -> None:
    x, w = head(700, 256, 10_000)
    targets = aims(700, 10_000)
    whole, again = (cuda.linear_forward(x, w, None, targets) for _ in range(2))
    few = cuda.linear_forward(x[333:340].clone(), w, None, targets[333:340].clone())
    for a, b, c in zip(whole, again, few, strict=True):
        assert a is not None and b is not None and c is not None
        assert torch.equal(a, b) and torch.equal(a[333:340], c)


def test_the_linear_kernel_keeps_hopeless_rows_apart() -> None:
    x, w = head(200, 128, 5000)
    targets = aims(200, 5000)
    x[7], x[8, 3] = torch.nan, torch.inf
    targets[150], targets[9] = IGNORE, 5000
    logp, entropy, lse = cuda.linear_forward(x, w, None, targets)
    assert entropy is not None
    assert logp.isnan().nonzero()[:, 0].tolist() == [7, 8, 9] and lse[9].isfinite()
    assert (float(logp[150]), float(entropy[150]), float(lse[150])) == (0, 0, 0)


def test_the_linear_kernel_is_captured_into_a_graph() -> None:
    x, w = head(300, 128, 3000)
    targets = aims(300, 3000)
    cuda.linear_forward(x, w, None, targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logp, _, _ = cuda.linear_forward(x, w, None, targets)
    x.copy_(head(300, 128, 3000, seed=5)[0])
    graph.replay()
    assert torch.equal(logp, cuda.linear_forward(x, w, None, targets)[0])


def test_what_the_linear_kernel_does_not_take() -> None:
    x, w = head(8, 128, 100)
    targets = aims(8, 100)
    for a, b in ((x.float(), w.float()), (x[:, :96].contiguous(), w[:, :96].contiguous()), (x, w.T.contiguous().T)):
        with pytest.raises(NotImplementedError, match="takes contiguous bfloat16 with H a multiple of 64"):
            cuda.linear_forward(a, b, None, targets)
    assert len(cuda.linear_forward(x[:0], w, None, targets[:0])[0]) == 0


def test_bad_input_is_one_sentence() -> None:
    logits, targets = draw(4, 10, torch.float32), aims(4, 10)
    for call, words in (
        (lambda: cuda.rows_forward(logits.half(), targets), "float32 or bfloat16"),
        (lambda: cuda.rows_forward(logits.cpu(), targets), "takes CUDA tensors"),
        (lambda: cuda.rows_forward(logits.T, targets), "unit column stride"),
        (lambda: cuda.rows_forward(logits, targets[:3]), "contiguous vector of length 4"),
        (lambda: cuda.rows_forward(logits, targets, -1.0), "must be finite and greater than 0"),
        (lambda: cuda.rows_forward(draw(1, 500_000, torch.float32), targets[:1]), "does not fit on chip"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call()
    assert len(cuda.rows_forward(logits[:0], targets[:0])[0]) == 0
