"""Engines: what runs an encoder on a device, one batch at a time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slide2vec.runtime.base import BatchProfile, Engine
    from slide2vec.runtime.device import (
        batch_size_for,
        devices_for,
        is_numbered,
        pick_device,
        resolve_precision,
    )

__all__ = [
    "BatchProfile",
    "Engine",
    "batch_size_for",
    "devices_for",
    "is_numbered",
    "pick_device",
    "resolve_precision",
]

#: Loaded on first use: `slide2vec.runtime.tensorrt` also serves where PyTorch is not installed.
_HOMES = {
    "BatchProfile": "base",
    "Engine": "base",
    "batch_size_for": "device",
    "devices_for": "device",
    "is_numbered": "device",
    "pick_device": "device",
    "resolve_precision": "device",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
