"""Pictures to embed."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8, coloured blobs."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 4), np.uint8)
