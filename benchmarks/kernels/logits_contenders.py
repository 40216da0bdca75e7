"""Questions C1 and T2, logits to loss and dloss/dlogits, and T1, logits to log-prob and entropy: who competes.

The loss is GRPO with clipping (token level, DAPO's normaliser), with the log-prob and the entropy of each token, as a trainer
needs them. The peers' formulas are written here from their definitions: TRL's `selective_log_softmax` (gather minus logsumexp row
by row in fp32, log_softmax row by row in bf16) and its entropy in chunks of 128 rows without gradient.

The limit is a copy of the logits, one read and one write; "update in place" moves the same bytes without fetching the destination
first, and is listed beside it. T1 only reads: its limit is a copy of half of the rows, which moves as many bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.scoreboard import Contender, Run, Unavailable
from omni_kernels import LossSpec, Tokens, backends
from omni_kernels.losses import coefficients, prepare

SPEC = LossSpec.preset("dapo")
LEFT_OUT: dict[str, str] = {}  # backends that are not to compete, and why


@dataclass(frozen=True)
class LogitsCase:
    tokens: int
    vocab: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"N={self.tokens} V={self.vocab}"


@dataclass(frozen=True)
class LogitsData:
    logits: Tensor
    work: Tensor  # a copy that a contender may overwrite
    tokens: Tokens


def make(case: LogitsCase) -> LogitsData:
    g = torch.Generator(case.device).manual_seed(0)
    logits = torch.empty(case.tokens, case.vocab, dtype=case.dtype, device=case.device)
    for rows in logits.split(64):
        rows.copy_(torch.randn(rows.shape, generator=g, device=case.device) * 2)
    targets = torch.randint(0, case.vocab, (case.tokens,), generator=g, device=case.device)
    picked = logits.gather(1, targets[:, None])[:, 0].float()
    noise, advantages = torch.randn(2, case.tokens, generator=g, device=case.device)
    old = picked - logits[:64].float().logsumexp(1).mean() + noise * 0.1
    return LogitsData(logits, torch.empty_like(logits), Tokens(targets, advantages, old=old))


def clipped_loss(logp: Tensor, tokens: Tokens) -> Tensor:
    """PPO's clipped surrogate, mean over tokens, eps 0.2 / 0.28."""
    assert tokens.old is not None
    ratio = (logp - tokens.old).exp()
    bounded = ratio.clamp(1 - SPEC.eps_low, 1 + SPEC.eps_high)
    return -torch.minimum(ratio * tokens.advantages, bounded * tokens.advantages).mean()


def trl_logp(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.dtype == torch.float32:
        picked = logits.gather(-1, targets[:, None])[:, 0]
        return picked - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    rows = [F.log_softmax(row, dim=-1).gather(-1, y[None])[0] for row, y in zip(logits, targets, strict=True)]
    return torch.stack(rows)


@torch.no_grad()
def trl_entropy(logits: Tensor) -> Tensor:
    parts = []
    for chunk in logits.split(128):
        log_p = F.log_softmax(chunk, dim=-1)
        parts.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(parts)


def log_softmax_form(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(logits.float(), dim=-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.detach().exp() * log_p.detach()).sum(-1)


def logsumexp_form(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.float()
    lse = torch.logsumexp(z, dim=-1)
    kept = z.detach()
    entropy = lse.detach() - ((kept - lse.detach()[:, None]).exp() * kept).sum(-1)
    return z.gather(-1, targets[:, None])[:, 0] - lse, entropy


Form = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (logits, targets) -> log-prob, entropy


def _differentiated(data: LogitsData, form: Form) -> Run:
    leaf = data.logits.detach().requires_grad_()

    def call() -> None:
        logp, _ = form(leaf, data.tokens.targets)
        torch.autograd.grad(clipped_loss(logp.float(), data.tokens), leaf)

    return Run(call)


def _forward_only(data: LogitsData, form: Form) -> Run:
    return Run(torch.no_grad()(lambda: form(data.logits, data.tokens.targets)))


def trl_form(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return trl_logp(logits, targets), trl_entropy(logits.detach())


def eager(how: Callable[[LogitsData, Form], Run], form: Form) -> Callable[[LogitsData], Run]:
    return lambda data: how(data, form)


def compiled(how: Callable[[LogitsData, Form], Run], form: Form) -> Callable[[LogitsData], Run]:
    def build(data: LogitsData) -> Run:
        return how(data, torch.compile(form, dynamic=False))

    return build


def require(backend: str) -> None:
    """Raises Unavailable where a backend cannot run, or is not to."""
    reason = LEFT_OUT.get(backend) or backends.reason_unavailable(backend)
    if reason is not None:
        raise Unavailable(reason)


def _rows(data: LogitsData, name: str) -> ModuleType:
    require(name)
    return backends.select(data.logits.device, data.logits.dtype, name)


def in_backend(name: str) -> Callable[[LogitsData], Run]:
    """Loss and gradient: in one sweep where the backend has one."""

    def build(data: LogitsData) -> Run:
        rows, tokens = _rows(data, name), data.tokens

        def sweep() -> None:
            batch = prepare(tokens, SPEC, torch.float32)
            statistics = rows.rows_policy_loss_(data.work, tokens.targets, batch, SPEC)
            coefficients(*statistics, batch, SPEC)

        def two_passes() -> None:
            batch = prepare(tokens, SPEC, torch.float32)
            statistics = rows.rows_forward(data.work, tokens.targets, 1.0, None, True)
            known = coefficients(*statistics, batch, SPEC)
            rows.rows_backward_(data.work, tokens.targets, statistics[2], statistics[1], known.a, known.b, 1.0, None)

        call = sweep if hasattr(rows, "rows_policy_loss_") else two_passes
        return Run(call, lambda: data.work.copy_(data.logits))

    return build


def forward_in_backend(name: str) -> Callable[[LogitsData], Run]:
    def build(data: LogitsData) -> Run:
        rows = _rows(data, name)
        return Run(lambda: rows.rows_forward(data.logits, data.tokens.targets, 1.0, None, True))

    return build


def liger_forward(data: LogitsData) -> Run:
    """Log-probs alone: the op has no entropy."""
    return Run(lambda: _liger().fused_selective_log_softmax(*_as_batch(data), temperature=1.0))


def liger_loss(data: LogitsData) -> Run:
    function = _liger().GrpoLossFunction
    _, ids = _as_batch(data)
    leaf, tokens = data.work.detach().view(len(ids), -1, data.work.shape[1]).requires_grad_(), data.tokens
    assert tokens.old is not None
    old, advantages = tokens.old.view(len(ids), -1)[:, :-1].contiguous(), tokens.advantages[: len(ids)].contiguous()

    def call() -> None:
        value, *_ = function.apply(
            leaf, old, None, ids, advantages, torch.ones_like(ids), 1.0, 0.0, SPEC.eps_low, SPEC.eps_high, True, "dapo"
        )
        torch.autograd.grad(value.sum(), leaf)

    return Run(call, lambda: data.work.copy_(data.logits))


def _liger() -> ModuleType:
    try:
        return importlib.import_module("liger_kernel.ops.grpo_loss")
    except ImportError as error:
        raise Unavailable(str(error)) from error


def _as_batch(data: LogitsData) -> tuple[Tensor, Tensor]:
    """Liger's op takes [B, L + 1, V] and leaves the last position out: 8 sequences, one row less each."""
    if not data.logits.is_cuda:
        raise Unavailable("a Triton kernel: it needs a GPU")
    logits = data.logits.view(8, -1, data.logits.shape[1])
    return logits, data.tokens.targets.view(8, -1)[:, :-1].contiguous()


def copy(data: LogitsData) -> Run:
    return Run(lambda: data.work.copy_(data.logits))


def copy_half(data: LogitsData) -> Run:
    half = len(data.logits) // 2
    return Run(lambda: data.work[:half].copy_(data.logits[:half]))


def update_in_place(data: LogitsData) -> Run:
    return Run(lambda: data.work.mul_(1.0))


_LOSS_PEERS: list[Contender[LogitsData]] = [
    Contender("TRL formulas, eager", "peer", eager(_differentiated, trl_form)),
    Contender("log_softmax, torch.compile", "peer", compiled(_differentiated, log_softmax_form)),
    Contender("logsumexp, torch.compile", "peer", compiled(_differentiated, logsumexp_form)),
]
C1: list[Contender[LogitsData]] = [
    Contender("limit: copy", "limit", copy),
    Contender("update in place", "context", update_in_place),
    Contender("omni_kernels, C++", "ours", in_backend("cpu")),
    Contender("omni_kernels, torch", "context", in_backend("torch")),
    *_LOSS_PEERS,
]
T1: list[Contender[LogitsData]] = [
    Contender("limit: copy of half the rows", "limit", copy_half),
    Contender("omni_kernels, Triton", "ours", forward_in_backend("triton")),
    Contender("omni_kernels, CUDA", "ours", forward_in_backend("cuda")),
    Contender("TRL formulas, eager", "peer", eager(_forward_only, trl_form)),
    Contender("log_softmax, torch.compile", "peer", compiled(_forward_only, log_softmax_form)),
    Contender("logsumexp, torch.compile", "peer", compiled(_forward_only, logsumexp_form)),
    Contender("Liger Triton (no entropy)", "peer", liger_forward),
]
T2: list[Contender[LogitsData]] = [
    Contender("limit: copy", "limit", copy),
    Contender("update in place", "context", update_in_place),
    Contender("omni_kernels, Triton", "ours", in_backend("triton")),
    Contender("omni_kernels, CUDA", "ours", in_backend("cuda")),
    Contender("omni_kernels, torch", "context", in_backend("torch")),
    *_LOSS_PEERS,
    Contender("Liger Triton (no entropy)", "peer", liger_loss),
]
