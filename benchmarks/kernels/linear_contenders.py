"""Question C2, hidden states and head to loss, dX and dW: who competes.

The loss is the one of C1. The limit is three full-size GEMMs (logits, dX, dW) of the same shapes and dtype, into buffers that
exist. Contenders marked cross-entropy solve the simpler task that their names say, and are listed for context.

Peers come from the packages `trl` and `liger-kernel` where they are installed (`pip install --no-deps`). TRL's function imports
its trainer package, with pandas and datasets, for one FSDP context manager; where these are absent it gets a null context.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.logits_contenders import SPEC, clipped_loss, logsumexp_form, trl_entropy, trl_logp
from benchmarks.scoreboard import Contender, Run, Unavailable
from omni_kernels import Tokens, backends, linear_policy_loss

_TRL_CHUNK = 32768  # columns, as its trainers set it
_SEQUENCES = 8  # of equal length: Liger's op takes a batch of sequences


@dataclass(frozen=True)
class LinearCase:
    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"N={self.tokens} H={self.hidden} V={self.vocab}"


@dataclass(frozen=True)
class LinearData:
    hidden: Tensor
    weight: Tensor
    tokens: Tokens


def make(case: LinearCase) -> LinearData:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.tokens, case.hidden, generator=g).to(case.dtype)
    weight = (torch.randn(case.vocab, case.hidden, generator=g) * 2 * case.hidden**-0.5).to(case.dtype)
    targets = torch.randint(0, case.vocab, (case.tokens,), generator=g)
    picked = (hidden.float() * weight[targets].float()).sum(-1)
    old = picked - torch.log(torch.tensor(float(case.vocab))) - 2 + torch.randn(case.tokens, generator=g) * 0.1
    advantages = torch.randn(_SEQUENCES, generator=g).repeat_interleave(case.tokens // _SEQUENCES)
    return LinearData(hidden, weight, Tokens(targets, advantages, old=old))


def _leaves(data: LinearData) -> tuple[Tensor, Tensor]:
    return data.hidden.detach().requires_grad_(), data.weight.detach().requires_grad_()


def _from_logp(data: LinearData, logp: Callable[[Tensor, Tensor], Tensor]) -> Run:
    x, w = _leaves(data)
    return Run(lambda: torch.autograd.grad(clipped_loss(logp(x, w).float(), data.tokens), (x, w)))


def three_gemms(data: LinearData) -> Run:
    x, w = data.hidden, data.weight
    logits, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def call() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.t(), x, out=dw)

    return Run(call)


def ours(backend: str) -> Callable[[LinearData], Run]:
    def build(data: LinearData) -> Run:
        reason = backends.reason_unavailable(backend)
        if reason is not None:
            raise Unavailable(reason)
        x, w = _leaves(data)
        return Run(
            lambda: torch.autograd.grad(linear_policy_loss(x, w, data.tokens, SPEC, backend=backend).loss, (x, w))
        )

    return build


def trl_full_logits(data: LinearData) -> Run:
    def logp(x: Tensor, w: Tensor) -> Tensor:
        logits = x @ w.t()
        trl_entropy(logits.detach())
        return trl_logp(logits, data.tokens.targets)

    return _from_logp(data, logp)


def compiled_full_logits(data: LinearData) -> Run:
    torch._dynamo.reset()
    form = torch.compile(logsumexp_form, dynamic=False)
    return _from_logp(data, lambda x, w: form(x @ w.t(), data.tokens.targets)[0])


def trl_chunked(data: LinearData) -> Run:
    try:
        function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    except ImportError as error:
        raise Unavailable(str(error)) from error
    try:
        importlib.import_module("trl.trainer.utils")
    except ImportError:
        stand_in = types.ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
        package = types.ModuleType("trl.trainer")
        package.__path__ = []
        sys.modules |= {"trl.trainer": package, "trl.trainer.utils": stand_in}
    y = data.tokens.targets
    return _from_logp(data, lambda x, w: function.apply(x, w, None, y, 1.0, _TRL_CHUNK, None, 1.0, ("entropy",))[0])


def liger(compile_it: bool) -> Callable[[LinearData], Run]:
    def build(data: LinearData) -> Run:
        try:
            module = importlib.import_module("liger_kernel.chunked_loss")
        except ImportError as error:
            raise Unavailable(str(error)) from error
        torch._dynamo.reset()
        loss = module.LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=compile_it, use_ref_model=False, epsilon_low=SPEC.eps_low, epsilon_high=SPEC.eps_high,
            loss_type="dapo",
        )  # fmt: skip
        x, w = _leaves(data)
        assert data.tokens.old is not None
        ids, old = (v.view(_SEQUENCES, -1) for v in (data.tokens.targets, data.tokens.old))
        advantages = data.tokens.advantages.view(_SEQUENCES, -1)[:, 0].contiguous()
        mask = torch.ones_like(ids)

        def call() -> None:
            value, *_ = loss(x.view(_SEQUENCES, -1, x.shape[1]), w, ids, mask, advantages, old_per_token_logps=old)
            torch.autograd.grad(value, (x, w))

        return Run(call)

    return build


def torch_cross_entropy(data: LinearData) -> Run:
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    x, w = _leaves(data)
    return Run(lambda: torch.autograd.grad(fused(x, w, data.tokens.targets), (x, w)))


def apple_cross_entropy(data: LinearData) -> Run:
    try:
        fused = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        raise Unavailable(str(error)) from error
    x, w = _leaves(data)
    impl = "cce" if x.is_cuda else "torch_compile"
    return Run(lambda: torch.autograd.grad(fused(x, w, data.tokens.targets, impl=impl), (x, w)))


CONTENDERS: list[Contender[LinearData]] = [
    Contender("limit: three GEMMs", "limit", three_gemms),
    Contender("omni_kernels, C++", "ours", ours("cpu")),
    Contender("omni_kernels, torch", "context", ours("torch")),
    Contender("TRL formulas on full logits", "peer", trl_full_logits),
    Contender("logsumexp on full logits, torch.compile", "peer", compiled_full_logits),
    Contender("TRL ChunkedLogProbFunction", "peer", trl_chunked),
    Contender("LigerFusedLinearGRPOLoss", "peer", liger(False)),
    Contender("LigerFusedLinearGRPOLoss, compiled", "peer", liger(True)),
    Contender("torch linear_cross_entropy (cross-entropy)", "context", torch_cross_entropy),
    Contender("cut-cross-entropy (cross-entropy)", "context", apple_cross_entropy),
]
