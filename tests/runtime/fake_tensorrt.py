"""A TensorRT small enough to read: the calls that we make, computed on the CPU.

`test_tensorrt_contract.py` compares every public name and signature here with the real bindings. What
tests steer is in STATE; a "plan" is JSON that says what its network takes and gives. Such a network gives
for each tile its mean times 1, 2, ... D.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod
from typing import Any

import numpy as np
import pytest

__version__ = "11.4.0.106"


@dataclass
class _State:
    """What the fake does, and what it was told."""

    inputs: list[tuple[int, ...]] = field(default_factory=lambda: [(-1, 3, 4, 4)])
    parser_errors: list[ParserError] = field(default_factory=list)
    build_error: str = ""
    cache_fits: bool = True
    phases: list[tuple[str, int]] = field(default_factory=lambda: [("Building", 2)])
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    built: IBuilderConfig | None = None
    enqueue_fails: bool = False
    contexts_left: int = 99
    #: Runs what is queued on a stream: at once, unless tests say otherwise.
    submit: Callable[[int, Callable[[], None]], None] = lambda stream, work: work()


STATE = _State()

#: A module of ours that keeps the pycuda which it imported.
_KEEPING = "slide2vec.runtime.tensorrt.pycuda_contexts"


@contextmanager
def installed() -> Iterator[_State]:
    """`import tensorrt` gives this module during the block, in its first state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", sys.modules[__name__])
        for field_name, value in vars(_State()).items():
            setattr(STATE, field_name, value)
        sys.modules.pop(_KEEPING, None)
        yield STATE
    sys.modules.pop(_KEEPING, None)


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        pass

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    UINT8 = 5
    FP8 = 6
    BF16 = 7


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class BuilderFlag(IntEnum):
    TF32 = 7


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class HardwareCompatibilityLevel(IntEnum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class Dims(tuple[int, ...]):
    def __init__(self, shape: Sequence[int]) -> None:
        """The tuple is made by then."""


class IHostMemory(bytes):
    pass


class ITensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._name, self._shape = name, Dims(shape)

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> Dims:
        return self._shape


class INetworkDefinition:
    @property
    def num_inputs(self) -> int:
        return len(STATE.inputs)

    def get_input(self, index: int) -> ITensor:
        return ITensor("pixels", STATE.inputs[index])


class IOptimizationProfile:
    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        STATE.calls.append(("set_shape", input, tuple(min), tuple(opt), tuple(max)))


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._data + b"+")


class IBuilderConfig:
    def __init__(self) -> None:
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.progress_monitor: Any = None
        self._flags = {BuilderFlag.TF32}
        self._limits: dict[MemoryPoolType, int] = {}
        self._cache: ITimingCache | None = None

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._limits[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        return 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._data and not (STATE.cache_fits or ignore_mismatch):
            return False
        self._cache = cache
        return True


class ParserError:
    def __init__(self, node: int, name: str, operator: str, description: str) -> None:
        self._said = node, name, operator, description

    def node(self) -> int:
        return self._said[0]

    def node_name(self) -> str:
        return self._said[1]

    def node_operator(self) -> str:
        return self._said[2]

    def desc(self) -> str:
        return self._said[3]


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._logger = logger

    def parse_from_file(self, model: str) -> bool:
        STATE.calls.append(("parse", model))
        return not STATE.parser_errors

    @property
    def num_errors(self) -> int:
        return len(STATE.parser_errors)

    def get_error(self, index: int) -> ParserError:
        return STATE.parser_errors[index]


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        STATE.calls.append(("create_network", flags))
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        STATE.built = config
        for phase, steps in STATE.phases:
            config.progress_monitor.phase_start(phase, None, steps)
            for step in range(steps):
                if not config.progress_monitor.step_complete(phase, step):
                    self._logger.log(ILogger.Severity.ERROR, "cancelled")
                    return None
            config.progress_monitor.phase_finish(phase)
        if STATE.build_error:
            self._logger.log(ILogger.Severity.ERROR, STATE.build_error)
            return None
        return IHostMemory(a_plan(row=STATE.inputs[0][1:]))


def a_plan(
    *, row: tuple[int, ...] = (3, 4, 4), dtype: str = "FLOAT", dim: int = 5, gives: str = "FLOAT"
) -> bytes:
    """A plan as this module writes and reads it."""
    return json.dumps({"row": row, "dtype": dtype, "dim": dim, "gives": gives}).encode()


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            return ICudaEngine(json.loads(serialized_engine))
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "Magic tag does not match")
            return None


class ICudaEngine:
    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        # Output first: nothing says that inputs come first.
        self._tensors = {
            "features": (TensorIOMode.OUTPUT, plan["gives"], (-1, plan["dim"])),
            "pixels": (TensorIOMode.INPUT, plan["dtype"], (-1, *plan["row"])),
        }

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._tensors[name][1]]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._tensors[name][2])

    def create_execution_context(self) -> IExecutionContext | None:
        STATE.contexts_left -= 1
        return IExecutionContext(self._plan) if STATE.contexts_left >= 0 else None


class IExecutionContext:
    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return name == "pixels" and list(shape[1:]) == self._plan["row"]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in ("pixels", "features")

    def execute_async_v3(self, stream_handle: int) -> bool:
        shape, addresses = self._shape, dict(self._addresses)
        STATE.calls.append(("execute", stream_handle, shape[0]))

        def work() -> None:
            assert self._shape == shape, "a CUDA graph whose context has seen another shape"
            dtype = np.uint8 if self._plan["dtype"] == "UINT8" else np.float32
            pixels = _at(addresses["pixels"], dtype, shape)
            features = _at(addresses["features"], np.float32, (shape[0], self._plan["dim"]))
            features[:] = expected(pixels, self._plan["dim"])

        if not STATE.enqueue_fails:
            STATE.submit(stream_handle, work)
        return not STATE.enqueue_fails


def _at(address: int, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    count = prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype).reshape(shape)


def expected(pixels: np.ndarray[Any, Any], dim: int) -> np.ndarray[Any, Any]:
    """(B, ...) -> (B, dim): what the network gives."""
    means = pixels.reshape(len(pixels), -1).mean(axis=1, dtype=np.float64)
    return (means[:, None] * np.arange(1, dim + 1)).astype(np.float32)
