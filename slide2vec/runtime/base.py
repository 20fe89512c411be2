"""The seam between the stream and whatever computes features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "Layout"]

#: What an engine takes. "float32_nchw": normalised pixels (B, 3, H, W) float32, as the encoder itself.
#: "uint8_nhwc": pixels as they are, (B, H, W, 3) uint8; the engine normalises them.
Layout: TypeAlias = Literal["float32_nchw", "uint8_nhwc"]


class Engine(Protocol):
    """Runs an encoder at one precision on one device.

    Attributes:
        runtime: name of the library that runs it ("torch", …).
        device: where pixels are expected and features are returned.
        precision: "fp32", "bf16" or "fp16".
        feature_dim: D.
        layout: of the pixels it takes.
    """

    runtime: str
    device: torch.device
    precision: str
    feature_dim: int
    layout: Layout

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of `layout` on `device` -> features (B, D) float32 on `device`; any B of 1 or more.

        On CUDA both are ordered on the current stream of the calling thread; nothing is synchronised.
        """
        ...

    def close(self) -> None:
        """Release the device's memory. May be called twice."""
        ...
