"""Which directories of a TIFF are the slide and its smaller copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slide2vec.readers.refusal import Refusal

__all__ = ["RIVAL", "Levels", "TiffLevel", "copies_of", "joined", "the_largest"]

#: A tifffile.TiffPage.
Page: TypeAlias = Any

#: Bits of NewSubfileType (TIFF 6.0, section 8).
REDUCED, MASK = 1, 4
#: A side of a copy, px, may be off by so many from the base's divided by the downsample: twice rounded.
ROUNDING_PX = 2
#: Images of at least this part of the largest one's area may be the slide as well as it.
RIVAL = 0.25


@dataclass(frozen=True, kw_only=True)
class TiffLevel:
    """One pyramid level of a TIFF file.

    Attributes:
        page: index of its directory in the file.
        subifd: index among the SubIFDs of that directory, None for the directory itself.
        planes: indices of the directories that hold red, green and blue, where it is joined of three; its
            offsets and counts are then theirs one after the other, as in a planar TIFF. Else empty.
        width, height: in px.
        tile: (width, height) of its tiles in px, None when it is stored in strips.
        compression, photometric: their TIFF names ("JPEG", "YCBCR", …).
        predictor: 1 for none.
        planar: channels are stored apart.
        samples, bits: channels per pixel, bits per channel.
        offsets, counts: (n,) int64 position and bytes of each tile, row-major; 0 bytes = left out.
        jpeg_tables: what JPEG tiles share.
        rows_per_strip: of an image in strips.
        extra_samples: what each channel after the colours is: 0 unspecified, 1 opacity that the colours were
            multiplied with, 2 opacity.
        subsampling: of YCBCR: pixels that share a colour, along x and y.
        fill_order: 2 where bytes have their lowest bit first.
        colormap: (3, 256) uint16 of PALETTE.
    """

    page: int
    subifd: int | None = None
    planes: tuple[int, ...] = ()
    width: int
    height: int
    tile: tuple[int, int] | None
    compression: str
    predictor: int
    photometric: str
    planar: bool
    samples: int
    bits: int
    offsets: NDArray[np.int64] = field(repr=False, compare=False)
    counts: NDArray[np.int64] = field(repr=False, compare=False)
    jpeg_tables: bytes | None = field(repr=False, compare=False)
    rows_per_strip: int = 0
    extra_samples: tuple[int, ...] = ()
    subsampling: tuple[int, int] = (1, 1)
    fill_order: int = 1
    colormap: NDArray[np.uint16] | None = field(default=None, repr=False, compare=False)


#: The levels of a slide, level 0 first, and how many of them are for planning, see `Probe`.
Levels: TypeAlias = tuple[tuple[TiffLevel, ...], int]


def the_largest(pages: Sequence[Page]) -> Page:
    """The directory that is the slide: the largest image, of the tiled ones where they are not all small.

    Raises:
        Refusal: there is none, or another one may be the slide as well.
    """
    images = [page for page in pages if not page.subfiletype & MASK]
    if not images:
        raise Refusal("it holds no image, only transparency masks")
    largest = max(map(_area, images))
    tiled = [page for page in images if page.is_tiled and _area(page) >= RIVAL * largest]
    base = max(tiled or images, key=lambda page: (_area(page), not page.subfiletype & REDUCED, -page.index))
    rivals = [page for page in tiled or images if page is not base and _is_rival(page, base)]
    if rivals:
        raise Refusal(_several([base, *rivals]))
    return base


def _several(pages: Sequence[Page]) -> str:
    """The sentence about images of which each may be the slide."""
    listed = ", ".join(
        f"directory {page.index} ({page.imagewidth}x{page.imagelength} px)" for page in pages[:6]
    )
    return (
        f"it holds {len(pages)} images that may be the slide: {listed}{', …' if len(pages) > 6 else ''}; "
        "write the one that is to be read into a file of its own (vips tiffsave IN[page=N] OUT.tif --tile "
        "--pyramid, or QuPath)"
    )


def _is_rival(page: Page, base: Page) -> bool:
    if page.subfiletype & REDUCED or _area(page) < RIVAL * _area(base):
        return False
    return not _is_smaller_copy(_size(page), _size(base), ROUNDING_PX)


def copies_of(
    base: Page, pages: Iterable[Page], *, flagged: bool = True, slack_px: float = ROUNDING_PX
) -> Levels:
    """The base and its ever smaller copies among the directories, else in its SubIFDs.

    OpenSlide and cuCIM see neither SubIFDs nor directories without the flag of reduced images, so levels
    found there are not for planning.

    Args:
        flagged: copies for planning must carry the flag.
        slack_px: by how much a side of a copy may be off.
    """
    if not base.is_tiled:
        return (_level_of(base),), 1
    copies = [page for page in pages if _is_copy(page, base, slack_px)]
    seen = [page for page in copies if page.subfiletype & REDUCED or not flagged]
    if seen:
        levels = (_level_of(base), *(_level_of(page) for page in _ever_smaller(seen)))
        return levels, len(levels)
    inside = [page for page in base.pages or () if _is_copy(page, base, slack_px)]
    others = _ever_smaller(inside or copies)
    return (_level_of(base), *(_level_of(page, base.index if inside else None) for page in others)), 1


def _is_copy(page: Page, base: Page, slack_px: float) -> bool:
    kinds = [
        (p.samplesperpixel, p.bitspersample, p.sampleformat, bool(p.subfiletype & MASK)) for p in (page, base)
    ]
    return (
        bool(page.is_tiled) and kinds[0] == kinds[1] and _is_smaller_copy(_size(page), _size(base), slack_px)
    )


def _is_smaller_copy(size: tuple[int, int], base: tuple[int, int], slack_px: float) -> bool:
    """Whether an image of one (width, height) can be a reduced one of another: smaller, of its aspect."""
    if not all(0 < side < full for side, full in zip(size, base, strict=True)):
        return False
    least = max(full / (side + slack_px) for side, full in zip(size, base, strict=True))
    most = min(
        full / (side - slack_px) if side > slack_px else inf for side, full in zip(size, base, strict=True)
    )
    return least <= most


def _ever_smaller(pages: Iterable[Page]) -> Iterator[Page]:
    last = None
    for page in sorted(pages, key=lambda page: -page.imagewidth):
        if last is None or page.imagewidth < last.imagewidth:
            last = page
            yield page


def _level_of(page: Page, parent: int | None = None) -> TiffLevel:
    """A directory as a level; `parent` is the directory that it is a SubIFD of."""
    return TiffLevel(
        page=page.index if parent is None else parent,
        subifd=None if parent is None else page.index,
        width=page.imagewidth,
        height=page.imagelength,
        tile=(page.tilewidth, page.tilelength) if page.is_tiled else None,
        compression=getattr(page.compression, "name", str(page.compression)),
        predictor=int(page.predictor),
        photometric=getattr(page.photometric, "name", str(page.photometric)),
        planar=int(page.planarconfig) == 2 and page.samplesperpixel > 1,
        samples=page.samplesperpixel,
        bits=page.bitspersample,
        offsets=np.asarray(page.dataoffsets, np.int64),
        counts=np.asarray(page.databytecounts, np.int64),
        jpeg_tables=page.jpegtables,
        rows_per_strip=0 if page.is_tiled else int(page.rowsperstrip),
        extra_samples=tuple(map(int, page.extrasamples)),
        subsampling=_subsampling(page),
        fill_order=int(page.fillorder),
        colormap=page.colormap,
    )


def _subsampling(page: Page) -> tuple[int, int]:
    """TIFF 6.0, section 21; (2, 2) where YCbCr does not say."""
    across, down = page.tags.valueof(530, (2, 2)) if page.photometric == 6 else (1, 1)
    return int(across), int(down)


def joined(levels: Sequence[TiffLevel]) -> TiffLevel:
    """One planar RGB level of three of a single channel."""
    return replace(
        levels[0],
        planes=tuple(level.page for level in levels),
        photometric="RGB",
        planar=True,
        samples=len(levels),
        offsets=np.concatenate([level.offsets for level in levels]),
        counts=np.concatenate([level.counts for level in levels]),
    )


def _size(page: Page) -> tuple[int, int]:
    return page.imagewidth, page.imagelength


def _area(page: Page) -> int:
    return int(page.imagewidth) * int(page.imagelength)
