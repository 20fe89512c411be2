"""What users say of dense features: which pixels, padded and cut how, which grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slide2vec.choices import Backend
from slide2vec.errors import ConfigError, ManifestError
from slide2vec.slides import Slide, check_id

if TYPE_CHECKING:
    import os

__all__ = ["DenseImageOptions", "DenseLike", "DenseOptions", "FeatureKind", "PadMode", "SlideRegions"]

FeatureKind = Literal["patch_features", "patch_features_prenorm", "cls_attention"]
PadMode = Literal["reflect", "replicate", "constant", "zero"]
_KINDS = ("patch_features", "patch_features_prenorm", "cls_attention")
_PADS = ("reflect", "replicate", "constant", "zero")


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """Dense features of regions of slides.

    Attributes:
        spacing_um: µm/px that regions are read at.
        target_size: side of a region in px at that spacing.
        tolerance: relative spacing difference within which a level is read as it is.
        backend: reader; "auto" picks per slide.
        pad_mode: how a region is padded below and to the right to whole patches, after normalisation.
        image_pad_value: of "constant" (and "zero"), in normalised pixels; None = 0.
        window_size: side of the windows that the encoder sees one at a time, px, rounded up to the patch;
            None = the whole region at once.
        overlap: of neighbouring windows, 0 to 1; blended with raised-cosine weights.
        feature_kind: "patch_features": patch tokens after the last block and its norm;
            "patch_features_prenorm": before that norm; "cls_attention": attention of the class token,
            head by head.
        attention_blocks: whose attention; -1 is the last.
        attention_include_registers: attention of the registers, too.

    Raises:
        ConfigError: a ValueError that names the field and what is allowed.
    """

    spacing_um: float
    target_size: int
    tolerance: float = 0.05
    backend: Backend = "auto"
    pad_mode: PadMode = "reflect"
    image_pad_value: float | None = None
    window_size: int | None = None
    overlap: float = 0.0
    feature_kind: FeatureKind = "patch_features"
    attention_blocks: Sequence[int] = (-1,)
    attention_include_registers: bool = False

    def __post_init__(self) -> None:
        _check_spacing(self, self.spacing_um)
        if not _is_positive(self.target_size):
            raise ConfigError(
                f"DenseOptions: target_size={self.target_size!r} must be a positive number of px"
            )
        _check(self)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a region in px."""
        return self.target_size, self.target_size


@dataclass(frozen=True, kw_only=True)
class DenseImageOptions:
    """Dense features of ready images. `target_size`, a side or (height, width), is what every image has to
    have once it is read at `spacing_um` (None: the preset's): nothing is fitted to it. The rest is as for
    `DenseOptions`.
    """

    target_size: int | tuple[int, int]
    spacing_um: float | None = None
    tolerance: float = 0.05
    backend: Backend = "auto"
    pad_mode: PadMode = "reflect"
    image_pad_value: float | None = None
    window_size: int | None = None
    overlap: float = 0.0
    feature_kind: FeatureKind = "patch_features"
    attention_blocks: Sequence[int] = (-1,)
    attention_include_registers: bool = False

    def __post_init__(self) -> None:
        if self.spacing_um is not None:
            _check_spacing(self, self.spacing_um)
        sides = self.target_size if isinstance(self.target_size, Sequence) else (self.target_size,) * 2
        if len(sides) != 2 or not all(map(_is_positive, sides)):
            raise ConfigError(
                f"DenseImageOptions: target_size={self.target_size!r} must be a side or (height, width) in px"
            )
        _check(self)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an image in px."""
        if isinstance(self.target_size, int):
            return self.target_size, self.target_size
        height, width = self.target_size
        return int(height), int(width)


DenseLike = DenseOptions | DenseImageOptions


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) > 0


def _check_spacing(options: DenseLike, spacing: Any) -> None:
    if isinstance(spacing, bool) or not math.isfinite(float(spacing)) or float(spacing) <= 0:
        name = type(options).__name__
        raise ConfigError(f"{name}: spacing_um={spacing!r} must be finite and positive, in µm/px")


def _check(options: DenseLike) -> None:
    """What both have in common."""
    wrong = None
    if options.pad_mode not in _PADS:
        wrong = f"pad_mode={options.pad_mode!r} is not one of {', '.join(_PADS)}"
    elif options.feature_kind not in _KINDS:
        wrong = f"feature_kind={options.feature_kind!r} is not one of {', '.join(_KINDS)}"
    elif options.window_size is not None and not _is_positive(options.window_size):
        wrong = f"window_size={options.window_size!r} must be a positive number of px, or None"
    elif not 0 <= options.overlap < 1:
        wrong = f"overlap={options.overlap!r} must be at least 0 and less than 1"
    elif not 0 <= options.tolerance < 1:
        wrong = f"tolerance={options.tolerance!r} must be at least 0 and less than 1"
    elif not options.attention_blocks or not all(
        isinstance(block, int) for block in options.attention_blocks
    ):
        wrong = f"attention_blocks={options.attention_blocks!r} must be whole numbers, such as (-1,)"
    if wrong is not None:
        raise ConfigError(f"{type(options).__name__}: {wrong}")


@dataclass(frozen=True, kw_only=True)
class SlideRegions:
    """Regions of one slide.

    Attributes:
        sample_id: the slide's name, a file stem.
        image_path: the slide.
        coordinates: (N, 2), x and y of top-left corners in level-0 px.
        annotation: class of the regions: a folder of its own; None, "tissue" and "merged" have none.
        spacing_at_level_0: µm/px of level 0, where the file's own is missing or wrong.

    Raises:
        ManifestError: a ValueError: an id is no file name, coordinates or spacing are not as said.
    """

    sample_id: str
    image_path: str | os.PathLike[str]
    coordinates: Any
    annotation: str | None = None
    spacing_at_level_0: float | None = None

    def __post_init__(self) -> None:
        if self.annotation is not None:
            check_id(self.annotation, "annotation")
        found = np.asarray(self.coordinates)
        if found.size and (found.ndim != 2 or found.shape[1] != 2):
            raise ManifestError(
                f"slide {self.sample_id}: coordinates must be (N, 2), x and y in level-0 px; got "
                f"{found.shape}"
            )
        if found.size and found.dtype.kind not in "iu" and (found != np.round(found)).any():
            raise ManifestError(f"slide {self.sample_id}: coordinates must be whole numbers, level-0 px")
        object.__setattr__(self, "coordinates", found.reshape(-1, 2).astype(np.int64))
        _ = self.slide  # says now what is wrong with it

    @property
    def slide(self) -> Slide:
        """The slide that they are of."""
        given = {"sample_id": self.sample_id, "image_path": self.image_path}
        return slide_of(given, self.spacing_at_level_0)


def slide_of(given: dict[str, Any], spacing_at_level_0: float | None) -> Slide:
    """A slide of its id and path."""
    from slide2vec.slides import slide_from_fields

    return slide_from_fields({**given, "spacing_at_level_0": spacing_at_level_0})
