"""How far pixels are from those that they should be: what decides whether a GPU's are taken."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import SlideReadError

__all__ = ["DECODED", "PixelLimits", "tiles_to_compare"]

#: Tiles that are looked at, spread over a slide, and those of them with the most texture that are compared:
#: on a smooth tile the chroma of a wrong decoder is right, on a white one even that of a wrong colour space.
_TILES_LOOKED_AT = 10
_TILES_COMPARED = 5


@dataclass(frozen=True)
class PixelLimits:
    """How far the pixels of a tile may be off, in grey levels.

    Attributes:
        mean: largest mean difference of a tile.
        percentile_99: what 99 of 100 of its values may differ by at most.
    """

    mean: float
    percentile_99: float

    def exceeded(self, found: NDArray[Any], expected: NDArray[Any]) -> str | None:
        """How the worst of some tiles is further off than these limits, None where none is.

        Args:
            found, expected: (n, ...) pixels of n tiles, of any dtype, in grey levels.
        """
        difference = np.abs(found.astype(np.float32) - expected.astype(np.float32)).reshape(len(found), -1)
        means, highs = difference.mean(1), np.percentile(difference, 99, axis=1)
        worst = int(np.argmax(np.maximum(means / self.mean, highs / self.percentile_99)))
        mean, high = float(means[worst]), float(highs[worst])
        if mean <= self.mean and high <= self.percentile_99:  # NaN is not
            return None
        return (
            f"its pixels differ by {mean:.1f} grey levels on average and 99 % of them by up to {high:.0f} "
            f"({self.mean:g} and {self.percentile_99:g} are allowed)"
        )


#: Of JPEG decoders. Measured against libjpeg-turbo (accurate integer IDCT, interpolated chroma): mean and
#: 99th percentile of a tile, on the tiles with most texture of real slides and of their pixels coded anew.
#:
#: | decoder | 1:1 | reduced by 2 |
#: |---|---|---|
#: | nvImageCodec on a CPU, OpenCV | 0, 0 | 0, 0 |
#: | IDCT, colours in floating point (4:4:4) | 0.40, 2 | |
#: | fast integer IDCT, quality 30 to 90 | 0.5 to 1.2, 1 to 4 | 0.5 to 1.0, 1 to 3 |
#: | chroma repeated, 4:2:0 and 4:2:2 | 1.1 to 3.3, 8 to 16 | 0.75 to 2.9, 6 to 13 |
#: | red and blue exchanged | 4.9 to 21, 35 to 91 | 4.8 to 20, 35 to 83 |
#: | shifted by a pixel | 13 to 26, 77 to 122 | 10 to 19, 60 to 91 |
#: | YCbCr for RGB, or RGB for YCbCr | 37 to 62, 118 to 158 | 36 to 61, 113 to 151 |
#:
#: The mean alone would pass repeated chroma; where tiles show little of it (generated tissue in 4:2:2: 0.5
#: and 4), both do.
DECODED = PixelLimits(mean=1.0, percentile_99=4.0)


def tiles_to_compare(
    tiles: NDArray[np.int64], side: int, read_tile: Callable[[int, NDArray[np.uint8]], None]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Those with the most texture of some tiles that can be decoded, spread over all of a slide's, and their
    pixels.

    Args:
        tiles: (n,) numbers of the slide's tiles.
        side: of the tiles, px.
        read_tile: writes a tile into (side, side, 3) uint8. A SlideReadError leaves the tile out.
    """
    chosen = np.linspace(0, len(tiles) - 1, min(len(tiles), _TILES_LOOKED_AT)).round().astype(np.int64)
    found, pixels = [], []
    for tile in tiles[np.unique(chosen)].tolist():
        target = np.empty((side, side, 3), np.uint8)
        with suppress(SlideReadError):
            read_tile(tile, target)
            found.append(tile)
            pixels.append(target)
    decoded = np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)
    steps = [np.abs(np.diff(decoded.astype(np.int16), axis=axis)).mean((1, 2, 3)) for axis in (1, 2)]
    most = np.argsort(-(steps[0] + steps[1]), kind="stable")[:_TILES_COMPARED]
    return np.array(found, np.int64)[most], decoded[most]
