"""Ready images as users give them: named files, or pixels in memory."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from slide2vec.errors import ManifestError, nearest_names
from slide2vec.files import as_path, is_remote
from slide2vec.slides import check_id, id_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["ImageLike", "ImageSpec", "as_images"]

ImageLike: TypeAlias = "ImageSpec | str | os.PathLike[str] | Mapping[str, Any]"


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """One ready image: a file, or its pixels.

    Attributes:
        sample_id: its name, unique in a call; a file stem, so without path separators.
        image_path: PNG, JPEG, TIFF or what else Pillow opens; None where `image` is given.
        spacing_at_level_0: µm/px, for `Model.embed_images_dense`; `Model.embed_images` refuses it.
        image: the pixels instead of a file: a PIL image, or an array (H, W, 3) uint8 RGB.

    Raises:
        ManifestError: a ValueError: the id is no file name, the spacing is not finite and positive, or there
            is not exactly one of `image_path` and `image`.
    """

    sample_id: str
    image_path: str | os.PathLike[str] | None = None
    spacing_at_level_0: float | None = None
    image: NDArray[np.uint8] | Image | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_id(self.sample_id, "sample_id")
        if (self.image_path is None) == (self.image is None):
            raise ManifestError(
                f"image {self.sample_id}: give either image_path, or image for pixels in memory"
            )
        spacing = self.spacing_at_level_0
        if spacing is None:
            return
        if isinstance(spacing, bool) or not math.isfinite(float(spacing)) or float(spacing) <= 0:
            raise ManifestError(
                f"image {self.sample_id}: spacing_at_level_0={spacing!r} must be finite and positive (µm/px)"
            )
        object.__setattr__(self, "spacing_at_level_0", float(spacing))

    @cached_property
    def path(self) -> Path | None:
        """Of its file, resolved where it is of this machine; None for pixels."""
        if self.image_path is None:
            return None
        path = as_path(self.image_path)
        return path if is_remote(path) else path.expanduser().resolve()

    @cached_property
    def source(self) -> str:
        """What it is, as sidecars record it as `image_path`: its path, or "memory:" and a digest of its
        pixels."""
        return f"memory:{_digest(self.image)}" if self.path is None else str(self.path)


def _digest(image: Any) -> str:
    import numpy as np

    pixels = np.ascontiguousarray(image)
    mode = getattr(image, "mode", "")
    digest = hashlib.blake2b(f"{mode} {pixels.dtype} {pixels.shape}".encode(), digest_size=16)
    digest.update(pixels.data)
    return digest.hexdigest()


def as_images(given: Iterable[ImageLike], method: str) -> list[ImageSpec]:
    """Images from ImageSpecs, paths (whose stem is the id) or mappings with the fields of `ImageSpec`.

    Args:
        method: of the model, for messages.

    Raises:
        ManifestError: there is none, one is not well given, or two have one sample_id.
    """
    if isinstance(given, str | os.PathLike | Mapping | ImageSpec):
        raise ManifestError(
            f"{method} takes a list of images, got {type(given).__name__}: put it in brackets"
        )
    found: dict[str, ImageSpec] = {}
    for item in given:
        image = _as_image(item)
        if (other := found.get(image.sample_id)) is not None:
            raise ManifestError(
                f"{method}: sample_id {image.sample_id!r} appears twice ({other.source} and {image.source}); "
                "files are named by it: give each image its own"
            )
        found[image.sample_id] = image
    if not found:
        raise ManifestError(f"{method}: at least one image is needed")
    return list(found.values())


_FIELDS = tuple(each.name for each in fields(ImageSpec))


def _as_image(given: ImageLike) -> ImageSpec:
    if isinstance(given, ImageSpec):
        return given
    if isinstance(given, Mapping):
        for key in given:
            if key not in _FIELDS:
                raise ManifestError(f"unknown image field {key!r}. {nearest_names(str(key), _FIELDS)}")
        return ImageSpec(**given)
    if isinstance(given, str | os.PathLike) or is_remote(given):
        return ImageSpec(sample_id=id_of(as_path(given)), image_path=given)
    raise ManifestError(
        f"an image is an ImageSpec, a path or a mapping, got {type(given).__name__}; pixels in memory go "
        "into ImageSpec(sample_id=…, image=…)"
    )
