"""UNet and UNet++ on an EfficientNet-B0: GrandQC's, as segmentation-models-pytorch builds them and names
their parts ("timm-efficientnet-b0", decoder of 256, 128, 64, 32, 16 channels)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.lazy import import_timm

__all__ = ["Unet", "UnetPlusPlus"]

#: Channels of what the encoder gives at 1/2, 1/4, … 1/32, and of the decoder, from the coarsest on.
ENCODED = (32, 24, 40, 112, 320)
DECODED = (256, 128, 64, 32, 16)
#: After so many stages of the network a map is taken.
_TAKEN_AFTER = (2, 3, 5, 7)


class _EfficientNet(nn.Module):
    """The convolutions of timm's EfficientNet-B0, under the names of its checkpoints. The last one, which
    classifiers have, is not used, and in the checkpoints all the same."""

    def __init__(self) -> None:
        super().__init__()
        net = import_timm().create_model("efficientnet_b0", pretrained=False, num_classes=0)
        self.conv_stem, self.bn1, self.blocks = net.conv_stem, net.bn1, net.blocks
        self.conv_head, self.bn2 = net.conv_head, net.bn2

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps of `ENCODED` channels, the finest first."""
        x = cast("Tensor", self.bn1(self.conv_stem(pixels)))
        maps = [x]
        for number, stage in enumerate(cast("nn.Sequential", self.blocks), 1):
            x = stage(x)
            if number in _TAKEN_AFTER:
                maps.append(x)
        return maps


class _Block(nn.Module):
    """Doubles the size, joins what is beside, and convolves twice."""

    def __init__(self, channels: int, beside: int, out: int) -> None:
        super().__init__()
        self.conv1 = _convolution(channels + beside, out)
        self.conv2 = _convolution(out, out)

    def forward(self, x: Tensor, beside: Sequence[Tensor] = ()) -> Tensor:
        larger = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return cast("Tensor", self.conv2(self.conv1(torch.cat([larger, *beside], dim=1))))


def _convolution(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class _Network(nn.Module):
    """Encoder, decoder and the last convolution. Sides of pixels are multiples of 32."""

    def __init__(self, decoder: nn.Module, classes: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.decoder = _EfficientNet(), decoder
        self.segmentation_head = nn.Sequential(nn.Conv2d(DECODED[-1], len(classes), 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes · H · W)."""
        maps = self.encoder(pixels)[::-1]
        return cast("Tensor", self.segmentation_head(self.decoder(maps))).flatten(1)


class Unet(_Network):
    """Every map of the decoder is joined with the encoder's of its size."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(_Decoder(), classes)


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        coarse, *finer = ENCODED[::-1]
        sizes = zip((coarse, *DECODED), (*finer, 0), DECODED, strict=False)
        self.blocks = nn.ModuleList(_Block(*each) for each in sizes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x, *finer = maps
        for number, block in enumerate(self.blocks):
            x = block(x, finer[number : number + 1])
        return x


class UnetPlusPlus(_Network):
    """Between encoder and decoder are maps that are joined with all of their size, and the finer ones with
    them in turn."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(_NestedDecoder(), classes)


class _NestedDecoder(nn.Module):
    """Block "x_i_j" makes map j of the i-th row: map i of the diagonal comes of the encoder's, and further
    along a row of the map before it, beside those of the same size in the rows below."""

    def __init__(self) -> None:
        super().__init__()
        coarse, *finer = ENCODED[::-1]
        blocks: dict[str, nn.Module] = {}
        for column, beside in enumerate(finer):
            channels = coarse if column == 0 else DECODED[column - 1]
            blocks[f"x_0_{column}"] = _Block(channels, beside * (column + 1), DECODED[column])
            for row in range(1, column + 1):
                blocks[f"x_{row}_{column}"] = _Block(finer[column - 1], beside * (column + 1 - row), beside)
        last = len(finer)
        blocks[f"x_0_{last}"] = _Block(DECODED[last - 1], 0, DECODED[last])
        self.blocks = nn.ModuleDict(blocks)

    def forward(self, maps: list[Tensor]) -> Tensor:
        made: dict[tuple[int, int], Tensor] = {}
        last = len(maps) - 1
        for column in range(last):
            for row in range(column, -1, -1):
                before = maps[row] if row == column else made[row, column - 1]
                beside = [made[below, column] for below in range(row + 1, column + 1)]
                made[row, column] = self.blocks[f"x_{row}_{column}"](before, [*beside, maps[column + 1]])
        return cast("Tensor", self.blocks[f"x_0_{last}"](made[0, last - 1]))
