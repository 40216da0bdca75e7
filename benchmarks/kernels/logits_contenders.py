"""Question C1, logits to loss and dloss/dlogits: who competes.

The loss is GRPO with clipping (token level, DAPO's normaliser), with the log-prob and the entropy of each token, as a trainer
needs them. The peers' formulas are written here from their definitions: TRL's `selective_log_softmax` (gather minus logsumexp row
by row in fp32, log_softmax row by row in bf16) and its entropy in chunks of 128 rows without gradient.

The limit is a copy of the logits, one read and one write; "update in place" moves the same bytes without fetching the destination
first, and is listed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.scoreboard import Contender, Run, Unavailable
from omni_kernels import LossSpec, Tokens, backends
from omni_kernels.losses import coefficients, prepare

SPEC = LossSpec.preset("dapo")


@dataclass(frozen=True)
class LogitsCase:
    tokens: int
    vocab: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"N={self.tokens} V={self.vocab}"


@dataclass(frozen=True)
class LogitsData:
    logits: Tensor
    work: Tensor  # a copy that a contender may overwrite
    tokens: Tokens


def make(case: LogitsCase) -> LogitsData:
    g = torch.Generator().manual_seed(0)
    logits = torch.empty(case.tokens, case.vocab, dtype=case.dtype)
    for row in logits:
        row.copy_(torch.randn(case.vocab, generator=g) * 2)
    targets = torch.randint(0, case.vocab, (case.tokens,), generator=g)
    picked = logits.gather(1, targets[:, None])[:, 0].float()
    old = picked - logits[:64].float().logsumexp(1).mean() + torch.randn(case.tokens, generator=g) * 0.1
    tokens = Tokens(targets, torch.randn(case.tokens, generator=g), old=old)
    return LogitsData(logits, torch.empty_like(logits), tokens)


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


def _differentiated(data: LogitsData, statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Run:
    leaf = data.logits.detach().requires_grad_()

    def call() -> None:
        logp, _ = statistics(leaf, data.tokens.targets)
        torch.autograd.grad(clipped_loss(logp.float(), data.tokens), leaf)

    return Run(call)


def trl_eager(data: LogitsData) -> Run:
    return _differentiated(data, lambda logits, y: (trl_logp(logits, y), trl_entropy(logits.detach())))


def compiled(form: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[LogitsData], Run]:
    def build(data: LogitsData) -> Run:
        torch._dynamo.reset()
        return _differentiated(data, torch.compile(form, dynamic=False))

    return build


def in_backend(name: str) -> Callable[[LogitsData], Run]:
    def build(data: LogitsData) -> Run:
        reason = backends.reason_unavailable(name)
        if reason is not None:
            raise Unavailable(reason)
        rows = backends.select(data.logits.device, data.logits.dtype, name)
        tokens = data.tokens

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


def copy(data: LogitsData) -> Run:
    return Run(lambda: data.work.copy_(data.logits))


def update_in_place(data: LogitsData) -> Run:
    return Run(lambda: data.work.mul_(1.0))


CONTENDERS: list[Contender[LogitsData]] = [
    Contender("limit: copy", "limit", copy),
    Contender("update in place", "context", update_in_place),
    Contender("omni_kernels, C++", "ours", in_backend("cpu")),
    Contender("omni_kernels, torch", "context", in_backend("torch")),
    Contender("TRL formulas, eager", "peer", trl_eager),
    Contender("log_softmax, torch.compile", "peer", compiled(log_softmax_form)),
    Contender("logsumexp, torch.compile", "peer", compiled(logsumexp_form)),
]
