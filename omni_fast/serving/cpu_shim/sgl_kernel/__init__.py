"""Stand-in for SGLang's compiled kernels on a CPU: every name can be imported, nothing can be called.

SGLang sees that the operators behind the names are missing and takes its plain torch path, on any processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments: object, **options: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is a compiled kernel; this server runs on the CPU without them")

    missing.__name__ = name
    return missing
