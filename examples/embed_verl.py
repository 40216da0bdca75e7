"""verl's linear_cross_entropy on omni_kernels, on one process or with the vocabulary split over several.

    python examples/embed_verl.py
    torchrun --nproc-per-node 2 examples/embed_verl.py

In verl, the function takes the place of its own, in the modules that have imported it:

    from omni_kernels.adapters import verl as omni
    verl.models.mcore.model_forward_fused.linear_cross_entropy = omni.linear_cross_entropy

Needs torch only. verl itself was not at hand when this was written.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from omni_kernels.adapters.verl import linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY, TEMPERATURE = 64, 48, 1000, 0.8


def main() -> None:
    group, rank, ranks = None, 0, 1
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))

    mine = weight.chunk(ranks)[rank].clone().requires_grad_()
    logp, entropy = linear_cross_entropy(hidden, mine, labels, TEMPERATURE, "none", group)
    (-logp.mean() - 0.01 * entropy.mean()).backward()

    log_p = torch.log_softmax(hidden @ weight.T / TEMPERATURE, -1)
    error = (logp - log_p.gather(1, labels[:, None])[:, 0]).abs().max().item()
    entropy_error = (entropy + (log_p.exp() * log_p).sum(-1)).abs().max().item()
    assert mine.grad is not None
    if rank == 0:
        print(f"{ranks} process(es), {len(mine)} rows of the weight each; log-prob within {error:.1e} of all logits',")
        print(f"entropy within {entropy_error:.1e}; norm of this rank's weight gradient {mine.grad.norm():.4f}")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
