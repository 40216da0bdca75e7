"""The Triton row kernels as a backend: NVIDIA GPUs of compute capability 8.0 and later, bf16 and fp32 logits, fp32 maths.

Traffic, in bytes of the logits (N x V x 2 in bf16); the statistics are 12 to 20 bytes a row more:

    rows_forward        one read. Each row is cut into segments, one program each; a second kernel merges them.
    rows_backward_      one read and one write, a program a segment. Idle and ignored rows are written only.
    rows_policy_loss_   one read and one write of HBM, plus one read of L2: a program takes a whole row, walks it for the
                        statistics, computes the row's coefficients from the recorded loss (`program.py`), and walks it
                        back for the gradient. Two rows of 300 KB on each of 132 processors, half of each on average still
                        to be read again, are 40 MB of the 50 MB of L2 of an H200. Where rows are fewer than
                        processors, `rows_forward` keeps each row's shift and a program a segment writes the gradient: the
                        second read is L2's as well then, as all those rows fit.

No host sync, no atomics, no autotuning (a kernel that writes over its input cannot be tried twice): launches can be captured
in a CUDA graph, and repeat bit by bit. Segments depend on V and dtype only, so a row's bits do not depend on N.

Limits: tensors on the current or any other NVIDIA GPU; V < 2^31. Where the environment had TRITON_INTERPRET=1 before the
first import, kernels run in Triton's interpreter instead, on CPU tensors too: exact and slow, for tests. A row with a NaN or
+inf logit, or with nothing but -inf, gives NaN log-prob, entropy and gradient; -inf elsewhere is a probability of 0. A target
outside the vocabulary, which is not looked for here, gives a NaN log-prob and reads and writes nothing outside its row.
p = e^(z - lse) in `rows_backward_` has the relative error of the last bit of lse; `rows_policy_loss_` does not.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from omni_kernels.backends.program import Recorded, record
from omni_kernels.backends.rows import Rows, check_coefficients, check_vector, outputs, scalar_or_rows
from omni_kernels.losses import Prepared
from omni_kernels.spec import LossSpec

try:
    import triton

    from omni_kernels.backends import triton_kernels as kernels
except ImportError as error:
    kernels = None  # type: ignore[assignment]
    _reason = f"triton is not importable ({error}); pip install triton"


@dataclass(frozen=True)
class Launch:
    """span: columns of a segment; block: columns in registers at a time; warps: of a program; stages: of the loads of a
    walk, on their way to shared memory while a block is worked on, that one included; 1: nothing is loaded ahead."""

    span: int
    block: int
    warps: int
    stages: int

    def fit(self, vocab: int) -> Launch:
        """No wider than a row needs. Segments are of equal width, as far as blocks allow."""
        block = max(_LEAST_BLOCK, min(self.block, triton.next_power_of_2(vocab)))
        blocks, segments = triton.cdiv(vocab, block), triton.cdiv(vocab, self.span)
        return Launch(
            triton.cdiv(blocks, segments) * block, block, max(1, self.warps * block // self.block), self.stages
        )

    def walk(self, logits: Tensor) -> dict[str, int]:
        """What a kernel that walks segments has to know."""
        lanes, vector = 32 * self.warps, 16 // logits.element_size()
        stages = min(self.stages, self.span // self.block)
        return {"SPAN": self.span, "BLOCK": self.block, "LANES": lanes, "VECTOR": vector, "STAGES": stages}


# A thread holds 8 to 32 logits, block / (32 warps), in registers: no more than 64 registers, and no spills.
# One segment a program: small programs, nine on a processor, so that some compute while others load (72 KB under way).
# One row a program: two on a processor (1,024 threads of 64 registers); more rows under way would not fit L2. So few cannot
# hide a load behind each other: each has two blocks (32 KB in bf16) on their way to shared memory while it works on one.
SEGMENT = {torch.bfloat16: Launch(32768, 4096, 4, 1), torch.float32: Launch(32768, 4096, 4, 1)}
ROW = {torch.bfloat16: Launch(32768, 8192, 16, 3), torch.float32: Launch(32768, 4096, 16, 3)}  # 16 KB a block
ROW_CAPPED = Launch(32768, 4096, 16, 3)  # the slope of the cap takes the registers of half a block
GRADIENT = {torch.bfloat16: Launch(8192, 8192, 8, 1), torch.float32: Launch(8192, 8192, 8, 1)}
_LEAST_BLOCK = 256  # one 16-byte load of bf16 by each thread of a warp


def reason_unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    if kernels is None:
        return _reason
    if not _interpreted() and not torch.cuda.is_available():
        return (
            "there is no NVIDIA GPU here; set TRITON_INTERPRET=1 before the first import to run it on the CPU, slowly"
        )
    return None


def rows_forward(
    logits: Tensor,
    targets: Tensor,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob of the target, entropy and log-sum-exp of every row, in nats, in one read of the logits.

    logits [N, V] bf16 or fp32, unit column stride; targets int64 [N], -100 marks a row that is not read (its outputs are 0);
    inv_temperature > 0, scalar or fp32 [N]. Returns fp32 [N] each; entropy is None unless wanted. Raises ValueError or
    TypeError on arguments that do not fit.
    """
    rows = _Rows(logits, targets, inv_temperature, softcap)
    return _statistics(rows, SEGMENT[logits.dtype].fit(rows.vocab), want_entropy, None)


def rows_backward_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    a: Tensor,
    b: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float | Tensor = 0.0,
) -> None:
    """Overwrites logits [N, V] with dloss/dlogits, given a = dloss/dlogp, b = dloss/dentropy and the weight of lse^2, [N].

    lse and entropy are those of `rows_forward`; entropy is needed where b is given. Rows whose coefficients are all 0, and
    ignored ones, become 0 without being read. The gradient is rounded once, to the dtype of the logits.
    """
    rows = _Rows(logits, targets, inv_temperature, softcap)
    z, z_rows = scalar_or_rows(z_loss, "z_loss", logits)
    check_coefficients(rows, lse, entropy, a, b)
    launch = GRADIENT[logits.dtype].fit(rows.vocab)
    blocks = triton.cdiv(rows.vocab, launch.block)
    with rows.on_device():
        kernels.block_gradient[(rows.count * blocks,)](
            *rows.arguments, blocks, None, entropy, lse, None, a, b, z_rows, z, (), (), *_NO_PROGRAM,
            BLOCK=launch.block, HAS_CAP=rows.capped, HAS_B=b is not None, num_warps=launch.warps,
        )  # fmt: skip


def rows_policy_loss_(
    logits: Tensor,
    targets: Tensor,
    batch: Prepared,
    spec: LossSpec,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    want_entropy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`rows_forward` and `rows_backward_` in one sweep: logits [N, V] become the gradient of the loss of `spec`, row by row.

    batch: `losses.prepare` of the same N tokens, row-wise (`losses.row_wise`). The loss itself and its metrics follow from the
    result: `losses.coefficients(logp, entropy, lse, batch, spec)`. A loss is compiled into the kernel when it is first met,
    its numbers (eps, beta, ...) are not. Raises NotImplementedError where it cannot be recorded (`program.record`).
    """
    rows = _Rows(logits, targets, inv_temperature, softcap)
    program = _compiled(record(batch, spec))
    columns = tuple(_column(getattr(batch, name)) for name in program.columns)
    for name, column in zip(program.columns, columns, strict=True):
        check_vector(column, name, column.dtype, logits)
    want_entropy = want_entropy or spec.needs_entropy
    launch = (ROW_CAPPED if rows.capped else ROW[logits.dtype]).fit(rows.vocab)
    segments = triton.cdiv(rows.vocab, launch.span)
    if rows.count < _processors(logits.device) and segments > 1:
        shift = torch.empty(2, rows.count, dtype=torch.float32, device=logits.device)
        logp, entropy, lse = _statistics(rows, launch, want_entropy, shift)
        launch = GRADIENT[logits.dtype].fit(rows.vocab)
        blocks = triton.cdiv(rows.vocab, launch.block)
        with rows.on_device():
            kernels.block_gradient[(rows.count * blocks,)](
                *rows.arguments, blocks, logp, entropy, lse, shift, None, None, None, 0.0, columns, program.constants,
                *program.code, BLOCK=launch.block, HAS_CAP=rows.capped, HAS_B=program.tilts, num_warps=launch.warps,
            )  # fmt: skip
        return logp, entropy, lse

    logp, entropy, lse = outputs(rows.logits, want_entropy)
    with rows.on_device():
        kernels.row_policy_loss[(rows.count,)](
            *rows.arguments, logp, entropy, lse, columns, program.constants, *program.code,
            SEGMENTS=segments, PADDED=_padded(segments), BLOCKS=triton.cdiv(rows.vocab, launch.block), **launch.walk(logits),
            HAS_CAP=rows.capped, ENTROPY=want_entropy, HAS_B=program.tilts, num_warps=launch.warps,
        )  # fmt: skip
    return logp, entropy, lse


def _statistics(
    rows: _Rows, launch: Launch, want_entropy: bool, shift: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """rows_forward; shift [2, N] takes (peak, log2 of the sum of exponentials)."""
    logp, entropy, lse = outputs(rows.logits, want_entropy)
    segments = triton.cdiv(rows.vocab, launch.span)
    partials = torch.empty(3, rows.count, segments, dtype=torch.float32, device=logp.device)
    with rows.on_device():
        kernels.segment_statistics[(rows.count * segments,)](
            *rows.arguments, partials, segments, **launch.walk(rows.arguments[0]), HAS_CAP=rows.capped, ENTROPY=want_entropy,
            CACHE="evict_first" if shift is None else "evict_last", num_warps=launch.warps,
        )  # fmt: skip
        kernels.merge_statistics[(rows.count,)](
            *rows.arguments, partials, segments, logp, entropy, lse, shift, PADDED=_padded(segments), HAS_CAP=rows.capped,
            ENTROPY=want_entropy, num_warps=1,
        )  # fmt: skip
    return logp, entropy, lse


class _Rows(Rows):
    """With the arguments that all kernels begin with."""

    def __init__(self, logits: Tensor, targets: Tensor, inv_temperature: float | Tensor, softcap: float | None) -> None:
        if kernels is None:
            raise RuntimeError(_reason)
        super().__init__("triton", None if _interpreted() else "cuda", logits, targets, inv_temperature, softcap)
        self.capped = softcap is not None
        self.arguments = (logits, self.stride, self.vocab, targets, self.scale, self.scale_rows, softcap or 1.0)

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Triton launches on the current device; this makes it that of the logits."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class _Program:
    """A recorded loss as arguments of the kernels. tilts: whether it has an entropy gradient."""

    columns: tuple[str, ...]
    constants: tuple[float, ...]
    code: tuple[tuple[int, ...], int, int, int, int, int]  # PROGRAM, LENGTH, COLUMNS, A, B, Z
    tilts: bool


_NO_PROGRAM = ((), 0, 0, -1, -1, -1)


@lru_cache(maxsize=64)
def _compiled(recorded: Recorded) -> _Program:
    """Numbers become constants that are passed at run time, so that a new beta compiles nothing; unread columns go."""
    known = 3 + len(recorded.columns)
    read = {r for step in recorded.code for r in step[2:5] if step[0] != "const"} | set(recorded.results)
    columns = [r for r in range(3, known) if r in read]
    constants = sorted({step[5] for step in recorded.code if step[0] == "const"})
    number = {value: 3 + len(columns) + k for k, value in enumerate(constants)}
    register = {r: r for r in range(3)} | {r: 3 + k for k, r in enumerate(columns)} | {-1: -1}
    codes = {name: code for code, name in enumerate(kernels.INSTRUCTIONS)}
    program: list[int] = []
    for op, dst, x, y, z, value in recorded.code:
        if op == "const":
            register[dst] = number[value]
            continue
        if op not in codes:
            raise NotImplementedError(f"no Triton instruction for {op!r}")
        register[dst] = 3 + len(columns) + len(constants) + len(program) // 4
        program += [codes[op], *(register.get(r, 0) for r in (x, y, z))]
    names = tuple(recorded.columns[r - 3] for r in columns)
    a, b, weight = (register[r] for r in recorded.results)
    code = (tuple(program), len(program) // 4, len(columns), a, b, weight)
    return _Program(names, tuple(constants), code, b >= 0)


def _column(column: Tensor) -> Tensor:
    if column.dtype == torch.bool:
        return column.contiguous().view(torch.uint8)
    return column.to(torch.float32).contiguous()


def _padded(segments: int) -> int:
    return max(2, triton.next_power_of_2(segments))


@cache
def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


@cache
def _processors(device: torch.device) -> int:
    """Rows below this are split over several programs. The interpreter has one processor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
