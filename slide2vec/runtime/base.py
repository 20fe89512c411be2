"""What an engine offers the stream: one batch of pixels in, features out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from slide2vec.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["BatchProfile", "Engine", "Layout"]

#: What an engine takes. "float32_nchw": normalised pixels (B, 3, H, W) float32, as the encoder itself.
#: "uint8_nhwc": pixels as they are, (B, H, W, 3) uint8; the engine normalises them.
Layout: TypeAlias = Literal["float32_nchw", "uint8_nhwc"]


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes an engine is compiled for, in tiles: it is fastest at `opt`.

    Raises:
        ConfigError: not 1 <= min <= opt <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(
                f"batch profile {self.min}, {self.opt}, {self.max}: it must be 1 <= min <= opt <= max"
            )


class Engine(Protocol):
    """Runs an encoder at one precision on one device.

    Attributes:
        runtime: name of the library that runs it ("torch", …).
        device: where pixels are expected and features are returned.
        precision: "fp32", "bf16", "fp16" or "fp8".
        feature_dim: D.
        layout: of the pixels it takes.
        holds_gil: no other thread runs Python while `run` does.
    """

    runtime: str
    device: torch.device
    precision: str
    feature_dim: int
    layout: Layout
    holds_gil: bool

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of `layout` on `device` -> features (B, D) float32 on `device`; any B of 1 or more.

        On CUDA both are ordered on the current stream of the calling thread; nothing is synchronised.
        """
        ...

    def close(self) -> None:
        """Release the device's memory. May be called twice."""
        ...
