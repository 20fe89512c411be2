"""What is imported when it is first used: names of a package; PyTorch's compiler, which timm would load."""

from __future__ import annotations

import gc
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["import_timm", "lazy_attributes", "without_collection"]

_COMPILER = "torch._dynamo"
#: The one of its modules that torchvision imports a name from.
_ITS_UTILS = f"{_COMPILER}.utils"
_importing = Lock()


def lazy_attributes(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package; `homes` names the module of it that has an attribute."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with without_collection():
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted(sys.modules[package].__all__)


@contextmanager
def without_collection() -> Iterator[None]:
    """Imports in the block are not interrupted by the garbage collector, which finds nothing in them and
    takes a tenth of the time of `import torch`."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if not gc.get_freeze_count():  # what is new counts as old: it is not looked through right now
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def import_timm() -> Any:
    """timm, imported without PyTorch's compiler (1.3 s): timm and torchvision import that for decorators and
    for a question that they ask when they run.

    They stay whole: what they would have taken from the compiler loads it when it is called.
    """
    with _importing:
        if {"timm", _COMPILER}.isdisjoint(sys.modules):
            with without_collection(), _compiler_when_called(), warnings.catch_warnings():
                # tqdm's, in a notebook without ipywidgets: bars of downloads are lines of text then
                warnings.filterwarnings("ignore", "IProgress not found")
                importlib.import_module("timm")
    return importlib.import_module("timm")


@contextmanager
def _compiler_when_called() -> Iterator[None]:
    """In the block `torch.compiler.disable` and what the compiler has in `utils` load it when called."""
    import torch
    from torch._compile import _disable_dynamo

    at_once: Any = torch.compiler.disable

    def disable(fn: Any = None, recursive: bool = True, **more: Any) -> Any:
        later = isinstance(fn, FunctionType) and not more and _COMPILER not in sys.modules
        return _disable_dynamo(fn, recursive) if later else at_once(fn, recursive, **more)

    utils: Any = _utils_when_called()
    torch.compiler.disable, sys.modules[_ITS_UTILS] = disable, utils
    try:
        yield
    finally:
        torch.compiler.disable = at_once
        if sys.modules.get(_ITS_UTILS) is utils:
            del sys.modules[_ITS_UTILS]


def _utils_when_called() -> ModuleType:
    """Stands for the compiler's `utils`: whatever is asked of it but one function loads the real one."""
    utils = ModuleType(_ITS_UTILS)

    def real(name: str) -> Any:
        if sys.modules.get(_ITS_UTILS) is utils:
            del sys.modules[_ITS_UTILS]
        return getattr(importlib.import_module(_ITS_UTILS), name)

    def get(name: str) -> Any:
        if name.startswith("__"):  # asked by the import itself
            raise AttributeError(f"module {_ITS_UTILS!r} has no attribute {name!r}")
        return real(name)

    def is_compile_supported(device_type: Any) -> Any:
        return real("is_compile_supported")(device_type)

    vars(utils).update(__getattr__=get, is_compile_supported=is_compile_supported)
    return utils
