"""The CUDA module (csrc/cuda/bindings.cpp). Addresses are `Tensor.data_ptr()`; 0 stands for an absent tensor."""
# fmt: off

from collections.abc import Sequence

OPS: list[str]
MAX_REGISTERS: int

class CoefficientProgram:
    def __init__(
        self, code: Sequence[tuple[int, int, int, int, int, float]], columns: int, results: tuple[int, int, int]
    ) -> None: ...

def row_plan(vocab: int, dtype: int) -> tuple[int, int, int]: ...
def rows_forward(
    logits: int, dtype: int, rows: int, vocab: int, row_stride: int, targets: int, inv_t: float, inv_t_rows: int, softcap: float,
    logp: int, entropy: int, lse: int, device: int, stream: int,
) -> None: ...
def rows_backward(
    logits: int, dtype: int, rows: int, vocab: int, row_stride: int, targets: int, inv_t: float, inv_t_rows: int, softcap: float,
    lse: int, entropy: int, a: int, b: int, z_loss: float, z_loss_rows: int, device: int, stream: int,
) -> None: ...
def rows_fused(
    logits: int, dtype: int, rows: int, vocab: int, row_stride: int, targets: int, inv_t: float, inv_t_rows: int, softcap: float,
    logp: int, entropy: int, lse: int, program: CoefficientProgram, columns: Sequence[int], device: int, stream: int,
) -> None: ...
def linear_workspace_bytes(rows: int, vocab: int) -> int: ...
def linear_pitch(vocab: int) -> int: ...
def linear_forward(
    hidden: int, weight: int, rows: int, vocab: int, depth: int, bias: int, targets: int, inv_t: float, inv_t_rows: int,
    softcap: float, workspace: int, logp: int, entropy: int, lse: int, exps: tuple[int, int, int], device: int, stream: int,
) -> None: ...
def linear_gradient(
    exps: tuple[int, int, int], rows: int, vocab: int, targets: int, inv_t: float, inv_t_rows: int, softcap: float, a: int, b: int,
    z: int, factor: int, device: int, stream: int,
) -> None: ...
