"""Samples to micro-batches: flat token rows in which whatever samples share is computed once.

The samples of a group share their prompt, and often the first tokens of their completions. A group becomes one prefix
tree: each distinct (prefix, token) is one row, its position is its depth, and it attends to its ancestors and itself.
That is exact: a row's hidden state depends on its prefix alone, and its gradient is the sum over the samples that
pass through it. The last token of a completion is only predicted, so it is no row. No row is padding.

A micro-batch holds as many trees as fit the token budget (longest first, then evened out); a group too large for the
budget is split by samples, each part with its own copy of the prompt. Splitting never changes the result, since the
loss is normalised by counts of the whole step.

Prior work on shared prefixes in training: AReaL's tree training; on trees of speculative tokens: SpecInfer
(2305.09781).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from os.path import commonprefix
from typing import Literal

import torch
from torch import Tensor

from omni_fast.errors import UserError
from omni_fast.policy.tree_attention import TreeLayout, tree_layout

Share = Literal["tree", "prompt", "none"]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sample as the trainer sees it.

    prompt, completion: token ids, neither empty. logprobs: the sampler's, in nats, one per completion token.
    group: samples with the same number share their prompt. task: for metrics per task.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    logprobs: Sequence[float]
    advantage: float
    group: int
    task: str = ""


@dataclass(slots=True)
class MicroBatch:
    """T rows for the model, N completion tokens for the loss.

    input_ids, positions: int64 [1, T]. layout: who attends to whom.
    predicts: int64 [N], the row whose hidden state predicts the token. targets: int64 [N].
    advantages, rollout: fp32 [N]. sequences: int64 [N], the sample of the token, counted from 0 in this micro-batch.
    samples: for each such number, the index of the sample in the step's list.
    """

    input_ids: Tensor
    positions: Tensor
    layout: TreeLayout
    predicts: Tensor
    targets: Tensor
    advantages: Tensor
    rollout: Tensor
    sequences: Tensor
    samples: list[int]


@dataclass(slots=True)
class _Tree:
    """A prefix tree in depth-first order: `parents[i] < i`, -1 for a root; depth is the position."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)  # sample -> row that predicts each completion token

    def add(self, parent: int, token: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
        return len(self.tokens) - 1


def _grow(trajectories: Sequence[Trajectory], members: Sequence[int], share: Share, budget: int) -> list[_Tree]:
    """The trees of one group: one if the budget allows. `members` are indices into `trajectories`."""
    # In sorted order a completion shares its longest prefix with its neighbour, so one path at a time builds the tree.
    ordered = sorted(members, key=lambda index: tuple(trajectories[index].completion))
    trees: list[_Tree] = []
    tree, path = _Tree(), [-1]
    previous: tuple[int, ...] = ()
    for index in ordered:
        sample = trajectories[index]
        inner = tuple(sample.completion[:-1])
        common = len(commonprefix([inner, previous])) if share == "tree" else 0
        if len(sample.prompt) + len(inner) > budget:
            raise UserError(
                f"A sample has {len(sample.prompt) + len(inner)} tokens and a micro-batch may hold {budget}: raise "
                "optimizer.tokens_per_microbatch, or shorten the prompts or the completions."
            )
        fits = len(tree.tokens) + len(inner) - common <= budget
        if not trees or share == "none" or not fits:
            tree, common, last = _Tree(), 0, -1
            trees.append(tree)
            for token in sample.prompt:
                last = tree.add(last, token)
            path = [last]
        del path[common + 1 :]
        for token in inner[common:]:
            path.append(tree.add(path[-1], token))
        tree.paths[index] = list(path)
        previous = inner
    return trees


def partition(sizes: Sequence[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Indices of `sizes` in as few bins of at most `budget` as first-fit decreasing finds, then evened out.

    Their number is rounded up to a multiple of `multiple`; some are empty where there are fewer sizes than that.

    The bins are first filled in the given number by always giving the next largest to the lightest; where that breaks
    the budget, the first-fit bins stay. Deterministic.
    """
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in order:
        home = next((number for number, load in enumerate(loads) if load + sizes[index] <= budget), len(bins))
        if home == len(bins):
            bins.append([])
            loads.append(0)
        bins[home].append(index)
        loads[home] += sizes[index]
    bins += [[] for _ in range(-len(bins) % multiple)]
    even: list[list[int]] = [[] for _ in bins]
    weights = [0] * len(bins)
    for index in order:
        lightest = min(range(len(bins)), key=lambda number: (weights[number], number))
        even[lightest].append(index)
        weights[lightest] += sizes[index]
    return even if bins and max(weights) <= budget else bins


def pack(
    trajectories: Sequence[Trajectory],
    *,
    tokens_per_microbatch: int,
    share: Share = "tree",
    device: str | torch.device = "cpu",
    ranks: int = 1,
    rank: int = 0,
) -> list[MicroBatch]:
    """Micro-batches of at most `tokens_per_microbatch` rows that together hold each sample once.

    share: "tree" as described above; "prompt" shares the prompt alone; "none" gives each sample its own copy.
    ranks: only the micro-batches of this `rank` of so many, evened out over ranks; all have the same number, if need be
    one that trains on nothing.
    Raises UserError where one sample is larger than the budget, ValueError for an empty or inconsistent sample.
    """
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(trajectories):
        if not sample.prompt or not sample.completion or len(sample.logprobs) != len(sample.completion):
            raise ValueError(
                f"sample {index} has {len(sample.prompt)} prompt tokens, {len(sample.completion)} completion tokens, "
                f"{len(sample.logprobs)} log-probs; give at least one of each, and one log-prob per completion token"
            )
        members = groups.setdefault(sample.group, [])
        members.append(index)
        if tuple(sample.prompt) != tuple(trajectories[members[0]].prompt):
            raise ValueError(f"samples {members[0]} and {index} are in group {sample.group} but have different prompts")
    trees = [tree for members in groups.values() for tree in _grow(trajectories, members, share, tokens_per_microbatch)]
    bins = partition([len(tree.tokens) for tree in trees], tokens_per_microbatch, ranks)[rank::ranks]
    nothing = [_Tree([0], [-1], [0])]  # for a rank without work, which still takes part in what the ranks do together
    return [_lay_out(trajectories, [trees[n] for n in sorted(bin)] or nothing, torch.device(device)) for bin in bins]


def _lay_out(trajectories: Sequence[Trajectory], trees: Sequence[_Tree], device: torch.device) -> MicroBatch:
    starts = [0, *accumulate(len(tree.tokens) for tree in trees)]
    paths = [
        (index, [start + row for row in path])
        for tree, start in zip(trees, starts, strict=False)
        for index, path in tree.paths.items()
    ]
    samples = [trajectories[index] for index, _ in paths]
    integers = partial(torch.tensor, dtype=torch.int64, device=device)
    floats = partial(torch.tensor, dtype=torch.float32, device=device)
    return MicroBatch(
        input_ids=integers([token for tree in trees for token in tree.tokens])[None],
        positions=integers([depth for tree in trees for depth in tree.depths])[None],
        layout=tree_layout([*pairwise(starts)], [tree.parents for tree in trees], device),
        predicts=integers([row for _, path in paths for row in path]),
        targets=integers([token for sample in samples for token in sample.completion]),
        advantages=floats([sample.advantage for sample in samples for _ in sample.completion]),
        rollout=floats([value for sample in samples for value in sample.logprobs]),
        sequences=integers([number for number, sample in enumerate(samples) for _ in sample.completion]),
        samples=[index for index, _ in paths],
    )
