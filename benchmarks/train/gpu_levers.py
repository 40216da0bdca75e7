"""What a GPU offers besides: which attention kernel, which blocks, how many rows a pass, and whether compiling layers pays.

Rows are read as all levers are: `seconds_on` is omni_fast as it is, `seconds_off` the alternative in its place, so `times_faster`
below 1 says that the alternative is faster. Nothing here is used by the trainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from benchmarks.train.flex_attention import ends, flex_rows
from benchmarks.train.levers import Lever, Setup, changed
from omni_fast.policy import tree_attention
from omni_fast.policy.tree_attention import TreeLayout

Attend = Callable[[Tensor, Tensor, Tensor, TreeLayout, float], Tensor]
_bounds: list[tuple[TreeLayout, Tensor, int]] = []  # of the micro-batch under way


def levers(setup: Setup) -> tuple[Lever, ...]:
    """Alternatives to what omni_fast does on a GPU."""
    learn, policy, case = setup.calls["update"], setup.policy, setup.case
    alone = changed(learn, policy, share="none")
    setup.calls["unshared"] = alone
    backend = "inductor" if case.device == "cuda" else "aot_eager"
    quarter, half = policy.tokens_per_microbatch // 4, -(-case.batch // 2)
    return (
        Lever("attention by SDPA, a call a bucket", "update", "FlexAttention, a call a layer", with_attention(learn, flex_rows), "update"),
        Lever("blocks of 64 rows", "update", "256 rows", changed(learn, tree_attention, BLOCK_ROWS=256), "update"),
        Lever("unshared: SDPA, not torch varlen", "update", "torch.nn.attention.varlen", with_attention(alone, torch_varlen), "unshared"),
        Lever("unshared: SDPA, not flash-attn", "update", "flash-attn's varlen", with_attention(alone, flash_varlen), "unshared"),
        Lever("all rows of a pass", "update", "a quarter of them a pass", changed(learn, policy, tokens_per_microbatch=quarter),
              "update"),
        Lever("all rows in one wave", "generate", "two waves", changed(setup.calls["generate"], setup.engine, max_rows=half),
              "generate"),
        Lever("layers as they are", "update", f"each compiled around its attention ({backend})",
              compiled_layers(policy.model, backend)(learn), "update"),
    )  # fmt: skip


def torch_varlen(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, tree: TreeLayout, scale: float) -> Tensor:
    """PyTorch's own (2.10 and later), for trees that are chains."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    else:
        k_TKD, v_TKD = (states.repeat_interleave(q_THD.shape[1] // states.shape[1], 1) for states in (k_TKD, v_TKD))
    bounds, longest = chains(tree)
    return varlen_attn(q_THD, k_TKD, v_TKD, bounds, bounds, longest, longest, scale=scale, **causal)


def flash_varlen(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, tree: TreeLayout, scale: float) -> Tensor:
    """flash-attn's, for trees that are chains."""
    if not is_flash_attn_2_available():
        raise RuntimeError("flash-attn is not installed")
    from flash_attn import flash_attn_varlen_func

    bounds, longest = chains(tree)
    return flash_attn_varlen_func(
        q_THD, k_TKD, v_TKD, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
    )


def chains(tree: TreeLayout) -> tuple[Tensor, int]:
    """Where each chain begins, and the last ends, int32; and the longest. ValueError where a tree branches."""
    if not _bounds or _bounds[0][0] is not tree:
        end = ends(tree)
        bounds = torch.cat((end.new_zeros(1), end.unique_consecutive())).int()
        if not torch.equal(bounds, bounds.unique()):
            raise ValueError("a tree branches; sequences of their own need share='none'")
        _bounds[:] = [(tree, bounds, int(bounds.diff().max()))]
    return _bounds[0][1:]


def with_attention(call: Callable[[], object], attend: Attend) -> Callable[[], object]:
    """`call` with another attention over rows."""
    attention = tree_attention.tree_attention

    def by(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings) -> object:
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        return attend(q, k, v, settings["tree"], settings["scaling"])[None], None

    def inside() -> object:
        AttentionInterface.register(tree_attention.NAME, by)
        try:
            return call()
        finally:
            AttentionInterface.register(tree_attention.NAME, attention)

    return inside


@contextmanager
def compiled_layers(model: nn.Module, backend: str) -> Iterator[None]:
    """Each decoder layer compiled, norms and MLPs as transformers writes them; the attention over rows stays as it is.

    What was compiled is kept for the next time.
    """
    layers = model.get_decoder().layers
    slim = {module: module.__dict__.pop("forward") for module in layers.modules() if "forward" in module.__dict__}
    AttentionInterface.register(tree_attention.NAME, torch.compiler.disable(tree_attention.tree_attention))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)
    try:
        yield
    finally:
        AttentionInterface.register(tree_attention.NAME, tree_attention.tree_attention)
        for layer in layers:
            del layer.forward
        for module, forward in slim.items():
            module.forward = forward
