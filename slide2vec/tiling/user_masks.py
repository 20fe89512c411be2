"""Masks that users give: rasters that span the slide, of 0 (background) and 1 or 255 (tissue) or of the
values of labels; and areas in GeoJSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.config import MaskSamplingConfig, SegmentationConfig
from slide2vec.errors import MaskError, Slide2VecError
from slide2vec.files import is_remote, plain_stat
from slide2vec.geometry import nearest_downsample_level, select_level
from slide2vec.readers import SlideReader, open_slide
from slide2vec.readers.reader import planning_downsamples
from slide2vec.slides import Slide
from slide2vec.tiling import geojson
from slide2vec.tiling.levels import read_level
from slide2vec.tiling.polygons import draw_areas
from slide2vec.tiling.types import PRECOMPUTED, Segmentation

__all__ = ["MAX_RASTER_PX", "read_labels"]


#: What tissue may be in a mask of tissue; one value in each.
TISSUE_VALUES = (1, 255)

#: The largest mask level that is read; a larger mask needs a pyramid.
MAX_RASTER_PX = 256_000_000

#: How far a mask's level may be from the segmentation level to count as the same spacing.
_LEVEL_TOLERANCE = 0.01

_TIFF = {".tif", ".tiff", ".btf"}
#: Annotations in files that are not read.
_DRAWN = {
    ".annotations": "a file of annotations",
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


def read_labels(
    reader: SlideReader,
    slide: Slide,
    base_spacing_um: float,
    config: SegmentationConfig,
    masks: MaskSamplingConfig,
    copy: Path | None = None,
) -> tuple[NDArray[np.uint8], Segmentation]:
    """The labels of the slide's mask at its segmentation level, (h, w) uint8, nearest-resized or drawn: their
    values as `masks` has them, 0 and 1 where it is one of tissue.

    Args:
        copy: of the mask, to be read in its place.

    Raises:
        MaskError: it is missing, unreadable or too large, has another shape than the slide, or something
            else than the labels; areas of GeoJSON are not on the slide.
    """
    path = slide.mask_path
    if path is None:
        raise MaskError(
            f"slide {slide.sample_id}: no mask_path is given, and masks says that tiles are made of "
            f"annotations ({', '.join(masks.min_coverage)}): give the slide's annotation mask"
        )
    target = nearest_downsample_level(config.downsample, planning_downsamples(reader))
    try:
        if copy is None and is_remote(path):
            raise OSError("it is on remote storage and needs ExecutionOptions(stage_dir=…)")
        read = _draw if path.suffix.lower() in geojson.SUFFIXES else _read
        labels, how = read(copy or path, reader, target, base_spacing_um, masks)
    except (OSError, ValueError, RuntimeError, SyntaxError, Slide2VecError) as error:
        what = "annotation" if masks.by_class else "tissue"
        raise MaskError(f"slide {slide.sample_id}: the {what} mask {path} cannot be used: {error}") from error
    downsample = planning_downsamples(reader)[target]
    return labels, Segmentation(
        method=PRECOMPUTED,
        requested_downsample=config.downsample,
        downsample=max(1, round(downsample)),
        level=target,
        spacing_um=base_spacing_um * downsample,
        requested_mask_backend="auto",
        **how,
    )


def _draw(
    path: Path, reader: SlideReader, target: int, base_spacing_um: float, masks: MaskSamplingConfig
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Areas of GeoJSON as a raster of the size of a level; of a huge one, of a smaller size."""
    width, height = reader.level_dimensions[target]
    factor = ceil(sqrt(width * height / MAX_RASTER_PX))
    size = ceil(width / factor), ceil(height / factor)
    areas = geojson.read_areas(path)
    drawn = draw_areas(areas, masks.pixel_mapping, size, reader.dimensions)
    return drawn, {
        "tissue_value": None if masks.by_class else TISSUE_VALUES[0],
        "mask_level": 0,
        "mask_spacing_um": base_spacing_um * reader.dimensions[0] / size[0],
        "mask_backend": "geojson",
    }


def _read(
    path: Path, reader: SlideReader, target: int, base_spacing_um: float, masks: MaskSamplingConfig
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """A raster's level nearest to the slide's segmentation level, in the size of that."""
    spacing = base_spacing_um * planning_downsamples(reader)[target]
    with _opened(path) as raster:
        size = raster.level_dimensions[0]
        _check_shape(size, reader.dimensions)
        mask_spacing = base_spacing_um * reader.dimensions[0] / size[0]
        downsamples = [size[0] / width for width, _ in raster.level_dimensions]
        choice = select_level(max(spacing, mask_spacing), mask_spacing, downsamples, _LEVEL_TOLERANCE)
        width, height = raster.level_dimensions[choice.level]
        if width * height > MAX_RASTER_PX:
            raise ValueError(
                f"its level {choice.level} has {width}x{height} px, more than the {MAX_RASTER_PX:,} px "
                "that are read at once; write it as a pyramid"
            )
        labels, tissue_value = _checked(raster.read(choice.level), masks)
        backend = raster.backend
    size = reader.level_dimensions[target]
    return np.asarray(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST), np.uint8), {
        "tissue_value": tissue_value,
        "mask_level": choice.level,
        "mask_spacing_um": choice.spacing_um,
        "mask_backend": backend,
    }


def _check_shape(size: tuple[int, int], dimensions: tuple[int, int]) -> None:
    """Refuse a mask that is not the slide at one scale, up to a pixel of rounding of the mask."""
    least = max(full / (side + 1) for full, side in zip(dimensions, size, strict=True))
    most = min(full / (side - 1) if side > 1 else np.inf for full, side in zip(dimensions, size, strict=True))
    if least > most:
        raise ValueError(
            f"it has {size[0]}x{size[1]} px and the slide {dimensions[0]}x{dimensions[1]} px; a mask must "
            "span the whole slide at one scale"
        )


def _checked(labels: NDArray[np.generic], masks: MaskSamplingConfig) -> tuple[NDArray[np.uint8], int | None]:
    """Labels as (h, w) uint8, those of tissue as 0 and 1; and what tissue is in the file (None: others)."""
    if labels.ndim == 3 and (labels == labels[..., :1]).all():
        labels = labels[..., 0]
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise ValueError(
            f"it is a {labels.dtype} raster of shape {labels.shape}; a mask has one channel (or equal ones) "
            "of whole numbers"
        )
    if masks.by_class:
        return _with_known_values(labels, masks), None
    one, full = (labels == value for value in TISSUE_VALUES)
    other = (labels != 0) & ~one & ~full
    if other.any() or (one.any() and full.any()):
        values = np.unique(labels[labels != 0])[:5].tolist()
        raise ValueError(
            f"it holds the values {values} beside 0; a mask of tissue has 0 (background) and either 1 or 255 "
            "(tissue), and other labels are for masks.pixel_mapping to name"
        )
    return np.ascontiguousarray(one | full, np.uint8), TISSUE_VALUES[1] if full.any() else TISSUE_VALUES[0]


def _with_known_values(labels: NDArray[np.generic], masks: MaskSamplingConfig) -> NDArray[np.uint8]:
    small = labels.astype(np.uint8)
    known = np.zeros(256, bool)
    known[[value for values in masks.pixel_mapping.values() for value in values]] = True
    wrong = ~known[small] | (small != labels)
    if wrong.any():
        listed = ", ".join(f"{label} {list(values)}" for label, values in masks.pixel_mapping.items())
        raise ValueError(
            f"it holds the values {np.unique(labels[wrong])[:5].tolist()}, which no label of "
            f"masks.pixel_mapping has ({listed}): name them there, also where they are not sampled"
        )
    return small


def _opened(path: Path) -> AbstractContextManager[_Raster]:
    try:
        plain_stat(path)
    except FileNotFoundError:
        raise FileNotFoundError("it does not exist") from None
    suffix = path.suffix.lower()
    if suffix in _DRAWN:
        raise ValueError(
            f"it is {_DRAWN[suffix]}, which is not read here; export it as GeoJSON (QuPath: File > Export "
            "objects as GeoJSON), or as a raster of labels of the slide's shape"
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
