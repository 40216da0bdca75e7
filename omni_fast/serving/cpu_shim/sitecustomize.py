"""Runs when the engine's Python starts on a CPU: lets a torchvision wheel built for CUDA load beside a CPU torch.

The wheel registers fakes for two operators that only its compiled CUDA library defines, and fails where they are not
known. Declaring both just before it loads is enough: nothing calls them. A stub torchvision would not do, because
transformers imports real names from it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

OPERATORS = ("nms", "qnms")


class DeclareBeforeTorchvision(MetaPathFinder):
    """Finds torchvision as usual, and declares its operators when it is executed."""

    library: object  # the declarations live as long as this reference

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "torchvision" else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def declare_and_execute(module: ModuleType) -> None:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library = library
            execute(module)

        spec.loader.exec_module = declare_and_execute  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, DeclareBeforeTorchvision())
