"""What every reading back end offers."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["BufferedReader", "SlideReader", "Squares", "planning_downsamples"]

#: (n, 2) int64 corners (x, y) in level px, and the side of all.
Squares: TypeAlias = tuple[NDArray[np.int64], int]


@runtime_checkable
class SlideReader(Protocol):
    """An opened slide: its pyramid and its pixels.

    Safe to use from several threads at once. Close it when done (a context manager).

    Attributes:
        backend: name of the back end ("tiff", "dicom", "cucim", "openslide", "vips", "asap").
        dimensions: (width, height) of level 0 in px.
        level_dimensions: (width, height) of every level, level 0 first.
        downsamples: width0 / width_l of every level, level 0 first (1.0).
        spacing_um: µm/px of level 0 as the file gives it (None when it gives none or an
            implausible one).
        spacing_source: what `spacing_um` was read from ("mpp", "resolution", "objective power", …),
            or, when it is None, why.
        tile_shapes: (width, height) in px of the file's own compressed tiles at every level, None
            where unknown or not tiled. Reads aligned to them decode nothing twice.
    """

    backend: str
    dimensions: tuple[int, int]
    level_dimensions: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    spacing_um: float | None
    spacing_source: str
    tile_shapes: tuple[tuple[int, int] | None, ...]

    def read_region(
        self, location_lv0: tuple[int, int], level: int, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """Pixels of one level, (height, width, 3) uint8 RGB, contiguous, owned by the caller.

        Args:
            location_lv0: (x, y) of the top-left corner in level-0 px; may lie outside the slide.
            level: the level to read.
            size: (width, height) in px of that level.

        The region's origin in the level is floor(location / downsample). Outside the slide pixels
        are white (255), as is what the file leaves transparent.

        Raises:
            SlideReadError: pixels cannot be decoded (never returned as black or white instead), or
                the level or size is not one the slide has.
        """
        ...

    def close(self) -> None:
        """Release the file. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def planning_downsamples(reader: SlideReader) -> tuple[float, ...]:
    """Downsamples of the levels that grids, read levels and tissue masks are chosen from.

    These are the first levels, which HS2P sees, too, so that coordinates are HS2P's. Further ones, in
    SubIFDs of a TIFF for instance, are only there to be read; a reader of such a slide has the attribute
    `planning_levels`, their number.
    """
    return reader.downsamples[: getattr(reader, "planning_levels", None)]


@runtime_checkable
class BufferedReader(Protocol):
    """A SlideReader that can write into memory that is used again, and average pixels as it decodes them."""

    def read_into(
        self,
        memory: NDArray[np.uint8],
        location_lv0: tuple[int, int],
        level: int,
        size: tuple[int, int],
        ratio: int,
        squares: Squares | None = None,
    ) -> NDArray[np.uint8] | None:
        """`read_region`, each ratio x ratio px averaged as OpenCV's INTER_AREA does, bit by bit.

        Args:
            memory: flat, of at least (height // ratio) * (width // ratio) * 3 bytes.
            squares: of the region, the only ones that will be looked at: elsewhere pixels may be any.

        Returns:
            (height // ratio, width // ratio, 3) uint8 in that memory; None where the region has to be read by
            `read_region`.

        Raises:
            SlideReadError: as `read_region`.
        """
        ...
