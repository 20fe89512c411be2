"""Where tissue is: a mask from the pixels of a coarse level.

By one of the methods of `tissue_methods.py`: HS2P's, followed by a morphological closing of `close` px, or a
segmenter on a thumbnail of its spacing, or on windows of the slide at that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.config import SegmentationConfig
from slide2vec.errors import SlideError
from slide2vec.geometry import nearest_downsample_level
from slide2vec.readers import SlideReader
from slide2vec.readers.reader import planning_downsamples
from slide2vec.tiling.label_windows import WindowSegmenter, label_map, slide_windows
from slide2vec.tiling.levels import read_blocks, reduced_size
from slide2vec.tiling.previews import thumbnail, thumbnail_level
from slide2vec.tiling.tissue_methods import Plane, Segmenter, TissueMethod, chosen
from slide2vec.tiling.types import Segmentation

__all__ = ["MAX_MASK_PX", "Segmented", "segment_tissue"]

logger = logging.getLogger(__name__)

#: The largest level that is segmented as it is; a larger one (a slide without pyramid) is first
#: averaged down to about the downsample asked for. HS2P segments every level as it is.
MAX_MASK_PX = 64_000_000

#: The label of tissue, of every segmenter.
TISSUE = "tissue"

#: Of a level's pixels, about as many are kept to look at afterwards.
_OVERVIEW_PX = 1_000_000


@dataclass(frozen=True, eq=False)
class Segmented:
    """A segmented level.

    Attributes:
        mask: (h, w) uint8, above 0 where there is tissue.
        segmentation: how it came about.
        overview: (h', w', 3) uint8, RGB of every `step`-th pixel along both axes; None with a mask raster.
        labels: (h, w) uint8, what a segmenter found, by the numbers of `names`; None with other methods.
    """

    mask: Plane
    segmentation: Segmentation
    overview: Plane | None = None
    step: int = 1
    labels: Plane | None = None
    names: tuple[str, ...] = ()


def segment_tissue(
    reader: SlideReader, sample_id: str, base_spacing_um: float, config: SegmentationConfig
) -> Segmented:
    """The tissue mask of a slide, and how it came about.

    Raises:
        SlideReadError: pixels cannot be decoded.
        SlideError: a segmenter of somebody else's gives no labels.
        WeightsError: a learned method's weights cannot be had.
    """
    method = chosen(config)
    if isinstance(method, TissueMethod):
        return _by_method(method, reader, sample_id, base_spacing_um, config)
    return _by_segmenter(method, reader, sample_id, base_spacing_um, config)


def _by_segmenter(
    segmenter: Segmenter,
    reader: SlideReader,
    sample_id: str,
    base_spacing_um: float,
    config: SegmentationConfig,
) -> Segmented:
    if isinstance(segmenter, WindowSegmenter):
        labels, overview, step = _labels_by_windows(segmenter, reader, base_spacing_um)
        shape = labels.shape
    else:
        labels, overview, step, shape = _labels_of_thumbnail(segmenter, reader, base_spacing_um)
    if problem := _wrong_with(labels, shape, segmenter.names):
        raise SlideError(f"slide {sample_id}: segmentation method {config.method} {problem}")
    downsample = reader.dimensions[0] / labels.shape[1]
    level = thumbnail_level(reader, max(1.0, downsample))
    segmentation = _record(config, level, downsample, base_spacing_um)
    return Segmented(
        mask=np.isin(labels, _numbers_of_tissue(segmenter)).astype(np.uint8),
        segmentation=replace(segmentation, checkpoint=getattr(segmenter, "checkpoint", None)),
        overview=overview,
        step=step,
        labels=labels,
        names=segmenter.names,
    )


def _labels_by_windows(
    segmenter: WindowSegmenter, reader: SlideReader, base_spacing_um: float
) -> tuple[Plane, Plane, int]:
    """Labels, RGB of every n-th of their pixels, and n."""
    size, read = slide_windows(reader, segmenter.spacing_um / base_spacing_um, segmenter.window_px)
    found = label_map(segmenter, size, read, most_px=MAX_MASK_PX, most_overview_px=_OVERVIEW_PX)
    return found.labels, found.overview, found.overview_step


def _labels_of_thumbnail(
    segmenter: Segmenter, reader: SlideReader, base_spacing_um: float
) -> tuple[Plane, Plane, int, tuple[int, ...]]:
    """The same of a segmenter that looks at all of the slide at once, and the shape that the labels must
    have."""
    width, height = reader.dimensions
    downsample = max(1.0, segmenter.spacing_um / base_spacing_um, sqrt(width * height / MAX_MASK_PX))
    picture = thumbnail(reader, downsample)
    labels = np.asarray(segmenter.segment(picture, base_spacing_um * width / picture.shape[1]))
    step = max(1, ceil(sqrt(labels.size / _OVERVIEW_PX)))
    return labels, picture[::step, ::step], step, picture.shape[:2]


def _wrong_with(labels: NDArray[Any], shape: tuple[int, ...], names: tuple[str, ...]) -> str | None:
    if TISSUE not in names:
        return f"has no label {TISSUE!r}, only {', '.join(names)}"
    if labels.dtype != np.uint8 or labels.shape != shape:
        return f"gives labels {labels.dtype} of shape {labels.shape}, not uint8 of {shape}"
    if labels.max() >= len(names):
        return f"gives label {labels.max()}, and has names for 0 to {len(names) - 1}"
    return None


def _numbers_of_tissue(segmenter: Segmenter) -> list[int]:
    return [number for number, name in enumerate(segmenter.names) if name == TISSUE]


def _record(
    config: SegmentationConfig, level: int, downsample: float, base_spacing_um: float
) -> Segmentation:
    return Segmentation(
        method=config.method,
        requested_downsample=config.downsample,
        downsample=max(1, round(downsample)),
        level=level,
        spacing_um=base_spacing_um * downsample,
        sthresh=config.sthresh,
        sthresh_up=config.sthresh_up,
        mthresh=config.mthresh,
        close=config.close,
    )


def _by_method(
    method: TissueMethod,
    reader: SlideReader,
    sample_id: str,
    base_spacing_um: float,
    config: SegmentationConfig,
) -> Segmented:
    level = nearest_downsample_level(config.downsample, planning_downsamples(reader))
    factor = _reduction(reader, level, config.downsample)
    if factor > 1:
        logger.info(
            "slide %s: level %d, the nearest to downsample %g, has %dx%d px and is averaged down %d times",
            *(sample_id, level, config.downsample, *reader.level_dimensions[level], factor),
        )
    downsample = reader.downsamples[level] * factor
    plane, overview, step = _plane(reader, level, factor, method.plane)
    segmentation = _record(config, level, downsample, base_spacing_um)
    return Segmented(_close(method.mask(plane, config), config.close), segmentation, overview, step)


def _reduction(reader: SlideReader, level: int, downsample: float) -> int:
    """By what factor to reduce a level before segmentation: 1 unless it has over `MAX_MASK_PX`."""
    width, height = reader.level_dimensions[level]
    if width * height <= MAX_MASK_PX:
        return 1
    return max(round(downsample / reader.downsamples[level]), ceil(sqrt(width * height / MAX_MASK_PX)))


def _plane(
    reader: SlideReader, level: int, factor: int, kept: Callable[[Plane], Plane]
) -> tuple[Plane, Plane, int]:
    """What a method keeps of each block's HSV; block by block to keep memory low.

    With it, RGB of every n-th pixel, and n.
    """
    width, height = reduced_size(reader.level_dimensions[level], factor)
    plane = np.empty((height, width), np.uint8)
    step = max(1, ceil(sqrt(width * height / _OVERVIEW_PX)))
    overview = np.empty((ceil(height / step), ceil(width / step), 3), np.uint8)
    for rows, columns, pixels in read_blocks(reader, level, factor):
        hsv = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), np.uint8)
        plane[rows, columns] = kept(hsv)
        sampled = pixels[-rows.start % step :: step, -columns.start % step :: step]
        top, left = ceil(rows.start / step), ceil(columns.start / step)
        overview[top : top + sampled.shape[0], left : left + sampled.shape[1]] = sampled
    return plane, overview, step


def _close(mask: Plane, size: int) -> Plane:
    if size == 0:
        return mask
    return np.asarray(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((size, size), np.uint8)), np.uint8)
