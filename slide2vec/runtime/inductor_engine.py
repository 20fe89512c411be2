"""Compiled encoders as AOTInductor packages: PyTorch's own compiler, ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slide2vec.errors import EngineError
from slide2vec.runtime.base import BatchProfile, Layout
from slide2vec.runtime.device import use_device

__all__ = ["InductorEngine"]


class InductorEngine:
    """See `slide2vec.runtime.base.Engine`.

    Args:
        package: of `torch._inductor.aoti_compile_and_package`, for the device.
        profile: the batches it was compiled for; larger ones are run in parts.

    Raises:
        EngineError: the package cannot be loaded.
    """

    runtime = "inductor"

    def __init__(
        self,
        package: Path,
        *,
        device: torch.device,
        precision: str,
        feature_dim: int,
        layout: Layout,
        profile: BatchProfile,
    ) -> None:
        self.device, self.precision, self.feature_dim, self.layout = device, precision, feature_dim, layout
        self._most = profile.max
        self._compiled: Any | None = _loaded(package, device)

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


def _loaded(package: Path, device: torch.device) -> Any:
    try:
        if device.type == "cpu":
            return torch._inductor.aoti_load_package(str(package))
        return torch._inductor.aoti_load_package(str(package), device_index=device.index or 0)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise EngineError(f"AOTInductor cannot load {package}: {reason}") from error
