"""Compiled encoders as AOTInductor packages: PyTorch's own compiler, ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slide2vec.errors import EngineError
from slide2vec.runtime.base import BatchProfile, Layout
from slide2vec.runtime.device import use_device
from slide2vec.runtime.record import EngineRecord

__all__ = ["InductorEngine", "load", "unavailable"]


def unavailable(runtime: str, precision: str, device: torch.device | None) -> str | None:
    """None: PyTorch brings it."""
    return None


def load(record: EngineRecord, file: Path, device: torch.device) -> InductorEngine:
    """The engine of a record, see `InductorEngine`."""
    return InductorEngine(file, device=device, profile=record.profile, **record.engine_arguments)


class InductorEngine:
    """See `slide2vec.runtime.base.Engine`.

    Args:
        package: of `torch._inductor.aoti_compile_and_package`, for the device.
        profile: the batches it was compiled for; larger ones are run in parts.
        runners: batches that may be under way on the device: one more would be waited for, with Python's lock
            in hand. They share the weights.

    Raises:
        EngineError: the package cannot be loaded.
    """

    runtime = "inductor"
    #: PyTorch's binding of `run` does not release it (2.15): on a CPU for as long as a batch takes.
    holds_gil = True

    def __init__(
        self,
        package: Path,
        *,
        device: torch.device,
        precision: str,
        feature_dim: int,
        layout: Layout,
        profile: BatchProfile,
        runners: int = 2,
    ) -> None:
        self.device, self.precision, self.feature_dim, self.layout = device, precision, feature_dim, layout
        self._most = profile.max
        self._compiled: Any | None = _loaded(package, device, runners)

    def run(self, pixels: Tensor) -> Tensor:
        """Pixels of `layout` -> (B, D) float32."""
        if self._compiled is None:
            raise EngineError("the engine is closed")
        with torch.inference_mode(), use_device(self.device):
            parts = [self._compiled(part.contiguous()) for part in torch.split(pixels, self._most)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        """Release the compiled code and its weights."""
        self._compiled = None


def _loaded(package: Path, device: torch.device, runners: int) -> Any:
    from torch._inductor.package.package import load_package  # imports the compiler

    index = -1 if device.type == "cpu" else device.index or 0
    try:
        with use_device(device):
            return load_package(str(package), num_runners=runners, device_index=index)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise EngineError(f"AOTInductor cannot load {package}: {reason}") from error
