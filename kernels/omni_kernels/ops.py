"""The public operators: torch custom ops with fakes and autograd, and the functions that call them.

A custom op is opaque to torch.compile, so chunk loops, native kernels and row compaction stay out of the graph.
Forward ops are functional; only backward ops write in place. `LossSpec` passes through
as a string, as ops take no objects, and an absent output is an empty tensor, as ops return no None.

Gradients are first order: a backward pass with create_graph=True raises RuntimeError.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_kernels import backends, linear
from omni_kernels.gemms import wide_of
from omni_kernels.head import Gradient, Head, Stats, check_range
from omni_kernels.losses import _Attach
from omni_kernels.metrics import METRICS
from omni_kernels.spec import LossOutput, LossSpec, Tokens

_TILE_ROWS = {"cpu": 256, "cuda": 1024}  # of batch-invariant GEMMs


class LogprobOutput(NamedTuple):
    """logp, entropy: fp32 [N] nats, differentiable.  Detached extras: the k largest log-probs [N, k], their tokens
    int64 [N, k], and sum_j p_j^2 [N]. All 0 on rows without a target."""

    logp: Tensor
    entropy: Tensor | None
    top_logp: Tensor
    top_tokens: Tensor
    sum_p_squared: Tensor


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tokens,
    spec: LossSpec,
    *,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
    return_tokens: bool = False,
    main_grad: Tensor | None = None,
    grad_scale: float | None = None,
    batch_invariant: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> LossOutput:
    """The policy loss of a language-model head, with its gradient made in the forward pass: 3 GEMMs, no full logits.

    hidden [N, H], weight [V, H] (tied or not), bias [V], bf16, fp16, fp32 or fp64; inv_temperature: number or [N], > 0;
    softcap: logits become cap tanh(logits / cap) first. `tokens` is aligned with the rows of hidden.
    want_entropy: measure the entropy even where the loss does not need it; off, it costs nothing.
    return_tokens: also return log-probs (and entropies) [N], detached.
    main_grad: fp32 [V, H]; dW is added to it, in fp32, and weight.grad stays None. With grad_scale it is added in the
        forward pass already, times grad_scale, and no dW is held: call backward once with just that upstream gradient
        (loss * grad_scale), and keep the call out of activation checkpoints, which would run it twice.
    batch_invariant: log-probs, entropies and dX of a token do not depend on the other rows, bit for bit.
    workspace_bytes: bound on the logits held at a time; more is faster until all rows fit, and for few rows there is no sum of
        dW (see `plan`).
    The loss is differentiable in hidden, weight and bias; what does not require a gradient costs no GEMM.
    Raises ValueError on input that does not fit.
    """
    check_head(hidden, weight, bias, main_grad)
    check_rows(hidden, tokens.targets, inv_temperature, softcap, "hidden")
    if grad_scale is not None and main_grad is None:
        raise ValueError(f"grad_scale is {grad_scale} but main_grad is None; give the fp32 [V, H] tensor to add dW to")
    want_entropy = want_entropy or spec.needs_entropy
    needs = _needs(hidden, weight, bias)
    n, scale = tokens.denominator, inv_temperature
    vectors = (
        tokens.targets, tokens.advantages, tokens.mask, tokens.sequences, tokens.old, tokens.reference, tokens.rollout,
        tokens.rows, n if isinstance(n, Tensor) else None, scale if isinstance(scale, Tensor) else None,
    )  # fmt: skip
    how = (
        None if n is None or isinstance(n, Tensor) else float(n), 1.0 if isinstance(scale, Tensor) else float(scale),
        softcap or 0.0, spec.encoded, want_entropy, *needs, _tile(hidden, batch_invariant), workspace_bytes or 0,
        backend or "",
    )  # fmt: skip
    if grad_scale is None or not needs[1]:
        target = main_grad if needs[1] else None
        loss, metrics, logp, entropy, *_ = _policy_op(hidden, weight, bias, target, *vectors, *how)
        tokenwise = (logp.detach(), entropy.detach() if want_entropy else None)
        return LossOutput(loss, metrics.detach(), *(tokenwise if return_tokens else ()))

    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "linear_policy_loss with grad_scale ran inside a backward pass (recomputation), which would add dW twice; "
            "call it outside the activation checkpoint"
        )
    head = _head(hidden, vectors[-1], how[1], how[2], *how[-3:])
    with torch.no_grad():
        made = linear.policy_head(
            hidden, weight, bias, tokens, spec, head, want_entropy, needs, into=main_grad, scale=grad_scale
        )
    loss = _Attach.apply(made.loss, hidden, made.dx, bias, made.db)
    return LossOutput(loss, made.metrics, *((made.stats.logp, made.stats.entropy) if return_tokens else ()))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
    main_grad: Tensor | None = None,
    batch_invariant: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(log-prob of each target, entropy of each row or None), fp32 [N] nats, of logits hidden @ weight.T + bias.

    Arguments as in `linear_policy_loss`; targets int64 [N], rows of IGNORE (-100) cost nothing and give 0.
    Differentiable in hidden, weight and bias under any upstream gradients: the backward pass computes the logits again
    (4 GEMMs), on the CPU without the rows whose upstream gradient is 0. main_grad: dW is added to it there.
    """
    logp, entropy, *_ = _linear_logprob(
        hidden, weight, targets, bias, inv_temperature, softcap, want_entropy, main_grad, batch_invariant,
        workspace_bytes, backend, None,
    )  # fmt: skip
    return logp, entropy


def linear_logprob_extras(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    top_k: int,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
    batch_invariant: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> LogprobOutput:
    """`linear_logprob` with extras of the same pass: the top_k (>= 0) log-probs with their tokens, and sum_j p_j^2."""
    if not 0 <= top_k <= len(weight):
        raise ValueError(f"top_k is {top_k}; give a number in [0, V] = [0, {len(weight)}]")
    return LogprobOutput(
        *_linear_logprob(
            hidden, weight, targets, bias, inv_temperature, softcap, want_entropy, None, batch_invariant,
            workspace_bytes, backend, top_k,
        )
    )  # fmt: skip


def logits_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(log-prob of each target, entropy of each row or None), fp32 [N] nats, of given logits [N, V].

    Rows may be strided, columns not. Differentiable in the logits under any upstream gradients. in_place: the backward
    pass overwrites the logits with their gradient, so it can run once, and nothing else may use them afterwards.
    """
    check_rows(logits, targets, inv_temperature, softcap, "logits")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits has strides {logits.stride()}; give contiguous rows: logits.contiguous()")
    if not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits is {logits.dtype} {list(logits.shape)}; give floats [N, V], V >= 1")
    row_scale, scale = _split(inv_temperature)
    logp, entropy, _ = _logits_op(
        logits, targets.contiguous(), row_scale, scale, softcap or 0.0, want_entropy, in_place, backend or ""
    )
    return logp, entropy if want_entropy else None


# --- policy loss ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("omni_kernels::linear_policy_loss", mutates_args=())
def _policy_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, targets: Tensor, advantages: Tensor,
    mask: Tensor | None, sequences: Tensor | None, old: Tensor | None, reference: Tensor | None, rollout: Tensor | None,
    rows: Tensor | None, denominator: Tensor | None, row_scale: Tensor | None, n: float | None, scale: float,
    softcap: float, spec: str, want_entropy: bool, need_dx: bool, need_dw: bool, need_db: bool, tile_rows: int, workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total = n if denominator is None else denominator
    tokens = Tokens(targets, advantages, mask, sequences, old, reference, rollout, total, rows)
    head = _head(hidden, row_scale, scale, softcap, tile_rows, workspace_bytes, backend)
    needs = (need_dx, need_dw, need_db)
    result = linear.policy_head(hidden, weight, bias, tokens, LossSpec.decode(spec), head, want_entropy, needs)
    stats = result.stats
    entropy, dx, dw, db = (_present(v, hidden) for v in (stats.entropy, result.dx, result.dw, result.db))
    return result.loss, result.metrics, stats.logp, entropy, dx, dw, db


@_policy_op.register_fake
def _(hidden, weight, bias, main_grad, targets, *rest):
    *_, want_entropy, need_dx, need_dw, need_db, _tile_rows, _workspace_bytes, _backend = rest
    dtype, n = wide_of(hidden.dtype), hidden.shape[0]  # len() would fix N in the graph
    rows = hidden.new_empty(n, dtype=dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(METRICS), dtype=torch.float64),
        rows,
        torch.empty_like(rows) if want_entropy else hidden.new_empty(0),
        hidden.new_empty(hidden.shape) if need_dx else hidden.new_empty(0),
        weight.new_empty(weight.shape) if need_dw else hidden.new_empty(0),
        bias.new_empty(bias.shape) if need_db else hidden.new_empty(0),
    )


def _policy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.count, ctx.main_grad = len(inputs), inputs[3]
    ctx.needs = inputs[-6:-3]
    ctx.save_for_backward(*output[4:])


def _policy_backward(ctx: Any, upstream: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    _first_order_only()
    grads: list[Tensor | None] = [None, None, None]
    if upstream is not None:
        for k, made in enumerate(ctx.saved_tensors):
            if ctx.needs[k] and k == 1 and ctx.main_grad is not None:
                _accumulate_op(ctx.main_grad, made, upstream)
            elif ctx.needs[k]:
                grads[k] = made if _is_one(upstream) else made * upstream.to(made.dtype)
    return (*grads, *[None] * (ctx.count - 3))


def _is_one(upstream: Tensor) -> bool:
    """Whether multiplying by it can be left out. Only where looking is free: on the CPU, and not while tracing."""
    return type(upstream) is Tensor and upstream.device.type == "cpu" and upstream.item() == 1


_policy_op.register_autograd(_policy_backward, setup_context=_policy_setup)


@torch.library.custom_op("omni_kernels::accumulate_", mutates_args=("main_grad",))
def _accumulate_op(main_grad: Tensor, part: Tensor, upstream: Tensor) -> None:
    main_grad.addcmul_(part, upstream.to(main_grad.dtype))


# --- log-probs from hidden states -------------------------------------------------------------------------------------


def _linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, inv_temperature: float | Tensor,
    softcap: float | None, want_entropy: bool, main_grad: Tensor | None, batch_invariant: bool,
    workspace_bytes: int | None, backend: str | None, top_k: int | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    check_head(hidden, weight, bias, main_grad)
    check_rows(hidden, targets, inv_temperature, softcap, "hidden")
    row_scale, scale = _split(inv_temperature)
    logp, entropy, _, *extra = _logprob_op(
        hidden, weight, bias, main_grad, targets.contiguous(), row_scale, scale, softcap or 0.0, want_entropy,
        -1 if top_k is None else top_k, _tile(hidden, batch_invariant), workspace_bytes or 0, backend or "",
    )  # fmt: skip
    top_logp, top_tokens, squares = (v.detach() for v in extra)
    return logp, entropy if want_entropy else None, top_logp, top_tokens, squares


@torch.library.custom_op("omni_kernels::linear_logprob", mutates_args=())
def _logprob_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, targets: Tensor,
    row_scale: Tensor | None, scale: float, softcap: float, want_entropy: bool, top_k: int, tile_rows: int,
    workspace_bytes: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    head = _head(hidden, row_scale, scale, softcap, tile_rows, workspace_bytes, backend)
    wanted = None if top_k < 0 else top_k
    stats, extra = linear.logprob_forward(hidden, weight, bias, targets, head, want_entropy, wanted)
    found = (None, None, None) if extra is None else (extra.top_logp, extra.top_tokens, extra.sum_p_squared)
    entropy, top_logp, top_tokens, squares = (_present(v, hidden) for v in (stats.entropy, *found))
    return stats.logp, entropy, stats.lse, top_logp, top_tokens, squares


@_logprob_op.register_fake
def _(hidden, weight, bias, main_grad, targets, row_scale, scale, softcap, want_entropy, top_k, *how):
    n, dtype, nothing = hidden.shape[0], wide_of(hidden.dtype), lambda: hidden.new_empty(0)
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n, dtype=dtype) if want_entropy else nothing(),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n, top_k, dtype=dtype) if top_k >= 0 else nothing(),
        hidden.new_empty(n, top_k, dtype=torch.int64) if top_k >= 0 else nothing(),
        hidden.new_empty(n, dtype=dtype) if top_k >= 0 else nothing(),
    )


@torch.library.custom_op("omni_kernels::linear_logprob_backward", mutates_args=())
def _logprob_backward_op(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    targets: Tensor, logp: Tensor, lse: Tensor, entropy: Tensor, row_scale: Tensor | None, scale: float, softcap: float,
    need_dx: bool, need_dw: bool, need_db: bool, tile_rows: int, workspace_bytes: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head = _head(hidden, row_scale, scale, softcap, tile_rows, workspace_bytes, backend)
    stats = Stats(logp, entropy if entropy.shape == lse.shape else None, lse)
    gradient = _upstream(grad_logp, grad_entropy, lse)
    needs = (need_dx, need_dw, need_db)
    grads = linear.logprob_backward(hidden, weight, bias, targets, stats, gradient, head, needs)
    dx, dw, db = (_present(g, hidden) for g in grads)
    return dx, dw, db


@_logprob_backward_op.register_fake
def _(grad_logp, grad_entropy, hidden, weight, bias, *rest):
    need_dx, need_dw, need_db = rest[7:10]
    return (
        hidden.new_empty(hidden.shape) if need_dx else hidden.new_empty(0),
        weight.new_empty(weight.shape) if need_dw else hidden.new_empty(0),
        bias.new_empty(bias.shape) if need_db else hidden.new_empty(0),
    )


def _logprob_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, main_grad, targets, row_scale, *how = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.main_grad, ctx.scale, ctx.softcap, ctx.tail = main_grad, how[0], how[1], how[4:]
    ctx.save_for_backward(hidden, weight, bias, targets, output[0], output[2], output[1], row_scale)


def _logprob_backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: object) -> Any:
    _first_order_only()
    grads: list[Tensor | None] = [None] * 13
    if grad_logp is None and grad_entropy is None:
        return tuple(grads)
    hidden, weight, bias, targets, logp, lse, entropy, row_scale = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    made = _logprob_backward_op(
        grad_logp, grad_entropy, hidden, weight, bias, targets, logp, lse, entropy, row_scale, ctx.scale, ctx.softcap,
        *needs, *ctx.tail,
    )  # fmt: skip
    for k in range(3):
        if needs[k]:
            grads[k] = made[k]
    if needs[1] and ctx.main_grad is not None:
        _accumulate_op(ctx.main_grad, made[1], made[1].new_ones(()))
        grads[1] = None
    return tuple(grads)


_logprob_op.register_autograd(_logprob_backward, setup_context=_logprob_setup)


# --- log-probs from logits --------------------------------------------------------------------------------------------


@torch.library.custom_op("omni_kernels::logits_logprob", mutates_args=())
def _logits_op(
    logits: Tensor, targets: Tensor, row_scale: Tensor | None, scale: float, softcap: float, want_entropy: bool,
    in_place: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head = _head(logits, row_scale, scale, softcap, 0, 0, backend)
    check_range(targets, logits.shape[1], head.inv_temperature)
    logp, entropy, lse = head.forward(logits, targets, want_entropy)
    return logp, _present(entropy, logits), lse


@_logits_op.register_fake
def _(logits, targets, row_scale, scale, softcap, want_entropy, in_place, backend):
    rows = logits.new_empty(logits.shape[0], dtype=wide_of(logits.dtype))
    return rows, torch.empty_like(rows) if want_entropy else logits.new_empty(0), torch.empty_like(rows)


@torch.library.custom_op("omni_kernels::logits_logprob_backward_", mutates_args=("logits",))
def _logits_backward_op(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, targets: Tensor, logp: Tensor, lse: Tensor,
    entropy: Tensor, row_scale: Tensor | None, scale: float, softcap: float, backend: str,
) -> None:  # fmt: skip
    head = _head(logits, row_scale, scale, softcap, 0, 0, backend)
    stats = Stats(logp, entropy if entropy.shape == lse.shape else None, lse)
    head.backward_(logits, targets, stats, _upstream(grad_logp, grad_entropy, lse))


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, row_scale, ctx.scale, ctx.softcap, _, ctx.in_place, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(logits, targets, output[0], output[2], output[1], row_scale)


def _logits_backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: object) -> Any:
    _first_order_only()
    if grad_logp is None and grad_entropy is None:
        return (None,) * 8
    logits, targets, logp, lse, entropy, row_scale = ctx.saved_tensors
    gradient = logits if ctx.in_place else logits.clone(memory_format=torch.contiguous_format)
    _logits_backward_op(
        grad_logp, grad_entropy, gradient, targets, logp, lse, entropy, row_scale, ctx.scale, ctx.softcap, ctx.backend
    )
    return gradient, *[None] * 7


_logits_op.register_autograd(_logits_backward, setup_context=_logits_setup)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _first_order_only() -> None:
    if torch.is_grad_enabled():  # only where the gradient itself is to be differentiated
        raise RuntimeError("omni_kernels gradients are first order; leave out create_graph=True")


def _upstream(grad_logp: Tensor | None, grad_entropy: Tensor | None, lse: Tensor) -> Gradient:
    a = torch.zeros_like(lse) if grad_logp is None else grad_logp.to(lse.dtype).contiguous()
    return Gradient(a, None if grad_entropy is None else grad_entropy.to(lse.dtype).contiguous())


def _head(
    rows: Tensor, row_scale: Tensor | None, scale: float, softcap: float, tile_rows: int, workspace_bytes: int,
    backend: str,
) -> Head:  # fmt: skip
    module = backends.select(rows.device, rows.dtype, backend or None)
    inv_temperature = scale if row_scale is None else row_scale.to(wide_of(rows.dtype)).contiguous()
    return Head(module, inv_temperature, softcap or None, workspace_bytes or None, tile_rows)


def _present(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


def _split(inv_temperature: float | Tensor) -> tuple[Tensor | None, float]:
    return (inv_temperature, 1.0) if isinstance(inv_temperature, Tensor) else (None, float(inv_temperature))


def _tile(hidden: Tensor, batch_invariant: bool) -> int:
    return _TILE_ROWS.get(hidden.device.type, 256) if batch_invariant else 0


def _needs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    on = torch.is_grad_enabled()
    return on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None) -> None:
    if hasattr(weight, "placements"):
        raise ValueError(
            "weight is a DTensor; use omni_kernels.parallel: vocab_parallel_policy_loss(*vocab_shard(weight)) for a "
            "vocabulary shard, PolicyHead under fully_shard for FSDP2"
        )
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.ndim != 2 or not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)}; give a float matrix")
    if hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        given = f"hidden {list(hidden.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"{given} do not fit; give [N, H] and [V, H], V and H >= 1")
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}; move them to one device")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != hidden.device):
        raise ValueError(f"bias is {list(bias.shape)} on {bias.device}; give [V] = {[len(weight)]} on {hidden.device}")
    wanted = torch.float32, weight.shape, weight.device
    if main_grad is not None and (main_grad.dtype, main_grad.shape, main_grad.device) != wanted:
        given = f"{main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}"
        raise ValueError(f"main_grad is {given}; give float32 {list(weight.shape)} on {weight.device}")


def check_rows(
    rows: Tensor, targets: Tensor, inv_temperature: float | Tensor, softcap: float | None, name: str
) -> None:
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError("omni_kernels has no forward-mode derivatives (jvp); use backward()")
    if rows.ndim != 2:
        raise ValueError(f"{name} has shape {list(rows.shape)}; give flat rows [N, ...], for example x.flatten(0, -2)")
    if targets.shape != rows.shape[:1] or targets.dtype != torch.int64 or targets.device != rows.device:
        given = f"{targets.dtype} {list(targets.shape)} on {targets.device}"
        raise ValueError(f"targets is {given}; give int64 {[len(rows)]} on {rows.device} like {name}")
    if isinstance(inv_temperature, Tensor):
        if inv_temperature.shape != targets.shape or inv_temperature.device != rows.device:
            given = f"{list(inv_temperature.shape)} on {inv_temperature.device}"
            raise ValueError(f"inv_temperature is {given}; give a number, or {[len(rows)]} on {rows.device}")
    elif not 0 < inv_temperature < float("inf"):
        raise ValueError(f"inv_temperature is {inv_temperature}; give a finite number > 0 (1 / temperature)")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; give a finite number > 0, or None for no cap")
