"""What a transform does to the values of pixels: found by its parts and by trying it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from slide2vec.errors import PresetError
from slide2vec.recipes import ImageGeometry

__all__ = ["geometry_of", "statistics_of", "without_geometry"]

Statistics: TypeAlias = tuple[float, float, float]

#: Side of the pictures that transforms are tried on, px.
SIDE = 48
#: By how much the result of a transform may differ from mean and std, in their units: float32 rounding.
NEAR = 2e-4


def statistics_of(transform: Callable[[Any], Any], name: str) -> tuple[Statistics, Statistics]:
    """Mean and std per RGB channel, of values in [0, 1], by which a transform normalises pictures.

    Args:
        transform: of a PIL image or (H, W, 3) uint8 array, to (3, H, W) float of the same size.
        name: of the encoder, for errors.

    Raises:
        PresetError: it does something else than a factor and an offset per channel, and what.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    values = _applied(transform, pixels, name)
    if values.shape != (3, SIDE, SIDE):
        raise PresetError(
            f"encoder {name}: its transform of a tile makes {tuple(values.shape)} of ({SIDE}, {SIDE}, 3); "
            "get_normalization_transform must not resize or crop, and gives (3, H, W)"
        )
    given = pixels.transpose(2, 0, 1).reshape(3, -1) / 255
    fits = [np.polyfit(x, y, 1) for x, y in zip(given, values.reshape(3, -1), strict=True)]
    for (slope, offset), x, y in zip(fits, given, values.reshape(3, -1), strict=True):
        if slope <= 0 or np.abs(slope * x + offset - y).max() > NEAR:
            raise PresetError(
                f"encoder {name}: its transform of a tile is no factor and offset per channel; what is more "
                "than (pixel / 255 - mean) / std belongs into the encoder itself"
            )
    return _said(transform, fits) or (
        _three(-offset / slope for slope, offset in fits),
        _three(1 / slope for slope, _ in fits),
    )


def _three(values: Iterator[float]) -> Statistics:
    """Rounded to what a fit of float32 values is good for."""
    first, second, third = (round(float(value), 6) for value in values)
    return first, second, third


def _said(transform: Any, fits: list[Any]) -> tuple[Statistics, Statistics] | None:
    """The numbers that one of its parts has as mean and std, where they are those that were found."""
    for part in _parts(transform):
        mean, std = getattr(part, "mean", None), getattr(part, "std", None)
        try:
            stated = [[float(value) for value in values] for values in (mean, std)]  # type: ignore[union-attr]
            near = [(-offset / slope, 1 / slope) for slope, offset in fits]
            if np.allclose(np.transpose(near), stated, atol=NEAR):
                return (stated[0][0], stated[0][1], stated[0][2]), (stated[1][0], stated[1][1], stated[1][2])
        except (TypeError, ValueError):
            continue
    return None


def _applied(transform: Callable[[Any], Any], pixels: NDArray[np.uint8], name: str) -> NDArray[Any]:
    """What it makes of a picture, which it takes as PIL's or as an array."""
    problem: Exception | None = None
    for picture in (Image.fromarray(pixels), pixels):
        try:
            return np.asarray(torch.as_tensor(transform(picture)).float().cpu(), np.float64)
        except Exception as error:  # of whatever users compose
            problem = problem or error
    raise PresetError(f"encoder {name}: its transform of a tile fails: {problem}") from problem


def geometry_of(transform: Any) -> ImageGeometry | None:
    """How a transform of torchvision's parts brings a ready image to the encoder's input: Resize, and after
    it CenterCrop or nothing; None where it has other parts, or none that resize."""
    found: ImageGeometry | None = None
    for part in _parts(transform):
        kind, size = type(part).__name__, _sides(getattr(part, "size", None))
        if kind == "Resize" and size and found is None:
            square = len(size) == 2
            if square and size[0] != size[1]:
                return None
            how = _interpolation(part)
            found = ImageGeometry(resize=size[0], crop=size[0], interpolation=how, square=square)
        elif kind == "CenterCrop" and size and found is not None and size[0] <= found.resize:
            found = found.model_copy(update={"crop": size[0]})
        elif size:
            return None
    return found


def without_geometry(transform: Any) -> Callable[[Any], Any]:
    """A transform without its parts that resize or crop."""
    kept = [part for part in _parts(transform) if type(part).__name__ not in ("Resize", "CenterCrop")]

    def applied(picture: Any) -> Any:
        for part in kept:
            picture = part(picture)
        return picture

    applied.transforms = kept  # type: ignore[attr-defined]  # as a Compose has them
    return applied


def _interpolation(part: Any) -> Literal["bicubic", "bilinear"]:
    named = getattr(getattr(part, "interpolation", None), "value", "bilinear")
    return "bicubic" if named == "bicubic" else "bilinear"


def _sides(size: Any) -> tuple[int, ...]:
    if isinstance(size, int):
        return (size,)
    return tuple(map(int, size)) if isinstance(size, list | tuple) else ()


def _parts(transform: Any) -> Iterator[Any]:
    inner = getattr(transform, "transforms", None)
    if isinstance(inner, list | tuple):
        for part in inner:
            yield from _parts(part)
    else:
        yield transform
