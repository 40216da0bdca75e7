"""The Triton and CUDA kernels on a GPU, against the float64 oracle and against torch in the same dtype; graphs, no host sync.

A backend that cannot run here is skipped with its reason.
"""

from __future__ import annotations

import gc
import importlib
from dataclasses import replace
from types import ModuleType

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

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
GPU = torch.device("cuda")
FEW, MANY = 1 << 20, 1  # processors: more than rows, so that Triton splits rows, or fewer


def load(name: str) -> ModuleType:
    reason = backends.reason_unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    return importlib.import_module(f"omni_kernels.backends.{name}")


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param)


@pytest.fixture(params=["triton", "cuda", "cuda_exp"])
def name(request: pytest.FixtureRequest) -> str:
    """Of a backend that heads can run on."""
    load(request.param)
    return str(request.param)


@pytest.fixture
def cuda() -> ModuleType:
    return load("cuda")


def is_cuda(backend: ModuleType) -> bool:
    return backend.__name__.endswith("cuda")


def draw(n: int, v: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0, offset: float = 0.0) -> Tensor:
    g = torch.Generator(GPU).manual_seed(seed)
    return (torch.randn(n, v, generator=g, device=GPU) * spread + offset).to(dtype)


def aims(n: int, v: int, seed: int = 1) -> Tensor:
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed)).to(GPU)


def check(
    backend: ModuleType, logits: Tensor, targets: Tensor, inv_t: float | Tensor = 1.0, cap: float | None = None,
    z: float = 0.01,
) -> None:  # fmt: skip
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
@pytest.mark.parametrize("v", [1, 2, 7, 8, 9, 1000, 5003, 49_152, 49_157, 50_257, 151_936, 262_144])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_rows_against_the_oracle(backend: ModuleType, dtype: torch.dtype, v: int, cap: float | None) -> None:
    n = 300 if v < 40_000 else 37
    inv_t = torch.rand(n, generator=torch.Generator().manual_seed(3)).to(GPU) + 0.5
    check(backend, draw(n, v, dtype), aims(n, v), inv_t, cap)


@every_dtype
@pytest.mark.parametrize("late", range(9))
@pytest.mark.parametrize("gap", [0, 1, 5, 16])
def test_rows_that_start_anywhere(backend: ModuleType, dtype: torch.dtype, late: int, gap: int) -> None:
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
def test_offsets(backend: ModuleType, dtype: torch.dtype, offset: float) -> None:
    check(backend, draw(9, 20_000, dtype, offset=offset), aims(9, 20_000), z=0.0)


@every_dtype
def test_a_sure_target(backend: ModuleType, dtype: torch.dtype) -> None:
    """1 - p of p = 0.999 and nearer to 1 has its digits, to the last bit of 1."""
    logits, targets = draw(16, 5000, dtype, spread=0.1), aims(16, 5000)
    logits[torch.arange(16), targets] = torch.arange(14.0, 22.0, 0.5, device=GPU).to(dtype)
    u = logits.clone().requires_grad_()
    logp, _ = logits_logprob(u, targets, backend=backend.__name__.rpartition(".")[2])
    (mine,) = torch.autograd.grad(logp.sum(), u)
    exact = -torch.expm1(reference.logprob(logits, targets)[0])
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(mine[torch.arange(16), targets].double(), exact, rtol=rounding, atol=5e-7)


@every_dtype
def test_ignored_idle_and_hopeless_rows(backend: ModuleType, dtype: torch.dtype) -> None:
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


def test_a_target_outside_the_vocabulary_is_nan(backend: ModuleType) -> None:
    logits = draw(3, 100, torch.float32)
    logp, _, lse = backend.rows_forward(logits, torch.tensor([0, 100, -1], device=GPU))
    assert logp.isnan().tolist() == [False, True, True] and lse.isfinite().all()


def batch_of(n: int, v: int, on_policy: bool = False) -> Tokens:
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
def test_one_sweep_equals_two(backend: ModuleType, preset: str, change: dict[str, object], on_policy: bool) -> None:
    n, v, cap = 300, 9001 if is_cuda(backend) else 40_001, 20.0
    tokens, spec = batch_of(n, v, on_policy), LossSpec.preset(preset, **change)
    if not row_wise(tokens, spec):
        return
    batch, logits = prepare(tokens, spec, torch.float32), draw(n, v, torch.float32)
    inv_t, swept = torch.rand(n, generator=torch.Generator().manual_seed(3)).to(GPU) + 0.5, logits.clone()
    logp, entropy, lse = backend.rows_policy_loss_(swept, tokens.targets, batch, spec, inv_t, cap)
    expected = backend.rows_forward(logits, tokens.targets, inv_t, cap)
    bound = 0.0 if is_cuda(backend) else 2e-6
    torch.testing.assert_close((logp, entropy, lse), expected, rtol=bound, atol=bound)
    known = coefficients(logp, entropy, lse, batch, spec)
    assert known.a.any()
    z = torch.zeros_like(lse) if known.z is None else known.z
    plain.rows_backward_(logits, tokens.targets, lse, entropy, known.a, known.b, inv_t, cap, z)
    torch.testing.assert_close(swept, logits, rtol=5e-5, atol=1e-7)


@every_dtype
@pytest.mark.parametrize("v", [151_936, 50_257, 50_000])
def test_splitting_company_and_repetition_do_not_change_a_bit(
    backend: ModuleType, dtype: torch.dtype, v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, some = 1000, slice(300, 307)
    logits, targets, spec = draw(n, v, dtype), aims(n, v), LossSpec(entropy_coef=0.01)
    one = torch.ones(n, device=GPU)
    batch = prepare(Tokens(targets, one, one > 0, torch.arange(n, device=GPU), denominator=7.0), spec, torch.float32)
    results = []
    for rows, processors in ((slice(None), MANY), (slice(None), MANY), (some, MANY), (some, FEW)):
        if not is_cuda(backend):
            monkeypatch.setattr(backend, "_processors", lambda device, count=processors: count)
        swept = logits[rows].clone()
        results.append((*backend.rows_policy_loss_(swept, targets[rows], batch.rows(rows), spec), swept))
    for whole, again, few, split in zip(*results, strict=True):
        assert whole is not None and again is not None and few is not None and split is not None
        assert torch.equal(whole, again) and torch.equal(whole[some], few) and torch.equal(few, split)
    alone, together = (backend.rows_forward(logits[r], targets[r]) for r in (some, slice(None)))
    for few, whole in zip(alone, together, strict=True):
        assert few is not None and whole is not None and torch.equal(few, whole[some])


def test_more_than_two_to_the_31_logits(backend: ModuleType) -> None:
    n, v = 8200, 262_144
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
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


def test_rows_are_captured_into_a_graph(backend: ModuleType) -> None:
    n, v = 64, 20_000
    targets, spec, one = aims(n, v), LossSpec(), torch.ones(n, device=GPU)
    batch = prepare(Tokens(targets, one, one > 0, torch.arange(n, device=GPU)), spec, torch.float32)
    source, logits = draw(n, v, torch.bfloat16), draw(n, v, torch.bfloat16)
    backend.rows_policy_loss_(logits, targets, batch, spec)  # records the loss, which looks at dummy values
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits.copy_(source)
        logp, _, _ = backend.rows_policy_loss_(logits, targets, batch, spec)
    source.copy_(draw(n, v, torch.bfloat16, seed=9))
    graph.replay()
    expected = source.clone()
    logp_now, _, _ = backend.rows_policy_loss_(expected, targets, batch, spec)
    assert torch.equal(logp, logp_now) and torch.equal(logits, expected)


def head(n: int = 700, h: int = 64, v: int = 5003) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).to(GPU, torch.bfloat16) for shape in ((n, h), (v, h)))
    return hidden.requires_grad_(), (weight.detach() / 8).requires_grad_()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("workspace", [None, 5003 * 2 * 300])
def test_linear_policy_loss_is_as_exact_as_torch(name: str, preset: str, workspace: int | None) -> None:
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
    for which in (name, "torch"):
        out = linear_policy_loss(hidden, weight, tokens, spec, backend=which, workspace_bytes=workspace)
        found = torch.autograd.grad(out.loss, (hidden, weight))
        errors.append([float((f.cpu().double() - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)])
    for mine, theirs in zip(*errors, strict=True):
        assert mine <= 3 * theirs + 1e-3


def steps(name: str, hidden: Tensor, weight: Tensor, tokens: Tokens, spec: LossSpec) -> tuple[Tensor, ...]:
    """One pass forward and backward of each linear operator."""
    loss = linear_policy_loss(hidden, weight, tokens, spec, backend=name, workspace_bytes=5003 * 2 * 300).loss
    logp, entropy = linear_logprob(hidden, weight, tokens.targets, backend=name, softcap=30.0)
    assert entropy is not None
    return (
        loss, *torch.autograd.grad(loss, (hidden, weight)),
        logp, *torch.autograd.grad((logp + 0.1 * entropy).sum(), (hidden, weight)),
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["dapo", "gspo", "cispo"])
def test_nothing_waits_for_the_gpu(name: str, preset: str) -> None:
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003), LossSpec.preset(preset, beta=0.05, entropy_coef=0.01)
    steps(name, hidden, weight, tokens, spec)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(name, hidden, weight, tokens, spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("preset", ["dapo", "cispo"])
def test_forward_and_backward_are_captured_into_a_graph(name: str, preset: str) -> None:
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003), LossSpec.preset(preset, beta=0.05, entropy_coef=0.01)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            steps(name, hidden, weight, tokens, spec)
    torch.cuda.current_stream().wait_stream(aside)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps(name, hidden, weight, tokens, spec)
    with torch.no_grad():
        hidden.mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    for then, now in zip(captured, steps(name, hidden, weight, tokens, spec), strict=True):
        torch.testing.assert_close(then, now)


def test_rows_of_the_packer_and_master_gradients(name: str) -> None:
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003), LossSpec()
    full = linear_policy_loss(hidden, weight, tokens, spec, backend=name)
    few = linear_policy_loss(
        hidden, weight, Tokens(**{**vars(tokens), "rows": head_rows(tokens, spec)}), spec, backend=name
    )
    torch.testing.assert_close(full.loss, few.loss)
    main = torch.zeros(weight.shape, device=GPU)
    (dw,) = torch.autograd.grad(full.loss, weight)
    linear_policy_loss(hidden, weight, tokens, spec, backend=name, main_grad=main, grad_scale=1.0)
    torch.testing.assert_close(main.bfloat16(), dw, rtol=2e-2, atol=float(dw.abs().max()) * 1e-2)


def test_the_head_equals_that_of_torch(name: str) -> None:
    x, w = (t.detach() for t in head(200))
    tokens = replace(batch_of(200, len(w), True), rollout=None)
    spec = LossSpec(beta=0.05, entropy_coef=0.01)
    results = []
    for which in (name, "torch"):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        out = linear_policy_loss(*leaves, tokens, spec, backend=which)
        out.loss.backward()
        results.append((out.loss.detach(), *(leaf.grad for leaf in leaves)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=float(theirs.abs().max()) * 1e-2)


def test_every_launch_fits_the_card(backend: ModuleType) -> None:
    """What `ptxas` promised holds for the widest rows there are, on this card."""
    for dtype in (torch.float32, torch.bfloat16):
        n, v = 300, 262_144
        logits, targets, one = draw(n, v, dtype), aims(n, v), torch.ones(n, device=GPU)
        tokens, spec = Tokens(targets, one, one > 0, torch.arange(n, device=GPU)), LossSpec(entropy_coef=0.1)
        logp, _, _ = backend.rows_policy_loss_(logits, targets, prepare(tokens, spec, torch.float32), spec, 1.0, 30.0)
        assert logp.isfinite().all() and logits.isfinite().all()


def matrices(n: int, h: int, v: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator(GPU).manual_seed(seed)
    x, w = (torch.randn(*shape, generator=g, device=GPU) for shape in ((n, h), (v, h)))
    return x.to(torch.bfloat16), (w * 4 / h**0.5).to(torch.bfloat16)


SHAPES = [
    (1, 64, 1), (3, 64, 255), (64, 64, 256), (129, 128, 257), (300, 576, 1000), (1000, 1024, 20_001), (2100, 896, 49_152),
]  # fmt: skip


@pytest.mark.parametrize("n, h, v", SHAPES)
@pytest.mark.parametrize("cap, biased", [(None, False), (None, True), (20.0, True)])
def test_the_linear_kernel_against_the_oracle(
    cuda: ModuleType, n: int, h: int, v: int, cap: float | None, biased: bool
) -> None:
    """Its logits are never rounded: near the error of fp32 logits in fp32 maths, where bf16 logits are off by 4e-2."""
    x, w = matrices(n, h, v)
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


def test_the_linear_kernel_is_batch_invariant_and_repeats(cuda: ModuleType) -> None:
    x, w = matrices(700, 256, 10_000)
    targets = aims(700, 10_000)
    whole, again = (cuda.linear_forward(x, w, None, targets) for _ in range(2))
    few = cuda.linear_forward(x[333:340].clone(), w, None, targets[333:340].clone())
    for a, b, c in zip(whole, again, few, strict=True):
        assert a is not None and b is not None and c is not None
        assert torch.equal(a, b) and torch.equal(a[333:340], c)


def test_the_linear_kernel_keeps_hopeless_rows_apart(cuda: ModuleType) -> None:
    x, w = matrices(200, 128, 5000)
    targets = aims(200, 5000)
    x[7], x[8, 3] = torch.nan, torch.inf
    targets[150], targets[9] = IGNORE, 5000
    logp, entropy, lse = cuda.linear_forward(x, w, None, targets)
    assert entropy is not None
    assert logp.isnan().nonzero()[:, 0].tolist() == [7, 8, 9] and lse[9].isfinite()
    assert (float(logp[150]), float(entropy[150]), float(lse[150])) == (0, 0, 0)


def test_the_linear_kernel_is_captured_into_a_graph(cuda: ModuleType) -> None:
    x, w = matrices(300, 128, 3000)
    targets = aims(300, 3000)
    cuda.linear_forward(x, w, None, targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logp, _, _ = cuda.linear_forward(x, w, None, targets)
    x.copy_(matrices(300, 128, 3000, seed=5)[0])
    graph.replay()
    assert torch.equal(logp, cuda.linear_forward(x, w, None, targets)[0])


def test_what_the_linear_kernel_does_not_take(cuda: ModuleType) -> None:
    x, w = matrices(8, 128, 100)
    targets = aims(8, 100)
    for a, b in ((x.float(), w.float()), (x[:, :96].contiguous(), w[:, :96].contiguous()), (x, w.T.contiguous().T)):
        with pytest.raises(NotImplementedError, match="takes contiguous bfloat16 with H a multiple of 64"):
            cuda.linear_forward(a, b, None, targets)
    assert len(cuda.linear_forward(x[:0], w, None, targets[:0])[0]) == 0


@pytest.mark.parametrize("n, h, v", SHAPES)
@pytest.mark.parametrize(
    "cap, biased, spread", [(None, False, 1.0), (None, True, 1.0), (20.0, True, 1.0), (None, False, 40.0)]
)
@pytest.mark.parametrize("bent", [False, True], ids=["a", "a, b, z"])
def test_exponentials_against_the_oracle(
    cuda: ModuleType, n: int, h: int, v: int, cap: float | None, biased: bool, spread: float, bent: bool
) -> None:
    """Two roundings to bf16 from the gradient of exact logits; spread: logits of a row reach beyond 64 bits."""
    x, w = matrices(n, h, v)
    x = (x * spread).bfloat16()
    bias = torch.randn(v, generator=torch.Generator().manual_seed(4)).to(GPU) if biased else None
    targets, inv_t = aims(n, v), torch.rand(n, generator=torch.Generator().manual_seed(3)).to(GPU) + 0.5
    targets[n // 2] = IGNORE
    found, exps = cuda.linear_exponentials(x, w, bias, targets, inv_t, cap)
    for kept, alone in zip(found, cuda.linear_forward(x, w, bias, targets, inv_t, cap), strict=True):
        torch.testing.assert_close(kept, alone, rtol=1e-5, atol=1e-5)
    a, b, z = (torch.randn(n, generator=torch.Generator().manual_seed(k)).to(GPU) for k in (5, 6, 7))
    a[n // 3] = b[n // 3] = z[n // 3] = 0
    factor = exps.gradient_(a, b if bent else None, z * 0.01 if bent else None)
    mine = factor[:, None].double() * exps.values.double()
    u = x.double() @ w.double().T + (0 if bias is None else bias.double())
    u.requires_grad_()
    exact = reference.logprob(u, targets.clamp(min=0), inv_t, cap)
    loss = a * exact[0] + (b * exact[1] + 0.01 * z * exact[2] ** 2 if bent else 0)
    (truth,) = torch.autograd.grad(loss[targets != IGNORE].sum(), u)
    assert not mine[n // 2].any() and not mine[n // 3].any()
    size = float((a.abs() + (b.abs() + 0.02 * (z * exact[2].detach()).abs() if bent else 0)).norm())
    allowed = (
        2**-8 * (3 * float(truth.norm()) + (size if bent else 0))
        + 1e-5 * (1 + float(exact[2].detach().abs().max())) * size
    )
    assert float((mine - truth).norm()) <= allowed


@pytest.mark.parametrize("change", [{}, {"entropy_coef": 0.01}, {"beta": 0.05, "z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("n, h, v", [(300, 64, 5003), (1000, 896, 20_001), (2100, 1024, 151_936)])
def test_exponentials_against_triton(cuda: ModuleType, n: int, h: int, v: int, change: dict[str, float]) -> None:
    """The whole loss in several chunks: no further from the torch backend in fp32 than the Triton path is, times three."""
    load("triton")
    x, w = matrices(n, h, v)
    tokens, spec = batch_of(n, v), LossSpec(**change)
    made = {}
    for which in ("triton", "cuda_exp", "torch"):
        leaves = [t.float() if which == "torch" else t.clone() for t in (x, w)]
        for leaf in leaves:
            leaf.requires_grad_()
        out = linear_policy_loss(*leaves, tokens, spec, backend=which, workspace_bytes=400 * v * 2)
        made[which] = (out.loss, *torch.autograd.grad(out.loss, leaves))
    for theirs, mine, truth in zip(made["triton"], made["cuda_exp"], made["torch"], strict=True):
        errors = [float((f.float() - truth).norm() / truth.norm()) for f in (mine, theirs)]
        assert errors[0] <= 3 * errors[1] + 1e-3


def test_bad_input_is_one_sentence(backend: ModuleType) -> None:
    logits, targets = draw(4, 10, torch.float32), aims(4, 10)
    calls = [
        (lambda: backend.rows_forward(logits.half(), targets), "float32 or bfloat16"),
        (lambda: backend.rows_forward(logits.cpu(), targets), "takes CUDA tensors"),
        (lambda: backend.rows_forward(logits.T, targets), "unit column stride"),
        (lambda: backend.rows_forward(logits, targets[:3]), "contiguous vector of length 4"),
    ]
    if is_cuda(backend):
        wide = draw(1, 500_000, torch.float32)
        calls += [
            (lambda: backend.rows_forward(logits, targets, -1.0), "must be finite and greater than 0"),
            (lambda: backend.rows_forward(wide, targets[:1]), "does not fit on chip"),
        ]
    for call, words in calls:
        with pytest.raises((ValueError, TypeError), match=words):
            call()
    assert len(backend.rows_forward(logits[:0], targets[:0])[0]) == 0
