"""The pixels of a ready image: opened with care, and brought to the encoder's input as its authors do it."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.nn import functional

from slide2vec.errors import ImageError
from slide2vec.files import open_plain
from slide2vec.images.specs import ImageSpec
from slide2vec.recipes import ImageGeometry, Recipe

__all__ = ["fitted", "image_geometry", "rgb", "transform_record"]

Pixels: TypeAlias = NDArray[np.uint8]

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
#: Modes of Pillow that it converts to RGB by cutting values off at 255.
_NOT_8_BIT = ("I", "F")


def image_geometry(recipe: Recipe) -> ImageGeometry:
    """How a preset's ready images are resized and cropped: as published, for the encoder's input.

    Args:
        recipe: of a tile preset; its input may have been asked for in another size than it was published for
            (`input_size_px`), and sizes are then larger or smaller in proportion.
    """
    made, own, side = recipe.transform, recipe.images, recipe.transform.crop
    if own is None:
        return ImageGeometry(resize=made.resize, crop=made.crop, interpolation=made.interpolation)
    if own.crop == side:
        return own
    return own.model_copy(update={"resize": round(own.resize * side / own.crop), "crop": side})


def transform_record(recipe: Recipe, geometry: ImageGeometry | None = None) -> dict[str, Any]:
    """A transform as sidecars record it: the values of its steps; without a geometry it only normalises."""
    statistics = {"mean": list(recipe.transform.mean), "std": list(recipe.transform.std)}
    if geometry is None:
        return {"normalize": statistics, "resize": None, "center_crop": None}
    resize = [geometry.resize] * (2 if geometry.square else 1)
    margin = {} if geometry.odd_margin == "even" else {"odd_margin": geometry.odd_margin}
    return {
        "normalize": statistics,
        "resize": {"size": resize, "interpolation": geometry.interpolation},
        "center_crop": {"size": [geometry.crop] * 2, **margin},
    }


def rgb(spec: ImageSpec) -> Image.Image:
    """An image in 8-bit RGB; what is transparent in it becomes white, as off a slide's edge.

    Raises:
        ImageError: it cannot be read or decoded, or has pixels of more than 8 bits that have no one way to
            become 8; the message names it.
    """
    try:
        return _from_memory(spec.image) if spec.path is None else _from_file(spec)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"image {spec.sample_id} ({spec.path}): it is no PNG, JPEG, TIFF or other image"
        ) from error
    except Exception as error:  # of decoders, whatever they make of a damaged file
        what = " ".join(str(error).split()) or type(error).__name__
        where = "in memory" if spec.path is None else f"({spec.path})"
        raise ImageError(f"image {spec.sample_id} {where}: {what}") from error


def _from_file(spec: ImageSpec) -> Image.Image:
    assert spec.path is not None
    with open_plain(spec.path) as file, Image.open(file) as image:
        if image.format == "JPEG" and image.mode == "RGB":
            # Pillow's pixels, bit by bit, but where libjpeg only warns of damage, simplejpeg raises.
            file.seek(0)
            decode = import_module("simplejpeg").decode_jpeg
            return Image.fromarray(decode(file.read(), "RGB", strict=True))
        _refuse_pages(image)
        return _as_rgb(image)


def _from_memory(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return _as_rgb(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ImageError(f"an array must be (H, W, 3) uint8 RGB, got {array.shape} {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _refuse_pages(image: Image.Image) -> None:
    """A file of several images of one size (a z-stack, channels) does not say which of them is meant; smaller
    ones are of a pyramid, or thumbnails."""
    pages, size = getattr(image, "n_frames", 1), image.size
    if pages > 1:
        image.seek(1)
        second = image.size
        image.seek(0)
        if second == size:
            raise ImageError(f"it holds {pages} images of one size: write the one that is meant to a file")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.partition(";")[0] in _NOT_8_BIT:
        raise ImageError(
            f"its pixels have more than 8 bits (mode {image.mode}): scale them to 8-bit RGB first"
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def fitted(image: Image.Image, geometry: ImageGeometry) -> Pixels:
    """Resized (antialiased) and cropped: (crop, crop, 3) uint8."""
    target = _resized_size(image.size, geometry)
    if image.size == target:
        pixels = np.asarray(image)
    elif geometry.tensor:
        pixels = _resized_by_torch(image, target, geometry.interpolation)
    else:
        pixels = np.asarray(image.resize(target, _RESAMPLING[geometry.interpolation]))
    whole = math.floor if geometry.odd_margin == "down" else round
    left, top = (whole((side - geometry.crop) / 2) for side in target)
    return cast("Pixels", pixels[top : top + geometry.crop, left : left + geometry.crop])


def _resized_by_torch(image: Image.Image, target: tuple[int, int], mode: str) -> Pixels:
    """As torchvision resizes a uint8 tensor on the CPU."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    made = functional.interpolate(pixels, target[::-1], mode=mode, antialias=True, align_corners=False)
    return cast("Pixels", made[0].permute(1, 2, 0).numpy())


def _resized_size(size: tuple[int, int], geometry: ImageGeometry) -> tuple[int, int]:
    """(width, height): the shorter side becomes `resize`, the longer is rounded down."""
    if geometry.square:
        return geometry.resize, geometry.resize
    shorter = min(size)
    width, height = (
        geometry.resize if side == shorter else geometry.resize * side // shorter for side in size
    )
    return width, height
