"""Bugs that were found in other implementations of these operators, and bad input: exact results or one clear sentence."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from omni_kernels import (
    IGNORE,
    PRESETS,
    LossSpec,
    Tokens,
    backends,
    linear_logprob,
    linear_logprob_extras,
    linear_policy_loss,
    logits_logprob,
    normaliser_count,
    plan,
    policy_loss,
    reference,
)

BACKENDS = [name for name in ("torch", "cpu") if backends.reason_unavailable(name) is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def check(logits: Tensor, targets: Tensor, backend: str, a: float = 1.0, b: float = 0.3) -> None:
    """Values and gradient of given logits against the oracle, to the precision of the dtype of the gradient."""
    logits = logits.detach().requires_grad_()
    n = len(targets)
    logp, entropy = logits_logprob(logits, targets, backend=backend)
    assert entropy is not None
    (mine,) = torch.autograd.grad(a * logp.sum() + b * entropy.sum(), logits)
    floor = logits.detach().double().clamp(min=-1e6).requires_grad_()
    exact_logp, exact_entropy, _ = reference.logprob(floor, targets)
    (exact,) = torch.autograd.grad(a * exact_logp.sum() + b * exact_entropy.sum(), floor)
    torch.testing.assert_close(logp.double(), exact_logp, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=2e-6, atol=2e-6 * n)
    step = float(logits.detach()[logits.detach().isfinite()].abs().max()) * 2**-23  # lse has so many digits
    rounding = 3e-6 + 2 * step + (2**-8 if logits.dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(mine.double(), exact, rtol=rounding, atol=1e-9 + step * 1e-2)


@every_backend
@DTYPES
def test_a_leading_block_of_minus_infinity(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, :8200] = -torch.inf
    check(logits, torch.tensor([8300, 8999, 8200]), backend)


@every_backend
@DTYPES
@pytest.mark.parametrize("offset", [-104.0, -300.0, -5000.0, 5000.0])
def test_softmax_is_shift_invariant(backend: str, dtype: torch.dtype, offset: float) -> None:
    logits = (torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 8 + offset).to(dtype)
    targets = torch.tensor([0, 999, 5, 17])
    check(logits, targets, backend)
    exact = (logits.double() - offset).float()
    here, there = logits_logprob(logits, targets, backend=backend), logits_logprob(exact, targets, backend=backend)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3 * abs(offset) / 5000)


@every_backend
@pytest.mark.parametrize("v", [1, 2, 7, 1021, 4099])
def test_vocabularies_of_odd_size(backend: str, v: int) -> None:
    g = torch.Generator().manual_seed(v)
    logits = torch.randn(11, v, generator=g)
    logp, _ = logits_logprob(logits, torch.randint(0, v, (11,), generator=g), backend=backend)
    assert (logp <= 0).all()
    check(logits, torch.randint(0, v, (11,), generator=g), backend)


@every_backend
@DTYPES
@pytest.mark.parametrize("p", [0.9, 0.999, 0.99999])
def test_gradient_of_a_sure_target_is_not_cancelled(backend: str, dtype: torch.dtype, p: float) -> None:
    """-a expm1(logp), rounded once: a(1 - p) taken in bf16 would be wrong by 100 %."""
    logits = torch.zeros(1, 64)
    logits[0, 3] = torch.tensor(63 * p / (1 - p)).log()
    logits = logits.to(dtype).requires_grad_()
    (mine,) = torch.autograd.grad(logits_logprob(logits, torch.tensor([3]), backend=backend)[0], logits)
    (exact,) = torch.autograd.grad(reference.logprob(logits, torch.tensor([3]))[0], logits)
    rounding = float(exact[0, 3]) * (2**-8 if dtype == torch.bfloat16 else 1e-6)
    assert float(mine[0, 3] - exact[0, 3]) == pytest.approx(0, abs=3e-7 + rounding)  # 3e-7: fp32 sum of exponentials


@pytest.mark.usefixtures("few_rows")
@every_backend
def test_weight_gradient_does_not_decay_over_chunks(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = (torch.randn(512, 64, generator=g) + 0.5).bfloat16()
    weight = (torch.randn(300, 64, generator=g) * 0.1).bfloat16().requires_grad_()
    targets = torch.randint(0, 300, (512,), generator=g)
    logp, *_ = reference.head(hidden, weight, targets)
    (exact,) = torch.autograd.grad(logp.sum(), weight)

    def error(chunks: int) -> float:
        tokens, workspace = Tokens(targets, -torch.ones(512), denominator=1.0), 512 // chunks * 300 * 2
        out = linear_policy_loss(hidden, weight, tokens, LossSpec(), workspace_bytes=workspace, backend=backend)
        (dw,) = torch.autograd.grad(out.loss, weight)
        return float((dw.double() - exact.double()).norm() / exact.double().norm())

    assert error(32) <= 1.5 * error(1)  # one more rounding, of the parts; a bf16 sum is at 3


@every_backend
def test_more_than_two_billion_logits(backend: str) -> None:
    """Row offsets are 64 bit. Ignored rows are never read, so the memory is never touched."""
    v = 1 << 15
    n = (1 << 31) // v + 8
    logits = torch.empty(n, v, dtype=torch.bfloat16)
    targets = torch.full((n,), IGNORE)
    for row in (0, n - 1):
        logits[row] = torch.linspace(-3, 3, v)
        targets[row] = v - 1
    logp, entropy = logits_logprob(logits, targets, backend=backend)
    assert logp[0] == logp[-1] < 0 and entropy is not None and entropy[0] == entropy[-1] > 0
    assert logp.count_nonzero() == 2


@every_backend
def test_a_sequence_of_seventy_thousand_tokens(backend: str) -> None:
    n = 70_000
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 3, generator=g).requires_grad_(), torch.randn(5, 3, generator=g).requires_grad_()
    tokens = Tokens(torch.randint(0, 5, (n,), generator=g), torch.ones(n), sequences=torch.zeros(n, dtype=torch.int64))
    out = linear_policy_loss(hidden, weight, tokens, LossSpec.preset("gspo"), backend=backend, workspace_bytes=100_000)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-1) and hidden.grad is not None and (hidden.grad.abs().sum(-1) > 0).all()


@every_backend
@DTYPES
def test_ignored_rows_are_never_read(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 50).to(dtype)
    logits[1:3] = torch.nan
    logits.requires_grad_()
    logp, entropy = logits_logprob(logits, torch.tensor([3, IGNORE, IGNORE, 4]), backend=backend)
    assert entropy is not None and (logp[1:3] == 0).all() and (entropy[1:3] == 0).all()
    (grad,) = torch.autograd.grad((logp + entropy).sum(), logits)
    assert (grad[1:3] == 0).all() and grad.isfinite().all()


@every_backend
@DTYPES
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_poisons_only_itself(backend: str, dtype: torch.dtype, poison: float) -> None:
    logits = torch.randn(3, 50).to(dtype)
    logits[1, 7] = poison
    logits.requires_grad_()
    logp, entropy = logits_logprob(logits, torch.tensor([1, 2, 3]), backend=backend)
    assert entropy is not None
    (grad,) = torch.autograd.grad((logp + entropy).sum(), logits)
    assert logp[1].isnan() and grad[1].isnan().any()
    assert logp[[0, 2]].isfinite().all() and entropy[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


@every_backend
@pytest.mark.parametrize("name", PRESETS)
def test_a_trained_row_that_is_nan_is_nan_in_loss_and_gradient(backend: str, name: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, generator=g).requires_grad_() for n in (6, 5))
    hidden.data[2, 0] = torch.nan
    tokens = Tokens(torch.arange(6) % 5, torch.ones(6), sequences=torch.arange(6) // 3, old=torch.full((6,), -1.6))
    loss = linear_policy_loss(hidden, weight, tokens, LossSpec.preset(name), backend=backend).loss
    (dx,) = torch.autograd.grad(loss, hidden)
    assert loss.isnan() and dx[2].isnan().all() and dx[3:].isfinite().all()


@every_backend
def test_an_impossible_target_does_not_make_the_entropy_bonus_nan(backend: str) -> None:
    hidden, weight = torch.eye(3)[:1].requires_grad_(), torch.tensor([[1.0, 0, 0], [2, 0, 0], [-torch.inf, 0, 0]])
    (dx,) = torch.autograd.grad(linear_logprob(hidden, weight[:2], torch.tensor([0]), backend=backend)[1], hidden)
    logits = (hidden.detach() @ weight.T).requires_grad_()
    logits.data[0, 2] = -torch.inf
    logp, entropy = logits_logprob(logits, torch.tensor([2]), backend=backend)
    (du,) = torch.autograd.grad(entropy, logits)
    assert logp == -torch.inf and du[0, 2] == 0
    torch.testing.assert_close(du[:, :2] @ weight[:2], dx)


@every_backend
def test_a_row_of_minus_infinity_is_nan_and_an_impossible_target_minus_infinity(backend: str) -> None:
    logits = torch.randn(3, 20)
    logits[0] = -torch.inf
    logits[1, 4] = -torch.inf
    logp, entropy = logits_logprob(logits, torch.tensor([1, 4, 2]), backend=backend)
    assert entropy is not None
    assert logp[0].isnan() and logp[1] == -torch.inf and entropy[1:].isfinite().all() and logp[2].isfinite()


def test_masked_garbage_is_not_exponentiated() -> None:
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    big = torch.tensor([-1.0, -1e38, torch.inf])
    tokens = Tokens(
        torch.tensor([1, IGNORE, 2]), torch.tensor([1.0, torch.nan, torch.nan]), torch.tensor([True, True, False]),
        None, big, big, big,
    )  # fmt: skip
    out = policy_loss(logp, None, tokens, LossSpec(beta=0.1, rollout="mask", rollout_max=5.0))
    out.loss.backward()
    assert out.loss.isfinite() and out.metrics.isfinite().all() and logp.grad is not None
    assert (logp.grad[1:] == 0).all() and logp.grad[0] != 0


def test_a_dropped_token_leaves_the_normaliser() -> None:
    rollout = torch.tensor([-1.0, -torch.inf, torch.nan, -1.0])
    tokens = Tokens(torch.ones(4, dtype=torch.int64), torch.ones(4), None, None, torch.full((4,), -1.0), None, rollout)
    logp = torch.full((4,), -1.0)
    for kept, n in (("kept", 2), ("all", 4)):
        spec = LossSpec(rollout="truncate", denominator=kept)  # type: ignore[arg-type]
        assert normaliser_count(tokens, spec) == n
        assert policy_loss(logp, None, tokens, spec).loss == pytest.approx(-2 / n)


def test_deferred_normaliser() -> None:
    """Where the kept count needs the current log-probs: denominator 1, then one division by the summed metric."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 8, generator=g).requires_grad_(), torch.randn(40, 8, generator=g).requires_grad_()
    spec = LossSpec(top_entropy=0.4)
    args = (torch.randint(0, 40, (30,), generator=g), torch.randn(30, generator=g))
    whole = linear_policy_loss(hidden, weight, Tokens(*args), spec)
    deferred = linear_policy_loss(hidden, weight, Tokens(*args, denominator=1.0), spec)
    kept = deferred.metrics[2].float()
    torch.testing.assert_close(deferred.loss / kept, whole.loss)
    one, two = (torch.autograd.grad(v, hidden)[0] for v in (deferred.loss, whole.loss))
    torch.testing.assert_close(one / kept, two)


@every_backend
def test_parts_of_the_vocabulary_that_begin_with_a_masked_token(backend: str) -> None:
    """The first column stands in for targets of other parts: 0 times its log-prob of -inf must not be NaN."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=g).requires_grad_() for n in (64, 400))
    bias = torch.zeros(400).index_fill_(0, torch.arange(0, 400, 16), -torch.inf)
    found = []
    for workspace in (None, 400 * 16):
        logp, entropy = linear_logprob(
            hidden, weight, torch.arange(1, 65) // 16 * 16 + 1, bias=bias, workspace_bytes=workspace, backend=backend
        )
        assert entropy is not None
        found.append(torch.autograd.grad((logp + 0.3 * entropy).sum(), (hidden, weight)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_plan_is_the_dial() -> None:
    small, large = (
        plan(4096, 576, 49152, 2, 16 << 20, row_wise=False),
        plan(4096, 576, 49152, 2, 1 << 30, row_wise=False),
    )
    assert (small.gemms, large.gemms) == (4, 3)
    assert [plan(4096, 576, 49152, 2, size).gemms for size in (None, 64 << 20, 16 << 20)] == [3, 3, 4]
    assert plan(4096, 576, 49152, 2, 16 << 20, needs_dw=False).gemms == 3
    assert small.workspace_bytes <= 16 << 20 and large.chunk_rows == 4096
    assert small.seconds(1e12, 1e11) > large.seconds(1e12, 1e11)
    assert plan(0, 8, 8, 4).chunk_rows == 1 and plan(5, 8, 1 << 30, 4, 1).chunk_rows == 1


def message(call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    return str(caught.value)


def test_bad_input_is_named_with_its_remedy() -> None:
    x, w, y = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 1, 2, 3])
    t = Tokens(y, torch.ones(4))
    assert "hidden [4, 3] and weight [7, 5] do not fit" in message(linear_logprob, x, torch.randn(7, 5), y)
    assert "hidden is torch.float32 [4, 3, 1]; give a float matrix" in message(linear_logprob, x[..., None], w, y)
    assert "weight is torch.int64" in message(linear_logprob, x, torch.ones(7, 3, dtype=torch.int64), y)
    assert "targets is torch.int32 [4] on cpu; give int64 [4]" in message(linear_logprob, x, w, y.int())
    assert "targets is torch.int64 [3]" in message(linear_logprob, x, w, y[:3])
    assert "targets holds 7; give tokens in [0, 7)" in message(linear_logprob, x, w, y + 4)
    assert "targets holds -1; give tokens" in message(linear_logprob, x, w, y - 1)
    assert "targets holds -1; give tokens" in message(logits_logprob, x @ w.T, y - 1)
    assert "targets holds 9; give tokens" in message(linear_policy_loss, x, w, Tokens(y + 6, torch.ones(4)), LossSpec())
    assert "inv_temperature is 0.0; give a finite number > 0" in message(linear_logprob, x, w, y, inv_temperature=0.0)
    assert "inv_temperature is [2] on cpu" in message(linear_logprob, x, w, y, inv_temperature=torch.ones(2))
    assert "softcap is -1.0; give" in message(linear_logprob, x, w, y, softcap=-1.0)
    assert "bias is [3]" in message(linear_logprob, x, w, y, bias=torch.ones(3))
    assert "main_grad is torch.float64 [7, 3]" in message(linear_logprob, x, w, y, main_grad=torch.ones(7, 3).double())
    assert "give contiguous rows" in message(logits_logprob, torch.randn(7, 4).T, y)
    assert "top_k is 8; give a number in [0, V] = [0, 7]" in message(linear_logprob_extras, x, w, y, top_k=8)
    assert "grad_scale is 1.0 but main_grad is None" in message(linear_policy_loss, x, w, t, LossSpec(), grad_scale=1.0)
    for name in ("abacus", "rows", "../torch"):  # rows: a module there, but no backend
        assert f"backend {name!r} is not available" in message(linear_logprob, x, w, y, backend=name)
    for backend in BACKENDS:
        wrong = message(linear_logprob, x, w, y, inv_temperature=torch.tensor([1, 2, 0.0, 1]), backend=backend)
        assert "inv_temperature holds 0.0; give finite numbers > 0" in wrong
    eights = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    assert "tensors are torch.float8_e4m3fn; give float32" in message(linear_logprob, *eights, y)
    assert "V and H >= 1" in message(linear_logprob, x[:, :0], w[:, :0], y)
    assert "main_grad is torch.float32 [7, 3] on meta" in message(
        linear_logprob, x, w, y, main_grad=torch.ones(7, 3, device="meta")
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mask": torch.ones(3, dtype=torch.bool)}, "Tokens.mask is [3] on cpu; give [4]"),
        ({"mask": torch.ones(4)}, "Tokens.mask is torch.float32; give bool"),
        ({"sequences": torch.zeros(4)}, "Tokens.sequences is torch.float32; give int64"),
        ({"rows": torch.tensor([0, 4])}, "Tokens.rows holds 4; give numbers in [0, N) = [0, 4)"),
        ({"rows": torch.ones(4, dtype=torch.bool)}, "Tokens.rows is torch.bool; give int64"),
        ({"rows": torch.tensor([[0]])}, "Tokens.rows is [1, 1] on cpu; give places of tokens [R]"),
        ({"denominator": -1.0}, "Tokens.denominator is -1.0; give one number >= 0"),
        ({"denominator": torch.ones(4)}, "Tokens.denominator is [4]; give one number >= 0"),
    ],
    ids=str,
)
def test_tokens_that_do_not_fit_are_named_by_the_fused_loss_too(change: dict[str, Tensor], sentence: str) -> None:
    tokens = replace(Tokens(torch.tensor([0, 1, 2, 3]), torch.ones(4)), **change)  # type: ignore[arg-type]
    assert sentence in message(linear_policy_loss, torch.randn(4, 3), torch.randn(7, 3), tokens, LossSpec())


@every_backend
def test_strided_targets_are_targets(backend: str) -> None:
    x, w, y = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([[0, 9], [1, 9], [2, 9], [3, 9]])[:, 0]
    same = y.contiguous()
    assert torch.equal(linear_logprob(x, w, y, backend=backend)[0], linear_logprob(x, w, same, backend=backend)[0])
    logits = x @ w.T
    assert torch.equal(logits_logprob(logits, y, backend=backend)[0], logits_logprob(logits, same, backend=backend)[0])


def test_operands_of_any_stride_are_exact() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 8, generator=g).T[:, :3], torch.randn(3, 20, generator=g).T
    y = torch.randint(0, 20, (8,), generator=g)
    torch.testing.assert_close(linear_logprob(x, w, y), linear_logprob(x.contiguous(), w.contiguous(), y))


def test_importing_is_light() -> None:
    """Beyond torch, importing loads this package only, and no compiler."""
    code = (
        "import sys, torch; before = set(sys.modules); import omni_kernels; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert "omni_kernels" in found and "omni_fast" not in found and "triton" not in found


@pytest.mark.usefixtures("few_rows")
@every_backend
@pytest.mark.parametrize("workspace", [None, 307 * 4 * 16])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_hidden_and_weight_of_different_dtypes(
    backend: str, kinds: tuple[torch.dtype, torch.dtype], workspace: int | None
) -> None:
    """As if both had the dtype of hidden; dW comes in the weight's own."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 24, generator=g).to(kind) for n, kind in zip((50, 307), kinds, strict=True))
    tokens = Tokens(torch.randint(0, 307, (50,), generator=g), torch.randn(50, generator=g))
    found = []
    for weight in (w, w.to(kinds[0])):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = linear_policy_loss(*leaves, tokens, LossSpec(), backend=backend, workspace_bytes=workspace)
        found.append(torch.autograd.grad(out.loss, leaves))
    (dx, dw), (same_dx, same_dw) = found
    assert torch.equal(dx, same_dx) and dw.dtype == kinds[1]
    assert float((dw.double() - same_dw.double()).norm()) < 8e-3 * float(same_dw.double().norm())
