"""TensorRT plans on NVIDIA GPUs: in PyTorch (TensorRTEngine), and on pycuda alone (DeployedEngine).

from slide2vec.runtime.tensorrt import DeployedEngine

with DeployedEngine("engines/virchow2-…") as engine:
    features = engine.run(tiles)  # numpy in, numpy out; PyTorch is not needed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slide2vec.lazy import lazy_attributes

if TYPE_CHECKING:
    from slide2vec.runtime.tensorrt.available import unavailable
    from slide2vec.runtime.tensorrt.deploy import DeployedEngine
    from slide2vec.runtime.tensorrt.engine import TensorRTEngine, load

__all__ = ["DeployedEngine", "TensorRTEngine", "load", "unavailable"]

_HOMES = {
    "DeployedEngine": "deploy",
    "TensorRTEngine": "engine",
    "load": "engine",
    "unavailable": "available",
}

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
