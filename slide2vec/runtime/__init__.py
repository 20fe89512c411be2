"""Engines: what runs an encoder on a device, one batch at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slide2vec.lazy import lazy_attributes

if TYPE_CHECKING:
    from slide2vec.runtime.base import BatchProfile, Engine
    from slide2vec.runtime.device import (
        devices_for,
        is_numbered,
        pick_device,
        resolve_precision,
    )

__all__ = [
    "BatchProfile",
    "Engine",
    "devices_for",
    "is_numbered",
    "pick_device",
    "resolve_precision",
]

#: Loaded on first use: `slide2vec.runtime.tensorrt` also serves where PyTorch is not installed.
_HOMES = {
    "BatchProfile": "base",
    "Engine": "base",
    "devices_for": "device",
    "is_numbered": "device",
    "pick_device": "device",
    "resolve_precision": "device",
}

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
