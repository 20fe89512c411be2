"""The tiles of classes of an annotation mask, as HS2P samples them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from slide2vec.config import MaskSamplingConfig
from slide2vec.geometry import TileGeometry
from slide2vec.labels import MERGED
from slide2vec.tiling.grid import Tiles, coverage, tissue_tiles
from slide2vec.tiling.types import TissueMask

__all__ = ["class_mask", "class_tiles"]

Labels = NDArray[np.uint8]


def class_mask(labels: Labels, masks: MaskSamplingConfig, annotation: str) -> Labels:
    """Where a class is ("merged": where any sampled one is), (h, w) uint8 0 or 255.

    Args:
        labels: (h, w), the values of labels.
    """
    names = tuple(masks.min_coverage) if annotation == MERGED else (annotation,)
    is_one = np.zeros(256, np.uint8)
    is_one[[value for name in names for value in masks.pixel_mapping[name]]] = 255
    return np.asarray(is_one[labels], np.uint8)


def class_tiles(
    labels: Labels,
    as_tissue: Callable[[Labels], TissueMask],
    masks: MaskSamplingConfig,
    annotation: str,
    geometry: TileGeometry,
    dimensions: tuple[int, int],
) -> Tiles:
    """The tiles that a class covers enough of; of "merged", those that any sampled class does.

    With strategy "joint" they are of the grid over all sampled classes, and all of a class in a tile counts.
    With "independent" each class has its own grid, and each piece counts its own area only, as with tissue.

    Args:
        labels: (h, w), the values of labels.
        as_tissue: finds the pieces of a (h, w) mask.
        dimensions: (width, height) of level 0, px.

    Returns:
        As `slide2vec.tiling.grid.tissue_tiles`; the fraction of a tile is that of its foremost class.
    """
    names = tuple(masks.min_coverage) if annotation == MERGED else (annotation,)
    alone = {name: class_mask(labels, masks, name) for name in names}
    if masks.strategy == "independent":
        return _together(
            [
                tissue_tiles(as_tissue(mask), geometry, dimensions, masks.min_coverage[name])
                for name, mask in alone.items()
            ]
        )
    x, y, _ = tissue_tiles(as_tissue(class_mask(labels, masks, MERGED)), geometry, dimensions, 0.0)
    found = []
    for name, mask in alone.items():
        fractions = coverage(mask, x, y, geometry, dimensions)
        kept = fractions >= np.float32(masks.min_coverage[name])
        found.append((x[kept], y[kept], fractions[kept]))
    return _together(found)


def _together(found: list[Tiles]) -> Tiles:
    """The tiles of several classes, each once, with its largest fraction."""
    if len(found) == 1:
        return found[0]
    x, y, fractions = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.lexsort((-fractions, y, x))
    x, y, fractions = x[order], y[order], fractions[order]
    first = np.ones(len(x), bool)
    first[1:] = (np.diff(x) != 0) | (np.diff(y) != 0)
    return x[first], y[first], fractions[first]
