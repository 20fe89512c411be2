"""Maps of a slide: its tiles coloured by principal components of their embeddings, or by attention."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ConfigError
from slide2vec.pictures.squares import lay_squares

__all__ = [
    "attention_key",
    "attention_map",
    "attention_overlay",
    "heat_colours",
    "pca_colours",
    "pca_key",
    "pca_map",
    "principal_components",
    "variance_shares",
]

_COMPONENTS = 3
_PERCENTILES = (2.0, 98.0)  # of a component become its darkest and brightest colour
_HEAT = 0.6  # share of the colours of attention over the tissue

_OKLAB_TO_CONES = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)

Pixels: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float64]


def pca_map(
    embeddings: NDArray[np.floating[Any]],
    x: NDArray[np.integer[Any]],
    y: NDArray[np.integer[Any]],
    tile_size_lv0: int,
    dimensions: tuple[int, int],
    thumbnail: Pixels,
    *,
    strength: float = 0.85,
) -> Pixels:
    """A map of a slide in which tiles with similar embeddings have similar colours.

    The first two principal components of the slide's own embeddings choose the hue and how vivid it
    is, the third how light, each scaled by its 2nd and 98th percentile. Tissue shows through; where
    there is no tile there is a faded grey thumbnail.

    Args:
        embeddings: (N, D) float; N may be 0.
        x, y: (N,) top-left corners of the tiles, level-0 px.
        tile_size_lv0: side of a tile, level-0 px.
        dimensions: (width, height) of the slide, level-0 px.
        thumbnail: (h, w, 3) uint8 RGB of the whole slide; the picture has its size.
        strength: of the colours over the tissue, 0 to 1.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        ConfigError: arrays do not belong together.
    """
    if embeddings.ndim != 2 or not len(embeddings) == len(x) == len(y):
        raise ConfigError(
            f"pca_map: embeddings {embeddings.shape} must be (N, D), with x {np.shape(x)} and "
            f"y {np.shape(y)} of length N"
        )
    colours = pca_colours(embeddings)
    paint, covered = lay_squares(thumbnail.shape[:2], x, y, tile_size_lv0, dimensions, colours)
    covered *= strength
    grey = thumbnail.astype(np.float32).mean(axis=2, keepdims=True)
    # darker tissue darkens the colour a little, so that its structure stays visible
    shade = 0.7 + 0.3 * grey / max(1.0, float(grey.max()))
    picture: NDArray[np.float32] = (1 - covered) * _faded(grey) + covered * paint * shade
    return picture.round().clip(0, 255).astype(np.uint8)


def attention_map(
    heat: NDArray[np.floating[Any]],
    x: NDArray[np.integer[Any]],
    y: NDArray[np.integer[Any]],
    tile_size_lv0: int,
    dimensions: tuple[int, int],
    thumbnail: Pixels,
) -> Pixels:
    """A slide with the attention of its tiles over it, all on one scale of colours.

    Args:
        heat: (N, h, w) float, a value per patch of each tile; N may be 0.
        x, y, tile_size_lv0, dimensions, thumbnail: see `pca_map`.

    Returns:
        (h, w, 3) uint8 RGB; as the thumbnail where there is no tile.
    """
    import cv2

    height, width = thumbnail.shape[:2]
    scale = np.array([width / dimensions[0], height / dimensions[1]])
    laid = np.full((height, width), np.nan, np.float32)
    for values, left, top in zip(heat, x, y, strict=True):
        start = np.round(np.array([left, top]) * scale).astype(int)
        end = np.maximum(np.round((np.array([left, top]) + tile_size_lv0) * scale).astype(int), start + 1)
        columns, rows = end - start
        shrinks = rows < len(values)
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        patch = cv2.resize(np.asarray(values, np.float32), (int(columns), int(rows)), interpolation=how)
        part = laid[start[1] : end[1], start[0] : end[0]]  # cut at the edge of the slide
        part[:] = patch[: part.shape[0], : part.shape[1]]
    return _heated(thumbnail, laid)


def attention_overlay(pixels: Pixels, heat: NDArray[np.floating[Any]]) -> Pixels:
    """A tile with its attention over it.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        heat: (h, w) float, a value per patch.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    import cv2

    height, width = pixels.shape[:2]
    laid = cv2.resize(np.asarray(heat, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return _heated(pixels, np.asarray(laid))


def principal_components(embeddings: NDArray[np.floating[Any]], count: int) -> Floats:
    """Scores (N, count) float64 on the first principal components, zero where there are fewer.

    The sign of a component is chosen so that its scores are skewed to positive values (the sum of
    their cubes is not negative): the same embeddings give the same colours everywhere.
    """
    tiles = len(embeddings)
    scores = np.zeros((tiles, count))
    if tiles < 2:
        return scores
    centred = np.asarray(embeddings, np.float64)
    centred = centred - centred.mean(axis=0)
    # the smaller of the two Gram matrices has the same spectrum, and is quick for 100,000 tiles
    if tiles <= embeddings.shape[1]:
        values, vectors = np.linalg.eigh(centred @ centred.T)
        found = vectors * np.sqrt(np.clip(values, 0, None))
    else:
        values, vectors = np.linalg.eigh(centred.T @ centred)
        found = centred @ vectors
    kept = min(count, len(values))
    negligible = values[::-1][:kept] <= 1e-12 * max(float(values[-1]), 1e-300)
    leading = found[:, ::-1][:, :kept]
    leading = np.where(negligible, 0.0, leading)
    signs = np.where((leading**3).sum(axis=0) < 0, -1.0, 1.0)
    scores[:, :kept] = leading * signs
    return scores


def variance_shares(embeddings: NDArray[np.floating[Any]], scores: Floats) -> list[float]:
    """How much of the variance of embeddings (N, D) each of their components holds, 0 to 1; `scores` are
    what `principal_components` gives."""
    centred = np.asarray(embeddings, np.float64)
    total = float(((centred - centred.mean(axis=0)) ** 2).sum()) if len(centred) else 0.0
    return [float(share) for share in (scores**2).sum(axis=0) / (total or 1.0)]


def pca_colours(embeddings: NDArray[np.floating[Any]]) -> Floats:
    """The colours of `pca_map` for embeddings (N, D): (N, 3) sRGB, 0 to 255."""
    return _colours(principal_components(embeddings, _COMPONENTS))


def heat_colours(values: NDArray[np.floating[Any]]) -> Pixels:
    """Numbers (N,) in the colours of `attention_key`, from their 2nd to their 98th percentile: (N, 3) uint8
    sRGB."""
    return _inferno(_heat_levels(np.asarray(values, np.float32))[:, None])[:, 0]


def pca_key(side: int = 128) -> Pixels:
    """The colours of `pca_map`: a square in which the first component grows to the right and the second
    upwards, and beside it a column in which the third does; (side, w, 3) uint8 RGB."""
    along = np.linspace(-1.0, 1.0, side)
    first, second = np.meshgrid(along, along[::-1])
    plane = _in_colour(np.stack([first, second, np.zeros_like(first)], axis=-1))
    column = _in_colour(np.stack([np.zeros(side), np.zeros(side), along[::-1]], axis=-1))
    gap, broad = np.full((side, side // 8, 3), 255.0), np.repeat(column[:, None], side // 6, axis=1)
    return np.hstack([plane, gap, broad]).round().astype(np.uint8)


def attention_key(side: int = 128) -> Pixels:
    """The colours of attention, least at the bottom: (side, side // 4, 3) uint8 RGB."""
    levels = np.repeat(np.linspace(255, 0, side).round().astype(np.uint8)[:, None], side // 4, axis=1)
    return _inferno(levels)


def _colours(scores: Floats) -> Floats:
    """Scores (N, 3) -> sRGB colours (N, 3), 0 to 255."""
    if not len(scores):
        return np.zeros((0, 3))
    low, high = np.percentile(scores, _PERCENTILES, axis=0)
    spread = high - low
    unit = np.clip((scores - low) / np.where(spread > 0, spread, 1.0), 0.0, 1.0)
    return _in_colour(np.where(spread > 0, 2.0 * unit - 1.0, 0.0))


def _in_colour(components: Floats) -> Floats:
    """Components (…, 3) from -1 to 1 -> sRGB colours (…, 3), 0 to 255.

    The first two components span the colour plane of Oklab (Ottosson, A perceptual color space for
    image processing, 2020) and the third its lightness, so that equal differences look equal.
    """
    lab = components[..., [2, 0, 1]] * (0.10, 0.17, 0.15) + (0.70, 0.0, 0.0)
    cones = (lab @ _OKLAB_TO_CONES.T) ** 3
    linear: Floats = np.clip(cones @ _CONES_TO_RGB.T, 0.0, 1.0)
    gamma: Floats = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255.0 * gamma


def _heated(pixels: Pixels, heat: NDArray[np.float32]) -> Pixels:
    """Grey pixels under the colours of their heat (h, w), dark violet for the 2nd percentile of its values
    and yellow for the 98th; where it is NaN the pixels as they are."""
    there = np.isfinite(heat)
    if not there.any():
        return pixels.copy()
    levels = _heat_levels(heat)
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    mixed = np.round((1 - _HEAT) * grey + _HEAT * _inferno(levels)).astype(np.uint8)
    return np.where(there[..., None], mixed, pixels)


def _heat_levels(heat: NDArray[np.float32]) -> Pixels:
    """0 for the 2nd percentile of numbers, and for what is NaN; 255 for the 98th."""
    there = np.isfinite(heat)
    low, high = np.percentile(heat[there], _PERCENTILES) if there.any() else (0.0, 1.0)
    unit = np.clip((np.where(there, heat, low) - low) / (high - low if high > low else 1.0), 0.0, 1.0)
    return np.round(255 * unit).astype(np.uint8)


def _inferno(levels: Pixels) -> Pixels:
    import cv2

    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)
    return np.asarray(cv2.cvtColor(colours, cv2.COLOR_BGR2RGB), np.uint8)


def _faded(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey values brought near to white."""
    return np.repeat(255.0 - 0.35 * (255.0 - grey), 3, axis=2).astype(np.float32)
