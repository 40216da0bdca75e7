"""Stand-in for triton on a CPU: kernels can be defined, never launched.

SGLang and torch import triton by name, decorate kernels, subclass and annotate with its types while they are loaded, and
then choose paths without it. The real package would be a gigabyte. So: a name with a capital is a class, any other
name a placeholder, `triton.anything` a module of such names; what is caught, compared or launched is written out.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

__version__ = "3.6.0"  # the release that SGLang's torch is built with
SUBMODULES = """language language.extra.libdevice runtime runtime.jit runtime.autotuner runtime.driver runtime.cache
runtime.errors compiler compiler.compiler backends.compiler testing tools.tensor_descriptor""".split()
CAUGHT = ("OutOfResources", "PTXASError")  # by name, and never raised


class Placeholder:
    """A value nobody computes with. As a decorator, with or without arguments, it leaves the function as it is.

    What a call returns has no attributes: code that asks the driver for its device gets an AttributeError, as from a
    triton without a GPU, and falls back to the CPU.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *arguments: object, **options: object) -> object:
        decorates = len(arguments) == 1 and callable(arguments[0]) and not options
        return arguments[0] if decorates else lambda function: function

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__dict__[name] = value = Placeholder(name)
        return value

    def __or__(self, other: object) -> Placeholder:  # in annotations
        return self

    __ror__ = __or__


class Base:
    """Of the classes with a capital: takes any arguments and can be subclassed."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__()


class Kernel:
    """What `triton.jit` makes of a function."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.fn, self.__name__, self.__doc__ = function, function.__name__, function.__doc__
        self.__module__ = function.__module__

    def __call__(self, *arguments: object, **options: object) -> NoReturn:
        raise RuntimeError(f"the Triton kernel {self.__name__} was launched by a server that runs on the CPU")

    def __getitem__(self, grid: object) -> Kernel:
        return self

    def __getattr__(self, name: str) -> None:  # its settings, which some modules read while they are loaded
        if name.startswith("__"):
            raise AttributeError(name)


def jit(*arguments: object, **options: object) -> object:
    """`@jit`, `@jit(...)`, and the same for `autotune` and `heuristics`."""
    if len(arguments) != 1 or not callable(arguments[0]) or options:
        return jit
    return arguments[0] if isinstance(arguments[0], Kernel) else Kernel(arguments[0])


autotune = heuristics = jit
JITFunction = Kernel


class Config:
    def __init__(self, kwargs: dict[str, object], num_warps: int = 4, num_stages: int = 2, **more: object) -> None:
        self.kwargs, self.num_warps, self.num_stages = kwargs, num_warps, num_stages


class constexpr:  # noqa: N801 (triton's own name)
    def __init__(self, value: object = None) -> None:
        self.value = value


def cdiv(a: int, b: int) -> int:
    return -(a // -b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 1


class Names(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        base = Exception if name in CAUGHT else Base
        made = type(name, (base,), {"__module__": self.__name__}) if name[0].isupper() else Placeholder(name)
        setattr(self, name, made)
        return made


class Submodules:
    """Finds and loads all of them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = __file__


sys.modules[__name__].__class__ = Names
sys.meta_path.insert(0, Submodules())
_made = {name: importlib.import_module(f"{__name__}.{name}") for name in SUBMODULES}
vars(_made["language"])["constexpr"], vars(_made["runtime.jit"])["JITFunction"] = constexpr, Kernel
