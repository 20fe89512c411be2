"""Pictures to check a slide's tissue and tiles by eye."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.config import PreprocessingConfig, PreviewConfig
from slide2vec.pictures import lay_squares, slide_size, with_footer, write_picture
from slide2vec.readers import SlideReader
from slide2vec.tiling.grid import draw_piece
from slide2vec.tiling.levels import read_level
from slide2vec.tiling.types import Tiling, TissueMask

__all__ = [
    "artefact_swatches",
    "draw_tiles",
    "draw_tissue",
    "overview",
    "preview_path",
    "thumbnail",
    "thumbnail_level",
    "tiles_in_words",
    "tissue_in_words",
    "write_mask_preview",
    "write_previews",
    "write_tiling_preview",
]

Picture = NDArray[np.uint8]

#: JPEG holds 65,535 px a side, and pictures larger than this are of no use to the eye.
MAX_SIDE_PX = 16_384

#: Of a preview, the longer side: smaller slides are reduced less than `downsample` says, or enlarged.
LEAST_SIDE_PX = 1_000

#: Widths of their lines that a hole has to be wide: hundreds of small ones would hide the tissue itself.
_SEEN_HOLE = 3
_HOLE_COLOR = (226, 92, 48)
_EDGE_COLOR = (25, 25, 25)
_TILE_COLOR = (20, 80, 220)
#: Of tiles that artefacts take a share of, from this on.
_ARTEFACT_COLORS = {
    "blur": (200, 40, 40),
    "bubble": (20, 150, 160),
    "fold": (150, 60, 200),
    "pen": (240, 140, 0),
    "spot": (90, 90, 90),
}
_SHOWN_FROM = 0.1
#: Opacity of tiles that are too small for outlines.
_TINT = 0.4
#: Side of a tile in the picture below which outlines would hide it.
_MIN_OUTLINED_PX = 6


def preview_path(output_dir: Path, kind: str, sample_id: str) -> Path:
    """Of a "mask" or "tiling" preview."""
    return output_dir / "preview" / kind / f"{sample_id}.jpg"


def write_previews(
    reader: SlideReader,
    tiling: Tiling,
    mask: TissueMask | None,
    config: PreprocessingConfig,
    output_dir: Path | None,
) -> tuple[Path | None, Path | None]:
    """Those of a slide that the config asks for; their paths, of tissue and of tiles, where they are there.

    Args:
        mask: None where tissue was not looked for: an earlier picture stays.
    """
    if output_dir is None:
        return None, None
    mask_path = preview_path(output_dir, "mask", tiling.sample_id)
    if config.preview.save_mask_preview and mask is not None:
        write_mask_preview(mask_path, reader, mask, config)
    tiling_path = preview_path(output_dir, "tiling", tiling.sample_id)
    if config.preview.save_tiling_preview:
        write_tiling_preview(tiling_path, reader, tiling, config)
    return (
        mask_path if config.preview.save_mask_preview and mask_path.is_file() else None,
        tiling_path if config.preview.save_tiling_preview else None,
    )


def write_mask_preview(
    path: Path, reader: SlideReader, tissue: TissueMask, config: PreprocessingConfig
) -> None:
    """Write a JPEG of the slide with its tissue outlined (and tinted, by `mask_overlay_alpha`), holes in
    orange, and below it how much there is.

    Raises:
        SlideReadError: pixels cannot be decoded.
    """
    picture = draw_tissue(overview(reader, config.preview.downsample), tissue, config.preview)
    spacing = tissue.segmentation.spacing_um / tissue.scale[0]
    _write(path, picture, reader, spacing, tissue_in_words(tissue))


def write_tiling_preview(
    path: Path, reader: SlideReader, tiling: Tiling, config: PreprocessingConfig
) -> None:
    """Write a JPEG of the slide with the outline of every tile (or region), and below it how many there are,
    and of what size.

    Raises:
        SlideReadError: pixels cannot be decoded.
    """
    picture = draw_tiles(overview(reader, config.preview.downsample), tiling)
    line = tiles_in_words(tiling, config.region_tile_multiple)
    _write(path, picture, reader, tiling.geometry.base_spacing_um, line, artefact_swatches(tiling))


def tiles_in_words(tiling: Tiling, region_tile_multiple: int | None = None) -> str:
    """ "1,204 tiles of 224 px at 0.5 µm/px (448 px of level 0)"; of regions, where a multiple is given."""
    geometry, count = tiling.geometry, len(tiling)
    name = "tile" if region_tile_multiple is None else "region"
    made_of = (
        ""
        if region_tile_multiple is None
        else f", each {region_tile_multiple} x {region_tile_multiple} tiles"
    )
    return (
        f"{count:,} {name}{'' if count == 1 else 's'} of {geometry.requested_tile_size_px} px at "
        f"{geometry.requested_spacing_um:.4g} µm/px ({geometry.tile_size_lv0} px of level 0){made_of}"
    )


def artefact_swatches(tiling: Tiling) -> dict[str, tuple[int, int, int]]:
    """Name and number -> colour, of the artefacts that `draw_tiles` colours tiles by."""
    colours = _colours(tiling)
    counts = {name: colours.count(colour) for name, colour in _ARTEFACT_COLORS.items()}
    return {f"{name}: {count:,}": _ARTEFACT_COLORS[name] for name, count in counts.items() if count}


def tissue_in_words(tissue: TissueMask) -> str:
    """How it was found, and how much there is: "tissue by hsv: 3 pieces, 40.5% of the slide"."""
    method = tissue.segmentation.method.replace("_", " ")
    count, small = len(tissue.pieces), len(tissue.left_out)
    more = f"; {small:,} smaller left out" if small else ""
    if not count:
        return f"no tissue by {method}{more}"
    inside = sum(np.count_nonzero(draw_piece(piece)) for piece in tissue.pieces) / tissue.mask.size
    return f"tissue by {method}: {count:,} piece{'' if count == 1 else 's'}, {inside:.1%} of the slide{more}"


def thumbnail(reader: SlideReader, downsample: float) -> Picture:
    """The whole slide reduced by `downsample` or, to stay below `MAX_SIDE_PX` a side, more: (h, w, 3)."""
    downsample = max(downsample, max(reader.dimensions) / MAX_SIDE_PX, 1.0)
    level = thumbnail_level(reader, downsample)
    factor = max(1, int(downsample / reader.downsamples[level] + 1e-3))
    width, height = (max(1, round(side / downsample)) for side in reader.dimensions)
    pixels = read_level(reader, level, factor)
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def overview(reader: SlideReader, downsample: float, least_px: int = LEAST_SIDE_PX) -> Picture:
    """As `thumbnail`, but of small slides with at least so many px on the longer side: reduced less, or each
    pixel of level 0 drawn several times."""
    side = max(reader.dimensions)
    picture = thumbnail(reader, min(downsample, side / least_px))
    times = ceil(least_px / side)
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def thumbnail_level(reader: SlideReader, downsample: float) -> int:
    """The coarsest level that is no coarser than `downsample` (1 or more)."""
    finer = [level for level, ds in enumerate(reader.downsamples) if ds <= downsample * 1.001]
    return max(finer, key=lambda index: reader.downsamples[index])


def draw_tissue(picture: Picture, tissue: TissueMask, config: PreviewConfig) -> Picture:
    """The picture of a whole slide with its tissue tinted (alpha) and outlined, and the holes in it that are
    wide enough to be seen."""
    height, width = picture.shape[:2]
    scale = np.array([width / tissue.mask.shape[1], height / tissue.mask.shape[0]])
    outlines = [_scaled(piece.contour, scale) for piece in tissue.pieces]
    holes = [_scaled(hole, scale) for piece in tissue.pieces for hole in piece.holes]
    drawn = picture.copy()
    color, alpha = config.tissue_contour_color, config.mask_overlay_alpha
    if alpha:
        tint = np.array(color, np.float32)
        mask = np.asarray(cv2.resize(tissue.mask, (width, height), interpolation=cv2.INTER_NEAREST))
        kept = np.zeros((height, width), np.uint8)
        cv2.drawContours(kept, outlines, -1, 1, thickness=cv2.FILLED)
        inside = (kept > 0) & (mask > 0)
        drawn[inside] = (drawn[inside] * (1 - alpha) + tint * alpha).astype(np.uint8)
    thickness = 1 + _thickness(width, height)
    holes = [hole for hole in holes if min(cv2.boundingRect(hole)[2:]) >= _SEEN_HOLE * (thickness + 2)]
    for lines, of in ((outlines, color), (holes, _HOLE_COLOR)):
        # dark on both sides: seen on pale glass and on dark stain
        cv2.drawContours(drawn, lines, -1, _EDGE_COLOR, thickness + 2, cv2.LINE_AA)
        cv2.drawContours(drawn, lines, -1, of, thickness, cv2.LINE_AA)
    return drawn


def draw_tiles(picture: Picture, tiling: Tiling) -> Picture:
    """The picture of a whole slide with the outline of every tile; tiny tiles are tinted instead. Blurred
    tiles are red, those under a bubble turquoise, folded ones violet, those under pen orange, with dark
    spots grey."""
    height, width = picture.shape[:2]
    scale_x, scale_y = width / tiling.dimensions[0], height / tiling.dimensions[1]
    side, colours = tiling.geometry.tile_size_lv0, _colours(tiling)
    if side * scale_x < _MIN_OUTLINED_PX:
        of_each = np.array(colours, np.float32).reshape(-1, 3)
        paint, covered = lay_squares((height, width), tiling.x, tiling.y, side, tiling.dimensions, of_each)
        covered *= _TINT
        return np.asarray(np.rint((1 - covered) * picture + covered * paint), np.uint8)
    left, top = np.rint(tiling.x * scale_x), np.rint(tiling.y * scale_y)
    right, bottom = np.rint((tiling.x + side) * scale_x), np.rint((tiling.y + side) * scale_y)
    drawn = picture.copy()
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], 1).astype(np.int32)
    for outline, colour in zip(corners.reshape(-1, 4, 2), colours, strict=True):
        cv2.polylines(drawn, [outline], True, colour, _thickness(width, height))
    return drawn


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


def _write(
    path: Path,
    picture: Picture,
    reader: SlideReader,
    spacing_um: float,
    line: str,
    swatches: Mapping[str, tuple[int, int, int]] | None = None,
) -> None:
    lines = [line, slide_size(reader.dimensions, spacing_um)]
    um_per_px = spacing_um * reader.dimensions[0] / picture.shape[1]
    write_picture(path, with_footer(picture, lines, um_per_px=um_per_px, swatches=swatches))
