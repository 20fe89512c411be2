"""A TensorRT-RTX small enough to read: what it has beside TensorRT (see fake_tensorrt.py).

`test_tensorrt_contract.py` compares it with the real bindings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import fake_tensorrt
import pytest
from fake_tensorrt import *  # noqa: F403

__version__ = "1.7.1.116"


@dataclass
class _Rtx:
    """What the fake does, and what it was told."""

    validity: tuple[int, int] = (0, 0)
    caches_fit: bool = True
    targets: list[ComputeCapability] = field(default_factory=list)
    strategies: list[Any] = field(default_factory=list)


RTX = _Rtx()


@contextmanager
def installed() -> Iterator[fake_tensorrt._State]:
    """`import tensorrt_rtx_bindings` gives this module during the block, in its first state."""
    with fake_tensorrt.installed() as state, pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_rtx_bindings", sys.modules[__name__])
        for name in ("slide2vec.runtime.tensorrt.rtx",):  # it keeps what it imported
            patch.delitem(sys.modules, name, raising=False)
        for name, value in vars(_Rtx()).items():
            setattr(RTX, name, value)
        yield state
        sys.modules.pop("slide2vec.runtime.tensorrt.rtx", None)


class ComputeCapability(IntEnum):
    SM75 = 75
    SM80 = 80
    SM86 = 86
    SM89 = 89
    SM120 = 120
    SM121 = 121


class EngineValidity(IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class IBuilderConfig(fake_tensorrt.IBuilderConfig):
    def __init__(self) -> None:
        super().__init__()
        self.num_compute_capabilities = 0

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        RTX.targets.append(compute_capability)
        return index == len(RTX.targets) - 1 < self.num_compute_capabilities


class Builder(fake_tensorrt.Builder):
    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()


class IRuntimeCache:
    """Holds the sizes that were run, as a list in JSON."""

    def __init__(self) -> None:
        self._kernels: list[int] = []

    def deserialize(self, blob: bytes) -> bool:
        if not RTX.caches_fit:
            return False
        self._kernels = json.loads(blob)
        return True

    def serialize(self) -> fake_tensorrt.IHostMemory:
        return fake_tensorrt.IHostMemory(json.dumps(sorted(self._kernels)).encode())


class IRuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._cache = IRuntimeCache()

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class IExecutionContext(fake_tensorrt.IExecutionContext):
    def __init__(self, plan: dict[str, Any], config: IRuntimeConfig) -> None:
        super().__init__(plan)
        self._kernels = config._cache._kernels
        RTX.strategies.append(config.dynamic_shapes_kernel_specialization_strategy)

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._shape[0] not in self._kernels:
            self._kernels.append(self._shape[0])
        return super().execute_async_v3(stream_handle)


class ICudaEngine(fake_tensorrt.ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:
        return IExecutionContext(self._plan, runtime_config)


class Runtime(fake_tensorrt.Runtime):
    @property
    def engine_header_size(self) -> int:
        return 64

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        assert len(buffer) <= self.engine_header_size
        validity, faults = RTX.validity
        return EngineValidity(validity), faults

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        made = super().deserialize_cuda_engine(serialized_engine)
        return None if made is None else ICudaEngine(made._plan)
