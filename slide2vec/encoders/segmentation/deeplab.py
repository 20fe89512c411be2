"""DeepLabv3 on a ResNet-50, of torchvision: HEST's segmenter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

__all__ = ["DeepLab"]


class DeepLab(nn.Module):
    """Normalised pixels (B, 3, H, W) -> logits (B, classes · H · W). `trunk` has the names of torchvision."""

    def __init__(self, classes: Sequence[str]) -> None:
        from torchvision.models.segmentation import deeplabv3_resnet50

        super().__init__()
        self.trunk: nn.Module = deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=len(classes)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes · H · W)."""
        return cast("Tensor", self.trunk(pixels)["out"]).flatten(1)
