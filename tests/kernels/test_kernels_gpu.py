"""The Triton and CUDA kernels on a GPU, against the float64 oracle and against torch in the same dtype; graphs, no host sync.

A backend that cannot run here is skipped with its reason. scripts/gpu.sh runs the backends one after the other in processes of
their own, by what is in the tests' names: triton, cuda, cuda_exp, linear_kernel, exponentials.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
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
from omni_kernels.losses import coefficients, prepare
from omni_kernels.spec import PRESETS

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
GPU = torch.device("cuda")
FEW, MANY = 1 << 20, 1  # processors: more than rows, so that Triton splits rows, or fewer
RACES = 50  # repetitions, for a missing fence to show
Batches = Callable[..., Tokens]


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


def aims(n: int, v: int) -> Tensor:
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(1)).to(GPU)


def scales(n: int) -> Tensor:
    """Inverse temperatures."""
    return torch.rand(n, generator=torch.Generator().manual_seed(3)).to(GPU) + 0.5


def plain_tokens(targets: Tensor) -> Tokens:
    one = torch.ones(len(targets), device=targets.device)
    return Tokens(targets, one, one > 0, torch.arange(len(targets), device=targets.device), denominator=1.0)


def sweep(backend: ModuleType, logits: Tensor, targets: Tensor, spec: LossSpec, *how: object) -> tuple[Tensor, ...]:
    """logp, entropy, lse; logits become the gradient of the loss on-policy, with advantages of 1."""
    return backend.rows_policy_loss_(logits, targets, prepare(plain_tokens(targets), spec, torch.float32), spec, *how)


@every_dtype
@pytest.mark.parametrize("v", [1, 2, 7, 8, 9, 1000, 5003, 49_152, 49_157, 50_257, 151_936, 262_144])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_rows_against_the_oracle(
    backend: ModuleType, check_rows: Callable[..., Tensor], dtype: torch.dtype, v: int, cap: float | None
) -> None:
    n = 1300 if v < 40_000 else 250  # so that a cluster has several
    check_rows(backend, draw(n, v, dtype), aims(n, v), scales(n), cap)


@every_dtype
@pytest.mark.parametrize("offset", [-104.0, -5000.0, 5000.0])
def test_offsets(backend: ModuleType, check_rows: Callable[..., Tensor], dtype: torch.dtype, offset: float) -> None:
    check_rows(backend, draw(9, 20_000, dtype, offset=offset), aims(9, 20_000), z=0.0)


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
def test_a_sure_target(backend: ModuleType, dtype: torch.dtype) -> None:
    """1 - p of p = 0.999 and nearer to 1 has its digits, to the last bits of 1: as many terms as a thread sums cost some."""
    logits, targets = draw(16, 5000, dtype, spread=0.1), aims(16, 5000)
    logits[torch.arange(16), targets] = torch.arange(14.0, 22.0, 0.5, device=GPU).to(dtype)
    u = logits.clone().requires_grad_()
    logp, _ = logits_logprob(u, targets, backend=backend.__name__.rpartition(".")[2])
    (mine,) = torch.autograd.grad(logp.sum(), u)
    exact = -torch.expm1(reference.logprob(logits, targets)[0])
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(mine[torch.arange(16), targets].double(), exact, rtol=rounding, atol=5e-6)


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


def test_one_sweep_equals_two(backend: ModuleType, batch_of: Batches, loss: tuple[LossSpec, bool]) -> None:
    n, v, cap, (spec, on_policy) = 300, 40_001, 20.0, loss
    tokens = batch_of(n, v, on_policy, GPU)
    batch, logits, inv_t = prepare(tokens, spec, torch.float32), draw(n, v, torch.float32), scales(n)
    swept = logits.clone()
    logp, entropy, lse = backend.rows_policy_loss_(swept, tokens.targets, batch, spec, inv_t, cap)
    expected = backend.rows_forward(logits, tokens.targets, inv_t, cap)
    torch.testing.assert_close((logp, entropy, lse), expected, rtol=2e-6, atol=2e-6)
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
    n, some = 1000, slice(304, 311)  # which starts at a multiple of 16 bytes, as the copies of it do
    logits, targets, spec = draw(n, v, dtype), aims(n, v), LossSpec(entropy_coef=0.01)
    results = []
    for rows, processors in ((slice(None), MANY), (slice(None), MANY), (some, MANY), (some, FEW)):
        if not is_cuda(backend):
            monkeypatch.setattr(backend, "_processors", lambda device, count=processors: count)
        swept = logits[rows].clone()
        results.append((*sweep(backend, swept, targets[rows], spec), swept))
    for _ in range(RACES if is_cuda(backend) else 0):
        swept = logits.clone()
        assert all(map(torch.equal, (*sweep(backend, swept, targets, spec), swept), results[0]))
    for whole, again, few, split in zip(*results, strict=True):
        assert torch.equal(whole, again) and torch.equal(whole[some], few) and torch.equal(few, split)
    alone, together = (backend.rows_forward(logits[r], targets[r]) for r in (some, slice(None)))
    assert all(torch.equal(few, whole[some]) for few, whole in zip(alone, together, strict=True))


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
    swept = logits.clone()
    sweep(backend, swept, targets, LossSpec())
    backend.rows_backward_(logits, targets, lse, None, -torch.ones(n, device=GPU))
    for gradient in (logits, swept):
        assert abs(float(gradient[-1, -1]) - float(torch.expm1(exact[-1]))) < 1e-2 and not gradient.isnan().any()


@every_dtype
def test_every_launch_fits_the_card(backend: ModuleType, dtype: torch.dtype) -> None:
    """What `ptxas` promised holds for the widest rows there are, on this card."""
    n, v = 300, 262_144
    logits = draw(n, v, dtype)
    logp, _, _ = sweep(backend, logits, aims(n, v), LossSpec(entropy_coef=0.1), 1.0, 30.0)
    assert logp.isfinite().all() and logits.isfinite().all()


def test_tensors_of_another_device_than_the_current_one(name: str, batch_of: Batches) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for device in ("cuda:0", "cuda:1"):  # the current one is the first
        hidden, weight = (t.detach().to(device).requires_grad_() for t in head())
        results.append(steps(name, hidden, weight, batch_of(700, 5003, False, device), LossSpec()))
    assert all(torch.equal(here, there.to("cuda:0")) for here, there in zip(*results, strict=True))


def replays(call: Callable[[], tuple[Tensor, ...]], change: Callable[[], object], exact: bool) -> None:
    """A captured call gives what the call gives, of inputs that changed since."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, and records the loss, which looks at dummy values
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    change()
    graph.replay()
    torch.cuda.synchronize()
    then = [x.clone() for x in captured]
    for old, now in zip(then, call(), strict=True):
        torch.testing.assert_close(old, now, **({"rtol": 0, "atol": 0} if exact else {}))


def test_rows_are_captured_into_a_graph(backend: ModuleType) -> None:
    targets, (source, logits) = aims(64, 20_000), (draw(64, 20_000, torch.bfloat16) for _ in range(2))

    def call() -> tuple[Tensor, ...]:
        logits.copy_(source)
        logp, _, _ = sweep(backend, logits, targets, LossSpec())
        return logp, logits

    replays(call, lambda: source.copy_(draw(64, 20_000, torch.bfloat16, seed=9)), exact=True)


def head(n: int = 700, h: int = 64, v: int = 5003) -> tuple[Tensor, Tensor]:
    x, w = matrices(n, h, v)
    return x.requires_grad_(), (w / 4).requires_grad_()


def matrices(n: int, h: int, v: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator(GPU).manual_seed(seed)
    x, w = (torch.randn(*shape, generator=g, device=GPU) for shape in ((n, h), (v, h)))
    return x.to(torch.bfloat16), (w * 4 / h**0.5).to(torch.bfloat16)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("workspace", [None, 5003 * 2 * 300])
def test_linear_policy_loss_is_as_exact_as_torch(
    name: str, batch_of: Batches, preset: str, workspace: int | None
) -> None:
    """Against the float64 oracle, at most three times the error of the torch backend, dlogits being bf16."""
    hidden, weight = head()
    spec, (tokens, host) = (
        LossSpec.preset(preset, beta=0.05, entropy_coef=0.01),
        (batch_of(700, 5003, False, device) for device in (GPU, "cpu")),
    )
    leaves = [x.detach().cpu().double().requires_grad_() for x in (hidden, weight)]
    logp, entropy, lse = reference.head(*leaves, host.targets)
    truth = torch.autograd.grad(reference.policy_loss(logp, entropy, host, spec, lse), leaves)
    with torch.no_grad():
        hidden[~tokens.trained()] = torch.nan  # which nothing may look at
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


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("preset", ["dapo", "gspo", "cispo"])
def test_nothing_waits_for_the_gpu(name: str, batch_of: Batches, preset: str) -> None:
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003, False, GPU), LossSpec.preset(preset, beta=0.05, entropy_coef=0.01)
    first = steps(name, hidden, weight, tokens, spec)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = steps(name, hidden, weight, tokens, spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("preset", ["dapo", "cispo"])
def test_forward_and_backward_are_captured_into_a_graph(name: str, batch_of: Batches, preset: str) -> None:
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003, False, GPU), LossSpec.preset(preset, beta=0.05, entropy_coef=0.01)
    replays(lambda: steps(name, hidden, weight, tokens, spec), lambda: hidden.data.mul_(-1), exact=False)


def test_rows_of_the_packer_and_master_gradients(name: str, batch_of: Batches) -> None:
    hidden, weight = head()
    tokens, spec = batch_of(700, 5003, False, GPU), LossSpec()
    full = linear_policy_loss(hidden, weight, tokens, spec, backend=name)
    few = linear_policy_loss(hidden, weight, replace(tokens, rows=head_rows(tokens, spec)), spec, backend=name)
    torch.testing.assert_close(full.loss, few.loss)
    main = torch.zeros(weight.shape, device=GPU)
    (dw,) = torch.autograd.grad(full.loss, weight)
    linear_policy_loss(hidden, weight, tokens, spec, backend=name, main_grad=main, grad_scale=1.0)
    torch.testing.assert_close(main.bfloat16(), dw, rtol=2e-2, atol=float(dw.abs().max()) * 1e-2)


def test_batch_invariant_rows_do_not_see_each_other(name: str, batch_of: Batches) -> None:
    hidden, weight = head(1100)  # a whole tile, and one that is filled up
    tokens, few = batch_of(1100, 5003, True, GPU), torch.arange(100, 140, device=GPU)
    part = Tokens(**{k: v if v is None else v[few] for k, v in vars(tokens).items()})
    part = replace(part, sequences=part.sequences - part.sequences.min())  # type: ignore[operator, union-attr]
    spec, results = LossSpec(beta=0.05, entropy_coef=0.01), []
    for x, batch in ((hidden, tokens), (hidden[few], part)):
        leaf, batch = x.detach().requires_grad_(), replace(batch, denominator=100.0)
        how = {"backend": name, "batch_invariant": True, "return_tokens": True}
        out = linear_policy_loss(leaf, weight, batch, spec, **how)  # type: ignore[arg-type]
        results.append((out.logp, out.entropy, *torch.autograd.grad(out.loss, leaf)))
    for together, alone in zip(*results, strict=True):
        assert torch.equal(together[few], alone)


SHAPES = [
    (1, 64, 1), (3, 64, 255), (64, 64, 256), (129, 128, 257), (300, 576, 1000), (1000, 1024, 20_001), (2100, 896, 49_152),
]  # fmt: skip


def problem(n: int, h: int, v: int, biased: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """hidden, weight, bias, targets of which one is ignored, inverse temperatures."""
    targets = aims(n, v)
    targets[n // 2] = IGNORE
    bias = torch.randn(v, generator=torch.Generator().manual_seed(4)).to(GPU) if biased else None
    return *matrices(n, h, v), bias, targets, scales(n)


@pytest.mark.parametrize("n, h, v", SHAPES)
@pytest.mark.parametrize("cap, biased", [(None, False), (None, True), (20.0, True)])
def test_the_linear_kernel_against_the_oracle(
    cuda: ModuleType, n: int, h: int, v: int, cap: float | None, biased: bool
) -> None:
    """Its logits are never rounded: near the error of fp32 logits in fp32 maths, where bf16 logits are off by 4e-2."""
    x, w, bias, targets, inv_t = problem(n, h, v, biased)
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
    whole = cuda.linear_forward(x, w, None, targets)
    for _ in range(RACES):
        assert all(map(torch.equal, whole, cuda.linear_forward(x, w, None, targets)))
    few = cuda.linear_forward(x[333:340].clone(), w, None, targets[333:340].clone())
    for a, c in zip(whole, few, strict=True):
        assert torch.equal(a[333:340], c)


def test_the_linear_kernel_keeps_hopeless_rows_apart(cuda: ModuleType) -> None:
    x, w = matrices(200, 128, 5000)
    targets = aims(200, 5000)
    x[7], x[8, 3] = torch.nan, torch.inf
    targets[150], targets[9] = IGNORE, 5000
    logp, entropy, lse = cuda.linear_forward(x, w, None, targets)
    assert logp.isnan().nonzero()[:, 0].tolist() == [7, 8, 9] and lse[9].isfinite()
    assert (float(logp[150]), float(entropy[150]), float(lse[150])) == (0, 0, 0)


def test_the_linear_kernel_is_captured_into_a_graph(cuda: ModuleType) -> None:
    x, w = matrices(300, 128, 3000)
    targets, other = aims(300, 3000), matrices(300, 128, 3000, seed=5)[0]
    replays(lambda: cuda.linear_forward(x, w, None, targets), lambda: x.copy_(other), exact=True)


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
    x, w, bias, targets, inv_t = problem(n, h, v, biased)
    x = (x * spread).bfloat16()
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
    lse = exact[2].detach().abs()
    sizes = a.abs() + (b.abs() + 0.02 * z.abs() * lse if bent else 0)
    size = float(sizes.norm())
    allowed = 2**-8 * (3 * float(truth.norm()) + size * bent) + 1e-5 * (1 + float(lse.max())) * size
    assert float((mine - truth).norm()) <= allowed
    by_row = 2**-8 * (12 * truth.norm(dim=1) + 4 * sizes * bent) + 1e-5 * (1 + lse) * sizes  # a wrong tile of some rows
    assert ((mine - truth).norm(dim=1) <= by_row)[targets != IGNORE].all()


@pytest.mark.usefixtures("chunks_of_rows")
@pytest.mark.parametrize("change", [{}, {"entropy_coef": 0.01}, {"beta": 0.05, "z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("n, h, v", [(300, 64, 5003), (1000, 896, 20_001), (2100, 1024, 151_936)])
def test_exponentials_against_triton(
    cuda: ModuleType, batch_of: Batches, n: int, h: int, v: int, change: dict[str, float]
) -> None:
    """The whole loss in several chunks: no further from the torch backend in fp32 than the Triton path is, times three."""
    load("triton")
    x, w = matrices(n, h, v)
    tokens, spec = batch_of(n, v, False, GPU), LossSpec(**change)
    made = {}
    for which in ("triton", "cuda_exp", "torch"):
        leaves = [(t.float() if which == "torch" else t.clone()).requires_grad_() for t in (x, w)]
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
