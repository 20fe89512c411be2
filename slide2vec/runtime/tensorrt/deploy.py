"""A TensorRT plan without PyTorch, for services: NumPy in, NumPy out, on pycuda.

Pixels are copied into page-locked memory, from there to the GPU, and features back, each context on a stream
of its own: while one batch computes, the next is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ConfigError, EngineError, ExtraMissingError
from slide2vec.installation import add_extra
from slide2vec.runtime.record import EngineRecord, read_record
from slide2vec.runtime.tensorrt.available import load_tensorrt

if TYPE_CHECKING:
    from slide2vec.runtime.tensorrt.pycuda_contexts import Device

__all__ = ["DeployedEngine"]

Features = NDArray[np.float32]


class DeployedEngine:
    """Runs an engine directory; a context manager. For the thread that made it.

    Args:
        plan_or_engine_dir: a directory that `slide2vec build-engine` wrote for TensorRT, or the plan in it.
        device: number of the CUDA device. Its primary context is used, which PyTorch and CuPy share.
        buffers: batches under way; 2 overlap copies with computing.

    Attributes:
        record: what engine.json says: layout, precision, feature_dim, profile, licence, …

    Raises:
        ExtraMissingError: TensorRT or pycuda is not installed.
        EngineError: there is no such GPU, or the plan does not load or is not what engine.json says.
        ConfigError: fewer than one buffer.
    """

    def __init__(self, plan_or_engine_dir: str | Path, *, device: int = 0, buffers: int = 2) -> None:
        if buffers < 1:
            raise ConfigError(f"buffers={buffers}: 1 or more are needed")
        given = Path(plan_or_engine_dir).expanduser()
        directory = given if given.is_dir() else given.parent
        self.record: EngineRecord = read_record(directory)
        if self.record.runtime != "tensorrt":
            raise EngineError(f"{directory} holds an engine of {self.record.runtime}, not of tensorrt")
        load_tensorrt()
        plan = directory / self.record.file
        self._device: Device | None = _pinned().Device(plan, self.record, device, buffers)

    def run(self, pixels: NDArray[Any]) -> Features:
        """(B, H, W, 3) uint8 or (B, 3, H, W) float32, as the record's layout says -> (B, D) float32.

        Any B of 1 or more: larger batches than the profile's max are split and overlap.

        Raises:
            EngineError: pixels of another shape or dtype, or TensorRT or CUDA fails, or it is closed.
        """
        most = self.record.profile.max
        parts = [pixels[first : first + most] for first in range(0, max(len(pixels), 1), most)]
        return np.concatenate(list(self.stream(parts)))

    def stream(self, batches: Iterable[NDArray[Any]]) -> Iterator[Features]:
        """Features of each batch, in order; while one computes the next is copied. Batches hold at most
        `record.profile.max` tiles. One stream at a time.

        Raises:
            EngineError: as `run`, or a batch is too large.
        """
        device = self._open()
        pending: deque[tuple[Any, int]] = deque()
        try:
            for turn, batch in enumerate(batches):
                device.check(batch)
                if len(pending) == len(device.contexts):
                    yield device.finish(*pending.popleft())
                context = device.contexts[turn % len(device.contexts)]
                pending.append((context, len(batch)))
                device.start(context, batch)
            while pending:
                yield device.finish(*pending.popleft())
        finally:  # a context whose features nobody took must be idle when it is used again
            for context, _ in pending:
                device.wait(context)

    def _open(self) -> Device:
        if self._device is None:
            raise EngineError("this engine is closed")
        return self._device

    def close(self) -> None:
        """Release the device's memory. May be called twice."""
        device, self._device = self._device, None
        if device is not None:
            device.close()

    def __enter__(self) -> DeployedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pinned() -> Any:
    """The module that calls pycuda."""
    try:
        import_module("pycuda.driver")
    except ImportError as error:
        raise ExtraMissingError(
            f"pycuda cannot be imported ({error}): {add_extra('deploy')} (Linux); it is built on "
            "installation and needs the CUDA toolkit for that"
        ) from error
    return import_module("slide2vec.runtime.tensorrt.pycuda_contexts")
