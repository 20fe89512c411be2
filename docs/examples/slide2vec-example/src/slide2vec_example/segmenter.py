"""A segmenter: tissue is what is darker than the brightest tenth of a slide; what is black is a mark."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["DARKER", "Darker"]

#: Grey levels below the slide's glass from which something is tissue, and up to which it is a mark.
DARKER_BY, BLACK = 12, 40


class Darker:
    """Labels the pixels of a thumbnail.

    Attributes:
        names: of the labels, by their numbers; those named "tissue" make tiles.
        spacing_um: µm/px of the thumbnails that it wants; those of coarser slides come as they are.
    """

    names = ("background", "tissue", "mark")
    spacing_um = 16.0

    def segment(self, thumbnail: NDArray[np.uint8], spacing_um: float) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of `spacing_um` µm/px -> (H, W) uint8 labels."""
        grey = thumbnail.mean(axis=2)
        labels = (grey < np.percentile(grey, 90) - DARKER_BY).astype(np.uint8)
        labels[grey < BLACK] = 2
        return labels


DARKER = Darker()
