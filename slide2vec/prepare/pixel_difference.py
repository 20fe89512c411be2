"""How far pixels are from those that they should be: what decides whether a GPU's are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DECODED", "PixelLimits", "most_textured", "spread"]

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


#: Of JPEG decoders.
DECODED = PixelLimits(mean=1.0, percentile_99=6.0)


def spread(count: int) -> NDArray[np.int64]:
    """Some of `count` tiles to look at, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, _TILES_LOOKED_AT)).round().astype(np.int64))


def most_textured(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Which of (n, S, S, 3) tiles to compare: the largest mean step between neighbouring pixels first."""
    steps = [np.abs(np.diff(pixels.astype(np.int16), axis=axis)).mean((1, 2, 3)) for axis in (1, 2)]
    return np.argsort(-(steps[0] + steps[1]), kind="stable")[:_TILES_COMPARED]
