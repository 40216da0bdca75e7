"""The decoder's kernels and products of every instruction set, against plain formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from omni_kernels import backends, decoder, products

if backends.reason_unavailable("cpu") is not None:
    pytest.skip(str(backends.reason_unavailable("cpu")), allow_module_level=True)

from omni_kernels.backends import cpu

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


bf16_products, fp32_products = (
    products.multiplies(torch.empty(1, 1, dtype=kind)) for kind in (torch.bfloat16, torch.float32)
)
needs_bf16 = pytest.mark.skipif(not bf16_products, reason="products of bf16 need AVX512-BF16, and no AMX")
needs_fp32 = pytest.mark.skipif(not fp32_products, reason="products of fp32 need AVX-512, and no processor of Intel's")
every_product = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=needs_fp32), pytest.param(torch.bfloat16, marks=needs_bf16)], ids=str
)


def near(found: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Within a rounding of the result, or two; `factor` where more than one is made on the way."""
    bound = factor * (2e-6 if dtype == torch.float32 else 8e-3)
    error = (found.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert error < bound, f"relative error {error:.3g}"


def leaf(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@every_dtype
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 40), (70, 576), (33, 17)])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(isa: str, dtype: torch.dtype, rows: int, width: int, residual: bool) -> None:
    x, weight, grad = (
        leaf(*shape, dtype=dtype, seed=k) for k, shape in enumerate([(rows, width), (width,), (rows, width)])
    )
    other = leaf(rows, width, dtype=dtype, seed=9) if residual else None
    grad_sum = leaf(rows, width, dtype=dtype, seed=4) if residual else None
    s, y, inverse = decoder.rms_norm(x, weight, 1e-5, other)
    assert torch.equal(s, x if other is None else x + other)
    exact, w = s.double().requires_grad_(), weight.double().requires_grad_()
    out = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * w
    near(y, out.detach(), dtype)
    dx, dw = decoder.rms_norm_backward(grad, s, weight, inverse, grad_sum)
    truth = torch.autograd.grad(out, (exact, w), grad.double())
    near(dx, truth[0] if grad_sum is None else truth[0] + grad_sum.double(), dtype, 4.0)
    assert dw is not None and dw.dtype == torch.float32
    near(dw, truth[1], torch.float32, 4.0)
    assert decoder.rms_norm_backward(grad, s, weight, inverse, want_weight=False)[1] is None


@every_dtype
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 33), (20, 1536)])
def test_gate(isa: str, dtype: torch.dtype, rows: int, width: int) -> None:
    both, grad = 3 * leaf(rows, 2 * width, dtype=dtype), leaf(rows, width, dtype=dtype)
    exact = both.double().requires_grad_()
    out = F.silu(exact[:, :width]) * exact[:, width:]
    near(decoder.gate(both), out.detach(), dtype)
    dboth, again = decoder.gate_backward(grad, both)
    assert torch.equal(again, decoder.gate(both))
    near(dboth, torch.autograd.grad(out, exact, grad.double())[0], dtype)


def test_the_gate_of_large_numbers(isa: str) -> None:
    both = torch.tensor([[1e30, -1e30, 200.0, -200.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0]])
    found = decoder.gate(both)[0]
    torch.testing.assert_close(found[:4], torch.tensor([1e30, 0.0, 200.0, 0.0]), rtol=1e-6, atol=1e-4)
    assert found[4].isnan()


@every_dtype
def test_rotate(isa: str, dtype: torch.dtype) -> None:
    x, grad = leaf(7, 3, 64, dtype=dtype), leaf(7, 3, 64, dtype=dtype, seed=1)
    cos, sin = leaf(7, 64, dtype=dtype, seed=2), leaf(7, 64, dtype=dtype, seed=3)
    exact = x.double().requires_grad_()
    turned = torch.cat((-exact[..., 32:], exact[..., :32]), dim=-1)
    out = exact * cos.double()[:, None] + turned * sin.double()[:, None]
    near(decoder.rotate(x, cos, sin), out.detach(), dtype)
    near(decoder.rotate(grad, cos, sin, backward=True), torch.autograd.grad(out, exact, grad.double())[0], dtype)
    inside = leaf(7, 6 * 64, dtype=dtype)
    inside[:, 64:256] = x.flatten(1)
    part = inside[:, 64:256].unflatten(1, (3, 64))
    assert torch.equal(decoder.rotate(part, cos, sin, part), decoder.rotate(x, cos, sin))


def forest(sizes: list[int], seed: int) -> tuple[list[tuple[int, int, list[tuple[Tensor, Tensor, Tensor]]]], Tensor]:
    """Random trees, each in blocks of up to 11 rows, and who sees whom among all rows."""
    generator = torch.Generator().manual_seed(seed)
    sees = torch.zeros(sum(sizes), sum(sizes), dtype=torch.bool)
    trees, start = [], 0
    for size in sizes:
        for row in range(start, start + size):
            if row > start:
                parent = int(torch.randint(max(start, row - 6), row, (1,), generator=generator))
                sees[row] = sees[parent]
            sees[row, row] = True
        blocks = []
        for first in range(start, start + size, 11):
            rows = torch.arange(first, min(first + 11, start + size))
            columns = sees[rows].any(0).nonzero().squeeze(1)
            blocks.append((rows, columns, sees[rows][:, columns]))
        trees.append((start, start + size, blocks))
        start += size
    return trees, sees


@every_dtype
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 64), (2, 2, 32)])
@settings(deadline=None, max_examples=8)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_attention(dtype: torch.dtype, heads: int, kv_heads: int, size: int, sizes: list[int], seed: int) -> None:
    trees, sees = forest(sizes, seed)
    blocks = decoder.tree_blocks(trees)
    assert blocks is not None
    rows, widths = sum(sizes), (heads * size, kv_heads * size, kv_heads * size)
    together, grad = leaf(rows, sum(widths), dtype=dtype, seed=seed), leaf(rows, heads, size, dtype=dtype, seed=seed)

    def by_head(states: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(1, (-1, size)) for part in states.split(widths, dim=1))

    parts = by_head(together)
    out, lse = decoder.attend(*parts, blocks, 0.2)  # type: ignore[call-arg, arg-type]
    exact = together.double().requires_grad_()
    q, k, v = (part.transpose(0, 1) for part in by_head(exact))
    k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
    scores = (0.2 * q @ k.transpose(1, 2)).masked_fill(~sees, -torch.inf)
    truth = (scores.softmax(-1) @ v).transpose(0, 1)
    near(out, truth.detach(), dtype)
    near(lse * math.log(2), scores.detach().logsumexp(-1).t(), torch.float32, 10.0)
    found = torch.empty_like(together)
    decoder.attend_backward(grad, *parts, lse, blocks, 0.2, by_head(found))  # type: ignore[call-arg, arg-type]
    near(found, torch.autograd.grad(truth, exact, grad.double())[0], dtype, 2.0)


def test_attention_of_every_instruction_set(isa: str) -> None:
    trees, _ = forest([40, 9], 1)
    blocks = decoder.tree_blocks(trees)
    assert blocks is not None
    parts = [leaf(49, heads, 32, dtype=torch.bfloat16, seed=heads) for heads in (4, 2, 2)]
    wide = [part.float() for part in parts]
    (out, lse), (exact, _) = decoder.attend(*parts, blocks, 0.3), decoder.attend(*wide, blocks, 0.3)
    near(out, exact.double(), torch.bfloat16)
    grad = leaf(49, 4, 32, dtype=torch.bfloat16)
    found, truth = [[torch.empty_like(part) for part in kind] for kind in (parts, wide)]
    decoder.attend_backward(grad, *parts, lse, blocks, 0.3, found)  # type: ignore[arg-type]
    decoder.attend_backward(grad.float(), *wide, lse, blocks, 0.3, truth)  # type: ignore[arg-type]
    for mine, theirs in zip(found, truth, strict=True):
        near(mine, theirs.double(), torch.bfloat16, 2.0)


def test_blocks_outside_their_tree_are_refused() -> None:
    trees, _ = forest([20], 0)
    first, last, blocks = trees[0]
    with pytest.raises(ValueError, match="outside its tree"):
        decoder.tree_blocks([(first, last - 1, blocks)])


@pytest.mark.skipif(cpu.reason_unavailable() is not None, reason="needs the C++ module")
def test_places_that_overflow_are_refused() -> None:
    tree, rows = torch.tensor([0, 1, 0, 1]), torch.zeros(1, dtype=torch.int32)
    bias, most = torch.zeros(64, dtype=torch.uint16), 2**63 - 1
    for where in map(torch.tensor, ([most, 1, 0, 1, 0], [0, 1, most, 1, 0], [0, 1, 0, 1, most])):
        lists = [(t.data_ptr(), t.numel()) for t in (tree, where, rows, rows, bias)]
        with pytest.raises(ValueError, match="reaches beyond its rows, columns or bias"):
            cpu.native.TreeBlocks(lists)
    wave = cpu.native.Wave([[2**31 - 1]], 1, 32)
    with pytest.raises(ValueError, match="tokens = 1 must be at least 2147483648"):
        wave.store(0, 1, 64, 64, 32, 64, 64, cpu.how())


@every_product
@pytest.mark.parametrize(("rows", "inner", "width"), [(1, 2, 1), (7, 64, 50), (21, 576, 192), (50, 96, 97), (9, 33, 7)])
def test_products(isa: str, dtype: torch.dtype, rows: int, inner: int, width: int) -> None:
    if inner % products.unit(dtype):
        inner += 1
    x, weight = leaf(rows, inner, dtype=dtype), leaf(width, inner, dtype=dtype, seed=1)
    exact = x.double() @ weight.double().t()
    near(products.linear(x, products.pack(weight, transposed=True)), exact, dtype)
    near(products.linear(x, products.pack(weight.t().contiguous())), exact, dtype)
    grad = leaf(rows, width, dtype=dtype, seed=2)
    exact = grad.double().t() @ x.double()
    packed = products.pack(x)
    sums = products.weight_gradient(grad, packed, torch.full((width, inner), torch.nan), add=False)
    near(sums, exact, torch.float32)
    near(products.weight_gradient(grad, packed, sums, add=True), 2 * exact, torch.float32)
    near(products.weight_gradient(grad, packed, sums, add=True, scale=-0.5), 1.5 * exact, torch.float32)
    near(products.weight_gradient(grad, packed, torch.empty(width, inner, dtype=dtype), add=False), exact, dtype)


@every_product
@pytest.mark.parametrize(("rows", "inner", "width"), [(1, 2, 1), (140, 64, 50), (21, 576, 192), (50, 2054, 97)])
def test_products_pack_a_matrix_on_the_way(isa: str, dtype: torch.dtype, rows: int, inner: int, width: int) -> None:
    x, weight = leaf(rows, inner, dtype=dtype), leaf(width, inner, dtype=dtype, seed=1)
    exact = x.double() @ weight.double().t()
    out = torch.empty(rows, width + 3, dtype=dtype)[:, :width]
    near(products.linear(x, weight, out, transposed=True), exact, dtype)
    assert torch.equal(out, products.linear(x, products.pack(weight, transposed=True)))
    near(products.linear(x, weight.t().contiguous(), out), exact, dtype)
    some = products.linear(x[rows // 2 :], weight.t().contiguous())
    assert torch.equal(some, out[rows // 2 :])  # a row's bits do not depend on the others
    for matrix, transposed in ((weight, True), (weight.t().contiguous(), False)):
        wide = torch.full((rows, width + 3), torch.nan)[:, :width]
        near(products.linear(x, matrix, wide, transposed=transposed), exact, torch.float32)
        near(products.linear(x, matrix, wide, transposed=transposed, add=True), 2 * exact, torch.float32)


@every_product
def test_threads_change_no_bit_of_a_product(dtype: torch.dtype) -> None:
    x, weight = leaf(50, 2054, dtype=dtype), leaf(2054, 200, dtype=dtype)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        packed = products.pack(x)
        out = products.linear(x, weight)
        wide = products.weight_gradient(out, packed, torch.empty(200, 2054), add=False)
        found.append((out, wide, products.linear(x, weight.t().contiguous(), transposed=True)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_bf16
def test_halves_are_the_sum_in_fp32(isa: str) -> None:
    parts = [(leaf(rows, 40, dtype=torch.bfloat16), leaf(rows, 99, dtype=torch.bfloat16)) for rows in (33, 8, 50)]
    wide, high = torch.empty(40, 99), torch.empty(40, 99, dtype=torch.bfloat16)
    low = torch.empty(40, 99, dtype=torch.uint16)
    for k, (grad, x) in enumerate(parts):
        packed = products.pack(x)
        products.weight_gradient(grad, packed, wide, add=k > 0)
        products.weight_gradient(grad, packed, high, add=k > 0, low=low, last=k == 2)
        if k < 2:
            bits = high.view(torch.int16).int() << 16 | low.view(torch.int16).int() & 0xFFFF
            assert torch.equal(bits, wide.view(torch.int32))
    assert torch.equal(high, wide.bfloat16())


@every_product
@pytest.mark.parametrize("widths", [(96, 48, 20), (32, 64, 6)])
def test_products_of_several_weights_are_one(dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    x = leaf(19, 64, dtype=dtype)
    weights = [leaf(width, 64, dtype=dtype) for width in widths]
    together = torch.cat(weights)
    out = products.linear(x, products.pack(*weights, transposed=True))
    assert torch.equal(out, products.linear(x, products.pack(together, transposed=True)))
    near(products.linear(out, products.pack(*weights)), out.double() @ together.double(), dtype)
    inside = torch.cat((out, out), dim=1)[:, 5 : 5 + sum(widths)]  # rows apart
    near(products.linear(inside, products.pack(*weights)), inside.double() @ together.double(), dtype)


@needs_bf16
@needs_fp32
def test_products_that_do_not_fit_are_refused() -> None:
    weight = leaf(6, 7, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="even"):
        products.pack(weight, transposed=True)
    with pytest.raises(TypeError, match="float64"):
        products.pack(weight.double())
    with pytest.raises(ValueError, match="below the other"):
        products.pack(weight, weight.float())
    with pytest.raises(ValueError, match="one dtype"):
        products.linear(leaf(3, 6, dtype=torch.bfloat16), weight.float())
    packed = products.pack(weight)
    with pytest.raises(ValueError, match="columns"):
        products.linear(leaf(3, 8, dtype=torch.bfloat16), packed)
    with pytest.raises(ValueError, match="fit"):
        products.weight_gradient(leaf(9, 8, dtype=torch.bfloat16), packed, torch.empty(8, 7), add=False)
    with pytest.raises(TypeError, match="added in float32"):
        products.weight_gradient(weight, packed, torch.empty(7, 7, dtype=torch.bfloat16), add=True)
    with pytest.raises(ValueError, match="scaled"):
        products.weight_gradient(weight, packed, torch.empty(7, 7), add=False, scale=2.0)
    with pytest.raises(ValueError, match="even"):
        products.linear(leaf(3, 7, dtype=torch.bfloat16), weight, transposed=True)
    with pytest.raises(ValueError, match="unit stride"):
        products.linear(leaf(3, 6, dtype=torch.bfloat16), leaf(1, 7, dtype=torch.bfloat16).expand(6, 7))
    with pytest.raises(ValueError, match="out is"):
        products.linear(leaf(3, 6, dtype=torch.bfloat16), weight, torch.empty(3, 6, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"pass torch.float32 \(3, 7\)"):
        products.linear(leaf(3, 6, dtype=torch.bfloat16), weight, torch.empty(3, 7, dtype=torch.bfloat16), add=True)


@every_dtype
def test_without_the_module_the_formulas_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, both = leaf(5, 64, dtype=dtype), leaf(64, dtype=dtype), leaf(5, 80, dtype=dtype)
    heads, cos = leaf(5, 2, 32, dtype=dtype), leaf(5, 32, dtype=dtype)
    grad = leaf(5, 40, dtype=dtype, seed=5)

    def everything() -> list[Tensor]:
        s, y, inverse = decoder.rms_norm(x, weight, 1e-5, x)
        dx, dw = decoder.rms_norm_backward(x, s, weight, inverse, y)
        assert dw is not None
        turned = [decoder.rotate(heads, cos, cos, backward=back) for back in (False, True)]
        return [s, y, inverse, dx, dw, decoder.gate(both), *decoder.gate_backward(grad, both), *turned]

    compiled = everything()
    monkeypatch.setattr(cpu, "best", lambda: "")
    assert not decoder.native(x) and decoder.tree_blocks([]) is None
    for mine, theirs in zip(compiled, everything(), strict=True):
        near(mine, theirs.double(), dtype, 2.0)
