"""The C++ module (csrc/cpu/bindings*.cpp). Addresses are `Tensor.data_ptr()`; 0 stands for an absent tensor."""
# fmt: off

from collections.abc import Sequence

OPS: list[str]
NORM_ROWS: int
PANEL: int
DEPTH: int
MATRIX_UNIT: bool
INTEL: bool
Attended = tuple[int, int, int, int, int, int, int, int, int, int, int, float, int]

def instruction_sets() -> list[str]: ...
def thread_runtime() -> str: ...
def vector_exp2(x: int, y: int, n: int, isa: str) -> None: ...

class How:
    def __init__(self, num_threads: int, isa: str) -> None: ...

class CoefficientProgram:
    def __init__(
        self, code: Sequence[tuple[int, int, int, int, int, float]], columns: int, results: tuple[int, int, int]
    ) -> None: ...

def rows_forward(
    logits: int, dtype: int, rows: int, vocab: int, row_stride: int, targets: int, inv_t: float, inv_t_rows: int, softcap: float,
    logp: int, entropy: int, lse: int, how: How,
) -> None: ...
def rows_backward(
    logits: int, dtype: int, rows: int, vocab: int, row_stride: int, targets: int, inv_t: float, inv_t_rows: int, softcap: float,
    lse: int, entropy: int, a: int, b: int, z_loss: float, z_loss_rows: int, how: How,
) -> None: ...
def rows_fused(
    logits: int, dtype: int, rows: int, vocab: int, row_stride: int, targets: int, inv_t: float, inv_t_rows: int, softcap: float,
    logp: int, entropy: int, lse: int, program: CoefficientProgram, columns: Sequence[int], how: How,
) -> None: ...
def norm_forward(
    dtype: int, rows: int, width: int, x: int, residual: int, weight: int, eps: float, sum: int, y: int, inverse: int, how: How,
) -> None: ...
def norm_backward(
    dtype: int, rows: int, width: int, x: int, weight: int, inverse: int, dy: int, dsum: int, dx: int, dweight: int, how: How,
) -> None: ...
def gate(
    dtype: int, rows: int, width: int, stride: int, gate: int, up: int, y: int, dy: int, dgate: int, dup: int, how: How,
) -> None: ...
def rotate(
    dtype: int, rows: int, heads: int, size: int, stride: int, out_stride: int, x: int, cos: int, sin: int, y: int, backward: bool,
    how: How,
) -> None: ...

class TreeBlocks:
    def __init__(self, lists: Sequence[tuple[int, int]]) -> None: ...

def attend_forward(trees: TreeBlocks, given: Attended, out: int, how: How) -> None: ...
def attend_backward(
    trees: TreeBlocks, given: Attended, dout: int, dq: int, dq_stride: int, dk: int, dv: int, dkv_stride: int, wide_dk: int,
    wide_dv: int, how: How,
) -> None: ...

class Wave:
    def __init__(self, columns: Sequence[Sequence[int]], kv_heads: int, size: int) -> None: ...
    @property
    def numbers(self) -> int: ...
    def assign(self, prompt_of_row: Sequence[int]) -> None: ...
    def store(
        self, dtype: int, tokens: int, k: int, v: int, stride: int, keys: int, values: int, how: How,
    ) -> None: ...
    def decode(
        self, dtype: int, rows: int, heads: int, q: int, k: int, v: int, stride: int, keys: int, values: int, own_keys: int,
        own_values: int, capacity: int, own: int, scale: float, out: int, how: How,
    ) -> None: ...

def pack(dtype: int, source: int, stride: int, n: int, k: int, units: int, transposed: bool, target: int, how: How) -> None: ...
def multiply(
    dtype: int, a: tuple[int, int, str], b: tuple[int, int, str], m: int, n: int, k: int, c: int, c_stride: int, out: int, low: int, scale: float,
    how: How,
) -> None: ...
