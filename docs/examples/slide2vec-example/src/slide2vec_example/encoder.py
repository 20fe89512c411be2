"""An encoder without weights: mean and standard deviation of the colours of a tile."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slide2vec import TorchTileEncoder, register_encoder

__all__ = ["Colours", "register"]


class ColourStatistics(nn.Module):
    """(B, 3, H, W) -> (B, 6)."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation per channel."""
        mean = pixels.mean(dim=(2, 3))
        spread = (pixels - mean[:, :, None, None]).square().mean(dim=(2, 3)).sqrt()
        return torch.cat([mean, spread], dim=1)


class Colours(TorchTileEncoder):
    """Mean and standard deviation of the colours of a tile."""

    def __init__(self, output_variant: str | None = None) -> None:
        super().__init__(
            ColourStatistics(),
            encode_dim=6,
            input_size=64,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            output_variant=output_variant,
        )


def register() -> None:
    """Called by slide2vec when it first looks for encoders."""
    register_encoder(
        "example-colours",
        encode_dim=6,
        input_size=64,
        supports_variable_input_size=True,
        supported_spacing_um=None,
        default_spacing_um=0.5,
        source="slide2vec-example",
    )(Colours)
