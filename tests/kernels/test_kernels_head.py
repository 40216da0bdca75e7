"""Log-probs, entropies and fused losses of a head against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from head_problem import BACKENDS, every_backend, problem, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels import (
    IGNORE,
    LossSpec,
    Tokens,
    head_rows,
    linear_logprob,
    linear_logprob_extras,
    linear_policy_loss,
    logits_logprob,
    policy_loss,
    reference,
)
from omni_kernels.gemms import Matrices


def error(found: Tensor, truth: Tensor) -> float:
    return float(((found.double() - truth).norm() / truth.norm().clamp(min=1e-300)).detach())


def plain(p: dict[str, Tensor], softcap: float | None, scaled: bool) -> tuple[Tensor, Tensor]:
    """(logp, entropy) as PyTorch computes them in the dtype of the inputs, log-softmax in fp32."""
    z = (p["hidden"] @ p["weight"].T + p["bias"]).float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z * p["row_scale"][:, None] if scaled else z
    log_p = torch.log_softmax(z, -1)
    used = p["targets"] != IGNORE
    logp = torch.where(used, log_p.gather(-1, p["targets"].clamp(min=0)[:, None])[:, 0], 0)
    return logp, torch.where(used, -(log_p.exp() * log_p).sum(-1), 0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("workspace", [None, 4 * 307 * 9])
def test_head_is_as_exact_as_plain_pytorch(
    backend: str, dtype: torch.dtype, softcap: float | None, scaled: bool, workspace: int | None
) -> None:
    p = problem(dtype=dtype)
    leaves = [p["hidden"], p["weight"], p["bias"]]
    scale = p["row_scale"] if scaled else 1.0
    logp, entropy, _ = reference.head(*leaves[:2], p["targets"], p["bias"], scale, softcap)
    truth = torch.autograd.grad((logp * p["ga"] + entropy * p["gb"]).sum(), leaves)
    rival_logp, rival_entropy = plain(p, softcap, scaled)
    rival = torch.autograd.grad((rival_logp * p["ga"] + rival_entropy * p["gb"]).sum(), leaves)
    ours_logp, ours_entropy = linear_logprob(
        *leaves[:2], p["targets"], bias=p["bias"], inv_temperature=scale, softcap=softcap, workspace_bytes=workspace,
        backend=backend,
    )  # fmt: skip
    assert ours_entropy is not None
    ours = torch.autograd.grad((ours_logp * p["ga"] + ours_entropy * p["gb"]).sum(), leaves)
    floor = 3e-7
    assert error(ours_logp, logp) <= 2 * error(rival_logp, logp) + floor
    assert error(ours_entropy, entropy) <= 2 * error(rival_entropy, entropy) + floor
    for mine, theirs, exact in zip(ours, rival, truth, strict=True):
        assert mine.dtype == dtype
        assert error(mine, exact) <= 3 * error(theirs, exact) + floor


@every_backend
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_given_logits(backend: str, in_place: bool, dtype: torch.dtype) -> None:
    p = problem()
    wide = torch.randn(50, 400, generator=torch.Generator().manual_seed(1)).to(dtype) * 3
    source = wide[:, :307].detach().requires_grad_()  # rows are strided
    logp, entropy, _ = reference.logprob(source, p["targets"], p["row_scale"], 9.0)
    (truth,) = torch.autograd.grad((logp * p["ga"] + entropy * p["gb"]).sum(), source)
    ours_logp, ours_entropy = logits_logprob(
        source, p["targets"], inv_temperature=p["row_scale"], softcap=9.0, in_place=in_place, backend=backend
    )
    assert ours_entropy is not None
    (mine,) = torch.autograd.grad((ours_logp * p["ga"] + ours_entropy * p["gb"]).sum(), source)
    assert error(ours_logp, logp) < 1e-6 and error(ours_entropy, entropy) < 1e-6
    assert error(mine, truth) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert (mine[p["targets"] == IGNORE] == 0).all()


@pytest.mark.usefixtures("few_rows")
@every_backend
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "sapo", "gmpo", "vespo", "reinforce"])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_fused_loss_equals_loss_of_the_logits(backend: str, name: str, on_policy: bool, chunk_rows: int) -> None:
    p = problem()
    leaves = [p["hidden"], p["weight"], p["bias"]]
    logp, entropy, lse = reference.head(*leaves[:2], p["targets"], p["bias"], p["row_scale"], 8.0)
    tokens = tokens_of(p, logp, on_policy=on_policy)
    spec = LossSpec.preset(
        name, beta=0.2, entropy_coef=0.03, z_loss=1e-3, eps_low=0.2, eps_high=0.3, rollout="truncate", rollout_max=1.2
    )
    wide = replace(
        tokens, **{f: v.double() for f in ("old", "reference", "rollout") if (v := getattr(tokens, f)) is not None}
    )
    truth = reference.policy_loss(logp, entropy, wide, spec, lse)
    wanted = torch.autograd.grad(truth, leaves)
    out = linear_policy_loss(
        *leaves[:2], tokens, spec, bias=p["bias"], inv_temperature=p["row_scale"], softcap=8.0, backend=backend,
        workspace_bytes=chunk_rows * 307 * 4, return_tokens=True,
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(float(truth.detach()), abs=1e-5)
    for mine, exact in zip(torch.autograd.grad(out.loss * 2.5, leaves), wanted, strict=True):
        assert error(mine / 2.5, exact) < 3e-6
    trained = tokens.trained()
    assert out.logp is not None and out.entropy is not None and not out.logp.requires_grad
    assert error(out.logp[trained], logp[trained]) < 1e-6 and error(out.entropy[trained], entropy[trained]) < 1e-6
    assert (out.logp[~trained] == 0).all()
    plain = policy_loss(logp.float(), entropy.float(), tokens, spec, lse.float())
    torch.testing.assert_close(out.metrics, plain.metrics, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("few_rows")
def test_workspace_does_not_change_the_result() -> None:
    p = problem()
    logp, *_ = reference.head(p["hidden"], p["weight"], p["targets"])
    for spec in (LossSpec(beta=0.1), LossSpec.preset("gspo", top_entropy=0.5)):
        results = []
        for workspace in (1, 10_000, 1 << 30):
            out = linear_policy_loss(
                p["hidden"], p["weight"], tokens_of(p, logp), spec, workspace_bytes=workspace, backend="torch"
            )
            results.append((out.loss.detach(), out.metrics, *torch.autograd.grad(out.loss, (p["hidden"], p["weight"]))))
        for other in results[1:]:
            torch.testing.assert_close(results[0], other, rtol=2e-5, atol=1e-7)


@every_backend
def test_clipped_masked_and_ignored_rows_leave_exactly(backend: str) -> None:
    p = problem()
    logp, *_ = reference.head(p["hidden"], p["weight"], p["targets"])
    tokens = tokens_of(p, logp)
    assert tokens.old is not None
    tokens = replace(tokens, old=tokens.old - 2.0)  # most rows with A > 0 are clipped
    out = linear_policy_loss(p["hidden"], p["weight"], tokens, LossSpec(), backend=backend)
    dead = ~tokens.trained() | ((tokens.advantages > 0) & (logp > tokens.old + 0.2))
    (dx,) = torch.autograd.grad(out.loss, p["hidden"])
    assert (dx[dead] == 0).all() and (dx[~dead].abs().sum(-1) > 0).all()
    poisoned = p["hidden"].detach().clone()
    poisoned[~tokens.trained()] = torch.nan  # rows that are not trained on are never read
    again = linear_policy_loss(poisoned, p["weight"], tokens, LossSpec(), backend=backend)
    assert torch.equal(again.loss, out.loss)


def test_rows_from_the_packer_give_the_same_gradient() -> None:
    p = problem()
    logp, *_ = reference.head(p["hidden"], p["weight"], p["targets"])
    tokens = tokens_of(p, logp)
    tokens = replace(tokens, advantages=tokens.advantages * (tokens.advantages > 0))
    full = linear_policy_loss(p["hidden"], p["weight"], tokens, LossSpec.preset("grpo"))
    rows = head_rows(tokens, LossSpec.preset("grpo"))
    few = linear_policy_loss(p["hidden"], p["weight"], replace(tokens, rows=rows), LossSpec.preset("grpo"))
    assert len(rows) < tokens.trained().sum()
    torch.testing.assert_close(few.loss, full.loss)
    for a, b in zip(*(torch.autograd.grad(o.loss, (p["hidden"], p["weight"])) for o in (full, few)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("needed", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight")])
def test_only_wanted_gradients_are_made(needed: tuple[str, ...]) -> None:
    p = problem()
    tokens = tokens_of(p, torch.full((50,), -5.0))
    full = linear_policy_loss(p["hidden"], p["weight"], tokens, LossSpec(), bias=p["bias"])
    full.loss.backward()
    cut = {k: p[k].detach().requires_grad_(k in needed) for k in ("hidden", "weight", "bias")}
    for out in (
        linear_policy_loss(cut["hidden"], cut["weight"], tokens, LossSpec(), bias=cut["bias"]).loss,
        policy_loss(
            linear_logprob(cut["hidden"], cut["weight"], p["targets"], bias=cut["bias"])[0], None, tokens, LossSpec()
        ).loss,
    ):
        assert out.requires_grad == bool(needed)
        if needed:
            for name, grad in zip(needed, torch.autograd.grad(out, [cut[k] for k in needed]), strict=True):
                torch.testing.assert_close(grad, p[name].grad, rtol=1e-4, atol=1e-7)


def test_tied_weight_gets_both_gradients() -> None:
    p = problem()
    table = p["weight"].detach().clone().requires_grad_()
    ids = torch.arange(50)
    tokens = tokens_of(p, torch.full((50,), -5.0))
    out = linear_policy_loss(table[ids] * 1.5, table, tokens, LossSpec())
    out.loss.backward()
    x = (table.detach()[ids] * 1.5).requires_grad_()
    w = table.detach().clone().requires_grad_()
    dx, dw = torch.autograd.grad(linear_policy_loss(x, w, tokens, LossSpec()).loss, (x, w))
    torch.testing.assert_close(table.grad, dw.index_add(0, ids, 1.5 * dx), rtol=1e-5, atol=1e-8)


def test_master_weight_gets_an_unrounded_gradient() -> None:
    p = problem(dtype=torch.bfloat16)
    master = p["weight"].detach().float().requires_grad_()
    tokens = tokens_of(p, torch.full((50,), -5.0))
    linear_policy_loss(p["hidden"], master, tokens, LossSpec()).loss.backward()
    linear_policy_loss(p["hidden"], p["weight"], tokens, LossSpec()).loss.backward()
    assert master.grad is not None and master.grad.dtype == torch.float32
    torch.testing.assert_close(master.grad.bfloat16(), p["weight"].grad)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("when", ["backward", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_accumulates_in_fp32(when: str, dtype: torch.dtype) -> None:
    p = problem(dtype=dtype)
    tokens = tokens_of(p, torch.full((50,), -5.0))
    master = p["weight"].detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad(linear_policy_loss(p["hidden"], master, tokens, LossSpec()).loss, master)
    main = torch.ones_like(wanted)
    for _ in range(2):
        out = linear_policy_loss(
            p["hidden"], p["weight"], tokens, LossSpec(), main_grad=main, workspace_bytes=9 * 307 * 4,
            grad_scale=0.5 if when == "forward" else None,
        )  # fmt: skip
        (out.loss * 0.5).backward()
    assert p["weight"].grad is None and p["hidden"].grad is not None
    torch.testing.assert_close(main - 1, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_linear_logprob_accumulates_into_main_grad() -> None:
    p = problem()
    (wanted,) = torch.autograd.grad(linear_logprob(p["hidden"], p["weight"], p["targets"])[0] @ p["ga"], p["weight"])
    main = torch.zeros_like(wanted)
    (linear_logprob(p["hidden"], p["weight"], p["targets"], main_grad=main)[0] @ p["ga"]).backward()
    assert p["weight"].grad is None
    torch.testing.assert_close(main, wanted)


def test_grad_scale_refuses_recomputation() -> None:
    p = problem()
    tokens, main = tokens_of(p, torch.full((50,), -5.0)), torch.zeros(307, 24)

    def loss(x: Tensor) -> Tensor:
        return linear_policy_loss(x, p["weight"], tokens, LossSpec(), main_grad=main, grad_scale=1.0).loss

    out = torch.utils.checkpoint.checkpoint(loss, p["hidden"], use_reentrant=False)
    with pytest.raises(RuntimeError, match="outside the activation checkpoint"):
        out.backward()


def test_extras() -> None:
    p = problem()
    out = linear_logprob_extras(
        p["hidden"],
        p["weight"],
        p["targets"],
        top_k=4,
        inv_temperature=p["row_scale"],
        softcap=6.0,
        workspace_bytes=9000,
    )
    z = 6 * torch.tanh(p["hidden"].double() @ p["weight"].double().T / 6) * p["row_scale"].double()[:, None]
    log_p = torch.log_softmax(z, -1)
    used = p["targets"] != IGNORE
    best = log_p.topk(4)
    torch.testing.assert_close(out.top_logp[used].double(), best.values[used], rtol=1e-5, atol=1e-5)
    assert torch.equal(out.top_tokens[used], best.indices[used])
    torch.testing.assert_close(
        out.sum_p_squared[used].double(), log_p.exp().square().sum(-1)[used], rtol=1e-5, atol=1e-7
    )
    assert (out.top_logp[~used] == 0).all() and (out.sum_p_squared[~used] == 0).all()
    assert out.logp.requires_grad and not out.top_logp.requires_grad


def test_entropy_is_absent_when_not_wanted() -> None:
    p = problem()
    assert linear_logprob(p["hidden"], p["weight"], p["targets"], want_entropy=False)[1] is None
    assert logits_logprob(torch.randn(50, 307), p["targets"], want_entropy=False)[1] is None
    tokens = tokens_of(p, torch.full((50,), -5.0))
    out = linear_policy_loss(p["hidden"], p["weight"], tokens, LossSpec(), want_entropy=False, return_tokens=True)
    assert out.entropy is None


@every_backend
def test_repeats_bit_by_bit(backend: str) -> None:
    p = problem(dtype=torch.bfloat16, n=200)
    tokens = tokens_of(p, torch.full((200,), -5.0))
    runs = [linear_policy_loss(p["hidden"], p["weight"], tokens, LossSpec(), backend=backend) for _ in range(2)]
    grads = [torch.autograd.grad(r.loss, (p["hidden"], p["weight"])) for r in runs]
    assert torch.equal(runs[0].loss, runs[1].loss) and torch.equal(runs[0].metrics, runs[1].metrics)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_rows_do_not_see_each_other(backend: str, dtype: torch.dtype) -> None:
    p = problem(n=600, h=64, v=1031, dtype=dtype)
    targets = p["targets"].clamp(min=0)
    options = {"batch_invariant": True, "backend": backend, "workspace_bytes": 600 * 1031}
    hidden, weight = p["hidden"], p["weight"]
    logp, entropy = linear_logprob(hidden, weight, targets, **options)
    (dx,) = torch.autograd.grad((logp * p["ga"] + entropy * p["gb"]).sum(), hidden)
    for cut in (slice(0, 1), slice(5, 300), slice(599, 600), slice(100, 600)):
        some, some_entropy = linear_logprob(hidden[cut], weight, targets[cut], **options)
        assert torch.equal(some, logp[cut]) and torch.equal(some_entropy, entropy[cut])
        (some_dx,) = torch.autograd.grad((some * p["ga"][cut] + some_entropy * p["gb"][cut]).sum(), hidden)
        assert torch.equal(some_dx[cut], dx[cut])


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 12), h=st.integers(1, 5), v=st.integers(1, 17), rows=st.integers(1, 5), seed=st.integers(0, 99),
    backend=st.sampled_from(BACKENDS), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_shape(n: int, h: int, v: int, rows: int, seed: int, backend: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(a, h, generator=g).to(dtype).requires_grad_() for a in (n, v))
    targets = torch.randint(0, v, (n,), generator=g)
    gradients = []
    for workspace in (None, rows * v * 2):
        logp, entropy = linear_logprob(hidden, weight, targets, workspace_bytes=workspace, backend=backend)
        assert entropy is not None and (logp <= 0).all() and (entropy >= -1e-6).all()
        gradients.append(torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight)))
    for whole, parts in zip(*gradients, strict=True):
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(whole, parts, rtol=rounding, atol=rounding * float(whole.abs().max()) if n else 0)
    tokens = Tokens(targets, torch.randn(n, generator=g))
    out = linear_policy_loss(
        hidden, weight, tokens, LossSpec(entropy_coef=0.1), workspace_bytes=rows * v * 2, backend=backend
    )
    out.loss.backward()
    assert out.loss.isfinite() and hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    if v == 1:
        assert (logp.abs() < 1e-7).all() and (hidden.grad.abs() < 1e-6).all()


def test_float64_inputs_give_a_float64_loss_and_gradient() -> None:
    p = problem(dtype=torch.float64)
    leaves = [p["hidden"], p["weight"], p["bias"]]
    logp, entropy, _ = reference.head(*leaves[:2], p["targets"], p["bias"])
    tokens = tokens_of(p, logp)
    truth = policy_loss(logp, entropy, tokens, LossSpec(beta=0.1)).loss
    loss = linear_policy_loss(*leaves[:2], tokens, LossSpec(beta=0.1), bias=p["bias"]).loss
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, truth)
    for mine, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.usefixtures("few_rows")
@every_backend
@pytest.mark.parametrize("chunk_rows", [1, 9, 17, 1000])
@pytest.mark.parametrize("vocab", [307, 308])  # odd: the product of dX is torch's
def test_a_bf16_weight_gradient_is_one_rounding_of_the_fp32_sum(backend: str, chunk_rows: int, vocab: int) -> None:
    """Whatever the chunks are, and where the last ones, or all but them, have no gradient."""
    p = problem(dtype=torch.bfloat16, v=vocab)
    hidden, weight = p["hidden"], p["weight"]
    for advantages in (torch.ones(50), torch.arange(50) < 25, torch.arange(50) >= 42, torch.zeros(50)):
        tokens = Tokens(torch.arange(50), advantages.float())
        out = linear_policy_loss(
            hidden, weight, tokens, LossSpec(), backend=backend, workspace_bytes=chunk_rows * 2 * vocab
        )
        dx, dw = torch.autograd.grad(out.loss, (hidden, weight))
        logits = (hidden @ weight.T).detach().double().requires_grad_()  # rounded once, as ours are
        logp = torch.log_softmax(logits, -1)[torch.arange(50), tokens.targets]
        (dz,) = torch.autograd.grad(-(logp * tokens.advantages).sum() / 50, logits)
        dz = dz.bfloat16().double()
        for mine, exact in ((dx, dz @ weight.double()), (dw, dz.T @ hidden.double())):
            assert error(mine, exact.detach()) < 4e-3
            assert exact.any() or not mine.any()


def test_what_rows_without_a_gradient_hold_is_not_used() -> None:
    """On a GPU they stay: 0 times NaN would be NaN."""
    hidden, weight, dlogits = torch.randn(5, 8), torch.randn(11, 8), torch.randn(5, 11)
    hidden[2], dlogits[2] = torch.nan, 0
    live = torch.tensor([True, True, False, True, True])
    for factor in (None, live.float()):
        m = Matrices(hidden, weight, None, 5, (True, True, True))
        m.add(dlogits, slice(0, 5), True, factor, live)
        assert m.dx is not None and m.dw is not None and m.db is not None
        assert not m.dx[2].any() and m.dx.isfinite().all() and m.db.isfinite().all()
        torch.testing.assert_close(m.dw, dlogits[live].T @ hidden[live])
