"""MUSK: the vision expert of BEiT-3, at one scale or two."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.lazy import import_timm
from slide2vec.recipes import EncoderSpec, Variant

__all__ = ["MuskEncoder", "quadrants"]

timm = import_timm()


class MuskEncoder(nn.Module):
    """Class token of the tile ("cls"; "aligned": projected into the space that is shared with texts), or of
    the tile and of its quadrants ("none": pools by itself).

    At two scales the tile is passed as it is, then twice as large in four quadrants whose class
    tokens are averaged; the two are concatenated. The five images go through the trunk as one
    batch. `forward` takes normalised pixels (B, 3, S, S) float and returns features (B, variant.dim).
    """

    def __init__(self, spec: EncoderSpec, variant: Variant) -> None:
        super().__init__()
        self.two_scales = variant.pool == "none"
        #: Images that go through the trunk for each tile, the first of them the tile as it is.
        self.passes_per_tile = 5 if self.two_scales else 1
        self.vit: nn.Module = timm.create_model(spec.arch, pretrained=False, **spec.kwargs)
        self.aligned = variant.pool == "aligned"
        if self.aligned:
            self.projection = nn.Linear(cast("int", self.vit.embed_dim), variant.dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D)."""
        if self.aligned:
            return F.normalize(self.projection(self._class_tokens(pixels)), dim=-1)
        if not self.two_scales:
            return self._class_tokens(pixels)
        five = torch.cat([pixels[:, None], quadrants(pixels)], dim=1)  # (B, 5, 3, S, S)
        tokens = self._class_tokens(five.flatten(0, 1)).reshape(pixels.shape[0], 5, -1)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=-1)

    def _class_tokens(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, width)."""
        return cast("Tensor", self.vit.forward_features(pixels)[:, 0])  # type: ignore[operator]


def quadrants(pixels: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, 4, C, S, S): enlarged twice (bicubic, in fp32) and cut row by row."""
    large = F.interpolate(pixels.float(), scale_factor=2, mode="bicubic").to(pixels.dtype)
    batch, channels, height, width = pixels.shape
    halves = large.reshape(batch, channels, 2, height, 2, width)
    return halves.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
