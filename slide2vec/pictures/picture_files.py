"""Writing pictures to files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ConfigError
from slide2vec.files import as_path, atomic_path

__all__ = ["encoded_picture", "write_picture"]

_QUALITY = 92


def write_picture(path: str | os.PathLike[str], image: NDArray[np.uint8]) -> Path:
    """Write (h, w, 3) uint8 RGB as PNG or JPEG, by the suffix; the file, which may be behind a URL, appears
    complete or not at all.

    Raises:
        ConfigError: the suffix is neither .png, .jpg nor .jpeg.
        OSError: the picture cannot be encoded or written.
    """
    path = as_path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"{path}: a picture's suffix must be .png, .jpg or .jpeg, not {path.suffix!r}")
    encoded = encoded_picture(image, suffix)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded)
    return path


def encoded_picture(image: NDArray[np.uint8], suffix: str, quality: int = _QUALITY) -> bytes:
    """(h, w, 3) uint8 RGB as the bytes of a file with that suffix: .png, .jpg or .jpeg.

    Raises:
        OSError: it cannot be encoded.
    """
    import cv2

    options = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, quality]
    done, encoded = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise OSError(f"a picture of {image.shape} cannot be encoded as {suffix}")
    return encoded.tobytes()
