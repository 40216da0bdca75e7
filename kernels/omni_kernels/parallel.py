"""Heads whose weight is spread over processes: split by vocabulary (tensor parallel), or by FSDP2.

Vocabulary-parallel: each rank of a group holds rows [start, start + V_k) of the weight, of any size, and all ranks hold
the same hidden states and tokens. Per chunk of rows each rank forms its own logits and statistics; one all-gather of
three numbers a token (logsumexp, entropy, the target's log-prob) makes them global, merged in rank order on every rank
alike, so all ranks see the same log-probs bit by bit. The logits are never gathered.

Who reduces what: dW and dbias are the shard's own, complete. dX of a rank is only its shard's share; with `reduce_dx`
(the default) it is summed over the group here, in fp32; without, the caller must (say, by a reduce-scatter over the
sequence).

FSDP2: wrap the weight in `PolicyHead` and call that module, so that FSDP's hooks gather the weight. Handing an FSDP
shard to the functions of this package is an error, not a gather behind your back.

Limits: not traceable by torch.compile; needs torch.distributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from omni_kernels import backends, linear
from omni_kernels.gemms import wide_of
from omni_kernels.head import Gradient, Head, Stats, check_range
from omni_kernels.ops import check_head, check_rows, linear_policy_loss
from omni_kernels.plan import Plan, plan
from omni_kernels.spec import IGNORE, LossOutput, LossSpec, Tokens


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: rows from `start` on, of `vocab` over all ranks of `group`."""

    group: dist.ProcessGroup
    start: int
    vocab: int


def vocab_shard(weight: DTensor) -> tuple[Tensor, VocabShard]:
    """(local weight, shard) of a weight [V, H] that is a DTensor sharded over its rows on a one-dimensional mesh.

    The local weight is differentiable: its gradient becomes a DTensor with the placement of `weight`.
    """
    mesh = weight.device_mesh
    if mesh.ndim != 1 or weight.placements[0] != Shard(0):
        given = f"placements {weight.placements} on a {mesh.ndim}-d mesh"
        raise ValueError(f"weight is a DTensor with {given}; give one that is Shard(0) on a 1-d mesh")
    rows, ranks, rank = weight.shape[0], mesh.size(), mesh.get_local_rank()
    return weight.to_local(), VocabShard(mesh.get_group(), min(rows, rank * -(-rows // ranks)), rows)


def vocab_parallel_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, *, bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0, softcap: float | None = None, want_entropy: bool = True,
    reduce_dx: bool = True, workspace_bytes: int | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`linear_logprob` of a sharded head: weight [V_k, H] and bias [V_k] are this rank's, targets the global tokens."""
    head = _head(hidden, weight, bias, targets, shard, inv_temperature, softcap, workspace_bytes, backend)
    return _Logprob.apply(hidden, weight, bias, targets.contiguous(), head, want_entropy, reduce_dx)


def vocab_parallel_policy_loss(
    hidden: Tensor, weight: Tensor, tokens: Tokens, spec: LossSpec, shard: VocabShard, *, bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0, softcap: float | None = None, want_entropy: bool = True,
    return_tokens: bool = False, reduce_dx: bool = True, workspace_bytes: int | None = None, backend: str | None = None,
) -> LossOutput:  # fmt: skip
    """`linear_policy_loss` of a sharded head. Loss and metrics are the same on every rank: count them once."""
    head = _head(hidden, weight, bias, tokens.targets, shard, inv_temperature, softcap, workspace_bytes, backend)
    want_entropy = want_entropy or spec.needs_entropy
    loss, metrics, logp, entropy = _PolicyLoss.apply(hidden, weight, bias, tokens, spec, head, want_entropy, reduce_dx)
    return LossOutput(loss, metrics, logp, entropy) if return_tokens else LossOutput(loss, metrics)


class PolicyHead(nn.Module):
    """`linear_policy_loss` as a module that holds the weight (tied or not), for `fully_shard` to wrap.

    Between its hooks the weight is whole. The loss is that of the rank's own tokens with the global normaliser, so its
    gradients must be summed over ranks, not averaged: after `fully_shard`, call `set_gradient_divide_factor(1.0)` (with
    gloo also `set_force_sum_reduction_for_comms(True)`).
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden: Tensor, tokens: Tokens, spec: LossSpec, **options: Any) -> LossOutput:
        """Options are those of `linear_policy_loss`."""
        return linear_policy_loss(hidden, self.weight, tokens, spec, bias=self.bias, **options)


@dataclass(frozen=True)
class _ShardedHead(Head):
    shard: VocabShard | None = None

    def plan(self, hidden: Tensor, weight: Tensor, row_wise: bool, needs_dw: bool) -> Plan:
        # every rank must cut the same chunks, whatever the size of its own shard
        assert self.shard is not None
        vocab = -(-self.shard.vocab // dist.get_world_size(self.shard.group))
        size = (len(hidden), hidden.shape[1], vocab, hidden.element_size())
        return plan(*size, self.workspace_bytes, row_wise, hidden.device.type, needs_dw)

    @property
    def may_take_all(self) -> bool:
        return False  # it depends on the processor, and another rank may have another one

    def check_targets(self, targets: Tensor, weight: Tensor) -> None:
        assert self.shard is not None
        check_range(targets, self.shard.vocab, self.inv_temperature)

    def policy_loss_(self, *_: object) -> None:
        return None  # the loss needs the other ranks' statistics in between

    def exponentials(self, *_: object) -> None:
        return None  # likewise

    def forward(self, logits: Tensor, targets: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        if len(logits) == 0:
            return super().forward(logits, targets, want_entropy)
        assert self.shard is not None
        local, owned = self.localised(logits, targets)
        logp, entropy, lse = super().forward(logits, local, want_entropy)
        logp = torch.where(owned, logp, -torch.inf)
        mine = torch.stack([lse, logp, torch.zeros_like(lse) if entropy is None else entropy])
        ranks = dist.get_world_size(self.shard.group)
        parts = mine.new_empty(ranks * 3, len(lse))
        dist.all_gather_into_tensor(parts, mine, group=self.shard.group)
        all_lse, all_logp, all_entropy = parts.view(ranks, 3, -1).double().unbind(1)
        total = torch.logsumexp(all_lse, 0)
        log_share = all_lse - total  # of each shard in the probability
        used = targets != IGNORE
        logp = torch.where(used, (all_logp + log_share).amax(0), 0).to(lse.dtype)
        if entropy is not None:
            parts = torch.where(log_share == -torch.inf, 0, log_share.exp() * (all_entropy - log_share))
            entropy = torch.where(used, parts.sum(0), 0).to(lse.dtype)
        return logp, entropy, torch.where(used, total, 0).to(lse.dtype)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, spec, head, want_entropy, reduce_dx):
        result = linear.policy_head(hidden, weight, bias, tokens, spec, head, want_entropy, ctx.needs_input_grad[:3])
        ctx.save_for_backward(_reduced(result.dx, head, reduce_dx), result.dw, result.db)
        ctx.mark_non_differentiable(result.metrics, result.stats.logp)
        if result.stats.entropy is not None:
            ctx.mark_non_differentiable(result.stats.entropy)
        return result.loss, result.metrics, result.stats.logp, result.stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        return *(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors), *[None] * 5


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head, want_entropy, reduce_dx):
        stats, _ = linear.logprob_forward(hidden, weight, bias, targets, head, want_entropy, None)
        ctx.save_for_backward(hidden, weight, bias, targets, stats.logp, stats.entropy, stats.lse)
        ctx.head, ctx.reduce_dx = head, reduce_dx
        return stats.logp, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, bias, targets, logp, entropy, lse = ctx.saved_tensors
        gradient = Gradient(grad_logp.contiguous(), None if entropy is None else grad_entropy.contiguous())
        dx, dw, db = linear.logprob_backward(
            hidden, weight, bias, targets, Stats(logp, entropy, lse), gradient, ctx.head, ctx.needs_input_grad[:3]
        )
        return _reduced(dx, ctx.head, ctx.reduce_dx), dw, db, None, None, None, None


def _reduced(dx: Tensor | None, head: _ShardedHead, reduce_dx: bool) -> Tensor | None:
    if dx is None or not reduce_dx:
        return dx
    assert head.shard is not None
    total = dx.to(wide_of(dx.dtype))
    dist.all_reduce(total, group=head.shard.group)
    return total.to(dx.dtype)


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabShard,
    inv_temperature: float | Tensor, softcap: float | None, workspace_bytes: int | None, backend: str | None,
) -> _ShardedHead:  # fmt: skip
    check_head(hidden, weight, bias, None)
    check_rows(hidden, targets, inv_temperature, softcap, "hidden")
    if shard.start < 0 or shard.start + len(weight) > shard.vocab:
        rows = f"[{shard.start}, {shard.start + len(weight)})"
        raise ValueError(f"the shard holds rows {rows} of a vocabulary of {shard.vocab}; give each rank rows of it")
    if isinstance(inv_temperature, Tensor):
        inv_temperature = inv_temperature.to(wide_of(hidden.dtype)).contiguous()
    module = backends.select(hidden.device, hidden.dtype, backend)
    return _ShardedHead(module, inv_temperature, softcap, workspace_bytes, 0, shard.start, shard)
