"""Weights of a file that holds a whole module (`torch.save(model)`), as GrandQC is published. Nothing of its
code is imported or run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

__all__ = ["state_of_pickled_module"]


class _Stub:
    """Stands for an object of any class: it keeps what was saved of it, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def state_of_pickled_module(path: Path) -> dict[str, Tensor] | None:
    """Parameters and buffers of the module in a file; None where it holds none, or anything else.

    PyTorch unpickles it as it does weights alone (`weights_only`); every name that it does not know becomes a
    class of its own that does nothing.
    """
    names = get_unsafe_globals_in_checkpoint(path)
    stubs: list[Any] = [(type("Stub", (_Stub,), {}), name) for name in names]
    with safe_globals(stubs):
        content = torch.load(path, map_location="cpu", weights_only=True)
    found = dict(_tensors(content))
    return found if isinstance(content, _Stub) and found else None


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    held = vars(module) if isinstance(module, _Stub) or hasattr(module, "_modules") else {}
    left_out = held.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in _mapping(held.get(kind)).items():
            if isinstance(value, Tensor) and name not in left_out:
                yield f"{prefix}{name}", value.detach()
    for name, child in _mapping(held.get("_modules")).items():
        yield from _tensors(child, f"{prefix}{name}.")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
