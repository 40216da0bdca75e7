"""Packing: exactness of the prefix tree, budgets, balance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from omni_fast.errors import UserError
from omni_fast.policy import tree_attention
from omni_fast.policy.pack import Share, Trajectory, pack, partition
from omni_kernels import LossSpec, Tokens, policy_loss

Models = Callable[..., LlamaForCausalLM]


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=9)  # few ids, so that completions share prefixes
groups = st.lists(
    st.tuples(tokens, st.lists(tokens, min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)


def build(raw: list[tuple[list[int], list[list[int]]]]) -> list[Trajectory]:
    trajectories = []
    for group, (prompt, completions) in enumerate(raw):
        for number, completion in enumerate(completions):
            advantage = math.sin(1.0 + group + 2.3 * number)
            trajectories.append(Trajectory(prompt, completion, [-1.0] * len(completion), advantage, group))
    return trajectories


@given(raw=groups, budget=st.integers(17, 80), share=st.sampled_from(["tree", "prompt", "none"]))
@settings(deadline=None, max_examples=60)
def test_each_token_once_within_the_budget(
    raw: list[tuple[list[int], list[list[int]]]], budget: int, share: Share
) -> None:
    trajectories = build(raw)
    batches = pack(trajectories, tokens_per_microbatch=budget, share=share)
    assert sorted(index for batch in batches for index in batch.samples) == list(range(len(trajectories)))
    for batch in batches:
        rows = batch.input_ids.shape[1]
        assert 0 < rows <= budget
        for number, index in enumerate(batch.samples):
            sample = trajectories[index]
            own = batch.sequences == number
            assert batch.targets[own].tolist() == sample.completion
            path = batch.predicts[own].tolist()
            assert batch.positions[0, path].tolist() == list(
                range(len(sample.prompt) - 1, len(sample.prompt) + len(path) - 1)
            )
            assert batch.input_ids[0, path[1:]].tolist() == sample.completion[:-1]
            assert batch.input_ids[0, path[0]].item() == sample.prompt[-1]
        if share == "tree":  # no two rows of a tree are the same (prefix, token): siblings of one sample's path differ
            paths = {tuple(batch.predicts[batch.sequences == n].tolist()) for n in range(len(batch.samples))}
            inner = {(trajectories[i].group, tuple(trajectories[i].completion[:-1])) for i in batch.samples}
            assert len(paths) == len(inner)


@given(
    raw=groups,
    block=st.sampled_from([1, 3, 64]),
    share=st.sampled_from(["tree", "prompt", "none"]),
)
@settings(deadline=None, max_examples=30)
def test_gradients_equal_plain_forward_per_sample(
    build_model: Models, raw: list[tuple[list[int], list[list[int]]]], block: int, share: Share
) -> None:
    model = build_model().double()
    trajectories = build(raw)
    spec = LossSpec(entropy_coef=0.1)
    total = float(sum(len(sample.completion) for sample in trajectories))

    plain_loss = 0.0
    for sample in trajectories:
        ids = torch.tensor([[*sample.prompt, *sample.completion]])
        logits = model(input_ids=ids[:, :-1]).logits[0, len(sample.prompt) - 1 :]
        logp = logits.log_softmax(-1)
        target = torch.tensor(sample.completion)
        flat = Tokens(target, torch.full((len(target),), sample.advantage).double(), denominator=total)
        out = policy_loss(logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1), flat, spec)
        out.loss.backward()
        plain_loss += out.loss.item()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "BLOCK_ROWS", block)
        batches = pack(trajectories, tokens_per_microbatch=40, share=share)
        model.config._attn_implementation = tree_attention.NAME
        packed_loss = 0.0
        for batch in batches:
            hidden = model.model(
                input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False, tree=batch.layout
            ).last_hidden_state[0]
            flat = Tokens(batch.targets, batch.advantages.double(), sequences=batch.sequences, denominator=total)
            logp = model.lm_head(hidden[batch.predicts]).log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1)
            out = policy_loss(logp.gather(1, batch.targets[:, None])[:, 0], entropy, flat, spec)
            out.loss.backward()
            packed_loss += out.loss.item()
    assert packed_loss == pytest.approx(plain_loss, abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_shared_rows_are_computed_once() -> None:
    same = [Trajectory([5] * 10, [1, 2, 3], [0.0] * 3, 1.0, 0) for _ in range(4)]
    other = [Trajectory([5] * 10, [1, 4], [0.0] * 2, 1.0, 0)]
    rows = {
        share: sum(b.input_ids.numel() for b in pack(same + other, tokens_per_microbatch=100, share=share))
        for share in ("tree", "prompt", "none")
    }
    assert rows == {"tree": 12, "prompt": 10 + 4 * 2 + 1, "none": 4 * 12 + 11}


def test_group_larger_than_the_budget_is_split_by_samples() -> None:
    trajectories = [Trajectory([7] * 10, [n, 1, 2, 3], [0.0] * 4, 1.0, 0) for n in range(6)]
    batches = pack(trajectories, tokens_per_microbatch=20)
    assert sorted(len(batch.samples) for batch in batches) == [3, 3]


def test_budget_smaller_than_one_sample() -> None:
    with pytest.raises(UserError, match=r"12 tokens.*may hold 11.*tokens_per_microbatch"):
        pack([Trajectory([1] * 10, [1, 2, 3], [0.0] * 3, 1.0, 0)], tokens_per_microbatch=11)


@pytest.mark.parametrize(
    "bad",
    [
        [Trajectory([], [1], [0.0], 1.0, 0)],
        [Trajectory([1], [], [], 1.0, 0)],
        [Trajectory([1], [1, 2], [0.0], 1.0, 0)],
        [Trajectory([1], [1], [0.0], 1.0, 0), Trajectory([2], [1], [0.0], 1.0, 0)],
    ],
)
def test_inconsistent_samples(bad: list[Trajectory]) -> None:
    with pytest.raises(ValueError, match="sample"):
        pack(bad, tokens_per_microbatch=100)


@given(sizes=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(50, 120))
@settings(deadline=None)
def test_partition_keeps_all_and_the_budget(sizes: list[int], budget: int) -> None:
    bins = partition(sizes, budget)
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in members) for members in bins]
    assert all(0 < load <= budget for load in loads)
    assert len(bins) <= 2 * max(1, -(-sum(sizes) // budget))


def test_partition_evens_out() -> None:
    loads = [sum(members) for members in ([10] * len(bin) for bin in partition([10] * 6, 40))]
    assert loads == [30, 30]


def test_unsupported_attention_is_refused() -> None:
    x = torch.zeros(1, 2, 3, 4)
    layout = pack([Trajectory([1, 2], [1, 2], [0.0] * 2, 1.0, 0)], tokens_per_microbatch=10)[0].layout
    with pytest.raises(ValueError, match="window"):
        tree_attention.tree_attention(torch.nn.Identity(), x, x, x, None, tree=layout, sliding_window=4)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_and_compiled_attention_agree(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    trajectories = [Trajectory(range(1, 90), [n, 1, 2, n, 3], [0.0] * 5, 1.0, 0) for n in range(7)]
    layout = pack(trajectories, tokens_per_microbatch=500)[0].layout
    if layout.blocks is None:
        pytest.skip("the compiled kernels are not built")
    states = [torch.randn(1, heads, len(layout.place), size, dtype=dtype, requires_grad=True) for heads in (6, 2, 2)]
    results = []
    for tree in (replace(layout, blocks=None), layout):
        out, _ = tree_attention.tree_attention(torch.nn.Identity(), *states, None, tree=tree)
        results.append((out, *torch.autograd.grad(out, states, torch.ones_like(out) / 10)))
    for fused, compiled in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(compiled, fused, rtol=tolerance, atol=tolerance)
