"""What PyTorch does with the operators: graphs kept and run again, opcheck, torch.compile, autocast, what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from head_problem import every_backend, problem, tokens_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from omni_kernels import (
    LossSpec,
    Tokens,
    linear_logprob,
    linear_policy_loss,
    logits_logprob,
    policy_loss,
)


def test_retained_graph_gives_the_same_gradient_again() -> None:
    p = problem()
    tokens = tokens_of(p, torch.full((50,), -5.0))
    for loss in (
        linear_policy_loss(p["hidden"], p["weight"], tokens, LossSpec()).loss,
        linear_logprob(p["hidden"], p["weight"], p["targets"])[0].sum(),
        logits_logprob(p["hidden"] @ p["weight"].T, p["targets"])[0].sum(),
    ):
        one = torch.autograd.grad(loss, p["hidden"], retain_graph=True)[0]
        two = torch.autograd.grad(loss, p["hidden"], retain_graph=True)[0]
        assert torch.equal(one, two)


def test_in_place_gradient_runs_once() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    loss = logits_logprob(logits, torch.zeros(4, dtype=torch.int64), in_place=True)[0].sum()
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("which", ["fused", "linear", "logits"])
def test_second_order_is_a_clear_error(which: str) -> None:
    p = problem()
    tokens = tokens_of(p, torch.full((50,), -5.0))
    loss = {
        "fused": lambda: linear_policy_loss(p["hidden"], p["weight"], tokens, LossSpec()).loss,
        "linear": lambda: linear_logprob(p["hidden"], p["weight"], p["targets"])[0].sum(),
        "logits": lambda: logits_logprob(p["hidden"] @ p["weight"].T, p["targets"])[0].sum(),
    }[which]()
    with pytest.raises(RuntimeError, match="first order"):
        torch.autograd.grad(loss, p["hidden"], create_graph=True)


def test_forward_mode_is_a_clear_error() -> None:
    """torch gives an operator without a rule a derivative of 0."""
    p = problem()
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: linear_logprob(x, p["weight"], p["targets"])[0], (p["hidden"],), (p["hidden"],))


def test_opcheck() -> None:
    p = problem(n=9, v=31)
    ops = torch.ops.omni_kernels
    tokens = tokens_of(p, torch.full((9,), -3.0))
    how = (None, 1.0, 0.0, LossSpec(entropy_coef=0.1).encoded, True, True, True, True, 0, 0, "torch")
    vectors = (
        tokens.targets, tokens.advantages, tokens.mask, tokens.sequences, tokens.old, tokens.reference, tokens.rollout,
        None, None, p["row_scale"],
    )  # fmt: skip
    head = (p["hidden"], p["weight"], p["bias"])
    torch.library.opcheck(ops.linear_policy_loss, (*head, None, *vectors, *how))
    torch.library.opcheck(ops.linear_logprob, (*head, None, tokens.targets, None, 1.0, 0.0, True, 3, 0, 0, "torch"))
    logits = torch.randn(9, 31, requires_grad=True)
    torch.library.opcheck(ops.logits_logprob, (logits, tokens.targets, p["row_scale"], 1.0, 4.0, True, False, "torch"))


@pytest.mark.parametrize("which", ["fused", "linear", "logits", "loss"])
def test_compiles_as_one_graph(which: str) -> None:
    p = problem()
    tokens = tokens_of(p, torch.full((50,), -5.0))
    spec = LossSpec.preset("gspo", beta=0.1, entropy_coef=0.1)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        if which == "fused":
            return linear_policy_loss(hidden, weight, tokens, spec, bias=p["bias"], softcap=8.0).loss * 2
        if which == "linear":
            logp, entropy = linear_logprob(hidden, weight, tokens.targets, inv_temperature=p["row_scale"])
        else:
            logp, entropy = logits_logprob(hidden @ weight.T, tokens.targets)
        if which == "loss":
            return policy_loss(logp, entropy, tokens, spec).loss
        return (logp * p["ga"] + entropy * p["gb"]).sum()

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, traced = run(p["hidden"], p["weight"]), compiled(p["hidden"], p["weight"])
    torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(v, (p["hidden"], p["weight"])) for v in (eager, traced)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["fused", "linear", "logits", "loss"])
def test_one_graph_serves_every_number_of_tokens(which: str) -> None:
    spec = LossSpec(beta=0.1, entropy_coef=0.1)

    def run(hidden: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
        if which == "fused":
            return linear_policy_loss(hidden, weight, tokens, spec).loss
        if which == "linear":
            logp, entropy = linear_logprob(hidden, weight, tokens.targets)
        else:
            logp, entropy = logits_logprob(hidden @ weight.T, tokens.targets)
        return policy_loss(logp, entropy, tokens, spec).loss if which == "loss" else (logp + entropy).sum()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for n in (50, 41, 63):
        p = problem(n, 6, 31)
        tokens = tokens_of(p, torch.full((n,), -3.0))
        if n == 50:
            for tensor in (p["hidden"], *(t for t in vars(tokens).values() if isinstance(t, Tensor))):
                torch._dynamo.mark_dynamic(tensor, 0)
        inputs = p["hidden"], p["weight"]
        grads = [torch.autograd.grad(call(*inputs, tokens), inputs) for call in (run, compiled)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


@every_backend
def test_gemms_keep_their_dtype_under_autocast(backend: str) -> None:
    p = problem(200, 24, 307)
    tokens, leaves = tokens_of(p, torch.full((200,), -5.0)), (p["hidden"], p["weight"])

    def run(**options: object) -> list[Tensor]:
        out = linear_policy_loss(*leaves, tokens, LossSpec(), backend=backend, workspace_bytes=60 * 307 * 4, **options)
        logp, _ = linear_logprob(*leaves, tokens.targets, backend=backend)
        return [out.loss.detach(), *torch.autograd.grad(out.loss + (logp * p["ga"]).sum(), leaves)]

    for options in ({}, {"batch_invariant": True}):
        alone = run(**options)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, run(**options), alone))


def test_a_second_backward_adds_the_same_gradient_again() -> None:
    p = problem()
    tokens = replace(tokens_of(p, torch.zeros(50)), old=None, rollout=None)
    leaves = [p["hidden"], p["weight"]]
    loss = linear_policy_loss(*leaves, tokens, LossSpec()).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    (loss * 2).backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, 4 * gradient)
