"""The C++ module (csrc/cpu/bindings.cpp). Addresses are `Tensor.data_ptr()`; 0 stands for an absent tensor."""

from collections.abc import Sequence

OPS: list[str]

def instruction_sets() -> list[str]: ...
def thread_runtime() -> str: ...

class CoefficientProgram:
    def __init__(
        self, code: Sequence[tuple[int, int, int, int, int, float]], columns: int, results: tuple[int, int, int]
    ) -> None: ...
    @property
    def columns(self) -> int: ...
    @property
    def has_entropy_gradient(self) -> bool: ...

def rows_forward(
    logits: int,
    dtype: int,
    rows: int,
    vocab: int,
    row_stride: int,
    targets: int,
    inv_t: float,
    inv_t_rows: int,
    softcap: float,
    logp: int,
    entropy: int,
    lse: int,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def rows_backward(
    logits: int,
    dtype: int,
    rows: int,
    vocab: int,
    row_stride: int,
    targets: int,
    inv_t: float,
    inv_t_rows: int,
    softcap: float,
    lse: int,
    entropy: int,
    a: int,
    b: int,
    z_loss: float,
    z_loss_rows: int,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def rows_fused(
    logits: int,
    dtype: int,
    rows: int,
    vocab: int,
    row_stride: int,
    targets: int,
    inv_t: float,
    inv_t_rows: int,
    softcap: float,
    logp: int,
    entropy: int,
    lse: int,
    program: CoefficientProgram,
    columns: Sequence[int],
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def vector_exp2(x: int, y: int, n: int, isa: str = "auto") -> None: ...
