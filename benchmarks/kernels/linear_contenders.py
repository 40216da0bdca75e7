"""Questions C2 and T4, hidden states and head to loss, dX and dW, and T3, to log-prob and entropy: who competes.

The loss is the one of C1. The limit is three full-size GEMMs (logits, dX, dW; for T3 the first) of the same shapes and dtype,
into buffers that exist. Contenders marked cross-entropy solve the simpler task that their names say, and are listed for context.
T5 (half of the rows inactive), T6 (the smallest workspace) and T7 (batch-invariant) compare this package with itself.

Peers come from the packages `trl` and `liger-kernel` where they are installed (`pip install --no-deps`). TRL's function imports
its trainer package, with pandas and datasets, for one FSDP context manager; where these are absent it gets a null context.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.logits_contenders import SPEC, clipped_loss, logsumexp_form, require, trl_entropy, trl_logp
from benchmarks.scoreboard import Contender, Run, Unavailable
from omni_kernels import Tokens, head_rows, linear_logprob, linear_policy_loss

_TRL_CHUNK = 32768  # columns, as its trainers set it
T4_WORKSPACE = 1200 << 20
_SEQUENCES = 8  # of equal length: Liger's op takes a batch of sequences


@dataclass(frozen=True)
class LinearCase:
    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"N={self.tokens} H={self.hidden} V={self.vocab}"


@dataclass(frozen=True)
class LinearData:
    hidden: Tensor
    weight: Tensor
    tokens: Tokens


def make(case: LinearCase) -> LinearData:
    place = case.device
    g = torch.Generator(place).manual_seed(0)
    hidden = torch.randn(case.tokens, case.hidden, generator=g, device=place).to(case.dtype)
    weight = (torch.randn(case.vocab, case.hidden, generator=g, device=place) * 2 * case.hidden**-0.5).to(case.dtype)
    targets = torch.randint(0, case.vocab, (case.tokens,), generator=g, device=place)
    picked = (hidden.float() * weight[targets].float()).sum(-1)
    old = picked - math.log(case.vocab) - 2 + torch.randn(case.tokens, generator=g, device=place) * 0.1
    advantages = torch.randn(_SEQUENCES, generator=g, device=place).repeat_interleave(case.tokens // _SEQUENCES)
    return LinearData(hidden, weight, Tokens(targets, advantages, old=old))


Build = Callable[[LinearData], Run]


def _leaves(data: LinearData) -> tuple[Tensor, Tensor]:
    return data.hidden.detach().requires_grad_(), data.weight.detach().requires_grad_()


def _from_logp(data: LinearData, logp: Callable[[Tensor, Tensor], Tensor]) -> Run:
    x, w = _leaves(data)
    return Run(lambda: torch.autograd.grad(clipped_loss(logp(x, w).float(), data.tokens), (x, w)))


def three_gemms(data: LinearData) -> Run:
    x, w = data.hidden, data.weight
    logits, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def call() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.t(), x, out=dw)

    return Run(call)


def one_gemm(data: LinearData) -> Run:
    logits = data.hidden.new_empty(len(data.hidden), len(data.weight))
    return Run(lambda: torch.mm(data.hidden, data.weight.t(), out=logits))


def ours(backend: str, tokens: Callable[[LinearData], Tokens] | None = None, **options: object) -> Build:
    """Loss and gradients; tokens: others than those of the data; options: of `linear_policy_loss`."""

    def build(data: LinearData) -> Run:
        require(backend)
        x, w = _leaves(data)
        given = data.tokens if tokens is None else tokens(data)
        return Run(
            lambda: torch.autograd.grad(linear_policy_loss(x, w, given, SPEC, backend=backend, **options).loss, (x, w))
        )

    return build


def ours_into_main_grad(backend: str) -> Build:
    """As a trainer with fp32 master gradients calls it: dW is added to a buffer that exists."""

    def build(data: LinearData) -> Run:
        require(backend)
        x, w = _leaves(data)
        main_grad = torch.zeros_like(w, dtype=torch.float32)

        def call() -> None:
            how = {"main_grad": main_grad, "grad_scale": 1.0, "backend": backend}
            torch.autograd.grad(linear_policy_loss(x, w, data.tokens, SPEC, **how).loss, x)

        return Run(call, lambda: main_grad.zero_())

    return build


def ours_forward(backend: str) -> Build:
    def build(data: LinearData) -> Run:
        require(backend)
        y = data.tokens.targets
        return Run(torch.no_grad()(lambda: linear_logprob(data.hidden, data.weight, y, backend=backend)))

    return build


def ours_one_kernel(data: LinearData) -> Run:
    """GEMM and softmax in one CUDA kernel: no logits in memory. A few rows are checked against fp32 first."""
    require("cuda")
    fused = importlib.import_module("omni_kernels.backends.cuda").linear_forward
    x, y = data.hidden[:64], data.tokens.targets[:64]
    exact, _ = linear_logprob(x.float(), data.weight.float(), y, backend="torch")
    error = float((fused(x, data.weight, None, y)[0] - exact).abs().max())
    assert error < 1e-3, f"the log-probs of linear_forward are off by {error:.1e}"
    return Run(lambda: fused(data.hidden, data.weight, None, data.tokens.targets))


def half_masked(data: LinearData) -> Tokens:
    """Every other token is not trained on, and the packer said so."""
    mask = torch.arange(len(data.hidden), device=data.hidden.device) % 2 == 0
    tokens = replace(data.tokens, mask=mask)
    return replace(tokens, rows=head_rows(tokens, SPEC))


def half_clipped(data: LinearData) -> Tokens:
    """Every other token turns out clipped: an old log-prob far on the other side of its advantage."""
    t = data.tokens
    assert t.old is not None
    far = t.old - t.advantages.sign() * 50
    return replace(t, old=torch.where(torch.arange(len(far), device=far.device) % 2 == 0, t.old, far))


def trl_full_logits(data: LinearData) -> Run:
    def logp(x: Tensor, w: Tensor) -> Tensor:
        logits = x @ w.t()
        trl_entropy(logits.detach())
        return trl_logp(logits, data.tokens.targets)

    return _from_logp(data, logp)


def compiled_full_logits(data: LinearData) -> Run:
    form = torch.compile(logsumexp_form, dynamic=False)
    return _from_logp(data, lambda x, w: form(x @ w.t(), data.tokens.targets)[0])


def trl_chunked(data: LinearData) -> Run:
    try:
        function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    except ImportError as error:
        raise Unavailable(str(error)) from error
    try:
        importlib.import_module("trl.trainer.utils")
    except ImportError:
        stand_in = types.ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
        package = types.ModuleType("trl.trainer")
        package.__path__ = []
        sys.modules |= {"trl.trainer": package, "trl.trainer.utils": stand_in}
    y = data.tokens.targets
    return _from_logp(data, lambda x, w: function.apply(x, w, None, y, 1.0, _TRL_CHUNK, None, 1.0, ("entropy",))[0])


def liger(compile_it: bool) -> Callable[[LinearData], Run]:
    def build(data: LinearData) -> Run:
        try:
            module = importlib.import_module("liger_kernel.chunked_loss")
        except ImportError as error:
            raise Unavailable(str(error)) from error
        loss = module.LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=compile_it, use_ref_model=False, epsilon_low=SPEC.eps_low, epsilon_high=SPEC.eps_high,
            loss_type="dapo",
        )  # fmt: skip
        x, w = _leaves(data)
        assert data.tokens.old is not None
        ids, old = (v.view(_SEQUENCES, -1) for v in (data.tokens.targets, data.tokens.old))
        advantages = data.tokens.advantages.view(_SEQUENCES, -1)[:, 0].contiguous()
        mask = torch.ones_like(ids)

        def call() -> None:
            value, *_ = loss(x.view(_SEQUENCES, -1, x.shape[1]), w, ids, mask, advantages, old_per_token_logps=old)
            torch.autograd.grad(value, (x, w))

        return Run(call)

    return build


def torch_cross_entropy(data: LinearData) -> Run:
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    x, w = _leaves(data)
    return Run(lambda: torch.autograd.grad(fused(x, w, data.tokens.targets), (x, w)))


def apple_cross_entropy(data: LinearData) -> Run:
    try:
        fused = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        raise Unavailable(str(error)) from error
    x, w = _leaves(data)
    impl = "cce" if x.is_cuda else "torch_compile"
    return Run(lambda: torch.autograd.grad(fused(x, w, data.tokens.targets, impl=impl), (x, w)))


def liger_scaled(forward_only: bool) -> Build:
    """Liger's fused head: per-token log-prob and entropy (SM90 kernels with its `cutedsl` extra, else in chunks of torch)."""

    def build(data: LinearData) -> Run:
        try:
            module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
        except ImportError as error:
            raise Unavailable(str(error)) from error
        function, y = module.LigerFusedLinearScaledCrossEntropyFunction, data.tokens.targets
        if forward_only:
            return Run(torch.no_grad()(lambda: function.apply(data.hidden, data.weight, y, return_entropy=True)))
        return _from_logp(data, lambda x, w: -function.apply(x, w, y, return_entropy=True)[0])

    return build


def verl(forward_only: bool) -> Build:
    def build(data: LinearData) -> Run:
        if not data.hidden.is_cuda:
            raise Unavailable("a Triton kernel: it needs a GPU")
        try:
            function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
        except ImportError as error:
            raise Unavailable(str(error)) from error
        y = data.tokens.targets
        if forward_only:
            return Run(torch.no_grad()(lambda: function(data.hidden, data.weight, y, 1.0, "none")))
        return _from_logp(data, lambda x, w: function(x, w, y, 1.0, "none")[0])

    return build


def forward_full_logits(data: LinearData) -> Run:
    form = torch.compile(logsumexp_form, dynamic=False)
    return Run(torch.no_grad()(lambda: form(data.hidden @ data.weight.t(), data.tokens.targets)))


_PEERS: list[Contender[LinearData]] = [
    Contender("TRL formulas on full logits", "peer", trl_full_logits),
    Contender("logsumexp on full logits, torch.compile", "peer", compiled_full_logits),
    Contender("TRL ChunkedLogProbFunction", "peer", trl_chunked),
    Contender("LigerFusedLinearGRPOLoss", "peer", liger(False)),
    Contender("Liger fused linear scaled cross-entropy", "peer", liger_scaled(False)),
    Contender("torch linear_cross_entropy (cross-entropy)", "context", torch_cross_entropy),
    Contender("cut-cross-entropy (cross-entropy)", "context", apple_cross_entropy),
]
C2: list[Contender[LinearData]] = [
    Contender("limit: three GEMMs", "limit", three_gemms),
    Contender("omni_kernels, C++", "ours", ours("cpu")),
    Contender("omni_kernels, C++, dW into main_grad", "ours", ours_into_main_grad("cpu")),
    Contender("omni_kernels, C++, workspace of 32 MiB", "ours", ours("cpu", workspace_bytes=32 << 20)),
    Contender("omni_kernels, torch", "context", ours("torch")),
    Contender("LigerFusedLinearGRPOLoss, compiled", "peer", liger(True)),
    *_PEERS,
]
T3: list[Contender[LinearData]] = [
    Contender("limit: one GEMM", "limit", one_gemm),
    Contender("omni_kernels, Triton", "ours", ours_forward("triton")),
    Contender("omni_kernels, CUDA rows", "ours", ours_forward("cuda")),
    Contender("omni_kernels, CUDA, one kernel", "ours", ours_one_kernel),
    Contender("logsumexp on full logits, torch.compile", "peer", forward_full_logits),
    Contender("Liger fused linear scaled cross-entropy", "peer", liger_scaled(True)),
    Contender("verl linear_cross_entropy", "peer", verl(True)),
]
T4: list[Contender[LinearData]] = [
    Contender("limit: three GEMMs", "limit", three_gemms),
    Contender("omni_kernels, Triton", "ours", ours("triton", workspace_bytes=T4_WORKSPACE)),
    Contender("omni_kernels, CUDA", "ours", ours("cuda", workspace_bytes=T4_WORKSPACE)),
    Contender("omni_kernels, CUDA, scaled exponentials", "ours", ours("cuda_exp", workspace_bytes=T4_WORKSPACE)),
    *_PEERS,
    Contender("verl linear_cross_entropy", "peer", verl(False)),
]
T5: list[Contender[LinearData]] = [
    Contender("all rows active", "peer", ours("triton", workspace_bytes=T4_WORKSPACE)),
    Contender("half masked, known a priori", "ours", ours("triton", half_masked, workspace_bytes=T4_WORKSPACE)),
    Contender(
        "half clipped, known after the log-prob", "ours", ours("triton", half_clipped, workspace_bytes=T4_WORKSPACE)
    ),
]
T6: list[Contender[LinearData]] = [
    Contender("limit: three GEMMs", "limit", three_gemms),
    *(
        Contender(f"workspace of {size >> 20} MiB", "ours", ours("triton", workspace_bytes=size))
        for size in (64 << 20, 256 << 20, T4_WORKSPACE)
    ),
]
T7: list[Contender[LinearData]] = [
    Contender("rows free to share a GEMM's shape", "peer", ours("triton")),
    Contender("batch-invariant", "ours", ours("triton", batch_invariant=True)),
]
