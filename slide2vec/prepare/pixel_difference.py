"""How far pixels are from those that they should be: what decides whether a GPU's are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DECODED", "PixelLimits"]


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
