"""Shapes of masks: gaps, strands and specks by their size."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["morphed", "without_specks"]


def morphed(mask: NDArray[Any], operation: int, width_px: float) -> NDArray[np.bool_]:
    """A mask, (H, W) bool, opened or closed (cv2.MORPH_OPEN, cv2.MORPH_CLOSE) by a disc of so many px.

    Beyond its edges an opened mask goes on, a closed one is empty.
    """
    side = max(1, round(width_px))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    border = cv2.BORDER_REPLICATE if operation == cv2.MORPH_OPEN else cv2.BORDER_CONSTANT
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), side, side, side, side, border)
    return np.asarray(cv2.morphologyEx(padded, operation, kernel)[side:-side, side:-side] > 0)


def without_specks(mask: NDArray[Any], least_px: float) -> NDArray[np.bool_]:
    """A mask, (H, W) bool, without its 4-connected pieces of less than so many px."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    large = np.asarray(stats)[:, cv2.CC_STAT_AREA] >= least_px
    large[0] = False
    return np.asarray(large[labels])
