"""The seam between the stream and whatever computes features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Engine"]


class Engine(Protocol):
    """Runs an encoder at one precision on one device.

    Attributes:
        runtime: name of the library that runs it ("torch", …).
        device: where pixels are expected and features are returned.
        precision: "fp32", "bf16" or "fp16".
        feature_dim: D.
    """

    runtime: str
    device: torch.device
    precision: str
    feature_dim: int

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, H, W) float32 on `device` -> features (B, D) float32 on `device`."""
        ...

    def close(self) -> None:
        """Release the device's memory. May be called twice."""
        ...
