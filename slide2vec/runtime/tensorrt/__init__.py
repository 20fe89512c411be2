"""TensorRT plans on NVIDIA GPUs: in PyTorch (TensorRTEngine), and on pycuda alone (DeployedEngine).

from slide2vec.runtime.tensorrt import DeployedEngine

with DeployedEngine("engines/virchow2-…") as engine:
    features = engine.run(tiles)  # numpy in, numpy out; PyTorch is not needed
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slide2vec.runtime.tensorrt.available import unavailable
    from slide2vec.runtime.tensorrt.deploy import DeployedEngine
    from slide2vec.runtime.tensorrt.engine import TensorRTEngine

__all__ = ["DeployedEngine", "TensorRTEngine", "unavailable"]

_HOMES = {"DeployedEngine": "deploy", "TensorRTEngine": "engine", "unavailable": "available"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
