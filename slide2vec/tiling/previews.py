"""Pictures to check a slide's tissue and tiles by eye."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.config import PreviewConfig
from slide2vec.files import atomic_path
from slide2vec.readers import SlideReader
from slide2vec.tiling.levels import read_level
from slide2vec.tiling.types import Tiling, TissueMask

__all__ = [
    "draw_tiles",
    "draw_tissue",
    "thumbnail",
    "thumbnail_level",
    "write_mask_preview",
    "write_tiling_preview",
]

Picture = NDArray[np.uint8]

#: JPEG holds 65,535 px a side, and pictures larger than this are of no use to the eye.
MAX_SIDE_PX = 16_384

_QUALITY = 90
_HOLE_COLOR = (226, 92, 48)
_TILE_COLOR = (24, 58, 120)
#: Of tiles that artefacts take a share of, from this on.
_ARTEFACT_COLORS = {
    "blur": (200, 40, 40),
    "bubble": (20, 150, 160),
    "fold": (150, 60, 200),
    "pen": (240, 140, 0),
    "spot": (90, 90, 90),
}
_SHOWN_FROM = 0.1
#: Side of a tile in the picture below which outlines would hide it.
_MIN_OUTLINED_PX = 6


def write_mask_preview(path: Path, reader: SlideReader, tissue: TissueMask, config: PreviewConfig) -> None:
    """Write a JPEG of the slide with its tissue tinted and outlined, holes outlined in orange.

    Raises:
        SlideReadError: pixels cannot be decoded.
    """
    _write(path, draw_tissue(thumbnail(reader, config.downsample), tissue, config))


def write_tiling_preview(path: Path, reader: SlideReader, tiling: Tiling, config: PreviewConfig) -> None:
    """Write a JPEG of the slide with the outline of every tile.

    Raises:
        SlideReadError: pixels cannot be decoded.
    """
    _write(path, draw_tiles(thumbnail(reader, config.downsample), tiling))


def thumbnail(reader: SlideReader, downsample: float) -> Picture:
    """The whole slide reduced by `downsample` or, to stay below `MAX_SIDE_PX` a side, more: (h, w, 3)."""
    downsample = max(downsample, max(reader.dimensions) / MAX_SIDE_PX, 1.0)
    level = thumbnail_level(reader, downsample)
    factor = max(1, int(downsample / reader.downsamples[level] + 1e-3))
    width, height = (max(1, round(side / downsample)) for side in reader.dimensions)
    pixels = read_level(reader, level, factor)
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def thumbnail_level(reader: SlideReader, downsample: float) -> int:
    """The coarsest level that is no coarser than `downsample` (1 or more)."""
    finer = [level for level, ds in enumerate(reader.downsamples) if ds <= downsample * 1.001]
    return max(finer, key=lambda index: reader.downsamples[index])


def draw_tissue(picture: Picture, tissue: TissueMask, config: PreviewConfig) -> Picture:
    """The picture of a whole slide with its tissue tinted (alpha) and outlined."""
    height, width = picture.shape[:2]
    scale = np.array([width / tissue.mask.shape[1], height / tissue.mask.shape[0]])
    outlines = [_scaled(piece.contour, scale) for piece in tissue.pieces]
    holes = [_scaled(hole, scale) for piece in tissue.pieces for hole in piece.holes]
    mask = np.asarray(cv2.resize(tissue.mask, (width, height), interpolation=cv2.INTER_NEAREST))
    kept = np.zeros((height, width), np.uint8)
    cv2.drawContours(kept, outlines, -1, 1, thickness=cv2.FILLED)
    inside = (kept > 0) & (mask > 0)
    drawn = picture.copy()
    tint = np.array(config.tissue_contour_color, np.float32)
    alpha = config.mask_overlay_alpha
    drawn[inside] = (drawn[inside] * (1 - alpha) + tint * alpha).astype(np.uint8)
    thickness = _thickness(width, height)
    dark = tuple(channel // 3 for channel in config.tissue_contour_color)
    cv2.drawContours(drawn, outlines, -1, dark, thickness, cv2.LINE_AA)
    cv2.drawContours(drawn, holes, -1, _HOLE_COLOR, max(1, thickness // 2), cv2.LINE_AA)
    return drawn


def draw_tiles(picture: Picture, tiling: Tiling) -> Picture:
    """The picture of a whole slide with the outline of every tile; tiny tiles are tinted instead. Blurred
    tiles are red, those under a bubble turquoise, folded ones violet, those under pen orange, with dark
    spots grey."""
    height, width = picture.shape[:2]
    scale_x, scale_y = width / tiling.dimensions[0], height / tiling.dimensions[1]
    side = tiling.geometry.tile_size_lv0
    left, top = np.rint(tiling.x * scale_x), np.rint(tiling.y * scale_y)
    right, bottom = np.rint((tiling.x + side) * scale_x), np.rint((tiling.y + side) * scale_y)
    drawn = picture.copy()
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], 1).astype(np.int32)
    large = side * scale_x >= _MIN_OUTLINED_PX
    for outline, colour in zip(corners.reshape(-1, 4, 2), _colours(tiling), strict=True):
        if large:
            cv2.polylines(drawn, [outline], True, colour, 1)
        else:
            cv2.fillConvexPoly(drawn, outline, colour)
    if large:
        return drawn
    return np.asarray(cv2.addWeighted(picture, 0.6, drawn, 0.4, 0), np.uint8)


def _colours(tiling: Tiling) -> list[tuple[int, int, int]]:
    """Of every tile: that of the artefact that takes most of it, where one takes enough."""
    found = [_TILE_COLOR] * len(tiling)
    most = np.full(len(tiling), _SHOWN_FROM, np.float32)
    for name, colour in _ARTEFACT_COLORS.items():
        share = tiling.artefacts.get(name)
        if share is None:
            continue
        for index in np.flatnonzero(share >= most):
            found[index], most[index] = colour, share[index]
    return found


def _scaled(outline: NDArray[np.int32], scale: NDArray[np.float64]) -> NDArray[np.int32]:
    # From the middle of a pixel of the mask to that of the picture.
    return np.rint((outline + 0.5) * scale - 0.5).astype(np.int32)


def _thickness(width: int, height: int) -> int:
    return max(1, round(max(width, height) / 1000))


def _write(path: Path, picture: Picture) -> None:
    quality = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)
    if not done:
        raise OSError(f"the preview {path} cannot be encoded as JPEG")
    with atomic_path(path) as temporary:
        temporary.write_bytes(np.asarray(data).tobytes())
