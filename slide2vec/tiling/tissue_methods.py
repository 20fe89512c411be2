"""Methods of telling tissue from glass (values of SegmentationConfig.method).

A `TissueMethod` is one of HS2P's, on the level that HS2P takes; a `Segmenter` labels a thumbnail at a spacing
of its own ("auto", in `auto_tissue.py`); a `LearnedMethod` makes one of weights (`slide2vec/segmenters`), for
thumbnails, or for windows of the slide (`WindowSegmenter` in `label_windows.py`).

hsv: hue, saturation and value within the range of stained tissue.
otsu: saturation, smoothed by a median, above Otsu's threshold.
threshold: saturation, smoothed by a median, above `sthresh`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.choices import SEGMENTATION_METHODS, learned_methods
from slide2vec.config import SegmentationConfig

__all__ = [
    "HSV",
    "OTSU",
    "THRESHOLD",
    "TISSUE_HSV",
    "LearnedMethod",
    "Plane",
    "Segmenter",
    "TissueMethod",
    "checkpoint_of",
    "chosen",
    "method_of",
]

Plane: TypeAlias = NDArray[np.uint8]

#: Lowest and highest hue, saturation and value (OpenCV: 0 to 180, 255, 255) that HS2P takes for tissue.
TISSUE_HSV = (90, 8, 103), (180, 255, 255)


class TissueMethod(NamedTuple):
    """How a level becomes a mask.

    Attributes:
        plane: (h, w, 3) uint8, HSV of a block as OpenCV has it -> (h, w) uint8, what is kept of it.
        mask: (H, W) uint8, the planes of all blocks -> (H, W) uint8, above 0 where there is tissue.
    """

    plane: Callable[[Plane], Plane]
    mask: Callable[[Plane, SegmentationConfig], Plane]


class Segmenter(Protocol):
    """What labels the pixels of a thumbnail."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels, by their numbers; those named "tissue" make tiles, "pen" and others do not."""

    @property
    def spacing_um(self) -> float:
        """µm/px of the thumbnails that it is made for; a slide that is coarser comes as it is."""

    def segment(self, thumbnail: Plane, spacing_um: float) -> Plane:
        """Labels, (H, W) uint8, of an (H, W, 3) uint8 RGB thumbnail of `spacing_um` µm/px."""


@runtime_checkable
class LearnedMethod(Protocol):
    """What needs weights to be a `Segmenter`."""

    def loaded(self, weights: str | Path | None, device: str | None) -> Segmenter:
        """With its weights, see `SegmentationConfig`; the same object when it is asked for again. It has the
        digest of its weights as `checkpoint`.

        Raises:
            WeightsError, ConfigError: the weights, or the device, cannot be had.
        """


def method_of(name: str) -> TissueMethod | Segmenter | LearnedMethod:
    """A method by its name."""
    return cast("TissueMethod | Segmenter | LearnedMethod", SEGMENTATION_METHODS[name].imported())


def chosen(config: SegmentationConfig) -> TissueMethod | Segmenter:
    """The method of a configuration, loaded if it has weights; raises as `LearnedMethod.loaded`."""
    method = method_of(config.method)
    return method.loaded(config.weights, config.device) if isinstance(method, LearnedMethod) else method


def checkpoint_of(config: SegmentationConfig) -> str | None:
    """The digest of the weights of a configuration's method; None of one without. Raises as `chosen`."""
    return getattr(chosen(config), "checkpoint", None) if config.method in learned_methods() else None


def _in_range(hsv: Plane) -> Plane:
    return np.asarray(cv2.inRange(hsv, *map(np.array, TISSUE_HSV)), np.uint8)


def _saturation(hsv: Plane) -> Plane:
    return hsv[:, :, 1]


def _as_it_is(plane: Plane, config: SegmentationConfig) -> Plane:
    return np.minimum(plane, np.uint8(config.sthresh_up))


def _above_otsu(plane: Plane, config: SegmentationConfig) -> Plane:
    smooth = cv2.medianBlur(plane, config.mthresh)
    _, mask = cv2.threshold(smooth, 0, config.sthresh_up, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return np.asarray(mask, np.uint8)


def _above_sthresh(plane: Plane, config: SegmentationConfig) -> Plane:
    smooth = cv2.medianBlur(plane, config.mthresh)
    _, mask = cv2.threshold(smooth, config.sthresh, config.sthresh_up, cv2.THRESH_BINARY)
    return np.asarray(mask, np.uint8)


HSV = TissueMethod(_in_range, _as_it_is)
OTSU = TissueMethod(_saturation, _above_otsu)
THRESHOLD = TissueMethod(_saturation, _above_sthresh)
