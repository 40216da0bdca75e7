"""The Triton device code of `backends/triton.py`: rows of logits in, statistics or gradients out, fp32 maths.

A row is cut into segments, and a segment is walked in blocks of BLOCK columns that sit in registers: each exponential is
taken once, relative to a running maximum that every thread has of its own. The statistics of a row are folded from those of
its segments by one formula in one order, whether one program walks all segments or each has its own, so that a row's bits
do not depend on how many rows there are.

Work is done in bits: x = (z - peak) c with c = log2(e) / temperature, so that e^ is one `ex2`; subtracting before scaling
keeps logits near 5000 exact. Where there is nothing but -inf so far, 0 is subtracted instead.

Limits: V < 2^31. Scalars that are None or constexpr select a specialisation when the kernel is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omni_kernels.spec import IGNORE

INSTRUCTIONS = (
    "neg", "abs", "exp", "expm1", "sigmoid", "add", "sub", "mul", "div", "min", "max", "lt", "le", "gt", "ge", "eq", "ne",
    "and", "or", "not", "where", "isfinite", "isnan",
)  # fmt: skip
"""What `_instruction` knows, by number."""

_IGNORE = tl.constexpr(IGNORE)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(-300.0)  # bits; 2^-300 is 0 in fp32, and 0 * -300 is no NaN, as 0 * -inf is
_TANH = tl.constexpr((-0.3333331731, 0.1333258038, -0.0538518654, 0.0210702536, -0.0062726075))  # fitted, |x| <= 0.55


# --- arithmetic -------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """To 1e-7: a polynomial in x^2 where 1 - 2 / (e^2x + 1) would cancel."""
    square = x * x
    series = _TANH[4]
    series = series * square + _TANH[3]
    series = series * square + _TANH[2]
    series = series * square + _TANH[1]
    series = series * square + _TANH[0]
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2 * _LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, x + x * square * series, tl.where(x < 0, -far, far))


@triton.jit
def _expm1(x):
    """To 2e-7: the series where e^x - 1 would cancel."""
    series = x * (1 / 40320) + 1 / 5040
    series = series * x + 1 / 720
    series = series * x + 1 / 120
    series = series * x + 1 / 24
    series = series * x + 1 / 6
    series = series * x + 1 / 2
    return tl.where(tl.abs(x) < 0.5, x + x * x * series, tl.exp(x) - 1.0)


@triton.jit
def _instruction(op: tl.constexpr, x, y, z):
    """One step of a recorded loss (`program.py`); truth is 1 and 0, and NaN passes through min and max as in torch."""
    if op == 0:
        value = -x
    elif op == 1:
        value = tl.abs(x)
    elif op == 2:
        value = tl.exp(x)
    elif op == 3:
        value = _expm1(x)
    elif op == 4:
        value = 1.0 / (1.0 + tl.exp(-x))
    elif op == 5:
        value = x + y
    elif op == 6:
        value = x - y
    elif op == 7:
        value = x * y
    elif op == 8:
        value = x / y
    elif op == 9:
        value = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif op == 10:
        value = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif op == 11:
        value = (x < y).to(tl.float32)
    elif op == 12:
        value = (x <= y).to(tl.float32)
    elif op == 13:
        value = (x > y).to(tl.float32)
    elif op == 14:
        value = (x >= y).to(tl.float32)
    elif op == 15:
        value = (x == y).to(tl.float32)
    elif op == 16:
        value = (x != y).to(tl.float32)
    elif op == 17:
        value = ((x != 0) & (y != 0)).to(tl.float32)
    elif op == 18:
        value = ((x != 0) | (y != 0)).to(tl.float32)
    elif op == 19:
        value = (x == 0).to(tl.float32)
    elif op == 20:
        value = tl.where(x != 0, y, z)
    elif op == 21:
        value = (x - x == 0).to(tl.float32)
    else:
        value = (x != x).to(tl.float32)
    return value


@triton.jit
def _coefficients(
    logp, entropy, lse, row, columns, constants, PROGRAM: tl.constexpr, LENGTH: tl.constexpr, COLUMNS: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """(a, b, z) of a row by the recorded loss, unrolled when compiled. PROGRAM: op, x, y, z of each of LENGTH steps.

    Registers: logp, entropy, lse, the row's entries of `columns`, `constants`, then one result a step. A, B, Z: those
    with the answer; -1: it is 0.
    """
    registers = (logp, entropy, lse)
    for i in tl.static_range(COLUMNS):
        registers = registers + (tl.load(columns[i] + row).to(tl.float32),)  # type: ignore[assignment]
    registers = registers + constants
    for i in tl.static_range(LENGTH):
        x, y, z = registers[PROGRAM[4 * i + 1]], registers[PROGRAM[4 * i + 2]], registers[PROGRAM[4 * i + 3]]
        registers = registers + (_instruction(PROGRAM[4 * i], x, y, z),)
    zero = tl.full([], 0.0, tl.float32)
    a, b, weight = zero, zero, zero
    if A >= 0:
        a = registers[A]
    if B >= 0:
        b = registers[B]
    if Z >= 0:
        weight = registers[Z]
    return a, b, weight


# --- parts of a row ---------------------------------------------------------------------------------------------------


@triton.jit
def _row_of(scale, scale_rows, row):
    """The inverse temperature of a row."""
    value = scale
    if scale_rows is not None:
        value = tl.load(scale_rows + row)
    return value


@triton.jit
def _target_logit(base, y, vocab, cap, HAS_CAP: tl.constexpr):
    """(z before the temperature, dz/du) of the target; NaN for a token outside the vocabulary."""
    z = tl.load(base + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(tl.float32)
    slope = tl.full([], 1.0, tl.float32)
    if HAS_CAP:
        bent = _tanh(z / cap)
        z = cap * bent
        slope = 1.0 - bent * bent
    return z, slope


@triton.jit
def _segment(
    base, first, vocab, cap, c, SPAN: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """(peak, sum 2^x, sum x 2^x) of SPAN columns from `first`, x = (z - peak) c. CACHE: how L2 is to treat them.

    Each of LANES threads has sums of its own, relative to its own peak, and meets the others once, at the end.
    """
    peaks = tl.full([LANES], float("-inf"), tl.float32)
    totals = tl.zeros([LANES], tl.float32)
    weights = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
        columns = first + start + tl.arange(0, BLOCK)
        inside = columns < vocab
        z = tl.load(base + columns, mask=inside, other=float("-inf"), eviction_policy=CACHE).to(tl.float32)
        if HAS_CAP:
            z = tl.where(inside, cap * _tanh(z / cap), float("-inf"))
        z = tl.reshape(z, [BLOCK // (LANES * VECTOR), LANES, VECTOR])
        higher = tl.maximum(peaks, tl.max(tl.max(z, 2), 0))
        safe = _finite(higher)
        x = (z - safe[None, :, None]) * c
        e = tl.exp2(x)
        sinks = tl.maximum((peaks - safe) * c, _LEAST)
        share = tl.exp2(sinks)
        if ENTROPY:
            weights = (weights + totals * sinks) * share + tl.sum(tl.sum(e * tl.maximum(x, _LEAST), 2), 0)
        totals = totals * share + tl.sum(tl.sum(e, 2), 0)
        peaks = higher
    return _fold(peaks, totals, weights, c, ENTROPY)


@triton.jit
def _finite(peak):
    """What is subtracted for a peak: 0 where there is nothing but -inf."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _fold(peaks, totals, weights, c, ENTROPY: tl.constexpr):
    """(peak, total, weighted) of vectors of them."""
    peak = tl.max(peaks, 0)
    x = (peaks - _finite(peak)) * c
    share = tl.exp2(x)
    total = tl.sum(totals * share, 0)
    weighted = total
    if ENTROPY:
        weighted = tl.sum((weights + totals * tl.maximum(x, _LEAST)) * share, 0)
    return peak, total, weighted


@triton.jit
def _merge(peaks, totals, weights, z_target, scale, ENTROPY: tl.constexpr):
    """(logp, entropy, lse, peak, log2 of the sum) of a row, from its segments'."""
    peak, total, weighted = _fold(peaks, totals, weights, scale * _LOG2_E, ENTROPY)
    peak = _finite(peak)
    log_total = tl.log(total)
    entropy = log_total
    if ENTROPY:
        entropy = log_total - weighted / total * _LN_2
    # rounding alone can take a log-prob beyond 0
    logp = tl.minimum((z_target - peak) * scale - log_total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return logp, entropy, peak * scale + log_total, peak, log_total * _LOG2_E


@triton.jit
def _hit(logp, entropy, lse, a, b, z):
    """d loss / d z of the target: expm1 where 1 - p would cancel."""
    p = tl.exp(logp)
    return 2.0 * z * lse * p - a * _expm1(logp) - b * p * (tl.maximum(logp, -1024.0) + entropy)


@triton.jit
def _write_gradient(
    base, first, vocab, cap, c, peak, log2_total, level, tilt, BLOCK: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_B: tl.constexpr,
):  # fmt: skip
    """Columns from `first` become p (level + tilt log2 p) dz/du."""
    columns = first + tl.arange(0, BLOCK)
    inside = columns < vocab
    z = tl.load(base + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if HAS_CAP:
        bent = _tanh(z / cap)
        z = cap * bent
    x = (z - peak) * c - log2_total
    g = tl.exp2(x) * level
    if HAS_B:
        g = tl.exp2(x) * (level + tilt * tl.maximum(x, -1024.0))
    if HAS_CAP:
        g = g * (1.0 - bent * bent)
    tl.store(base + columns, g.to(base.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def _clear(base, first, vocab, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK)
    tl.store(base + columns, tl.zeros([BLOCK], base.dtype.element_ty), mask=columns < vocab)


# --- kernels ----------------------------------------------------------------------------------------------------------

# Where a vector of one number a row starts is of no use to a kernel: a chunk's slice of it compiles nothing new.
_kernel = triton.jit(
    do_not_specialize=["segments", "blocks"],
    do_not_specialize_on_alignment=[
        "targets", "scale_rows", "partials", "logp_out", "entropy_out", "lse_out", "shift_out", "logp_in", "entropy_in",
        "lse_in", "shift_in", "a_in", "b_in", "z_in", "columns",
    ],
)  # fmt: skip


@_kernel
def segment_statistics(
    logits, row_stride, vocab, targets, scale, scale_rows, cap, partials, segments, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr, HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """One program a segment: partials [3, N, segments], not written for ignored rows. One read of the logits."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    if tl.load(targets + row) != _IGNORE:
        base = logits + row * row_stride
        c = _row_of(scale, scale_rows, row) * _LOG2_E
        first = (program % segments) * SPAN
        peak, total, weighted = _segment(
            base, first, vocab, cap, c, SPAN, BLOCK, LANES, VECTOR, STAGES, HAS_CAP, ENTROPY, CACHE
        )
        plane = tl.num_programs(0).to(tl.int64)
        tl.store(partials + program, peak)
        tl.store(partials + plane + program, total)
        if ENTROPY:
            tl.store(partials + 2 * plane + program, weighted)


@_kernel
def merge_statistics(
    logits, row_stride, vocab, targets, scale, scale_rows, cap, partials, segments, logp_out, entropy_out, lse_out,
    shift_out, PADDED: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One program a row: the statistics, and where wanted shift_out [2, N] = (peak, log2 of the sum)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    y = tl.load(targets + row)
    used = y != _IGNORE
    lanes = tl.arange(0, PADDED)
    inside = (lanes < segments) & used
    slots = partials + row * segments + lanes
    peaks = tl.load(slots, mask=inside, other=float("-inf"))
    totals = tl.load(slots + rows * segments, mask=inside, other=0.0)
    weights = totals
    if ENTROPY:
        weights = tl.load(slots + 2 * rows * segments, mask=inside, other=0.0)
    z_target, _ = _target_logit(logits + row * row_stride, y, vocab, cap, HAS_CAP)
    scale = _row_of(scale, scale_rows, row)
    logp, entropy, lse, peak, log2_total = _merge(peaks, totals, weights, z_target, scale, ENTROPY)
    tl.store(logp_out + row, tl.where(used, logp, 0.0))
    tl.store(lse_out + row, tl.where(used, lse, 0.0))
    if ENTROPY:
        tl.store(entropy_out + row, tl.where(used, entropy, 0.0))
    if shift_out is not None:
        tl.store(shift_out + row, peak)
        tl.store(shift_out + rows + row, log2_total)


@_kernel
def block_gradient(
    logits, row_stride, vocab, targets, scale, scale_rows, cap, blocks, logp_in, entropy_in, lse_in, shift_in, a_in, b_in,
    z_in, z_all, columns, constants, PROGRAM: tl.constexpr, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, Z: tl.constexpr, BLOCK: tl.constexpr, HAS_CAP: tl.constexpr, HAS_B: tl.constexpr,
):  # fmt: skip
    """One program a block: logits become dlogits. One read and one write; none of the two and one for idle rows.

    shift_in is None: (a, b, z) are given, and p = e^(z - lse). Else they come from the recorded loss, p from the shift.
    """
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    first = (program % blocks) * BLOCK
    base = logits + row * row_stride
    y = tl.load(targets + row)
    used = y != _IGNORE
    lse = tl.load(lse_in + row)
    scale = _row_of(scale, scale_rows, row)
    owner = used & (y >= first) & (y < first + BLOCK) & (y < vocab)
    z_target, slope = _target_logit(base, tl.where(owner, y, -1), vocab, cap, HAS_CAP)
    entropy = tl.full([], 0.0, tl.float32)
    if entropy_in is not None:
        entropy = tl.load(entropy_in + row)
    if shift_in is None:
        logp = z_target * scale - lse
        a = tl.load(a_in + row)
        b = tl.full([], 0.0, tl.float32)
        if HAS_B:
            b = tl.load(b_in + row)
        z = z_all
        if z_in is not None:
            z = tl.load(z_in + row)
        peak, log2_total = lse / scale, tl.full([], 0.0, tl.float32)
    else:
        logp = tl.load(logp_in + row)
        a, b, z = _coefficients(logp, entropy, lse, row, columns, constants, PROGRAM, LENGTH, COLUMNS, A, B, Z)
        peak, log2_total = tl.load(shift_in + row), tl.load(shift_in + tl.num_programs(0) // blocks + row)
    if used & ((a != 0) | (b != 0) | (z != 0)):
        level = (2.0 * z * lse - a - b * entropy) * scale
        tl.debug_barrier()  # all threads have the target's logit before one of them writes over it
        _write_gradient(
            base, first, vocab, cap, scale * _LOG2_E, peak, log2_total, level, -b * scale * _LN_2, BLOCK, HAS_CAP, HAS_B
        )
        tl.debug_barrier()  # the target's entry is written last
        if owner:
            hit = _hit(logp, entropy, lse, a, b, z) * scale * slope
            tl.store(base + y, hit.to(base.dtype.element_ty))
    else:
        _clear(base, first, vocab, BLOCK)


@_kernel
def row_policy_loss(
    logits, row_stride, vocab, targets, scale, scale_rows, cap, logp_out, entropy_out, lse_out, columns, constants,
    PROGRAM: tl.constexpr, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    Z: tl.constexpr, SEGMENTS: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr, HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr, HAS_B: tl.constexpr,
):  # fmt: skip
    """One program a row: statistics, the recorded loss, dlogits. The second walk runs backwards, over what L2 still has."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    y = tl.load(targets + row)
    used = y != _IGNORE
    live = False
    if used:
        scale = _row_of(scale, scale_rows, row)
        c = scale * _LOG2_E
        z_target, slope = _target_logit(base, y, vocab, cap, HAS_CAP)
        lanes = tl.arange(0, PADDED)
        peaks = tl.full([PADDED], float("-inf"), tl.float32)
        totals = tl.zeros([PADDED], tl.float32)
        weights = tl.zeros([PADDED], tl.float32)
        for segment in range(SEGMENTS):
            peak, total, weighted = _segment(
                base, segment * SPAN, vocab, cap, c, SPAN, BLOCK, LANES, VECTOR, STAGES, HAS_CAP, ENTROPY, "evict_last"
            )
            here = lanes == segment
            peaks = tl.where(here, peak, peaks)
            totals = tl.where(here, total, totals)
            weights = tl.where(here, weighted, weights)
        logp, entropy, lse, peak, log2_total = _merge(peaks, totals, weights, z_target, scale, ENTROPY)
        tl.store(logp_out + row, logp)
        tl.store(lse_out + row, lse)
        if ENTROPY:
            tl.store(entropy_out + row, entropy)
        a, b, z = _coefficients(logp, entropy, lse, row, columns, constants, PROGRAM, LENGTH, COLUMNS, A, B, Z)
        live = (a != 0) | (b != 0) | (z != 0)
        if live:
            level = (2.0 * z * lse - a - b * entropy) * scale
            tilt = -b * scale * _LN_2
            tl.debug_barrier()  # all threads have the target's logit before one of them writes over it
            for back in tl.range(0, BLOCKS, num_stages=STAGES):
                start = (BLOCKS - 1 - back) * BLOCK
                _write_gradient(base, start, vocab, cap, c, peak, log2_total, level, tilt, BLOCK, HAS_CAP, HAS_B)
            tl.debug_barrier()  # the target's entry is written last
            hit = _hit(logp, entropy, lse, a, b, z) * scale * slope
            tl.store(base + y, hit.to(base.dtype.element_ty), mask=(y >= 0) & (y < vocab))
    else:
        tl.store(logp_out + row, 0.0)
        tl.store(lse_out + row, 0.0)
        if ENTROPY:
            tl.store(entropy_out + row, 0.0)
    if not live:
        for block in range(BLOCKS):
            _clear(base, block * BLOCK, vocab, BLOCK)
