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
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import load_state_dict_from_file
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_map

from omni_fast.rollout.fleet import Json, Server

CHECKS = (0, 5, 17)  # SGLang


def request(folder: Path, name: str, server: Server) -> tuple[str, Json]:
    """The path and the body that make the server load the adapter as `name`."""
    if server.version != CHECKS:
        return "/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}
    path = folder / "adapter_model.safetensors"
    read = _Made(load_state_dict_from_file, (str(path),))
    directions = base64.b64encode(pickle.dumps(_Made(tree_map, (torch.clone, read)))).decode()
    copies: list[Json] = [directions] * server.tensor_parallel
    config: Json = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    sums: Json = {tensor: _sha256(value) for tensor, value in load_file(path).items()}
    checked: dict[str, Json] = {"serialized_named_tensors": copies, "expected_checksums": sums}
    return "/load_lora_adapter_from_tensors", {"lora_name": name, "config_dict": config} | checked


@dataclass
class _Made:
    """Becomes what `make` returns where it is unpickled, by functions of packages that SGLang trusts.

    The tensors are copied there: what is read is a map of the file, which goes with the next version.
    """

    make: Callable[..., object]
    arguments: tuple[object, ...]

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.make, self.arguments


def _sha256(value: Tensor) -> str:
    return hashlib.sha256(value.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
