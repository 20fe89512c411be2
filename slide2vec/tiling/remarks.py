"""What is implausible about the tissue and the tiles that were found, in sentences that name the remedy.

Nothing is changed for it: the rules stay HS2P's. A slide that is embedded without tiles, or with tiles of
glass, should say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.config import FilterConfig
from slide2vec.geometry import TileGeometry
from slide2vec.tiling.tissue_methods import TISSUE_HSV
from slide2vec.tiling.types import PRECOMPUTED, TissueMask

__all__ = ["TilingFacts", "remarks"]

#: Grey levels up to which a picture is black, and from which it is white: the defaults of FilterConfig.
BLACK, WHITE = 25, 220
#: Of a picture's pixels, how many have to agree for it to be called black, white or grey.
NEARLY_ALL_PIXELS = 0.999
#: Grey levels that JPEG leaves between the channels of a grey pixel, and between pixels of one colour.
GREY_CHANNELS, ONE_COLOUR = 6, 4
#: Share of the slide under tiles from which they are "nearly everywhere".
NEARLY_EVERYWHERE = 0.95
#: Median grey level below which the background is dark: glass in transmitted light is above 200.
DARK_BACKGROUND = 60
#: Saturation (OpenCV, 0 to 255) and value from which a pixel is stained, well above any glass.
STAINED_SATURATION, STAINED_VALUE = 51, 40
#: Share of the coloured area outside the rule's hues from which it is reported.
OUTSIDE_THE_HUES = 0.1
#: Glass with a cast: bright, hardly coloured, and of one colour (grey levels from its median) over a share.
GLASS_VALUE, GLASS_SPREAD, GLASS_SHARE = 180, 8, 0.2
#: Difference of its channels, in grey levels, from which HS2P's rule (saturation 8 of 255) may take it.
CAST = 6
#: In reference tiles: a piece of tissue that is left out is reported from this size, smaller ones are dust.
SMALLEST_PIECE_REPORTED = 0.5
#: Left-out tissue in relation to kept tissue from which it is reported.
LEFT_OUT = 0.25
#: Side of a tile in px of the mask below which its tissue fraction says little.
COARSEST_TILE_PX = 2.0

AUTO = "auto"
FIRST_HUE = TISSUE_HSV[0][0]
#: OpenCV hues (0 to 180) up to the first one that method hsv takes, and their names.
_HUES = ((8, "red"), (27, "brown or orange"), (35, "yellow"), (FIRST_HUE, "green"))

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class TilingFacts:
    """What tiling a slide came to.

    Attributes:
        tissue: that was found; its `overview` is looked at.
        geometry: of the tiles.
        dimensions: (width, height) of level 0, px.
        in_grid: tiles that hold enough tissue.
        tiles: those of them that passed the pixel filters.
        tissue_threshold: least tissue fraction of a tile.
        filtering: with `ref_tile_size` set.
        annotation: the class that the "tissue" is of; None where it is of tissue.
    """

    tissue: TissueMask
    geometry: TileGeometry
    dimensions: tuple[int, int]
    in_grid: int
    tiles: int
    tissue_threshold: float
    filtering: FilterConfig
    annotation: str | None = None


def remarks(found: TilingFacts) -> tuple[str, ...]:
    """What is implausible, the cause before its consequences; empty for most slides."""
    picture = _picture(found)
    if picture is not None:
        return (picture,)
    listed = [*_too_coarse(found), *_other_hues(found), *_small_pieces(found)]
    if not found.tiles:
        return tuple(listed) or (_why_none(found),)
    if _covered(found) >= NEARLY_EVERYWHERE:
        listed.append(_why_everywhere(found))
    return tuple(listed)


# the picture as a whole ----------------------------------------------------------------------------


def _picture(found: TilingFacts) -> str | None:
    """What is wrong with the picture itself, where that is why tissue cannot be found in it."""
    overview, mask = found.tissue.overview, found.tissue.mask
    if overview is None or not overview.size:
        return None
    red, green, blue = cv2.split(overview)  # ten times as fast as along the short axis
    brightest = np.maximum(np.maximum(red, green), blue)
    counts = np.asarray(cv2.calcHist([brightest], [0], None, [256], [0, 256]), np.float32).ravel()
    others = _may_differ(found, brightest.size)
    if counts[BLACK + 1 :].sum() <= others:
        return "all its pixels are black: it was scanned or written wrongly"
    median = _median(counts)
    if median < DARK_BACKGROUND:
        return (
            f"its background is dark (median grey level {median:.0f}), as in fluorescence: "
            f"{_of_dark_slides(found)}"
        )
    if mask.any() and not mask.all():
        return None
    pixels = overview.reshape(-1, 3)
    colour = np.median(pixels, axis=0)
    darkest = np.minimum(np.minimum(red, green), blue)
    if np.sum(np.abs(pixels - colour).max(axis=1) > ONE_COLOUR) <= others:
        white = ": there is nothing on the glass" if colour.min() >= WHITE else ""
        return f"all its pixels have one colour, {_rgb(colour)}{white}"
    if np.sum(darkest < WHITE) <= others:
        return "all its pixels are white: there is nothing on the glass, or it was scanned too bright"
    if np.sum(brightest - darkest > GREY_CHANNELS) <= others:
        return (
            f"it is greyscale, and method {found.tissue.segmentation.method} finds tissue by its colour: "
            "give a tissue mask (mask_path)"
        )
    return None


def _of_dark_slides(found: TilingFacts) -> str:
    if found.tissue.segmentation.method == AUTO:
        return "what shines was taken for tissue; encoders are made for stained tissue on bright glass"
    return (
        "segmentation and encoders are made for stained tissue on bright glass; if it is meant, try method "
        "auto (--segmentation-method auto), or give a tissue mask (mask_path)"
    )


def _may_differ(found: TilingFacts, pixels: int) -> float:
    """How many pixels of the overview may be otherwise for a picture to be black, white or grey: dust and
    dead pixels are on every slide, but a biopsy is larger than a quarter of a tile."""
    tile = (found.geometry.tile_size_lv0 / found.tissue.overview_scale) ** 2
    return min((1 - NEARLY_ALL_PIXELS) * pixels, tile / 4)


def _median(counts: NDArray[np.float32]) -> float:
    """The median of grey levels, of which there are so many each."""
    cumulated = np.cumsum(counts, dtype=np.float64)
    total = cumulated[-1]
    # of an even number the mean of the two in the middle
    middle = [int(np.searchsorted(cumulated, at, side="right")) for at in ((total - 1) // 2, total // 2)]
    return sum(middle) / 2


# causes --------------------------------------------------------------------------------------------


def _too_coarse(found: TilingFacts) -> Iterator[str]:
    segmentation = found.tissue.segmentation
    side = found.geometry.tile_size_lv0 / max(found.tissue.scale)
    if segmentation.method != PRECOMPUTED and side < COARSEST_TILE_PX:
        yield (
            f"level {segmentation.level} (downsample {segmentation.downsample}), on which tissue was looked "
            f"for, is too coarse: a tile is {side:.2g} px there; a smaller segmentation downsample "
            "(--segmentation-downsample) takes a finer level, if the slide has one"
        )


def _other_hues(found: TilingFacts) -> Iterator[str]:
    """Stained pixels whose hues method hsv does not take for tissue: brown (DAB), red, yellow, green."""
    tissue = found.tissue
    overview = tissue.overview
    if overview is None or tissue.segmentation.method != "hsv":
        return
    hsv = cv2.cvtColor(overview, cv2.COLOR_RGB2HSV)
    taken = tissue.overview_mask
    least = np.array((0, STAINED_SATURATION, STAINED_VALUE))
    outside = (cv2.inRange(hsv, least, np.array((FIRST_HUE - 1, 255, 255))) > 0) & ~taken
    tile_px = (found.geometry.tile_size_lv0 / tissue.overview_scale) ** 2
    count = int(np.count_nonzero(outside))
    if count < tile_px:
        return
    stained = cv2.inRange(hsv, least, np.array((255, 255, 255))) > 0
    share = count / max(1, int(np.count_nonzero(stained | taken)))
    if share < OUTSIDE_THE_HUES:
        return
    hue = float(np.median(hsv[..., 0][outside]))
    name = next(name for upper, name in _HUES if hue <= upper)
    stain = " (DAB, say)" if name.startswith("brown") else ""
    yield (
        f"{share:.0%} of what is coloured is {name}{stain}, which method hsv does not take for tissue: try "
        "method auto (--segmentation-method auto)"
    )


def _small_pieces(found: TilingFacts) -> Iterator[str]:
    a_t, reference = found.filtering.a_t, found.filtering.ref_tile_size
    tile_area = found.tissue.smallest_area / a_t if a_t else 0.0
    listed = [area for area in found.tissue.left_out if area >= SMALLEST_PIECE_REPORTED * tile_area]
    kept = float(np.count_nonzero(found.tissue.mask)) - sum(found.tissue.left_out)
    if listed and (not found.tiles or sum(listed) >= LEFT_OUT * kept):
        pieces = "1 piece of tissue is" if len(listed) == 1 else f"{len(listed)} pieces of tissue are"
        yield (
            f"{pieces} not larger than a_t = {a_t:g} tiles of {reference} px and left out: a smaller a_t "
            "(--min-piece) keeps them"
        )


# consequences --------------------------------------------------------------------------------------


def _why_none(found: TilingFacts) -> str:
    method = found.tissue.segmentation.method
    if found.annotation is not None and not found.in_grid:
        if not found.tissue.mask.any():
            return f"its mask holds nothing of {found.annotation}"
        return (
            f"no tile holds as much of {found.annotation} as masks.min_coverage asks for, or it is but dust: "
            "a smaller share, or a smaller a_t (--min-piece), keeps more"
        )
    if not found.tissue.mask.any():
        if method == PRECOMPUTED:
            return "its tissue mask holds no tissue"
        other = "" if method == AUTO else "try method auto (--segmentation-method auto), or "
        return f"method {method} takes no pixel for tissue: {other}give a tissue mask (mask_path)"
    if not found.tissue.pieces:
        return "its tissue is but dust: a smaller a_t (--min-piece) keeps it"
    if not found.in_grid:
        return (
            f"no tile holds as much tissue as tissue_threshold = {found.tissue_threshold:g} asks for; a "
            "smaller one (--tissue-threshold) keeps more"
        )
    return f"the pixel filters left out all of its {found.in_grid:,} tiles: see filtering"


def _covered(found: TilingFacts) -> float:
    """Share of the slide under tiles, 0 to 1 (more, where they overhang)."""
    width, height = found.dimensions
    return found.tiles * found.geometry.step_px_lv0**2 / (width * height)


def _why_everywhere(found: TilingFacts) -> str:
    everywhere = "tiles lie nearly everywhere"
    tissue = found.tissue
    if tissue.segmentation.method == PRECOMPUTED:
        return f"{everywhere}: its tissue mask covers the slide"
    glass = _cast_glass(tissue)
    if glass is not None:
        cast = round(float(glass.max() - glass.min()))
        remedy = "try method auto (--segmentation-method auto)"
        if tissue.segmentation.method == AUTO:
            remedy = "a tissue mask (mask_path) leaves it out"
        return (
            f"{everywhere}: its glass is not white but {_rgb(glass)}, a cast of {cast} grey levels, and "
            f"counts as tissue: {remedy}"
        )
    return f"{everywhere}: no glass is to be seen on it; --previews draws what was taken for tissue"


def _cast_glass(tissue: TissueMask) -> NDArray[np.float64] | None:
    """The colour of glass that was taken for tissue; None where there is none such."""
    if tissue.overview is None:
        return None
    pixels = tissue.overview[tissue.overview_mask].reshape(-1, 3)
    value = pixels.max(axis=1)
    bright = pixels[value >= np.quantile(value, 0.9)] if len(value) else pixels
    if not len(bright):
        return None
    glass = np.asarray(np.median(bright, axis=0), np.float64)
    near = np.abs(pixels - glass).max(axis=1) <= GLASS_SPREAD
    if glass.max() < GLASS_VALUE or near.mean() < GLASS_SHARE or glass.max() - glass.min() < CAST:
        return None
    return np.asarray(np.median(pixels[near], axis=0), np.float64)


def _rgb(colour: NDArray[np.floating]) -> str:
    return f"RGB ({', '.join(f'{value:.0f}' for value in colour)})"
