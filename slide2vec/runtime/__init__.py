"""Engines: what runs an encoder on a device, one batch at a time."""

from slide2vec.runtime.base import Engine
from slide2vec.runtime.device import batch_size_for, pick_device, resolve_precision

__all__ = ["Engine", "batch_size_for", "pick_device", "resolve_precision"]
