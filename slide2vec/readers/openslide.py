"""OpenSlide: reads the most formats; always installed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray

from slide2vec.errors import BackendError, SlideReadError
from slide2vec.readers.crash_guard import check_in_child
from slide2vec.readers.probe import Probe, TiffLevel
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.recheck import check_of
from slide2vec.readers.spacing import SpacingCandidate, choose_spacing, objective_claim

__all__ = ["OpenslideReader", "unavailable"]

#: Whose levels are the directories of the file, tile by tile. OpenSlide says nothing of much
#: damage; the tiles of other vendors cannot be checked beforehand.
_CHECKED = ("aperio", "generic", "ome", "philips")
#: Side in level px of what is read at once where the downsample is no whole number.
_BLOCK = 512


def unavailable() -> str | None:
    """Why this back end cannot be used here: it always can."""
    return None


class OpenslideReader(PyramidReader):
    """Reads everything that OpenSlide opens.

    OpenSlide takes level-0 locations. One that falls between two pixels of a level is answered with
    pixels interpolated between them, so the same pixel would look different in two overlapping
    regions. Levels whose downsample is no whole number are therefore read in blocks that always
    begin at the same places, where a whole location comes closest to a whole pixel.

    Raises:
        BackendError: OpenSlide does not open the file.
    """

    backend = "openslide"

    def __init__(self, probe: Probe) -> None:
        reason = next((reason for level in probe.levels if (reason := _why_not(level))), None)
        if reason:
            raise BackendError(reason)
        check_in_child(OpenslideReader, probe)
        try:
            handle = openslide.OpenSlide(probe.path)
        except openslide.OpenSlideError as error:
            raise BackendError(f"OpenSlide cannot open it: {error}") from error
        dimensions = handle.level_dimensions
        if wrong := _other_levels(probe, dimensions):
            handle.close()
            raise BackendError(wrong)
        super().__init__(probe, dimensions[: probe.planning or None])
        self._handle: Any | None = handle
        self._native_downsamples = tuple(handle.level_downsamples)
        self._lock = threading.Lock()
        if probe.kind != "tiff" or probe.vendor in {"leica", "ventana", "trestle"}:
            self.claims = tuple(_claims(handle.properties))
            self.spacing_um, self.spacing_source = choose_spacing(self.claims)
        self._check = check_of(probe, self._read_error) if probe.vendor in _CHECKED else None
        if self.tile_shapes[0] is None:
            self.tile_shapes = tuple(
                _tile_shape(handle.properties, i) for i in range(len(self.level_dimensions))
            )

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        if self._check is not None and self._handle is not None:
            self._check(level, x, y, width, height)
        downsample = self._native_downsamples[level]
        if downsample == int(downsample):
            return self._read(level, x, y, width, height)
        pixels = np.empty((height, width, 3), np.uint8)
        for top, y0, y1 in _blocks(y, y + height, downsample):
            for left, x0, x1 in _blocks(x, x + width, downsample):
                block = self._read(level, left, top, x1 - left, y1 - top)
                pixels[y0 - y : y1 - y, x0 - x : x1 - x] = block[y0 - top :, x0 - left :]
        return pixels

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """A box whose corner is taken to level 0 by rounding."""
        downsample = self._native_downsamples[level]
        arguments = (round(x * downsample), round(y * downsample)), level, (width, height)
        handle = self._handle
        if handle is None:
            raise SlideReadError(f"slide {self.name} was closed")
        try:
            return _as_rgb(handle.read_region(*arguments))
        except openslide.OpenSlideError:
            self._renew()
        # An error sticks to a handle, and it may have been another thread's: ask one of our own.
        try:
            with openslide.OpenSlide(self.path) as handle:
                return _as_rgb(handle.read_region(*arguments))
        except openslide.OpenSlideError as error:
            raise self._read_error(level, x, y, error) from error

    def _renew(self) -> None:
        """Replace the shared handle if it has failed (not closed: other threads may be in it)."""
        with self._lock:
            if self._handle is not None and _has_failed(self._handle):
                self._handle = openslide.OpenSlide(self.path)

    def close(self) -> None:
        """Release the file. May be called twice."""
        with self._lock:
            if self._handle is not None:
                self._handle.close()
                if self._check is not None:
                    self._check.close()
            self._handle = None


def _why_not(level: TiffLevel) -> str | None:
    """Why OpenSlide (4.0.1) would give other pixels than such a level has; what it cannot read it refuses."""
    if level.bits != 8:
        return f"it has {level.bits} bits per channel, of which OpenSlide gives the highest 8 only"
    if level.photometric in ("SEPARATED", "CIELAB"):
        return f"OpenSlide gives black or other colours for {level.photometric} pixels"
    return None


def _other_levels(probe: Probe, dimensions: Sequence[tuple[int, int]]) -> str | None:
    """How OpenSlide's levels differ from those of the tags, None where they begin with them."""
    if probe.levels and probe.levels[0].planes:
        return "its red, green and blue are three directories, of which OpenSlide would take one"
    if probe.vendor == "philips":  # pads its levels to whole tiles; OpenSlide knows their true sizes
        return None
    expected = [(level.width, level.height) for level in probe.levels[: probe.planning]]
    if list(dimensions[: probe.planning]) == expected:
        return None
    return f"OpenSlide sees other levels in it {tuple(dimensions)} than its tags {tuple(expected)}"


def _has_failed(handle: Any) -> bool:
    try:
        return not handle.level_count
    except openslide.OpenSlideError:
        return True


def _as_rgb(image: Any) -> NDArray[np.uint8]:
    """An RGBA picture over white, (height, width, 3) uint8."""
    rgba = np.asarray(image)
    alpha = rgba[..., 3]
    pixels: NDArray[np.uint8] = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)  # type: ignore[assignment]
    if alpha.min() < 255:
        rows, columns = np.nonzero(alpha < 255)
        opacity = alpha[rows, columns, None].astype(np.uint16)
        mixed = pixels[rows, columns] * opacity + 255 * (255 - opacity)
        pixels[rows, columns] = (mixed + 127) // 255
    return pixels


def _blocks(start: int, stop: int, downsample: float) -> list[tuple[int, int, int]]:
    """(where its block begins, start, stop) of the pieces that the blocks of a level cut a span into."""
    edges = [_edge(index, downsample) for index in range(start // _BLOCK, stop // _BLOCK + 3)]
    return [(a, max(a, start), min(b, stop)) for a, b in pairwise(edges) if a < stop and b > start]


@cache
def _edge(index: int, downsample: float) -> int:
    """Level pixel where a block begins: of the last in its half block, the closest to a whole location."""
    pixels = np.arange(index * _BLOCK - (_BLOCK // 2 if index else 0), index * _BLOCK + 1)
    locations = pixels * downsample
    return int(pixels[np.abs(locations - np.round(locations)).argmin()])


def _claims(properties: Any) -> Iterator[SpacingCandidate]:
    x, y, power = (
        _number(properties.get(f"openslide.{name}")) for name in ("mpp-x", "mpp-y", "objective-power")
    )
    if x is not None:
        yield ("mpp", x) if y is None else ("mpp", x, y)
    if power is not None:
        yield objective_claim(power)


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _tile_shape(properties: Any, level: int) -> tuple[int, int] | None:
    width, height = (properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height"))
    return (int(width), int(height)) if width and height else None
