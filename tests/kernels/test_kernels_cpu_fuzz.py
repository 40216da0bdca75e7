"""Whatever is passed to the CPU backend or to its native entry points: a one-line error or a result, never a crash."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels import backends

if backends.reason_unavailable("cpu") is not None:
    pytest.skip(str(backends.reason_unavailable("cpu")), allow_module_level=True)

from omni_kernels.backends import cpu

native = cpu.native
ERRORS = (ValueError, TypeError)
ODD_FLOATS = st.sampled_from([0.0, -1.0, 1e-38, 1e38, float("inf"), -float("inf"), float("nan"), 0.5, 1.0])


@st.composite
def tensors(draw: st.DrawFn, rank: int, size: int) -> Tensor:
    """Mostly of the right rank and length; sometimes not, and in any dtype and layout."""
    dtype = draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.float64, torch.bool, torch.float16])
    )
    shape = [
        draw(st.sampled_from([size, size, size, 0, 1, 7]))
        for _ in range(draw(st.sampled_from([rank] * 6 + [0, 1, 2, 3])))
    ]
    values = torch.randn(shape) if draw(st.booleans()) else torch.full(shape, draw(ODD_FLOATS))
    tensor = values.nan_to_num(0, 3, -3).to(dtype) if dtype == torch.int64 else values.to(dtype)
    layout = draw(st.sampled_from(["plain"] * 4 + ["transposed", "strided", "expanded", "meta"]))
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.t()
    if layout == "strided" and tensor.dim() >= 1:
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded" and tensor.dim() == 2 and len(tensor):
        return tensor[:1].expand(len(tensor), -1)
    return tensor.to("meta") if layout == "meta" else tensor


def attempt(call: object) -> None:
    try:
        call()  # type: ignore[operator]
    except ERRORS as error:
        assert str(error) and "\n" not in str(error).strip()


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_any_tensors(data: st.DataObject) -> None:
    n = data.draw(st.sampled_from([0, 1, 4, 7]))
    logits = data.draw(tensors(2, n))
    targets = data.draw(
        st.one_of(tensors(1, n), st.just(torch.randint(-3, 8, (n,))), st.just(torch.zeros(n, dtype=torch.int64)))
    )
    inv_t, cap = data.draw(st.one_of(ODD_FLOATS, tensors(1, n))), data.draw(st.one_of(st.none(), ODD_FLOATS))
    vector = st.one_of(tensors(1, n), st.just(torch.randn(n)))
    lse, a, b = data.draw(vector), data.draw(vector), data.draw(st.one_of(st.none(), vector))
    attempt(lambda: cpu.rows_forward(logits, targets, inv_t, cap, data.draw(st.booleans())))
    attempt(
        lambda: cpu.rows_backward_(
            logits, targets, lse, data.draw(st.one_of(st.none(), vector)), a, b, inv_t, cap, data.draw(ODD_FLOATS)
        )
    )


@settings(deadline=None, max_examples=300)
@given(
    rows=st.integers(-2, 5), vocab=st.integers(-1, 40), stride=st.one_of(st.integers(-5, 50), st.just(2**62)),
    dtype=st.integers(-1, 3), target=st.integers(-200, 60), inv_t=ODD_FLOATS, cap=ODD_FLOATS,
    threads=st.sampled_from([-1, 0, 1, 3, 2**30]), isa=st.sampled_from(["auto", "avx2", "mmx", ""]),
    nulls=st.sets(st.integers(0, 7)), odd=st.booleans(), ops=st.lists(st.tuples(*[st.integers(-2, 300)] * 5), max_size=6),
    results=st.tuples(*[st.integers(-2, 260)] * 3), columns=st.integers(-1, 4),
)  # fmt: skip
def test_any_numbers_at_the_native_entry_points(
    rows, vocab, stride, dtype, target, inv_t, cap, threads, isa, nulls, odd, ops, results, columns
) -> None:  # type: ignore[no-untyped-def]
    """Addresses are of real memory, null or misaligned; everything else is arbitrary."""
    memory = torch.randn(5 * 50 + 40)  # holds whatever passes the checks
    targets = torch.full((5,), target)
    out = [torch.zeros(5) for _ in range(6)]
    pointers = [0 if i in nulls else t.data_ptr() + odd * (i == 1) for i, t in enumerate([memory, targets, *out])]
    shape = (pointers[0], dtype, rows, vocab, stride, pointers[1], inv_t, 0, cap)
    attempt(lambda: native.rows_forward(*shape, *pointers[2:5], native.How(threads, isa)))
    attempt(lambda: native.rows_backward(*shape, *pointers[2:6], 0.0, 0, native.How(threads, isa)))

    def fused() -> None:
        program = native.CoefficientProgram([(*op, 0.5) for op in ops], columns, results)
        how = native.How(threads, isa)
        native.rows_fused(*shape, *pointers[2:5], program, [pointers[6]] * max(columns, 0), how)

    attempt(fused)


@settings(deadline=None, max_examples=300)
@given(
    shape=st.tuples(*[st.integers(-2, 60)] * 3), strides=st.tuples(*[st.one_of(st.integers(-5, 64), st.just(2**62))] * 3),
    inner=st.tuples(*[st.sampled_from(["along", "down", "packed", "across"])] * 2), out=st.integers(-2, 8),
    nulls=st.sets(st.integers(0, 3)), transposed=st.booleans(), units=st.integers(-1, 40), scale=ODD_FLOATS,
    dtype=st.integers(-1, 2),
)  # fmt: skip
def test_any_numbers_at_the_products(shape, strides, inner, out, nulls, transposed, units, scale, dtype) -> None:  # type: ignore[no-untyped-def]
    """Addresses are of real memory that holds whatever passes the checks, or null."""
    m, n, k = shape
    if max(strides) > 64:
        m, n, k = -1, n, k
    memory = [torch.zeros(64 * 96 * 2, dtype=torch.float32) for _ in range(4)]
    a, b, c, low = (0 if i in nulls else t.data_ptr() for i, t in enumerate(memory))
    sides = (a, strides[0], inner[0]), (b, strides[1], inner[1])
    attempt(lambda: native.multiply(dtype, *sides, m, n, k, c, strides[2], out, low, scale, native.How(2, "auto")))
    attempt(lambda: native.pack(dtype, a, min(strides[0], 64), n, k, units, transposed, b, native.How(2, "auto")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 9])}, r"targets\[1\] = 9 is outside 0..8; use -100 for a row to ignore"),
        (
            {"logits": torch.zeros(2, 9, dtype=torch.float16)},
            "logits are torch.float16; the cpu backend takes float32 or bfloat16",
        ),
        ({"logits": torch.zeros(9, 2).t()}, "unit column stride"),
        ({"logits": torch.zeros(2, 0)}, "at least one column"),
        ({"inv_temperature": 0.0}, "inv_temperature = 0.000000 must be finite and greater than 0"),
        ({"softcap": -1.0}, "softcap = -1.000000 must be finite and greater than 0"),
    ],
)
def test_errors_name_the_argument_and_the_remedy(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"logits": torch.zeros(2, 9), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ERRORS, match=message):
        cpu.rows_forward(**{**arguments, **change})  # type: ignore[arg-type]


def test_instruction_sets_and_threads_are_checked() -> None:
    with pytest.raises(ValueError, match="instruction set 'neon' is unknown or not run by this processor; use 'auto'"):
        native.How(1, "neon")
    with pytest.raises(ValueError, match="num_threads = 0 must be between 1 and 4096"):
        native.How(0, "auto")


def test_no_rows_and_one_column() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    logp, entropy, lse = cpu.rows_forward(torch.zeros(0, 5), empty)
    assert entropy is not None and logp.shape == entropy.shape == lse.shape == (0,)
    single = torch.tensor([[3.0], [-7.0]])
    logp, entropy, lse = cpu.rows_forward(single, torch.tensor([0, 0]))
    assert entropy is not None and logp.tolist() == entropy.tolist() == [0, 0] and lse.tolist() == [3, -7]


def test_without_the_module_the_torch_backend_says_why() -> None:
    code = (
        "import sys, torch; sys.modules['omni_kernels._native_cpu'] = None\n"
        "from omni_kernels import backends\n"
        "print(backends.select(torch.device('cpu'), torch.float32).__name__)\n"
        "print(backends.reason_unavailable('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, reason = done.stdout.strip().splitlines()
    assert name == "omni_kernels.backends.torch" and "reinstall with a C++17 compiler" in reason
