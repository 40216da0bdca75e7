"""Runs when the engine's Python starts on a CPU: prepares torch just before two modules load that need it otherwise.

A torchvision wheel built for CUDA registers fakes for two operators that only its compiled CUDA library defines, and fails
where they are not known. Declaring both is enough: nothing calls them. A stub torchvision would not do, because
transformers imports real names from it. SGLang's LoRA keeps small tables in pinned memory, which only a CUDA driver can
give; on a CPU plain memory is the same. Its checksums of weights wait for a GPU, of which there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

OPERATORS = ("nms", "qnms")
KEPT: list[object] = []  # declarations live as long as a reference to them


def declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


def pin_nothing() -> None:
    import torch

    def plain(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, pin_memory=False, **options: make(*args, **options)

    torch.tensor, torch.zeros = plain(torch.tensor), plain(torch.zeros)
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign,assignment,return-value]


def wait_for_nothing() -> None:
    import torch

    torch.cuda.synchronize = lambda device=None: None


BEFORE: dict[str, Callable[[], None]] = {
    "torchvision": declare_operators,
    "sglang.srt.lora.lora_manager": pin_nothing,
    "sglang.srt.utils.weight_checker": wait_for_nothing,
}


class Prepare:
    """Finds these modules as usual, and prepares torch when they are executed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in BEFORE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def prepare_and_execute(module: ModuleType) -> None:
            BEFORE[name]()
            execute(module)

        spec.loader.exec_module = prepare_and_execute  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Prepare())
