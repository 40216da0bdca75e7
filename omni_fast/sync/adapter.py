"""How a server is asked to load a LoRA adapter that stands in a folder, so that it loads these very numbers or none.

SGLang shows no adapter. But 0.5.17 compares tensors that a request brings with checksums that it brings too, and dies of a
difference. What the request brings here is not the numbers, a hundred megabytes for a 7B model and once for each GPU of the
server, but a pickle that reads them from the folder where it is opened.

Limits: other versions of SGLang load the folder unchecked; newer ones do not let a pickle call what they do not know.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_fast.rollout.fleet import Json, Server

CHECKS = (0, 5, 17)  # SGLang


def request(folder: Path, name: str, server: Server) -> tuple[str, Json]:
    """The path and the body that make the server load the adapter as `name`."""
    if server.version != CHECKS:
        return "/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}
    path = folder / "adapter_model.safetensors"
    values = load_file(path)
    copies: list[Json] = [_directions(path, values)] * server.tensor_parallel
    config: Json = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    sums: Json = {tensor: _sha256(value) for tensor, value in values.items()}
    checked: dict[str, Json] = {"serialized_named_tensors": copies, "expected_checksums": sums}
    return "/load_lora_adapter_from_tensors", {"lora_name": name, "config_dict": config} | checked


class _Call:
    """Becomes what `make` returns where it is unpickled."""

    def __init__(self, make: Callable[..., Tensor], *arguments: object) -> None:
        self.made: tuple[Callable[..., Tensor], tuple[object, ...]] = (make, arguments)

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[object, ...]]:
        return self.made


def _directions(path: Path, values: dict[str, Tensor]) -> str:
    """A pickle of the `values` of a safetensors file, all of one dtype, that copies them from there."""
    kind = next(iter(values.values())).dtype
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    first = (8 + size) // kind.itemsize  # the header is filled up to a multiple of 8
    whole = _Call(partial(torch.from_file, dtype=kind), str(path), False, path.stat().st_size // kind.itemsize)
    parts = {}
    for name, value in values.items():
        start = first + header[name]["data_offsets"][0] // kind.itemsize
        part = _Call(torch.reshape, _Call(torch.narrow, whole, 0, start, value.numel()), list(value.shape))
        parts[name] = _Call(torch.clone, part)  # the file goes with the next version
    return base64.b64encode(pickle.dumps(parts)).decode()


def _sha256(value: Tensor) -> str:
    return hashlib.sha256(value.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
