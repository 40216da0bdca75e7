"""FlexAttention over prefix trees: the rule k <= q < end[k], its blocks, and values and gradients of the bucketed path.

And the alternatives that benchmarks/train/gpu_levers.py measures on a GPU: chains for varlen kernels, compiled layers.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaForCausalLM

from benchmarks.train import flex_attention, gpu_levers
from omni_fast.policy import tree_attention
from omni_fast.policy.pack import Share, Trajectory, pack
from omni_fast.policy.tree_attention import TreeLayout
from omni_fast.policy.update import Policy
from omni_kernels import LossSpec

CPU = torch.device("cpu")
parents = st.integers(1, 40).flatmap(lambda count: st.tuples(*[st.floats(0, 1) for _ in range(count)]).map(depth_first))


def depth_first(draws: tuple[float, ...]) -> list[int]:
    """A tree in depth-first order: a new row hangs under any row of the path to the one before it, or none."""
    tree: list[int] = []
    path: list[int] = []
    for row, draw in enumerate(draws):
        del path[round(draw * len(path)) :]
        tree.append(path[-1] if path else -1)
        path.append(row)
    return tree


def sees(layout: TreeLayout) -> torch.Tensor:
    """bool [T, T] out of the buckets, without what pads them."""
    rows = len(layout.place)
    places = []  # of each row of each bucket: which columns it sees
    for bucket in layout.buckets:
        blocks, height, width = bucket.shape
        columns = bucket.columns.view(blocks, 1, width).expand(-1, height, -1).reshape(-1, width)
        places += [seen[mask].tolist() for seen, mask in zip(columns, bucket.mask.flatten(0, 2), strict=True)]
    found = torch.zeros(rows, rows, dtype=torch.bool)
    for row, place in enumerate(layout.place.tolist()):
        found[row, places[place]] = True
    return found


def packed(seed: int, samples: int, share: Share, longest: int = 90) -> TreeLayout:
    draw = random.Random(seed)
    batch = []
    for group in range(3):
        prompt = [draw.randrange(9) for _ in range(draw.randint(1, longest))]
        for _ in range(samples):
            completion = [draw.randrange(3) for _ in range(draw.randint(1, 70))]
            batch.append(Trajectory(prompt, completion, [-1.0] * len(completion), 1.0, group))
    (micro,) = pack(batch, tokens_per_microbatch=100_000, share=share)
    return micro.layout


@given(trees=st.lists(parents, min_size=1, max_size=4), block=st.sampled_from([2, 5, 64]))
@settings(deadline=None, max_examples=60)
def test_one_number_a_row_is_the_tree(trees: list[list[int]], block: int) -> None:
    starts = [sum(map(len, trees[:number])) for number in range(len(trees) + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "BLOCK_ROWS", block)
        layout = tree_attention.tree_layout(list(zip(starts, starts[1:], strict=False)), trees, CPU)
    end, row = flex_attention.ends(layout), torch.arange(starts[-1])
    by_rule = (row <= row[:, None]) & (row[:, None] < end)
    assert torch.equal(by_rule, sees(layout))


@pytest.mark.parametrize("share", ["tree", "prompt", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_those_of_pytorch(seed: int, share: Share) -> None:
    end = flex_attention.ends(packed(seed, 9, share, longest=500))
    end = torch.cat((end, torch.arange(len(end) + 1, len(end) + -len(end) % 128 + 1)))
    mine = flex_attention.block_mask(end)
    theirs = create_block_mask(mine.mask_mod, None, None, len(end), len(end), device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, wanted = (getattr(mask, f"{kind}_num_blocks")[0, 0].tolist() for mask in (mine, theirs))
        assert counts == wanted
        indices, expected = (getattr(mask, f"{kind}_indices")[0, 0].tolist() for mask in (mine, theirs))
        for row, count in enumerate(counts):
            assert indices[row][:count] == expected[row][:count]
    assert int(mine.full_kv_num_blocks.sum()) > 0


@pytest.mark.parametrize("share", ["tree", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
def test_values_and_gradients_of_the_bucketed_path(
    monkeypatch: pytest.MonkeyPatch, share: Share, dtype: torch.dtype, tolerance: float, heads: tuple[int, int]
) -> None:
    monkeypatch.setattr(flex_attention, "ROW_STEP", 256)
    layout = packed(7, 4, share)
    rows = len(layout.place)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(rows, count, 8, generator=generator, dtype=dtype, requires_grad=True)

    # PyTorch refuses gradients on CPUs, for which it compiles no backward pass; its own loop has one.
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    inputs = [draw(heads[0]), draw(heads[1]), draw(heads[1])]
    weight = draw(heads[0]).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        flexible = flex_attention.flex_rows(*inputs, layout, 0.3)
    other = tree_attention._fused(*inputs, layout, 0.3)
    torch.testing.assert_close(flexible, other, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(
        torch.autograd.grad(flexible, inputs, weight), torch.autograd.grad(other, inputs, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=10 * tolerance)


def test_the_mask_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "ROW_STEP", 128)
    made: list[int] = []
    build = flex_attention.block_mask
    monkeypatch.setattr(flex_attention, "block_mask", lambda end: made.append(len(end)) or build(end))
    layouts = [packed(seed, 2, "tree") for seed in range(2)]
    for layout in (layouts[0], layouts[0], layouts[1], layouts[1], layouts[0]):
        states = torch.randn(len(layout.place), 2, 8)
        flex_attention.flex_rows(states, states, states, layout, 1.0)
    assert len(made) == 3


def step(model: LlamaForCausalLM, batch: list[Trajectory], share: Share = "tree") -> tuple[Policy, Callable[[], float]]:
    policy = Policy(
        model, loss=LossSpec.preset("dapo"), learning_rate=1e-2, dtype=torch.float32, tokens_per_microbatch=20, share=share
    )  # fmt: skip
    return policy, lambda: policy.update(batch)["microbatches"]


def gradient(policy: Policy) -> torch.Tensor:
    return torch.cat([slot.sum().flatten() for slot in policy.slots])


def by_chain(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, tree: TreeLayout, scale: float
) -> torch.Tensor:
    """What a varlen kernel computes, from the same bounds."""
    bounds, longest = gpu_levers.chains(tree)
    edges = bounds.tolist()
    assert longest == max(b - a for a, b in pairwise(edges)) and edges[-1] == len(q_THD)
    parts = []
    for a, b in pairwise(edges):
        q, k, v = (states[a:b].transpose(0, 1)[None] for states in (q_THD, k_TKD, v_TKD))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


def test_alternatives_make_the_same_step(
    monkeypatch: pytest.MonkeyPatch,
    build_model: Callable[..., LlamaForCausalLM],
    build_batch: Callable[..., list[Trajectory]],
) -> None:
    monkeypatch.setattr(flex_attention, "ROW_STEP", 128)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    batch = build_batch(4)
    plain, update = step(build_model(), batch)
    assert update() > 1
    for attend, share in ((flex_attention.flex_rows, "tree"), (by_chain, "none")):
        policy, update = step(build_model(), batch, share)
        gpu_levers.with_attention(update, attend)()
        torch.testing.assert_close(gradient(policy), gradient(plain), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="branches"):
        gpu_levers.with_attention(step(build_model(), batch)[1], by_chain)()

    policy, update = step(build_model(), batch)
    own = [module.__dict__.get("forward") for module in policy.model.modules()]
    torch.compiler.reset()
    with gpu_levers.compiled_layers(policy.model, "aot_eager"):
        update()
    torch.testing.assert_close(gradient(policy), gradient(plain), rtol=1e-4, atol=1e-6)
    assert [module.__dict__.get("forward") for module in policy.model.modules()] == own
