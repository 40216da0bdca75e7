"""The CUDA kernels without a GPU: their plan, their arithmetic run lane by lane on the host.

csrc/cuda/tests/emulate.cpp calls the functions that the kernels call, in the same order; what is left to a GPU (copies,
barriers, shuffles) is tested in test_kernels_gpu.py.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels import IGNORE, LossSpec, Tokens, backends, reference
from omni_kernels.backends import cuda, cuda_exp
from omni_kernels.backends import torch as plain
from omni_kernels.backends.program import record
from omni_kernels.head import Head
from omni_kernels.linear import policy_head
from omni_kernels.losses import Prepared, coefficients, prepare

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
PER_SM, RESERVED, PER_BLOCK = 228 * 1024, 1024, 227 * 1024  # bytes of shared memory, compute capability 9.0
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# --- the arithmetic, on the host ---------------------------------------------------------------------------------------


class Emulator:
    """The interface of a backend, plus `plan`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.op_name.restype = ctypes.c_char_p
        names = [library.op_name(code).decode() for code in range(64)]
        self.codes = {name: code for code, name in enumerate(names) if name}

    def plan(self, vocab: int, element_bytes: int, lead: int = 0) -> tuple[list[int], list[tuple[int, int]], int]:
        """(cluster, vectors a block, shared bytes); (first, count) of each warp; vectors of the row."""
        out, spans = (ctypes.c_int * 3)(), (ctypes.c_int * 128)()
        vectors = self.library.plan(ctypes.c_int64(vocab), element_bytes, lead, out, spans)
        return list(out), [(spans[2 * k], spans[2 * k + 1]) for k in range(8 * out[0])], vectors

    def rows_forward(
        self, logits: Tensor, targets: Tensor, inv_t: float | Tensor = 1.0, cap: float | None = None, _: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = [torch.empty(len(logits)) for _ in range(3)]
        scales = rows_of(inv_t, logits)
        self.library.forward(*address(logits, targets, scales, cap), *map(pointer, out))
        return out[0], out[1], out[2]

    def rows_backward_(
        self, logits: Tensor, targets: Tensor, lse: Tensor, entropy: Tensor, a: Tensor, b: Tensor | None = None,
        inv_t: float | Tensor = 1.0, cap: float | None = None, z: float = 0.0,
    ) -> None:  # fmt: skip
        scales, zs = rows_of(inv_t, logits), rows_of(z, logits)
        given = [None if v is None else pointer(v) for v in (entropy, lse, a, b, zs)]
        self.library.backward(*address(logits, targets, scales, cap), *given)

    def fused_(
        self, logits: Tensor, targets: Tensor, batch: Prepared, spec: LossSpec, inv_t: float | Tensor, cap: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        recorded = record(batch, spec)
        columns = [getattr(batch, name).float().contiguous() for name in recorded.columns]
        out, scales = [torch.empty(len(logits)) for _ in range(3)], rows_of(inv_t, logits)
        steps = [field for op, dst, x, y, z, _ in recorded.code for field in (self.codes[op], dst, x, y, z)]
        values = [value for *_, value in recorded.code]
        self.library.fused(
            *address(logits, targets, scales, cap), *map(pointer, out), (ctypes.c_int * len(steps))(*steps),
            (ctypes.c_float * len(values))(*values), len(values),
            (ctypes.c_void_p * len(columns))(*(c.data_ptr() for c in columns)), len(columns),
            (ctypes.c_int * 3)(*recorded.results),
        )  # fmt: skip
        return out[0], out[1], out[2]


def rows_of(value: float | Tensor, logits: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((len(logits),), value)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def address(logits: Tensor, targets: Tensor, scales: Tensor, cap: float | None) -> tuple[object, ...]:
    n, v = logits.shape
    sizes = [ctypes.c_int64(x) for x in (n, v, logits.stride(0))]
    kind = 0 if logits.dtype == torch.float32 else 1
    return pointer(logits), kind, *sizes, pointer(targets), pointer(scales), ctypes.c_float(cap or 0.0)


def placed(values: Tensor, late: int = 0, gap: int = 0) -> Tensor:
    """The same rows, `late` elements after a 16-byte boundary and `gap` elements apart, among NaN that must stay."""
    n, v = values.shape
    store = torch.full((16 + late + n * (v + gap) + 16,), torch.nan, dtype=values.dtype)
    view = store[16 + late :].as_strided((n, v), (v + gap, 1), store.storage_offset() + 16 + late)
    return view.copy_(values)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulator of the CUDA kernels")
    library = tmp_path_factory.mktemp("cuda") / "emulate.so"
    flags = "-std=c++17 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas -fPIC -shared".split()
    subprocess.run([compiler, *flags, str(CUDA / "tests" / "emulate.cpp"), "-o", str(library)], check=True, timeout=120)
    return Emulator(ctypes.CDLL(str(library)))


@settings(deadline=None, max_examples=200)
@given(vocab=st.integers(1, 900_000), element_bytes=st.sampled_from([2, 4]), data=st.data())
def test_the_plan_covers_a_row_once_and_fits(
    emulator: Emulator, vocab: int, element_bytes: int, data: st.DataObject
) -> None:
    lead = data.draw(st.integers(0, 16 // element_bytes - 1))
    (cluster, slice_vectors, shared), spans, vectors = emulator.plan(vocab, element_bytes, lead)
    assert cluster in (0, 1, 2, 4, 8)
    if cluster == 0:
        assert vocab * element_bytes > 8 * (PER_BLOCK - 4096)
        return
    assert slice_vectors * 16 < shared <= PER_BLOCK
    assert cluster == 8 or 3 * (shared + RESERVED) <= PER_SM
    at = 0
    for k, (first, count) in enumerate(spans):
        assert count >= 0 and (count == 0 or first == at), k
        at = first + count if count else at
        block = k // 8
        assert count == 0 or block * slice_vectors <= first and first + count <= (block + 1) * slice_vectors
        # The place of a warp in shared memory is the same for rows of any alignment: it fetches ahead of the others.
        begin, end = (block * slice_vectors + slice_vectors * (k % 8 + i) // 8 for i in (0, 1))
        assert count == 0 or begin == first and first + count <= end
    assert at == vectors and (vectors - 1) * 16 < (lead + vocab) * element_bytes <= vectors * 16


def test_the_plan_of_known_heads(emulator: Emulator) -> None:
    """Three blocks to a multiprocessor up to 300k bf16 logits; the promised 256k bf16 and 128k fp32 fit."""
    expected = {(151_936, 2): 4, (151_936, 4): 8, (49_152, 2): 2, (49_152, 4): 4, (262_144, 2): 8, (131_072, 4): 8}
    for (vocab, element_bytes), cluster in expected.items():
        (found, _, shared), *_ = emulator.plan(vocab, element_bytes)
        assert found == cluster and 3 * (shared + RESERVED) <= PER_SM


@every_dtype
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rows_against_the_oracle(
    emulator: Emulator, check_rows: Callable[..., Tensor], dtype: torch.dtype, data: st.DataObject
) -> None:
    n, v = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 7, 8, 9, 63, 256, 1000, 2049, 5003, 60_001]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    spread, offset = data.draw(st.sampled_from([0.1, 3.0, 30.0])), data.draw(st.sampled_from([0.0, 300.0, -5000.0]))
    cap = data.draw(st.sampled_from([None, None, 4.0, 30.0]))
    values = (torch.randn(n, v, generator=g) * spread + (0.0 if cap else offset)).to(dtype)
    late, gap = data.draw(st.integers(0, 7)), data.draw(st.sampled_from([0, 1, 3, 8]))
    targets = torch.randint(0, v, (n,), generator=g)
    inv_t: float | Tensor = torch.rand(n, generator=g) + 0.5 if data.draw(st.booleans()) else 1.0
    a, b = torch.randn(n, generator=g), torch.randn(n, generator=g) * data.draw(st.sampled_from([0, 1]))

    given = (targets, inv_t, cap, (a, b if b.any() else None))
    gradient = check_rows(emulator, values, *given, copy=lambda v: placed(v, late, gap))
    if gap:  # nothing beside the rows is touched
        between = gradient.as_strided((n, gap), (v + gap, 1), gradient.storage_offset() + v)
        assert between.isnan().all()


def test_one_sweep_is_the_loss(
    emulator: Emulator, batch_of: Callable[..., Tokens], loss: tuple[LossSpec, bool]
) -> None:
    """The recorded program gives the coefficients that `losses.coefficients` gives, and the gradient follows from them."""
    n, v, cap, (spec, on_policy) = 40, 1500, 20.0, loss
    g, tokens = torch.Generator().manual_seed(0), batch_of(n, v, on_policy)
    batch, inv_t = prepare(tokens, spec, torch.float32), torch.rand(n, generator=g) + 0.5
    values = torch.randn(n, v, generator=g) * 2
    swept, apart = placed(values), placed(values)
    mine = emulator.fused_(swept, tokens.targets, batch, spec, inv_t, cap)
    logp, entropy, lse = emulator.rows_forward(apart, tokens.targets, inv_t, cap)
    assert all(torch.equal(x, y) for x, y in zip(mine, (logp, entropy, lse), strict=True))
    known = coefficients(logp, entropy, lse, batch, spec)
    assert known.a.any()
    z = torch.zeros(n) if known.z is None else known.z
    plain.rows_backward_(apart, tokens.targets, lse, entropy, known.a, known.b, inv_t, cap, z)
    torch.testing.assert_close(swept, apart, rtol=5e-5, atol=1e-7)


@every_dtype
def test_ignored_and_idle_rows_are_never_read(emulator: Emulator, dtype: torch.dtype) -> None:
    logits = placed(torch.randn(4, 2001, generator=torch.Generator().manual_seed(0)).to(dtype))
    logits[1] = torch.nan
    targets = torch.tensor([3, IGNORE, 2000, 0])
    logp, entropy, lse = emulator.rows_forward(logits, targets, 1.0, None)
    assert (logp[1], entropy[1], lse[1]) == (0, 0, 0) and logp.isfinite().all()
    logits[2] = torch.nan  # its coefficients are 0
    emulator.rows_backward_(logits, targets, lse, entropy, torch.tensor([1.0, 1.0, 0.0, -2.0]), None, 1.0, None)
    assert not logits[1:3].any() and logits[0].any() and logits.isfinite().all()


@every_dtype
def test_minus_infinity_is_probability_zero_and_the_rest_is_nan(emulator: Emulator, dtype: torch.dtype) -> None:
    values = torch.randn(5, 4001, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, :3000] = -torch.inf
    values[1, 2500:] = -torch.inf
    values[2, 17], values[3, 1234], values[4] = torch.nan, torch.inf, -torch.inf
    logits, targets = placed(values), torch.tensor([3500, 0, 1, 2, 3])
    logp, entropy, lse = emulator.rows_forward(logits, targets, 1.0, None)
    assert logp[:2].isfinite().all() and entropy[:2].isfinite().all()
    assert logp[2:].isnan().all() and entropy[2:].isnan().all()
    sums = Tokens(targets, torch.ones(5), torch.ones(5, dtype=torch.bool), torch.arange(5))
    spec = LossSpec(entropy_coef=0.1)
    for sweep in (False, True):
        gradient = placed(values)
        if sweep:
            emulator.fused_(gradient, targets, prepare(sums, spec, torch.float32), spec, 1.0, None)
        else:
            emulator.rows_backward_(gradient, targets, lse, entropy, torch.ones(5), torch.ones(5), 1.0, None)
        assert gradient[:2].isfinite().all() and gradient[2:].isnan().any(1).all()
        assert not gradient[0, :3000].any() and not gradient[1, 2500:].any()


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 40_000), vocab=st.integers(1, 300_000))
def test_the_pieces_of_the_linear_kernel_cover_every_tile_once(emulator: Emulator, rows: int, vocab: int) -> None:
    row_tiles, column_tiles = -(-rows // 128), -(-vocab // 256)
    out = (ctypes.c_int * (4 * row_tiles * 66))()
    count = emulator.library.linear_pieces(ctypes.c_int64(rows), ctypes.c_int64(vocab), out, row_tiles * 66)
    pieces = torch.tensor(list(out)[: 4 * count]).view(count, 4)
    assert count == row_tiles * min(66, column_tiles)
    assert (pieces[:, 3] > pieces[:, 2]).all() and int((pieces[:, 3] - pieces[:, 2]).sum()) == row_tiles * column_tiles
    keys = pieces[:, 0] * 66 + pieces[:, 1]
    assert len(keys.unique()) == count and int(pieces[:, 0].max()) == row_tiles - 1
    by_split = {tuple(p[1:].tolist()) for p in pieces}  # the same columns whatever the rows
    assert len(by_split) == min(66, column_tiles)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_linear_fold_against_the_oracle(emulator: Emulator, data: st.DataObject) -> None:
    """Accumulators of all threads, laid out as the tensor cores leave them, folded and merged."""
    n, v = data.draw(st.integers(1, 140)), data.draw(st.sampled_from([1, 2, 9, 255, 256, 257, 700, 20_000]))
    n = min(n, 20) if v > 1000 else n
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    cap, offset = data.draw(st.sampled_from([None, 20.0])), data.draw(st.sampled_from([0.0, -300.0]))
    logits = torch.randn(n, v, generator=g) * data.draw(st.sampled_from([0.1, 5.0])) + (0.0 if cap else offset)
    bias = torch.randn(v, generator=g) if data.draw(st.booleans()) else None
    targets, inv_t = torch.randint(0, v, (n,), generator=g), torch.rand(n, generator=g) + 0.5
    out = [torch.empty(n) for _ in range(3)]
    emulator.library.linear(
        pointer(logits), ctypes.c_int64(n), ctypes.c_int64(v), None if bias is None else pointer(bias),
        pointer(targets), pointer(inv_t), ctypes.c_float(cap or 0.0), *map(pointer, out), None, None, None,
    )  # fmt: skip
    shifted = logits if bias is None else logits + bias
    exact = reference.logprob(shifted, targets, inv_t, cap)
    theirs = plain.rows_forward(shifted, targets, inv_t, cap, True)
    for found, other, truth in zip(out, theirs, exact, strict=True):
        assert other is not None
        allowed = 2 * (other.double() - truth).abs().max() + 3e-7 * (1 + exact[2].abs().max())
        assert float((found.double() - truth).abs().max()) <= float(allowed)


@dataclass(frozen=True)
class EmulatedExponentials:
    """`cuda.Exponentials`, on the host. store: [N, pitch], of which values are the first V columns."""

    library: ctypes.CDLL
    store: Tensor
    references: Tensor
    folds: Tensor
    vocab: int
    targets: Tensor
    inv_t: Tensor
    cap: float | None

    @property
    def values(self) -> Tensor:
        return self.store[:, : self.vocab]

    def gradient_(self, a: Tensor, b: Tensor | None, z: Tensor | None) -> Tensor:
        factor = torch.full_like(a, torch.nan)
        given = [None if v is None else pointer(v.contiguous()) for v in (a, b, z)]
        self.library.linear_gradient(
            pointer(self.store), pointer(self.references), pointer(self.folds), ctypes.c_int64(len(a)),
            ctypes.c_int64(self.vocab), pointer(self.targets), pointer(self.inv_t), ctypes.c_float(self.cap or 0.0),
            *given, pointer(factor),
        )  # fmt: skip
        return factor


def exponentials(
    emulator: Emulator, u: Tensor, bias: Tensor | None, targets: Tensor, inv_t: float | Tensor, cap: float | None
) -> tuple[tuple[Tensor, Tensor, Tensor], EmulatedExponentials]:
    """`cuda.linear_exponentials` of a product u [N, V] in fp32; what is kept starts as NaN."""
    n, v = u.shape
    scales, targets = rows_of(inv_t, u), targets.contiguous()
    pitch = emulator.library.linear_pitch(ctypes.c_int64(v))
    kept = [torch.full((n, w), torch.nan) for w in (pitch, pitch // 256, 4)]
    kept[0] = kept[0].bfloat16()
    out = [torch.empty(n) for _ in range(3)]
    emulator.library.linear(
        pointer(u), ctypes.c_int64(n), ctypes.c_int64(v), None if bias is None else pointer(bias), pointer(targets),
        pointer(scales), ctypes.c_float(cap or 0.0), *map(pointer, out), *map(pointer, kept),
    )  # fmt: skip
    exps = EmulatedExponentials(emulator.library, kept[0], kept[1], kept[2], v, targets, scales, cap)
    return (out[0], out[1], out[2]), exps


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_exponentials_become_the_gradient(emulator: Emulator, data: st.DataObject) -> None:
    """To two roundings to bf16, of p and of the gradient; a gradient of fp32 logits that is stored in bf16 has one."""
    n, v = data.draw(st.integers(1, 140)), data.draw(st.sampled_from([1, 2, 9, 255, 256, 257, 700, 20_000]))
    n = min(n, 20) if v > 1000 else n
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    cap = data.draw(st.sampled_from([None, None, 20.0]))
    u = torch.randn(n, v, generator=g) * data.draw(st.sampled_from([0.1, 5.0, 40.0]))
    u += 0.0 if cap else data.draw(st.sampled_from([0.0, 30.0, 300.0, -300.0, 5000.0]))  # some beyond 64 bits
    if data.draw(st.booleans()):
        u[:, : v // 2] -= 100.0  # tiles of a row with references of their own
    bias = torch.randn(v, generator=g) if data.draw(st.booleans()) else None
    targets, inv_t = torch.randint(0, v, (n,), generator=g), torch.rand(n, generator=g) + 0.5
    a = torch.randn(n, generator=g) * data.draw(st.sampled_from([1e-30, 1e-12, 1e-5, 1.0]))
    b, z = (torch.randn(n, generator=g) * s * a.abs().max() if data.draw(st.booleans()) else None for s in (1.0, 0.01))
    targets[1::7] = IGNORE
    for weight in (a, b, z):
        if weight is not None:
            weight[2::7] = 0
    _, exps = exponentials(emulator, u, bias, targets, inv_t, cap)
    assert not exps.store[:, v:].any()
    factor = exps.gradient_(a, b, z)
    mine = factor[:, None].double() * exps.values.double()

    x = (u if bias is None else u + bias).double()
    z_NV, slope = (x, torch.ones(())) if cap is None else (cap * torch.tanh(x / cap), 1 - torch.tanh(x / cap) ** 2)
    z_NV.requires_grad_()
    exact, used = reference.logprob(z_NV, targets.clamp(min=0), inv_t), targets != IGNORE
    parts = zip((a, b, z), (exact[0], exact[1], exact[2] ** 2), strict=True)
    (steep,) = torch.autograd.grad(sum((w.double() * f)[used].sum() for w, f in parts if w is not None), z_NV)
    truth, z_NV, lse = steep * slope, z_NV.detach(), exact[2].detach().abs()
    assert not factor[1::7].any() and not factor[2::7].any()
    bits = 2 * float(truth.norm())
    if b is not None:  # log p is known to as many digits as p
        bits += float((slope * (b * inv_t)[:, None] * (z_NV * inv_t[:, None]).softmax(-1)).norm())
    if cap is not None:  # and so is where on the cap's slope it is
        bits += float((steep * 2 * z_NV / cap**2 / inv_t[:, None]).norm())
    size = float((a.abs() + (0 if b is None else b.abs()) + (0 if z is None else 2 * z.abs() * lse)).norm())
    last_bit = 2e-7 + 2**-23 * float(lse.max())  # of lse, in fp32
    assert float((mine - truth).norm()) <= 2**-8 * bits + 2 * last_bit * size


def test_a_factor_too_small_for_fp32_goes_into_the_exponentials(emulator: Emulator) -> None:
    u = torch.randn(4, 700, generator=torch.Generator().manual_seed(0)) + 40.0  # exponentials near 2^58
    targets, a = torch.tensor([3, 500, 1, 699]), torch.full((4,), 1e-30)
    _, exps = exponentials(emulator, u, None, targets, 1.0, None)
    mine = exps.gradient_(a, None, None)[:, None].double() * exps.values.double()
    truth = a[:, None].double() * (torch.eye(700)[targets] - u.double().softmax(-1))
    torch.testing.assert_close(mine, truth, rtol=1e-2, atol=1e-37)


@pytest.mark.parametrize("n, v, h", [(1, 1, 64), (130, 300, 64), (5, 513, 128), (3, 257, 576)])
def test_the_boxes_make_the_product(emulator: Emulator, n: int, v: int, h: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, u = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g), torch.full((n, v), torch.nan)
    emulator.library.linear_product(pointer(x), pointer(w), *map(ctypes.c_int64, (n, v, h)), pointer(u))
    torch.testing.assert_close(u, x @ w.T, rtol=1e-4, atol=1e-4)


def test_hopeless_rows_of_exponentials_stay_apart(emulator: Emulator) -> None:
    """A row that is not trained on counts for nothing whatever it holds; one that is makes itself NaN."""
    n, v = 8, 700
    u = torch.randn(n, v, generator=torch.Generator().manual_seed(0))
    u[0] = u[1] = u[2, 5] = torch.nan
    u[3, 7], u[4], u[5, :600], u[6, 100:] = torch.inf, -torch.inf, -torch.inf, -torch.inf
    targets, a = torch.tensor([IGNORE, 3, 3, 3, 3, 650, 50, 0]), torch.ones(n)
    a[1] = 0  # idle
    (logp, _, _), exps = exponentials(emulator, u, None, targets, 1.0, None)
    assert logp.isnan().tolist() == [False, True, True, True, True, False, False, False]
    factor = exps.gradient_(a, None, None)
    gradient = factor[:, None] * exps.values.float()
    assert gradient.isnan().any(1).tolist() == [False, False, True, True, True, False, False, False]
    assert not gradient[:2].any() and not gradient[5, :600].any() and not gradient[6, 100:].any()
    plain.rows_backward_(u, targets, *plain.rows_forward(u, targets, 1.0, None, True)[:0:-1], a, None, 1.0, None)
    torch.testing.assert_close(gradient[5:], u[5:], rtol=1e-2, atol=1e-6)


@pytest.mark.usefixtures("chunks_of_rows")
@pytest.mark.parametrize("change", [{}, {"entropy_coef": 0.01}, {"z_loss": 0.01}, {"beta": 0.1}], ids=str)
@pytest.mark.parametrize("biased, cap, h", [(False, None, 64), (True, 20.0, 192)])
def test_the_head_on_exponentials(
    emulator: Emulator, batch_of: Callable[..., Tokens], change: dict[str, float], biased: bool, cap: float | None,
    h: int,
) -> None:  # fmt: skip
    """Loss and gradients of a head in chunks of rows, its GEMM played in fp32: as near to float64 as with torch's own."""
    n, v, g = 300, 777, torch.Generator().manual_seed(0)
    x, w = torch.randn(n, h, generator=g).bfloat16(), (torch.randn(v, h, generator=g) * 3 / h**0.5).bfloat16()
    bias = torch.randn(v, generator=g).bfloat16() if biased else None
    tokens, spec, inv_t = batch_of(n, v), LossSpec(**change), torch.rand(n, generator=g) + 0.5
    asked: list[int] = []

    def linear_exponentials(hidden, weight, bias, targets, inv_t, cap, want_entropy):  # type: ignore[no-untyped-def]
        asked.append(len(hidden))
        u = hidden.float() @ weight.float().T
        return exponentials(emulator, u, None if bias is None else bias.float(), targets, inv_t, cap)

    rows = {k: getattr(plain, k) for k in ("rows_forward", "rows_backward_")}
    backend = SimpleNamespace(**rows, linear_exponentials=linear_exponentials)
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, w, bias)]
    exact = reference.head(leaves[0], leaves[1], tokens.targets, leaves[2], inv_t, cap)
    loss = reference.policy_loss(exact[0], exact[1], tokens, spec, exact[2])
    truth = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    errors = []
    for module in (backend, plain):
        head = Head(module, inv_t, cap, workspace_bytes=130 * v * 2)
        made = policy_head(x, w, bias, tokens, spec, head, True, (True, True, biased))
        torch.testing.assert_close(made.loss.double(), loss, rtol=2e-2, atol=2e-3)
        found = [f for f in (made.dx, made.dw, made.db) if f is not None]
        errors.append([float((f.double() - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)])
    assert len(asked) > 1
    for mine, theirs in zip(*errors, strict=True):
        assert mine <= 1.5 * theirs + 1e-3


def test_a_card_runs_by_default_only_what_was_validated_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    card, place = "some card", torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: card)
    for functions, answers in (
        ((), (False, False)),
        (cuda.ROW_FUNCTIONS, (True, False)),
        ((*cuda.ROW_FUNCTIONS, "linear_exponentials"), (True, True)),
    ):
        monkeypatch.setattr(cuda, "VALIDATED", frozenset((card, f) for f in functions))
        assert (cuda.is_validated(place), cuda_exp.is_validated(place)) == answers
    assert backends.reason_unavailable("cuda_exp") == backends.reason_unavailable("cuda")
