"""A reader of pictures in PPM (P6), which slide2vec does not read itself. They say no spacing."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import BackendError
from slide2vec.readers import Probe, PyramidReader

__all__ = ["PpmReader", "unavailable"]

_HEADER = re.compile(rb"P6\s+(\d+)\s+(\d+)\s+255\s")


def unavailable() -> str | None:
    """Why it cannot be used on this machine, and what to install; None when it can."""
    return None


class PpmReader(PyramidReader):
    """Only has to read boxes that lie inside a level: what is white around a slide, and the comparison with a
    second decoder, are slide2vec's.

    Raises:
        BackendError: it is no such file, and another reader may have it.
    """

    backend = "ppm"

    def __init__(self, probe: Probe) -> None:
        with probe.path.open("rb") as file:
            header = _HEADER.match(file.read(64))
        if header is None:
            raise BackendError("it is no PPM picture (P6) of 8 bits")
        width, height = map(int, header.groups())
        super().__init__(probe, [(width, height)])
        self._pixels = np.memmap(probe.path, np.uint8, "r", header.end(), (height, width, 3))

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        return np.array(self._pixels[y : y + height, x : x + width])

    def close(self) -> None:
        """The file is released with the last array of it."""
