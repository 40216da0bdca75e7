"""The memory dial: how many rows of logits a workspace holds, how many GEMMs that costs, and what it should take.

Pure arithmetic: fits into a capacity planner as well as into `linear.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

WORKSPACE_BYTES = {"cpu": 40 << 20, "cuda": 1 << 30}  # default, of logits
_DEFAULT_WORKSPACE = 64 << 20
_LEAST_ROWS = {2: 448, 4: 208, 8: 104}  # by bytes an element: fewer do not pay for a pass over the sum of dW on a CPU
_LEAST_DEVICE_ROWS = 1024  # on a GPU


@dataclass(frozen=True)
class Plan:
    """One pass of head and loss over `rows` tokens.

    chunk_rows: rows of logits that exist at a time; workspace_bytes: what they take.
    gemms: matrix products of rows x hidden x vocab, with dX and dW; 3, or 4 where logits are computed again for the gradient, as many
    columns of all rows at a time as fit: dW is whole then, and no sum of it over chunks of rows is needed.
    flops, traffic_bytes: of the GEMMs / of the logits and the sums of gradients.
    """

    rows: int
    chunk_rows: int
    workspace_bytes: int
    gemms: int
    flops: float
    traffic_bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Predicted time on a machine with these measured ceilings: GEMMs and row passes one after the other."""
        return self.flops / flops_per_s + self.traffic_bytes / bytes_per_s


def plan(
    rows: int, hidden: int, vocab: int, element_bytes: int, workspace_bytes: int | None = None, row_wise: bool = True,
    device: str = "cpu", needs_dw: bool = True,
) -> Plan:  # fmt: skip
    """The plan for rows x hidden x vocab; `row_wise`: the loss's gradient follows row by row (`losses.row_wise`).

    workspace_bytes bounds the logits held at a time; one row, or 16 columns of all rows, is the least it can be. Where it
    holds so few rows that passes over the sum of dW (needs_dw: there is one) would cost more than a product, and the
    vocabulary is larger than the batch, the logits are computed again. None: the device's default, or more where that would
    be so few (448 rows of bf16 on a CPU, 208 of fp32, 1,024 on a GPU); `linear.py` takes all rows at once instead where
    that needs less memory than a sum of dW over chunks.
    """
    row_bytes = vocab * element_bytes
    least = _LEAST_ROWS[element_bytes] if device == "cpu" else _LEAST_DEVICE_ROWS
    if workspace_bytes is None:
        workspace_bytes = max(WORKSPACE_BYTES.get(device, _DEFAULT_WORKSPACE), least * row_bytes)
    most = max(1, workspace_bytes // row_bytes)
    chunks = max(1, -(-rows // most))
    chunk_rows = max(1, -(-rows // chunks))
    again = chunks > 1 and (not row_wise or needs_dw and most < least and rows <= vocab)
    gemms = 4 if again else 3
    logits_passes = 5 + 2 * again  # written, read for the statistics, read and written for dlogits, read by dX and dW
    # Of the sum over chunks, of dX or dW: read and written in fp32, and a partial product read.
    summed = 0 if not needs_dw else rows if again and rows <= vocab else vocab
    traffic = logits_passes * rows * row_bytes + 3 * (chunks - 1) * summed * hidden * 4.0
    return Plan(rows, chunk_rows, chunk_rows * row_bytes, gemms, gemms * 2.0 * rows * hidden * vocab, traffic)
