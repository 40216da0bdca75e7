"""The C++ row kernels of every instruction set this processor has, against the float64 oracle and against torch itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels import IGNORE, LossSpec, Tokens, backends, reference
from omni_kernels.losses import coefficients, prepare, row_wise

if backends.reason_unavailable("cpu") is not None:
    pytest.skip(str(backends.reason_unavailable("cpu")), allow_module_level=True)

from omni_kernels.backends import cpu
from omni_kernels.backends.program import record

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def test_exp2_is_within_two_ulps(isa: str) -> None:
    x = torch.cat([torch.linspace(-125.9, 127.0, 400_001), torch.linspace(-1, 1, 200_001)])
    y = torch.empty_like(x)
    cpu.native.vector_exp2(x.data_ptr(), y.data_ptr(), len(x), isa)
    exact = x.double().exp2()
    ulp = torch.exp2(exact.log2().floor() - 23)
    assert float(((y.double() - exact) / ulp).abs().max()) < 2
    edges = torch.tensor([-torch.inf, -1e30, -200.0, torch.nan])
    out = torch.empty_like(edges)
    cpu.native.vector_exp2(edges.data_ptr(), out.data_ptr(), len(edges), isa)
    assert out[:3].tolist() == [0, 0, 0] and out[3].isnan()


@every_dtype
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_against_the_oracle(
    isa: str, check_rows: Callable[..., Tensor], dtype: torch.dtype, data: st.DataObject
) -> None:
    widths = [1, 2, 15, 16, 17, 63, 1000, 1024, 1025, 2048, 2049, 5003]
    n, v = data.draw(st.integers(1, 5)), data.draw(st.sampled_from(widths))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    spread, offset = data.draw(st.sampled_from([0.1, 3.0, 30.0])), data.draw(st.sampled_from([0.0, 300.0, -5000.0]))
    cap = data.draw(st.sampled_from([None, None, 4.0, 30.0]))
    offset = 0.0 if cap else offset
    stride = v + data.draw(st.sampled_from([0, 3]))
    logits = (torch.randn(n, stride, generator=g) * spread + offset).to(dtype)[:, :v]
    targets = torch.randint(0, v, (n,), generator=g)
    inv_t: float | Tensor = torch.rand(n, generator=g) + 0.5 if data.draw(st.booleans()) else 1.0
    a, b = torch.randn(n, generator=g), torch.randn(n, generator=g) * data.draw(st.sampled_from([0, 1]))

    check_rows(cpu, logits, targets, inv_t, cap, (a, b if b.any() else None), shifted=True)


@every_dtype
def test_a_large_offset_costs_no_digits_in_the_gradient(isa: str, dtype: torch.dtype) -> None:
    """fp32 lse of a row near 5000 is off by 2e-4: p = exp(z - lse) must not inherit that."""
    logits = (torch.randn(3, 3000, generator=torch.Generator().manual_seed(0)) * 4 + 5000).to(dtype)
    targets, a, b = torch.tensor([0, 5, 2999]), torch.ones(3), torch.ones(3)
    logp, entropy, lse = cpu.rows_forward(logits, targets)
    gradient = logits.clone()
    cpu.rows_backward_(gradient, targets, lse, entropy, a, b)
    u = logits.double().requires_grad_()
    exact = reference.logprob(u, targets)
    (truth,) = torch.autograd.grad((exact[0] + exact[1]).sum(), u)
    error = float((gradient.double() - truth).norm() / truth.norm())
    assert error < (3e-3 if dtype == torch.bfloat16 else 2e-6)


@every_dtype
def test_ignored_and_idle_rows_are_never_read(isa: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1] = torch.nan  # ignored
    targets = torch.tensor([3, IGNORE, 1999, 0])
    logp, entropy, lse = cpu.rows_forward(logits, targets)
    assert entropy is not None and (logp[1], entropy[1], lse[1]) == (0, 0, 0) and logp.isfinite().all()
    logits[2] = torch.nan  # its coefficients are 0
    a = torch.tensor([1.0, 1.0, 0.0, -2.0])
    cpu.rows_backward_(logits, targets, lse, None, a)
    assert not logits[1:3].any() and logits[0].any() and logits.isfinite().all()


@every_dtype
def test_minus_infinity_is_probability_zero_and_the_rest_is_nan(isa: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4000, generator=g).to(dtype)
    logits[0, :3000] = -torch.inf
    logits[1, 2500:] = -torch.inf
    logits[2, 17], logits[3, 1234], logits[4] = torch.nan, torch.inf, -torch.inf
    targets = torch.tensor([3500, 0, 1, 2, 3])
    logp, entropy, lse = cpu.rows_forward(logits, targets)
    assert entropy is not None and logp[:2].isfinite().all() and entropy[:2].isfinite().all()
    assert logp[2:].isnan().all() and entropy[2:].isnan().all()
    for b in (None, torch.ones(5)):
        gradient = logits.clone()
        cpu.rows_backward_(gradient, targets, lse, entropy, torch.ones(5), b)
        assert gradient[:2].isfinite().all() and gradient[2:].isnan().any(1).all()
        assert not gradient[0, :3000].any() and not gradient[1, 2500:].any()


@every_dtype
def test_threads_do_not_change_a_bit(batch_of: Callable[..., Tokens], dtype: torch.dtype) -> None:
    tokens, spec = batch_of(67, 3001), LossSpec(beta=0.1, entropy_coef=0.01)
    batch = prepare(tokens, spec, torch.float32)
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(67, 3001, generator=g).to(dtype), torch.randint(0, 3001, (67,), generator=g)
    a, before = torch.randn(67, generator=g), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            logp, entropy, lse = cpu.rows_forward(logits, targets)
            gradient = logits.clone()
            cpu.rows_backward_(gradient, targets, lse, entropy, a, a)
            swept = logits.clone()
            results.append((logp, entropy, lse, gradient, swept, *cpu.rows_policy_loss_(swept, targets, batch, spec)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_one_sweep_equals_two(batch_of: Callable[..., Tokens], loss: tuple[LossSpec, bool]) -> None:
    """The recorded program gives the coefficients that `losses.coefficients` gives, whatever the loss."""
    n, v, cap, (spec, on_policy) = 40, 1500, 20.0, loss
    g, tokens = torch.Generator().manual_seed(0), batch_of(n, v, on_policy)
    targets = tokens.targets
    batch = prepare(tokens, spec, torch.float32)
    logits = torch.randn(n, v, generator=g) * 2
    inv_t = torch.rand(n, generator=g) + 0.5
    swept = logits.clone()
    logp, entropy, lse = cpu.rows_policy_loss_(swept, targets, batch, spec, inv_t, cap)
    expected = cpu.rows_forward(logits, targets, inv_t, cap)
    for mine, other in zip((logp, entropy, lse), expected, strict=True):
        assert torch.equal(mine, other)  # type: ignore[arg-type]
    known = coefficients(logp, entropy, lse, batch, spec)
    assert known.a.any()
    cpu.rows_backward_(
        logits, targets, lse, entropy, known.a, known.b, inv_t, cap, 0.0 if known.z is None else known.z
    )  # fmt: skip
    torch.testing.assert_close(swept, logits, rtol=3e-6, atol=1e-9)


def test_what_cannot_be_recorded_says_so(batch_of: Callable[..., Tokens]) -> None:
    tokens, spec = batch_of(8, 50), LossSpec(policy="gmpo")
    assert not row_wise(tokens, spec)
    with pytest.raises(NotImplementedError):
        record(prepare(tokens, spec, torch.float32), spec)


def test_the_threads_are_torchs_own() -> None:
    """One OpenMP runtime in the process: a second pool would fight torch.mm for the processors."""
    assert cpu.native.thread_runtime() == "openmp"
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len(runtimes) == 1
