"""The seam between pixels as read and pixels as the engine wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Preparer"]


class Preparer(Protocol):
    """Turns a batch of tiles into the encoder's input."""

    def prepare(self, tiles: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 tiles, wherever they are -> pixels in the engine's layout, on its device."""
        ...
