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

from omni_fast.rollout.shared_cache import weight_of

BUCKET_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor."""

    name: str
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors of one dtype that travel one after the other as one flat buffer."""

    dtype: torch.dtype
    entries: list[Entry]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(entry.shape.numel() for entry in self.entries) * self.dtype.itemsize

    def views(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        """Its tensors as parts of its buffer."""
        parts = flat.split([entry.shape.numel() for entry in self.entries])
        return [(entry.name, part.view(entry.shape)) for entry, part in zip(self.entries, parts, strict=True)]


def make_plan(
    model: PreTrainedModel, bucket_bytes: int = BUCKET_BYTES, dtype: torch.dtype | None = None
) -> list[Bucket]:
    """Buckets in the order of the model's tensors. A tensor larger than `bucket_bytes` has a bucket of its own.

    dtype: what fp32 tensors travel as; None: all as they are.
    """
    buckets: list[Bucket] = []
    open_: dict[torch.dtype, Bucket] = {}
    for name, value in tensors(model):
        kind = dtype if dtype is not None and value.dtype == torch.float32 else value.dtype
        bucket = open_.get(kind)
        if bucket is None or bucket.size + value.numel() * kind.itemsize > bucket_bytes:
            bucket = open_[kind] = Bucket(kind, [])
            buckets.append(bucket)
        bucket.entries.append(Entry(name, value.shape, kind))
    return buckets


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
