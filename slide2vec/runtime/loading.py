"""The runtimes by name: which can be used here, and an engine out of its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slide2vec.errors import EngineError
from slide2vec.runtime.record import EngineRecord, per_gpu, read_record

if TYPE_CHECKING:
    from slide2vec.runtime.base import Engine

__all__ = ["COMPILED", "load_engine", "not_here", "runtimes_for"]

#: Runtimes of compiled engines, the preferred one first, by the kind of device they run on.
COMPILED = {"cuda": ("tensorrt", "tensorrt-rtx", "inductor"), "cpu": ("openvino", "inductor")}


def runtimes_for(device: torch.device) -> tuple[str, ...]:
    """Runtimes of compiled engines that exist for a device, the preferred one first."""
    return COMPILED.get(device.type, ())


def not_here(runtime: str, precision: str, device: torch.device | None = None) -> str | None:
    """Why no engine of a runtime can run here, None when it can; None as a device is the current one."""
    if runtime == "openvino":
        from slide2vec.runtime.openvino_engine import unavailable

        return unavailable(precision)
    if runtime in ("tensorrt", "tensorrt-rtx"):
        from slide2vec.runtime.tensorrt import unavailable as no_tensorrt

        return no_tensorrt(runtime, precision, device)
    return None  # PyTorch brings its own


def load_engine(directory: Path, device: torch.device) -> Engine:
    """The engine in a folder, ready to run.

    Raises:
        EngineError: its record or file cannot be read, or the device cannot run it.
        ExtraMissingError: the runtime is not installed.
    """
    record = read_record(directory)
    if record.runtime not in runtimes_for(device):
        raise EngineError(f"{directory}: an engine of {record.runtime} does not run on {device}")
    return _LOADERS[record.runtime](record, directory / record.file, device)


def _common(record: EngineRecord) -> dict[str, Any]:
    """Arguments that every runtime's engine takes."""
    return {"precision": record.precision, "feature_dim": record.feature_dim, "layout": record.layout}


def _openvino(record: EngineRecord, file: Path, device: torch.device) -> Engine:
    from slide2vec.runtime.openvino_engine import OpenVINOEngine

    return OpenVINOEngine(file, **_common(record))


def _inductor(record: EngineRecord, file: Path, device: torch.device) -> Engine:
    from slide2vec.runtime.inductor_engine import InductorEngine

    return InductorEngine(file, device=device, profile=record.profile, **_common(record))


def _tensorrt(record: EngineRecord, file: Path, device: torch.device) -> Engine:
    from slide2vec.runtime.tensorrt import TensorRTEngine

    return TensorRTEngine(file, device=device, profile=record.profile, **_common(record))


def _tensorrt_rtx(record: EngineRecord, file: Path, device: torch.device) -> Engine:
    from slide2vec.runtime.tensorrt import TensorRTEngine

    kernels = file.with_name(per_gpu("kernels", torch.cuda.get_device_name(device), "cache"))
    return TensorRTEngine(
        file,
        device=device,
        profile=record.profile,
        runtime="tensorrt-rtx",
        kernels=kernels,
        **_common(record),
    )


_LOADERS: dict[str, Callable[[EngineRecord, Path, torch.device], Engine]] = {
    "openvino": _openvino,
    "inductor": _inductor,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
}
