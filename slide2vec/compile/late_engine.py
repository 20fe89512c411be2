"""PyTorch's engine of an encoder that is still being loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from slide2vec.runtime.torch_engine import TorchEngine

if TYPE_CHECKING:
    import torch

__all__ = ["LateTorchEngine"]


class LateTorchEngine:
    """See `slide2vec.runtime.base.Engine`: what is run first waits for the encoder.

    Args:
        make: gives the engine; waits.
    """

    runtime, layout, holds_gil = TorchEngine.runtime, TorchEngine.layout, TorchEngine.holds_gil

    def __init__(
        self, make: Callable[[], TorchEngine], *, feature_dim: int, precision: str, device: torch.device
    ) -> None:
        self._make = make
        self.feature_dim, self.precision, self.device = feature_dim, precision, device

    @cached_property
    def _engine(self) -> TorchEngine:
        return self._make()

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float32 -> (B, D) float32. Raises WeightsError where the encoder cannot be had."""
        return self._engine.run(pixels)

    def close(self) -> None:
        """As that of TorchEngine."""
        if "_engine" in self.__dict__:
            self._engine.close()
