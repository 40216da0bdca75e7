"""Hugging Face causal language models that score tokens instead of returning logits.

    with patch_lm_head(model):
        out = model(input_ids, attention_mask=mask, labels=labels)      # out.loss, out.logp [B, L], out.entropy [B, L]

The head is what `get_output_embeddings` names: a linear layer with or without bias, tied or not, frozen or not. Softcap and
logit scale are read from the configuration, and the whole is held against the model's own logits on three tokens before
anything is patched, so a head that does something else is refused instead of scored wrongly. Without labels and targets
the model is as before; `generate` works on.

`torch.compile(model, fullgraph=True)` sees the head as one operator, forward and backward. Rows without a target never
reach the GEMMs on a CPU; on a GPU they are gathered away first, at the price of a host sync, except under torch.compile.

Limits: decoder-only models with their weights in memory: patch before `fully_shard`, before wrapping in DDP, and through
`get_base_model()` where PEFT wraps it. No quantised heads, no adapter on the head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_kernels.adapters import as_autocast, head_options
from omni_kernels.ops import linear_logprob
from omni_kernels.spec import IGNORE

_TRIED = "5.23.0"
try:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(
        f"omni_kernels.adapters.hf needs transformers (tried with {_TRIED}); pip install transformers ({error})"
    ) from error

# names under which configurations keep a factor of the logits, and whether they divide by it
_SCALES = {
    "logit_scale": False, "output_multiplier": False, "lm_head_multiplier": False, "logits_scaling": True,
}  # fmt: skip
_PROBE = 3  # tokens


@dataclass
class ScoredTokens(ModelOutput):
    """loss: mean negative log-prob of the scored tokens, or their sum over `num_items_in_batch`; scalar.
    logp, entropy: fp32 [B, L] nats, 0 where nothing is scored. All differentiable."""

    loss: Tensor | None = None
    logp: Tensor | None = None
    entropy: Tensor | None = None


class Patch:
    """A patched model; `undo()`, or leaving it as a context, brings its own forward back."""

    def __init__(self, model: PreTrainedModel, forward: functools.partial[Any]) -> None:
        self._model = model
        self._before = model.__dict__.get("forward")
        # a partial, whose arguments follow a deepcopy of the model; generate() validates its own against the signature
        model.forward = functools.update_wrapper(forward, model.forward)

    def undo(self) -> None:
        """Idempotent. Patches of one model are undone in reverse order."""
        if self._before is not None:
            self._model.forward = self._before
        else:
            self._model.__dict__.pop("forward", None)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_lm_head(model: PreTrainedModel) -> Patch:
    """Makes `model(..., labels=)` and `model(..., targets=)` return `ScoredTokens`; all other calls stay as they are.

    labels: int64 [B, L], the tokens themselves, as everywhere in transformers: logp[:, t] is that of labels[:, t] after
        the tokens before it, and logp[:, 0] is 0.  targets: int64 [B, L], aligned with the positions: logp[:, t] is
        that of targets[:, t] as the token after position t (labels shifted by one, packed rows, context parallelism).
        -100 in either is not scored.
    inv_temperature=: 1 / temperature, a number or [B, L] (aligned like labels or targets).
    num_items_in_batch=: what the loss is divided by, as the transformers Trainer gives it.
    Raises ValueError for a model whose logits are not those of a linear head, softcap and scale, and for heads
    that cannot be read.
    """
    read = _Reader(model)
    read.check()
    return Patch(model, functools.partial(_forward, read, model.forward))


def _forward(
    read: _Reader, original: Callable[..., Any], *args: Any, labels: Tensor | None = None,
    targets: Tensor | None = None, inv_temperature: float | Tensor = 1.0,
    num_items_in_batch: Tensor | int | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    if labels is None and targets is None:
        return original(*args, **kwargs)
    if labels is not None and targets is not None:
        raise ValueError("labels and targets are both given; give one of them")
    hidden = read.model.base_model(*args, **{"use_cache": False, **kwargs, "return_dict": True}).last_hidden_state
    wanted = labels if targets is None else targets
    assert wanted is not None
    if wanted.shape != hidden.shape[:-1]:
        name = "labels" if targets is None else "targets"
        raise ValueError(f"{name} is {list(wanted.shape)}; give {list(hidden.shape[:-1])} like the positions")
    if isinstance(inv_temperature, Tensor) and inv_temperature.shape not in ((), wanted.shape):
        given = list(inv_temperature.shape)
        raise ValueError(f"inv_temperature is {given}; give a number, or {list(wanted.shape)} like the positions")
    if targets is None:  # position t - 1 speaks of token t; the last one of none
        wanted = torch.cat([wanted[:, 1:], torch.full_like(wanted[:, :1], IGNORE)], 1)
        if isinstance(inv_temperature, Tensor) and inv_temperature.ndim:
            inv_temperature = inv_temperature.roll(-1, 1)
    logp, entropy = read.score(hidden, wanted, inv_temperature)
    count = (wanted != IGNORE).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -logp.sum() / count
    if targets is None:
        logp, entropy = (torch.cat([v.new_zeros(len(v), 1), v[:, :-1]], 1) for v in (logp, entropy))
    return ScoredTokens(loss, logp, entropy)


@dataclass(frozen=True)
class _Reader:
    """What is between the last hidden state of a model and its logits."""

    model: PreTrainedModel

    @property
    def head(self) -> nn.Linear:
        """Looked up anew each time: sharding and adapters replace it."""
        return self.model.get_output_embeddings()

    @functools.cached_property
    def scale(self) -> float:
        config = self.model.config.get_text_config()
        for name, divides in _SCALES.items():
            value = getattr(config, name, None)
            if value is not None:
                return 1 / value if divides and config.model_type != "hyperclovax" else float(value)
        return 1.0

    @functools.cached_property
    def softcap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def score(self, hidden: Tensor, targets: Tensor, inv_temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """(logp, entropy) fp32 [B, L] of hidden [B, L, H]; 0 where the target is IGNORE."""
        head, rows = self.head, None
        x, y, t = hidden.flatten(0, -2), targets.flatten(), inv_temperature
        if isinstance(t, Tensor):
            t = t.expand(targets.shape).flatten()
        if x.is_cuda and not torch.compiler.is_compiling():
            rows = (y != IGNORE).nonzero()[:, 0]
            x, y, t = x[rows], y[rows], t[rows] if isinstance(t, Tensor) else t
        options = head_options(t, self.scale, self.softcap)
        logp, entropy = linear_logprob(as_autocast(x), head.weight, y, bias=head.bias, **options)
        assert entropy is not None
        if rows is not None:
            logp, entropy = (v.new_zeros(targets.numel()).index_copy(0, rows, v) for v in (logp, entropy))
        return logp.view_as(targets), entropy.view_as(targets)

    def check(self) -> None:
        """Raises ValueError where this is not how the model makes its logits."""
        name, head = type(self.model).__name__, self.head
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(f"{name} is an encoder-decoder; patch_lm_head takes decoder-only models")
        if type(head) is not nn.Linear:
            raise ValueError(f"the head of {name} is {type(head).__name__}; patch_lm_head takes a plain nn.Linear")
        if head.weight.is_meta or not head.weight.is_floating_point() or hasattr(head.weight, "placements"):
            raise ValueError(f"the head of {name} is quantised, sharded or on meta; patch before sharding, in floats")
        if self.scale <= 0:
            raise ValueError(f"{name} multiplies its logits by {self.scale}; patch_lm_head takes a factor > 0")
        seen: list[Tensor] = []
        hook = self.model.base_model.register_forward_hook(lambda *a: seen.append(a[-1].last_hidden_state))
        tokens = torch.arange(_PROBE, device=head.weight.device)[None] % len(head.weight)
        try:
            with torch.no_grad():
                logits = self.model(tokens, use_cache=False, return_dict=True).logits.float()
                mine, _ = self.score(seen[0], tokens, 1.0)
        finally:
            hook.remove()
        theirs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        error = float((mine - theirs).abs().max())
        allowed = 1e-4 + 4 * torch.finfo(head.weight.dtype).eps * float(logits.abs().max())
        if not error <= allowed:
            raise ValueError(
                f"{name} makes its logits in a way unknown here: log-probs of the head differ by {error:.2g} "
                f"(allowed {allowed:.2g}); score its logits with logits_logprob instead"
            )
