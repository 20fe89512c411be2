"""Tissue masks that users give: rasters of 0 (background) and 1 or 255 (tissue) that span the slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.config import SegmentationConfig
from slide2vec.errors import MaskError, Slide2VecError
from slide2vec.files import is_remote, plain_stat
from slide2vec.geometry import nearest_downsample_level, select_level
from slide2vec.readers import SlideReader, open_slide
from slide2vec.readers.reader import planning_downsamples
from slide2vec.slides import Slide
from slide2vec.tiling.levels import read_level
from slide2vec.tiling.types import PRECOMPUTED, Segmentation

__all__ = ["MAX_RASTER_PX", "read_mask"]


#: What tissue may be in a mask; one value in each.
TISSUE_VALUES = (1, 255)

#: The largest mask level that is read; a larger mask needs a pyramid.
MAX_RASTER_PX = 256_000_000

#: How far a mask's level may be from the segmentation level to count as the same spacing.
_LEVEL_TOLERANCE = 0.01

_TIFF = {".tif", ".tiff", ".btf"}
#: Annotations, which people take for masks.
_DRAWN = {
    ".annotations": "a file of annotations",
    ".geojson": "GeoJSON",
    ".json": "JSON",
    ".qpdata": "a QuPath data file",
    ".xml": "XML",
}
_FLAT = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
#: TIFF colour interpretations whose 8-bit values slide readers return unchanged: min-is-black, RGB.
_PLAIN_PHOTOMETRICS = {1, 2}


@dataclass(frozen=True)
class _Raster:
    """An opened mask: what reads it, (width, height) of its levels, and their stored values."""

    backend: str
    level_dimensions: Sequence[tuple[int, int]]
    read: Callable[[int], NDArray[np.generic]]


def read_mask(
    reader: SlideReader,
    slide: Slide,
    base_spacing_um: float,
    config: SegmentationConfig,
    copy: Path | None = None,
) -> tuple[NDArray[np.uint8], Segmentation]:
    """The slide's mask raster at its segmentation level, (h, w) uint8 0 or 255, nearest-resized.

    Args:
        copy: of the raster, to be read in its place.

    Raises:
        MaskError: it is missing, unreadable or too large, has another shape than the slide, or
            values other than 0 and one of 1 and 255.
    """
    path = slide.mask_path
    if path is None:
        raise MaskError(f"slide {slide.sample_id}: no mask_path is given")
    try:
        if copy is None and is_remote(path):
            raise OSError("it is on remote storage and needs ExecutionOptions(stage_dir=…)")
        labels, read = _read_labels(
            copy or path, reader.dimensions, base_spacing_um, planning_downsamples(reader), config
        )
    except (OSError, ValueError, RuntimeError, SyntaxError, Slide2VecError) as error:
        raise MaskError(f"slide {slide.sample_id}: the tissue mask {path} cannot be used: {error}") from error
    size = reader.level_dimensions[read.level]
    mask = cv2.resize(labels * np.uint8(255), size, interpolation=cv2.INTER_NEAREST)
    return np.asarray(mask, np.uint8), read


def _read_labels(
    path: Path,
    dimensions: tuple[int, int],
    base_spacing_um: float,
    slide_downsamples: Sequence[float],
    config: SegmentationConfig,
) -> tuple[NDArray[np.uint8], Segmentation]:
    """The labels of the mask's level nearest to the slide's segmentation level, as stored."""
    target = nearest_downsample_level(config.downsample, slide_downsamples)
    spacing = base_spacing_um * slide_downsamples[target]
    with _opened(path) as raster:
        size = raster.level_dimensions[0]
        _check_shape(size, dimensions)
        mask_spacing = base_spacing_um * dimensions[0] / size[0]
        downsamples = [size[0] / width for width, _ in raster.level_dimensions]
        choice = select_level(max(spacing, mask_spacing), mask_spacing, downsamples, _LEVEL_TOLERANCE)
        width, height = raster.level_dimensions[choice.level]
        if width * height > MAX_RASTER_PX:
            raise ValueError(
                f"its level {choice.level} has {width}x{height} px, more than the {MAX_RASTER_PX:,} px "
                "that are read at once; write it as a pyramid"
            )
        labels, tissue_value = _checked(raster.read(choice.level))
    return labels, Segmentation(
        method=PRECOMPUTED,
        requested_downsample=config.downsample,
        downsample=max(1, round(slide_downsamples[target])),
        level=target,
        spacing_um=spacing,
        tissue_value=tissue_value,
        mask_level=choice.level,
        mask_spacing_um=choice.spacing_um,
        mask_backend=raster.backend,
        requested_mask_backend="auto",
    )


def _check_shape(size: tuple[int, int], dimensions: tuple[int, int]) -> None:
    """Refuse a mask that is not the slide at one scale, up to a pixel of rounding of the mask."""
    least = max(full / (side + 1) for full, side in zip(dimensions, size, strict=True))
    most = min(full / (side - 1) if side > 1 else np.inf for full, side in zip(dimensions, size, strict=True))
    if least > most:
        raise ValueError(
            f"it has {size[0]}x{size[1]} px and the slide {dimensions[0]}x{dimensions[1]} px; a mask must "
            "span the whole slide at one scale"
        )


def _checked(labels: NDArray[np.generic]) -> tuple[NDArray[np.uint8], int]:
    """Labels as (h, w) uint8 of 0 and 1, and what tissue is in the file."""
    if labels.ndim == 3 and (labels == labels[..., :1]).all():
        labels = labels[..., 0]
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise ValueError(
            f"it is a {labels.dtype} raster of shape {labels.shape}; a mask has one channel (or equal ones) "
            "of whole numbers"
        )
    one, full = (labels == value for value in TISSUE_VALUES)
    other = (labels != 0) & ~one & ~full
    if other.any() or (one.any() and full.any()):
        values = np.unique(labels[labels != 0])[:5].tolist()
        raise ValueError(
            f"it holds the values {values} beside 0; a mask has 0 (background) and either 1 or 255 (tissue)"
        )
    return np.ascontiguousarray(one | full, np.uint8), TISSUE_VALUES[1] if full.any() else TISSUE_VALUES[0]


def _opened(path: Path) -> AbstractContextManager[_Raster]:
    try:
        plain_stat(path)
    except FileNotFoundError:
        raise FileNotFoundError("it does not exist") from None
    suffix = path.suffix.lower()
    if suffix in _DRAWN:
        raise ValueError(
            f"it is {_DRAWN[suffix]}, outlines and no raster; draw them as one of 0 and 1 of the slide's "
            "shape (QuPath: File > Export images > Export rendered labels, or its LabeledImageServer)"
        )
    opener = _tiff if suffix in _TIFF else _flat if suffix in _FLAT else _whole_slide
    return opener(path)


@contextmanager
def _flat(path: Path) -> Iterator[_Raster]:
    from PIL import Image

    try:
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error}; write the mask smaller, or as a pyramidal TIFF") from error
    with image:
        indexed = image.mode in {"1", "I", "I;16", "L", "P"}
        yield _Raster("pil", [image.size], lambda _: np.asarray(image if indexed else image.convert("RGB")))


@contextmanager
def _tiff(path: Path) -> Iterator[_Raster]:
    """Stored values, by tifffile; where it lacks the codec, by what else opens the file unchanged."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        levels = file.series[0].levels
        pages = [level.keyframe for level in levels]
        sizes = [(int(page.imagewidth), int(page.imagelength)) for page in pages]
        plain = all(page.photometric in _PLAIN_PHOTOMETRICS and page.dtype == np.uint8 for page in pages)
        if all(_decodes(page) for page in pages):
            yield _Raster("tifffile", sizes, lambda level: np.squeeze(levels[level].asarray()))
            return
    if len(sizes) == 1:
        with _flat(path) as raster:
            yield raster
    elif plain:
        with _whole_slide(path) as raster:
            yield raster
    else:
        raise ValueError(
            f"nothing here reads the stored values of its tiles ({pages[0].compression!r}); write it as "
            "8-bit gray, or pip install imagecodecs"
        )


def _decodes(page: Any) -> bool:
    """Whether tifffile has the codec of a page: looking it up raises where it has not."""
    import tifffile

    try:
        tifffile.TIFF.DECOMPRESSORS[page.compression], tifffile.TIFF.UNPREDICTORS[page.predictor]
    except (KeyError, ValueError):
        return False
    return True


@contextmanager
def _whole_slide(path: Path) -> Iterator[_Raster]:
    with open_slide(Slide(sample_id="mask", image_path=path)) as reader:
        yield _Raster(reader.backend, reader.level_dimensions, lambda level: read_level(reader, level))
