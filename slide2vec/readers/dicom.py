"""DICOM whole-slide images: every frame is read and decoded once, by a decoder that raises on damage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import BackendError, SlideReadError
from slide2vec.readers.dicomdecode import decoded, why_not_decoded
from slide2vec.readers.dicomframes import unwrapped
from slide2vec.readers.dicomlevels import DicomLevel
from slide2vec.readers.jpegtiles import TilePlace, _place, _spans
from slide2vec.readers.probe import Probe
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.raw import RawBoxes
from slide2vec.readers.tilecheck import Fail

__all__ = ["DicomReader", "unavailable"]


def unavailable() -> str | None:
    """Why this back end cannot be used here, None when it can."""
    missing = [name for name in ("pydicom", "simplejpeg", "imagecodecs") if find_spec(name) is None]
    return f"{missing[0]} is not installed: pip install {' '.join(missing)}" if missing else None


class DicomReader(PyramidReader):
    """Reads DICOM whole-slide images of any transfer syntax but video.

    Raises:
        BackendError: it is no DICOM file, or its frames are stored in a way that is not read.
    """

    backend = "dicom"

    def __init__(self, probe: Probe) -> None:
        if probe.kind != "dicom":
            raise BackendError(f"it is no DICOM file ({probe.vendor or probe.kind})")
        levels = probe.dicom_levels
        if reason := next(filter(None, map(why_not_decoded, levels)), None):
            raise BackendError(reason)
        super().__init__(probe, [(level.width, level.height) for level in levels])
        self.tile_shapes = tuple(level.tile for level in levels)
        tiles: Any = DicomTiles(levels, probe.name, self._read_error)
        self._boxes = RawBoxes(tiles, _AsTheyAre(), [False] * len(levels))

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        return self._boxes.read(level, x, y, width, height)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Release the files. May be called twice."""
        self._boxes.close()


class DicomTiles:
    """Reads the frames of a slide. Safe to use from several threads.

    Args:
        name: of the slide.
        fail: makes the error of a frame that is damaged.
    """

    def __init__(self, levels: Sequence[DicomLevel], name: str, fail: Fail) -> None:
        self._levels, self._name, self._fail = levels, name, fail
        self._files: list[list[int]] | None = [
            [os.open(path, os.O_RDONLY) for path in level.files] for level in levels
        ]

    def close(self) -> None:
        """Release the files. May be called twice."""
        files, self._files = self._files, None
        for file in (file for level in files or () for file in level):
            os.close(file)

    def under(self, level: int, x: int, y: int, width: int, height: int) -> list[TilePlace]:
        """The frames under a box inside a level (level px), without those that the file leaves out."""
        spec: Any = self._levels[level]
        columns, rows = spec.tile
        across = -(-spec.width // columns)
        return [
            _place(row * across + column, (column * columns, row * rows), spec, (x, y, width, height))
            for row in range(y // rows, (y + height - 1) // rows + 1)
            for column in range(x // columns, (x + width - 1) // columns + 1)
            if spec.counts[row * across + column]
        ]

    def read(self, level: int, places: Sequence[TilePlace]) -> list[Any]:
        """(rows, columns, 3) uint8 of the frames, read in file order with as few requests as possible.

        Raises:
            SlideReadError: one is damaged, or the slide was closed.
        """
        if self._files is None:
            raise SlideReadError(f"slide {self._name} was closed")
        spec = self._levels[level]
        numbers = np.array([place.tile for place in places], np.int64)
        found: dict[int, bytes] = {}
        for number, file in enumerate(self._files[level]):
            (here,) = np.nonzero(spec.file[numbers] == number)
            offsets, counts = spec.offsets[numbers[here]], spec.counts[numbers[here]]
            for span in _spans(offsets, counts):
                start, end = int(offsets[span[0]]), int((offsets[span] + counts[span]).max())
                block = os.pread(file, end - start, start)
                for index in span.tolist():
                    at = int(offsets[index]) - start
                    found[int(here[index])] = block[at : at + int(counts[index])]
        return [self._pixels(level, place, found[index]) for index, place in enumerate(places)]

    def _pixels(self, level: int, place: TilePlace, data: bytes) -> NDArray[np.uint8]:
        spec = self._levels[level]
        try:
            return decoded(spec, data if spec.is_native else unwrapped(data))
        except (ValueError, RuntimeError) as error:
            raise self.damaged(level, place, f"damaged frame ({error})") from error

    def damaged(self, level: int, place: TilePlace, why: str) -> SlideReadError:
        """The error of a frame that a decoder does not take."""
        return self._fail(level, place.x, place.y, why)

    def shape(self, level: int) -> tuple[int, int, int]:
        """(height, width, 3) of a level's frames."""
        columns, rows = self._levels[level].tile
        return rows, columns, 3


class _AsTheyAre:
    """A `TileDecoder` of what is decoded already."""

    def decode(self, frames: Sequence[Any], *, rgb: bool) -> list[Any]:
        return list(frames)

    def canvas(self, height: int, width: int) -> Any:
        return np.full((height, width, 3), 255, np.uint8)
