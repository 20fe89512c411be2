"""Writing pictures to files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ConfigError
from slide2vec.files import as_path, atomic_path

__all__ = ["write_picture"]

_QUALITY = 92


def write_picture(path: str | os.PathLike[str], image: NDArray[np.uint8]) -> Path:
    """Write (h, w, 3) uint8 RGB as PNG or JPEG, by the suffix; the file, which may be behind a URL, appears
    complete or not at all.

    Raises:
        ConfigError: the suffix is neither .png, .jpg nor .jpeg.
        OSError: the picture cannot be encoded or written.
    """
    import cv2

    path = as_path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"{path}: a picture's suffix must be .png, .jpg or .jpeg, not {path.suffix!r}")
    options = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    done, encoded = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise OSError(f"{path}: a picture of {image.shape} cannot be encoded as {suffix}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.tobytes())
    return path
