"""verl's two fused heads, by their signatures: `linear_cross_entropy` (Megatron engine) and `FusedLinearForPPO` (FSDP).

What verl calls cross-entropy returns the log-prob of each label and the entropy of each row, both differentiable. The
signatures are those of verl/utils/kernel/linear_cross_entropy.py and verl/utils/experimental/torch_functional.py
(github.com/verl-project/verl, August 2026). Beyond verl's: any hidden size, CPU tensors, labels of -100 (log-prob and
entropy 0, no gradient), a temperature per token in both. Different: results are fp32 whatever the input is.

Limits: verl itself is not imported and was not run; the callables are tested on their own, over two gloo ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omni_kernels.ops import linear_logprob
from omni_kernels.parallel import VocabShard, vocab_parallel_logprob


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: dist.ProcessGroup | None = None,
    *,
    reduce_dx: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), fp32 nats, of logits hidden @ weight.T / temperature.

    hidden [..., H]; labels int64 of the same leading shape, N in all; temperature: a number or N of them.
    reduction: of the log-probs, "none" [N], "sum" or "mean" (scalar); the entropy is always [N].
    dist_process_group: tensor parallelism; weight [V / ranks, H] is the rank's equal share of the rows, in rank order,
        labels are tokens of the whole vocabulary. As in verl, the gradient of hidden is then only the share of this
        rank's rows, for the gather of sequence parallelism to sum; reduce_dx sums it over the group here.
    Raises ValueError on input that does not fit.
    """
    x, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    inv_temperature = _inverse(1.0 if temperature is None else temperature)
    if dist_process_group is None:
        logp, entropy = linear_logprob(x, weight, y, inv_temperature=inv_temperature)
    else:
        rank, ranks = dist.get_rank(dist_process_group), dist.get_world_size(dist_process_group)
        shard = VocabShard(dist_process_group, rank * len(weight), ranks * len(weight))
        logp, entropy = vocab_parallel_logprob(
            x, weight, y, shard, inv_temperature=inv_temperature, reduce_dx=reduce_dx
        )
    assert entropy is not None
    if reduction in (None, "none"):
        return logp, entropy
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; use 'none', 'sum' or 'mean'")
    return (logp.sum() if reduction == "sum" else logp.mean()), entropy


class FusedLinearForPPO(nn.Module):
    """verl's module of that name. chunk_size: rows of logits held at a time."""

    def __init__(self, chunk_size: int = 512) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log-probs, entropy), fp32 of the shape of input_ids ([N] or [B, L]); hidden_states [..., H], weights [V, H].

        temperature: a number, or one per token.
        """
        logp, entropy = linear_logprob(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            vocab_weights,
            input_ids.reshape(-1).to(torch.int64),
            inv_temperature=_inverse(temperature),
            workspace_bytes=self.chunk_size * len(vocab_weights) * hidden_states.element_size(),
        )
        assert entropy is not None
        return logp.view_as(input_ids), entropy.view_as(input_ids)


def _inverse(temperature: float | Tensor) -> float | Tensor:
    """1 / temperature: a number, or flat, one per token."""
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    return 1.0 / (temperature.item() if temperature.numel() == 1 else temperature.reshape(-1).float())
