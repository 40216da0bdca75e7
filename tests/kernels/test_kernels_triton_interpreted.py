"""The Triton kernels, run by Triton's interpreter on the CPU, against the float64 oracle and against torch itself.

The interpreter is chosen when Triton is first imported, so `test_kernels_triton.py` runs this file in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_kernels_triton_interpreted.py
"""

from __future__ import annotations

import importlib.util
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels import IGNORE, LossSpec, Tokens, backends, linear_policy_loss, reference
from omni_kernels.backends import torch as plain
from omni_kernels.losses import coefficients, prepare
from omni_kernels.spec import PRESETS

if os.environ.get("TRITON_INTERPRET") != "1" or backends.reason_unavailable("triton") is not None:
    pytest.skip("run by test_kernels_triton.py, with TRITON_INTERPRET=1", allow_module_level=True)

from omni_kernels.backends import triton as backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's word on the NaN that a test asks for
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SPLIT, WHOLE = 1 << 20, 1  # processors: more of them than rows, or fewer


@pytest.fixture(autouse=True)
def round_to_bf16_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter cuts the low bits off; `cvt.rn.bf16.f32` rounds to nearest."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    cast = InterpreterBuilder.cast_impl

    def rounded(self: InterpreterBuilder, value: TensorHandle, kind: tl.dtype) -> TensorHandle:
        if (value.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, value, kind)
        data = torch.from_numpy(numpy.ascontiguousarray(value.data)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(data.reshape(value.data.shape), kind.scalar)

    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, rounded)


@pytest.fixture(autouse=True, scope="module")
def patch_the_language_once() -> Iterator[None]:
    """The interpreter patches `triton.language` at every call of a device function, which takes it 10 ms."""
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def once(function: types.FunctionType) -> interpreter._LangPatchScope:
        names = tuple(sorted(v.__name__ for v in function.__globals__.values() if v is tl or v is tl.core))
        if names not in done:
            done.add(names)
            scopes.append(patch(function))
        return interpreter._LangPatchScope()

    tl, scopes = interpreter.tl, []
    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = patch
    for scope in reversed(scopes):
        scope.restore()


@pytest.fixture(autouse=True)
def small_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments and blocks of a few hundred columns, so that short rows have many."""
    for table in (backend.SEGMENT, backend.ROW, backend.GRADIENT):
        for dtype in table:
            monkeypatch.setitem(table, dtype, backend.Launch(2048, 1024, 2, 1))


def borrowed(*names: str) -> Iterator[tuple[str, object]]:
    """The tests of other files that take a backend by name, for this one."""
    slow = {
        "test_a_sequence_of_seventy_thousand_tokens", "test_more_than_two_billion_logits",
        "test_weight_gradient_does_not_decay_over_chunks", "test_batch_invariant_rows_do_not_see_each_other",
    }  # fmt: skip
    for name in names:
        spec = importlib.util.spec_from_file_location(f"borrowed_{name}", Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for title, test in vars(module).items():
            marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
            if not title.startswith("test_") or title in slow or "backend" not in [m.args[0] for m in marks]:
                continue
            copy = types.FunctionType(test.__code__, test.__globals__, title, test.__defaults__, test.__closure__)
            copy.__annotations__ = test.__annotations__
            rest = [m for m in marks if m.args[0] != "backend"]
            copy.pytestmark = [pytest.mark.parametrize("backend", ["triton"]).mark, *rest]  # type: ignore[attr-defined]
            yield f"{title}_{name}", copy


globals().update(borrowed("test_kernels_known_bugs", "test_kernels_head"))


def exact_gradient(
    logits: Tensor, targets: Tensor, a: Tensor, b: Tensor, z: float, inv_t: float | Tensor, cap: float | None
) -> Tensor:
    u = logits.double().requires_grad_()
    logp, entropy, lse = reference.logprob(u, targets, inv_t, cap)
    (gradient,) = torch.autograd.grad((a * logp + b * entropy + z * lse**2).sum(), u)
    return gradient


@every_dtype
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_against_the_oracle(check_rows: Callable[..., Tensor], dtype: torch.dtype, data: st.DataObject) -> None:
    n, v = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 15, 257, 512, 1000, 1024, 1025, 2049, 5003]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    spread, offset = data.draw(st.sampled_from([0.1, 3.0, 30.0])), data.draw(st.sampled_from([0.0, 300.0, -5000.0]))
    cap = data.draw(st.sampled_from([None, None, 4.0, 30.0]))
    offset = 0.0 if cap else offset
    logits = (torch.randn(n, v + data.draw(st.sampled_from([0, 3])), generator=g) * spread + offset).to(dtype)[:, :v]
    targets = torch.randint(0, v, (n,), generator=g)
    inv_t: float | Tensor = torch.rand(n, generator=g) + 0.5 if data.draw(st.booleans()) else 1.0
    a, b = torch.randn(n, generator=g), torch.randn(n, generator=g) * data.draw(st.sampled_from([0, 1]))

    check_rows(backend, logits, targets, inv_t, cap, (a, b if b.any() else None))


def test_one_sweep_equals_two(
    batch_of: Callable[..., Tokens], loss: tuple[LossSpec, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded loss gives the coefficients that `losses.coefficients` gives; splitting a row changes no bit."""
    n, v, cap, (spec, on_policy) = 12, 1500, 20.0, loss
    g, tokens = torch.Generator().manual_seed(0), batch_of(n, v, on_policy)
    batch = prepare(tokens, spec, torch.float32)
    targets = torch.where(tokens.trained(), tokens.targets, IGNORE)
    logits, inv_t = torch.randn(n, v, generator=g) * 2, torch.rand(n, generator=g) + 0.5
    results = []
    for processors in (WHOLE, SPLIT):
        monkeypatch.setattr(backend, "_processors", lambda device, count=processors: count)
        swept = logits.clone()
        results.append((swept, *backend.rows_policy_loss_(swept, targets, batch, spec, inv_t, cap)))
    swept, logp, entropy, lse = results[0]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]
    assert entropy is not None and lse is not None and logp is not None
    known = coefficients(logp, entropy, lse, batch, spec)
    assert known.a.any()
    z = 0.0 if known.z is None else known.z
    twice = logits.clone()
    plain.rows_backward_(twice, targets, lse, entropy, known.a, known.b, inv_t, cap, z)
    torch.testing.assert_close(swept, twice, rtol=3e-6, atol=1e-8)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_policy_loss_of_a_head(batch_of: Callable[..., Tokens], preset: str, dtype: torch.dtype) -> None:
    g, tokens = torch.Generator().manual_seed(1), batch_of(24, 700)
    hidden, weight = (torch.randn(k, 16, generator=g).to(dtype).requires_grad_() for k in (24, 700))
    spec = LossSpec.preset(preset, beta=0.1, entropy_coef=0.01)
    found = []
    for name in ("triton", "torch"):
        out = linear_policy_loss(hidden, weight, tokens, spec, backend=name, workspace_bytes=10 * 700 * 4)
        found.append((out.loss.detach(), out.metrics, *torch.autograd.grad(out.loss, (hidden, weight))))
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=near, atol=near * float(other.abs().max()))


@every_dtype
@pytest.mark.parametrize("processors", [WHOLE, SPLIT])
def test_a_large_offset_costs_no_digits_in_one_sweep(
    dtype: torch.dtype, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 lse of a row near 5000 is off by 2e-4: p must not inherit that."""
    monkeypatch.setattr(backend, "_processors", lambda device: processors)
    logits = (torch.randn(3, 3000, generator=torch.Generator().manual_seed(0)) * 4 + 5000).to(dtype)
    tokens = Tokens(torch.tensor([0, 5, 2999]), torch.ones(3), denominator=1.0)
    spec = LossSpec(entropy_coef=1.0)
    swept = logits.clone()
    backend.rows_policy_loss_(swept, tokens.targets, prepare(tokens, spec, torch.float32), spec)
    truth = exact_gradient(logits, tokens.targets, -torch.ones(3), -torch.ones(3), 0.0, 1.0, None)
    error = float((swept.double() - truth).norm() / truth.norm())
    assert error < (5e-3 if dtype == torch.bfloat16 else 2e-6)


@every_dtype
@pytest.mark.parametrize("processors", [WHOLE, SPLIT])
def test_ignored_and_idle_rows_are_never_read(
    dtype: torch.dtype, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_processors", lambda device: processors)
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1] = torch.nan  # ignored
    targets = torch.tensor([3, IGNORE, 1999, 0])
    logp, entropy, lse = backend.rows_forward(logits, targets)
    assert entropy is not None and (logp[1], entropy[1], lse[1]) == (0, 0, 0) and logp.isfinite().all()

    swept, tokens = logits.clone(), Tokens(targets, torch.tensor([1.0, 1.0, 0.0, -2.0]))
    backend.rows_policy_loss_(swept, targets, prepare(tokens, LossSpec(), torch.float32), LossSpec())
    assert not swept[1:3].any() and swept[0].any() and swept[3].any() and swept.isfinite().all()

    logits[2] = torch.nan  # its coefficients are 0
    backend.rows_backward_(logits, targets, lse, None, torch.tensor([1.0, 1.0, 0.0, -2.0]))
    assert not logits[1:3].any() and logits[0].any() and logits.isfinite().all()


@every_dtype
def test_minus_infinity_is_probability_zero_and_the_rest_is_nan(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, :3000] = -torch.inf
    logits[1, 2500:] = -torch.inf
    logits[2, 17], logits[3, 1234], logits[4] = torch.nan, torch.inf, -torch.inf
    targets = torch.tensor([3500, 0, 1, 2, 3])
    logp, entropy, lse = backend.rows_forward(logits, targets)
    assert entropy is not None and logp[:2].isfinite().all() and entropy[:2].isfinite().all()
    assert logp[2:].isnan().all() and entropy[2:].isnan().all()
    tokens, spec = Tokens(targets, torch.ones(5), denominator=1.0), LossSpec(entropy_coef=0.5)
    for b in (None, torch.ones(5), spec):
        gradient = logits.clone()
        if isinstance(b, LossSpec):
            backend.rows_policy_loss_(gradient, targets, prepare(tokens, spec, torch.float32), spec)
        else:
            backend.rows_backward_(gradient, targets, lse, entropy, torch.ones(5), b)
        assert gradient[:2].isfinite().all() and gradient[2:].isnan().any(1).all()
        assert not gradient[0, :3000].any() and not gradient[1, 2500:].any()


def test_a_target_outside_the_vocabulary_reads_and_writes_nothing_outside() -> None:
    whole = torch.zeros(6, 300)
    logits, targets = whole[2:4], torch.tensor([300, -1])
    logp, _, lse = backend.rows_forward(logits, targets)
    assert logp.isnan().all() and lse.isfinite().all()
    backend.rows_backward_(logits, targets, lse, None, torch.ones(2))
    tokens = Tokens(targets, torch.ones(2))
    backend.rows_policy_loss_(logits, targets, prepare(tokens, LossSpec(), torch.float32), LossSpec())
    assert not whole[:2].any() and not whole[4:].any()


def test_rows_more_than_two_billion_elements_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row offsets are 64 bit. What lies between the rows is never touched."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)  # it would copy 4 GB onto themselves
    v, stride = 64, (1 << 30) + 16
    memory = torch.empty(2 * stride + v, dtype=torch.bfloat16)
    logits = memory.as_strided((3, v), (stride, 1))
    targets = torch.tensor([v - 1, IGNORE, v - 1])
    for row in (0, 2):
        logits[row] = torch.linspace(-3, 3, v)
    logp, entropy, lse = backend.rows_forward(logits, targets)
    assert logp[0] == logp[2] < 0 and entropy is not None and entropy[0] == entropy[2] > 0 and logp[1] == 0
    tokens = Tokens(targets, torch.ones(3))
    backend.rows_policy_loss_(logits, targets, prepare(tokens, LossSpec(), torch.float32), LossSpec())
    assert torch.equal(logits[0], logits[2]) and logits[0].any() and not logits[1].any()
    backend.rows_backward_(logits, targets, lse, None, torch.tensor([0.0, 0.0, 0.0]))
    assert not logits[0].any() and not logits[2].any()


def test_scalars_on_the_device_are_not_looked_at() -> None:
    logits, targets = torch.randn(3, 40), torch.tensor([1, 2, 3])
    half = torch.tensor(0.5)
    for one, other in zip(
        backend.rows_forward(logits, targets, half), backend.rows_forward(logits, targets, 0.5), strict=True
    ):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_bad_arguments_are_named() -> None:
    logits, targets = torch.randn(4, 10), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match="logits are torch.float16; the triton backend takes"):
        backend.rows_forward(logits.half(), targets)
    with pytest.raises(ValueError, match="at least one column"):
        backend.rows_forward(logits[:, :0], targets)
    with pytest.raises(ValueError, match="unit column stride"):
        backend.rows_forward(logits.T, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets has shape"):
        backend.rows_forward(logits, targets[:3])
    with pytest.raises(ValueError, match="entropy is None but b is given"):
        backend.rows_backward_(logits, targets, targets.float(), None, targets.float(), targets.float())
    assert backend.rows_forward(logits[:0], targets[:0])[0].shape == (0,)
    backend.rows_backward_(logits[:0], targets[:0], *[torch.zeros(0)] * 3)
