"""The loss, handed to compiled code without writing it twice: records `losses.coefficients` as a straight-line program.

A row-wise loss gives the coefficients (a, b, z) of a token from its own log-prob, entropy and lse, and from per-token columns.
`record` runs `losses.coefficients` once on a few dummy tokens, notes the element-wise operations that lead to a, b and z, and
drops the rest (loss, metrics). The C++ kernel replays them row by row (csrc/cpu/program.h), so a row's gradient is written
while the row is still in cache.

Limits: losses for which `losses.row_wise` is true, in fp32. An operation without an instruction, an operation in place, or a
look at a value raises NotImplementedError; callers then compute the coefficients in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omni_kernels.losses import Prepared, coefficients
from omni_kernels.spec import LossSpec

Instruction = tuple[str, int, int, int, int, float]  # op, dst, x, y, z, constant

_ROWS = 3  # dummy tokens: their values do not matter, only what is done with them
_OUTPUTS = ("a", "b", "z")

_UNARY = {
    "neg": "neg", "abs": "abs", "exp": "exp", "expm1": "expm1", "log": "log", "log1p": "log1p", "sigmoid": "sigmoid",
    "sqrt": "sqrt", "isnan": "isnan", "isfinite": "isfinite", "logical_not": "not", "bitwise_not": "not",
}  # fmt: skip
_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "minimum": "min", "maximum": "max", "clamp_min": "max",
    "clamp_max": "min", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "eq": "eq", "ne": "ne", "logical_and": "and",
    "logical_or": "or", "bitwise_and": "and", "bitwise_or": "or", "__and__": "and", "__or__": "or",
}  # fmt: skip
_SAME = ("detach", "alias", "clone", "expand", "lift_fresh_copy", "view")
_FILL = {"ones_like": 1.0, "zeros_like": 0.0}


@dataclass(frozen=True)
class Recorded:
    """A program. Registers 0, 1, 2 hold logp, entropy, lse; then come `columns`, fields of `Prepared`, one each.

    results: registers of a, b, z; -1 where the loss has none.
    """

    code: tuple[Instruction, ...]
    columns: tuple[str, ...]
    results: tuple[int, int, int]


def record(batch: Prepared, spec: LossSpec) -> Recorded:
    """The program of `coefficients(logp, entropy, lse, batch, spec)`; only which fields of `batch` are given matters."""
    return _record(tuple(f.name for f in fields(batch) if getattr(batch, f.name) is not None), spec)


@lru_cache(maxsize=64)
def _record(given: tuple[str, ...], spec: LossSpec) -> Recorded:
    columns = tuple(name for name in given if name != "sequences")
    dtypes = {name: torch.bool if name in ("trained", "kept") else torch.float32 for name in columns}

    inputs = {name: torch.zeros(_ROWS) for name in ("logp", "entropy", "lse")}
    inputs |= {name: torch.zeros(_ROWS, dtype=dtypes[name]) for name in columns}
    values: dict[str, Tensor | None] = {f.name: inputs.get(f.name) for f in fields(Prepared)}
    with torch.no_grad(), _Recorder() as recorder:
        batch = Prepared(**values)  # type: ignore[arg-type]
        known = coefficients(inputs["logp"], inputs["entropy"], inputs["lse"], batch, spec)
    return _lower(recorder.steps, list(inputs.values()), [getattr(known, name) for name in _OUTPUTS], columns)


@dataclass(frozen=True)
class _Step:
    name: str
    args: tuple[object, ...]
    kwargs: dict[str, object]
    mutates: bool
    out: Tensor


class _Recorder(TorchDispatchMode):
    """Notes every operation that makes one tensor. Holding the results keeps their identities apart."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.steps.append(_Step(func._opname, args, kwargs or {}, func._schema.is_mutable, out))
        elif func._opname == "_local_scalar_dense":
            raise NotImplementedError("a loss that looks at a value cannot become a coefficient program")
        return out


def _lower(
    steps: list[_Step], inputs: list[Tensor], outputs: list[Tensor | None], columns: tuple[str, ...]
) -> Recorded:
    made = {id(step.out): step for step in steps}
    registers = {id(tensor): index for index, tensor in enumerate(inputs)}
    code: list[Instruction] = []

    def emit(op: str, *sources: int, value: float = 0.0) -> int:
        x, y, z = (*sources, 0, 0, 0)[:3]
        code.append((op, len(inputs) + len(code), x, y, z, value))
        return code[-1][1]

    def source(value: object) -> int:
        """The register of a value; only what a result needs is ever asked for."""
        if isinstance(value, Tensor):
            if id(value) not in registers:
                if id(value) in made:
                    registers[id(value)] = _emit_step(made[id(value)], source, emit)
                elif value.numel() == 1:
                    registers[id(value)] = source(value.item())
                else:
                    raise NotImplementedError("a coefficient program reads its columns and scalars only")
            return registers[id(value)]
        if isinstance(value, bool | int | float):
            return emit("const", value=float(value))
        raise NotImplementedError(f"a coefficient program cannot hold {value!r}")

    results = [-1 if value is None else source(value) for value in outputs]
    return Recorded(tuple(code), columns, (results[0], results[1], results[2]))


def _emit_step(step: _Step, source: Callable[[object], int], emit: Callable[..., int]) -> int:
    name, args = step.name, step.args
    if step.mutates:
        raise NotImplementedError(f"{name} works in place, which a coefficient program cannot")
    if name in _UNARY:
        return emit(_UNARY[name], source(args[0]))
    if name in _BINARY:
        right = source(args[1])
        if step.kwargs.get("alpha", 1) != 1:
            right = emit("mul", right, source(step.kwargs["alpha"]))
        return emit(_BINARY[name], source(args[0]), right)
    if name == "rsub":
        return emit("sub", source(args[1]), source(args[0]))
    if name == "clamp":
        low, high = (*args[1:], None, None)[:2]
        value = source(args[0])
        if low is not None:
            value = emit("max", value, source(low))
        return value if high is None else emit("min", value, source(high))
    if name == "pow" and args[1] == 2:
        return emit("mul", source(args[0]), source(args[0]))
    if name == "reciprocal":
        return emit("div", source(1.0), source(args[0]))
    if name == "where":
        return emit("where", *(source(arg) for arg in args))
    if name == "_to_copy":
        return emit("ne", source(args[0]), source(0.0)) if step.out.dtype == torch.bool else source(args[0])
    if name in _SAME:
        return source(args[0])
    if name in _FILL:
        return source(_FILL[name])
    if name in ("full_like", "full"):
        return source(args[1])
    if name == "scalar_tensor":
        return source(args[0])
    raise NotImplementedError(f"no instruction for {name} in a coefficient program")
