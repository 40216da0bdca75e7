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

NORM_ROWS: int
PANEL: int
TILE_ROWS: int

def norm_forward(
    dtype: int,
    rows: int,
    width: int,
    x: int,
    residual: int,
    weight: int,
    eps: float,
    sum: int,
    y: int,
    inverse: int,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def norm_backward(
    dtype: int,
    rows: int,
    width: int,
    x: int,
    weight: int,
    inverse: int,
    dy: int,
    dsum: int,
    dx: int,
    dweight: int,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def gate(
    dtype: int,
    rows: int,
    width: int,
    stride: int,
    gate: int,
    up: int,
    y: int,
    dy: int,
    dgate: int,
    dup: int,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def rotate(
    dtype: int,
    rows: int,
    heads: int,
    size: int,
    stride: int,
    out_stride: int,
    x: int,
    cos: int,
    sin: int,
    y: int,
    backward: bool,
    num_threads: int,
    isa: str = "auto",
) -> None: ...

class TreeBlocks:
    def __init__(
        self,
        trees: int,
        tree_numbers: int,
        blocks: int,
        block_numbers: int,
        rows: int,
        row_count: int,
        columns: int,
        column_count: int,
        bias: int,
        bias_count: int,
    ) -> None: ...

def attend_forward(
    trees: TreeBlocks,
    dtype: int,
    rows: int,
    heads: int,
    kv_heads: int,
    size: int,
    q: int,
    q_stride: int,
    k: int,
    k_stride: int,
    v: int,
    v_stride: int,
    scale: float,
    lse: int,
    out: int,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def attend_backward(
    trees: TreeBlocks,
    dtype: int,
    rows: int,
    heads: int,
    kv_heads: int,
    size: int,
    q: int,
    q_stride: int,
    k: int,
    k_stride: int,
    v: int,
    v_stride: int,
    scale: float,
    lse: int,
    dout: int,
    dq: int,
    dq_stride: int,
    dk: int,
    dv: int,
    dkv_stride: int,
    wide_dk: int,
    wide_dv: int,
    num_threads: int,
    isa: str = "auto",
) -> None: ...

class Wave:
    def __init__(self, columns: Sequence[Sequence[int]], kv_heads: int, size: int) -> None: ...
    @property
    def numbers(self) -> int: ...
    def assign(self, prompt_of_row: Sequence[int]) -> None: ...
    def store(
        self,
        dtype: int,
        tokens: int,
        k: int,
        v: int,
        stride: int,
        keys: int,
        values: int,
        num_threads: int,
        isa: str = "auto",
    ) -> None: ...
    def decode(
        self,
        dtype: int,
        rows: int,
        heads: int,
        q: int,
        k: int,
        v: int,
        stride: int,
        keys: int,
        values: int,
        own_keys: int,
        own_values: int,
        capacity: int,
        own: int,
        scale: float,
        out: int,
        num_threads: int,
        isa: str = "auto",
    ) -> None: ...

def pack(
    source: int,
    stride: int,
    n: int,
    k: int,
    units: int,
    how: str,
    target: int,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def multiply(
    a: int,
    a_stride: int,
    b: int,
    m: int,
    n: int,
    k: int,
    c: int,
    c_stride: int,
    out: int,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def vector_exp2(x: int, y: int, n: int, isa: str = "auto") -> None: ...
