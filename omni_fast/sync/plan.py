"""What a weight sync carries: names, shapes and dtypes as servers know them, in buckets of bounded size.

Names are those of the Hugging Face checkpoint; a LoRA adapter is merged into its layer, so that a server needs no LoRA.
Tied weights appear once. The plan is made once; `tensors` reads the policy's working weights as they are at the time.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omni_fast.rollout.packed_linear import weight_of

BUCKET_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor; `offset` is where its first number stands in its bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def count(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors of one dtype that travel as one flat buffer of `count` numbers."""

    dtype: torch.dtype
    entries: tuple[Entry, ...]
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * self.dtype.itemsize

    def views(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        """Its tensors as parts of its buffer."""
        return [(one.name, flat[one.offset : one.offset + one.count].view(one.shape)) for one in self.entries]


@dataclass(frozen=True, slots=True)
class Plan:
    buckets: tuple[Bucket, ...]

    @property
    def entries(self) -> list[Entry]:
        return [entry for bucket in self.buckets for entry in bucket.entries]


def make_plan(model: PreTrainedModel, bucket_bytes: int = BUCKET_BYTES, dtype: torch.dtype | None = None) -> Plan:
    """Buckets in the order of the model's tensors. A tensor larger than `bucket_bytes` has a bucket of its own.

    dtype: what fp32 tensors travel as; None: all as they are.
    """
    buckets: list[Bucket] = []
    open_: dict[torch.dtype, list[Entry]] = {}

    def close(kind: torch.dtype) -> None:
        if entries := open_.pop(kind, []):
            buckets.append(Bucket(kind, tuple(entries), entries[-1].offset + entries[-1].count))

    for name, value in tensors(model):
        kind = dtype if dtype is not None and value.dtype == torch.float32 else value.dtype
        entries = open_.get(kind, [])
        start = entries[-1].offset + entries[-1].count if entries else 0
        if entries and (start + value.numel()) * kind.itemsize > bucket_bytes:
            close(kind)
            start = 0
        open_.setdefault(kind, []).append(Entry(name, tuple(value.shape), kind, start))
    for kind in list(open_):
        close(kind)
    return Plan(tuple(buckets))


@torch.no_grad()
def tensors(model: PreTrainedModel, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The wanted weights (None: all) by their checkpoint names; not copies, but for layers with an adapter."""
    for own, parameter in model.named_parameters():
        name = own.replace(".base_layer.", ".")
        if ".lora_" not in own and (wanted is None or name in wanted):
            merged = name != own and name.endswith(".weight")
            yield name, weight_of(model.get_submodule(name.removesuffix(".weight"))) if merged else parameter.detach()


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the tensor's numbers as they stand in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().tobytes())
