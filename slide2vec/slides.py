"""Slides as users give them: a path or a mapping. Manifests are read in `slide2vec.manifests`."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from slide2vec.errors import ConfigError, ManifestError, nearest_names
from slide2vec.files import as_path, is_remote

__all__ = [
    "SLIDE_SUFFIXES",
    "IdFrom",
    "Slide",
    "SlideLike",
    "as_slide",
    "as_slides",
    "id_of",
    "is_missing",
    "is_tiling_option",
    "slide_from_fields",
]

logger = logging.getLogger(__name__)

#: µm/px that a user may state; wider than what is believed of a file (an overview may have 30).
GIVEN_SPACING_UM = (0.01, 100.0)

#: Bytes; file systems allow 255 with what we add.
_LONGEST_ID = 200

#: Files that are taken for slides by their names. Some are refused when they are opened, with the reason.
SLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm"}
    | {".vms", ".vmu", ".svslide", ".czi", ".qptiff", ".vsi", ".zif"}
)
#: What tables write for a value that is missing, in lower case.
_MISSING = frozenset(("", "nan", "na", "n/a", "none", "null", "<na>"))
#: What a slide's id is made of where none is given: the name of its file, or its path.
IdFrom: TypeAlias = Literal["name", "path"]


class DescribedSlide(Protocol):
    """Anything that names a slide by attributes, such as hs2p's SlideSpec; it may have mask_path,
    spacing_at_level_0 and patient_id, too."""

    @property
    def sample_id(self) -> str: ...

    @property
    def image_path(self) -> str | Path: ...


SlideLike: TypeAlias = "Slide | DescribedSlide | str | os.PathLike[str] | Mapping[str, Any]"


@dataclass(frozen=True, kw_only=True)
class Slide:
    """One slide to embed.

    Attributes:
        sample_id: its name, unique in a call; a file stem, so without path separators.
        image_path: the slide file; a UPath where it is on remote storage, which ExecutionOptions(stage_dir=…)
            makes readable.
        mask_path: an optional tissue mask that replaces segmentation: a raster (0, and 1 or 255 for tissue),
            or GeoJSON; with `PreprocessingConfig.masks` of other labels, the mask of annotations.
        spacing_at_level_0: µm/px of level 0, where the file's own value is missing or wrong.
        patient_id: for patient-level models.
        tiling: options of this slide that count over those of the run: "tissue_threshold", and
            "segmentation_…", "filtering_…", "qc_…" with the fields of SegmentationConfig, FilterConfig,
            QualityConfig, such as "segmentation_method". Checked when the slide is planned.
        annotation: the class of its mask whose tiles are meant; the sample_id then is as
            `slide2vec.labels.class_name` has it, "tumor/a". `slide2vec.manifests.by_class` makes such slides.
    """

    sample_id: str
    image_path: Path
    mask_path: Path | None = None
    spacing_at_level_0: float | None = None
    patient_id: str | None = None
    tiling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    annotation: str | None = None

    def __post_init__(self) -> None:
        check_id(self.sample_id.removeprefix(f"{self.annotation}/"), "sample_id")
        if self.patient_id is not None:
            check_id(self.patient_id, "patient_id")
        spacing = self.spacing_at_level_0
        low, high = GIVEN_SPACING_UM
        if spacing is not None and not low <= spacing <= high:
            raise ManifestError(
                f"slide {self.sample_id}: spacing_at_level_0={spacing!r} is not a plausible µm/px "
                f"({low:g} to {high:g}); scanners give about 0.25 at 40x and 0.5 at 20x"
            )


def check_id(value: str, field: str) -> None:
    """Refuse an id that could not be a file stem."""
    if not isinstance(value, str) or not value.strip() or value in {".", ".."}:
        raise ManifestError(f"{field} must be a non-empty text, got {value!r}")
    if any(char in value for char in "/\\\0") or ".." in value:
        raise ManifestError(f'{field}={value!r} becomes a file name: "/", "\\", ".." and NUL are not allowed')
    if not value.isprintable() or len(value.encode(errors="replace")) > _LONGEST_ID:
        raise ManifestError(
            f"{field}={value[:100]!r} becomes a file name: at most {_LONGEST_ID} bytes, all printable"
        )


_FIELDS = tuple(field.name for field in fields(Slide) if field.name != "annotation")
_DESCRIBED = tuple(name for name in _FIELDS if name != "tiling")


def id_of(path: Path, id_from: IdFrom = "name") -> str:
    """An id for a slide that was given none: the stem of its file, or its path with "__" for separators.

    What could not be a file name itself (".." in it, unprintable characters) has "_" there, and what is
    longer than 200 bytes ends in a digest; both are logged. The same path always gives the same id.

    Args:
        path: as it was given: relative paths give short ids.
    """
    parts = [path.stem]
    if id_from == "path":
        parents = [part for part in path.parent.parts if part not in ("/", ".", "..", path.anchor)]
        parts = [*parents, path.stem]
    plain = "__".join(parts)
    made = "".join(char if char.isprintable() and char not in "/\\\0" else "_" for char in plain)
    made = made.replace("..", "__").strip() or "_"
    if len(made.encode(errors="replace")) > _LONGEST_ID:
        digest = hashlib.blake2b(plain.encode(errors="replace"), digest_size=6).hexdigest()
        kept = made.encode(errors="replace")[: _LONGEST_ID - len(digest) - 1].decode(errors="ignore")
        made = f"{kept}_{digest}"
    if made != plain:
        logger.warning("slide %s: its name could not be that of other files, so it is called %s", path, made)
    return made


#: Columns and keys that go into `Slide.tiling`.
_TILING_OPTION = re.compile(
    r"tissue_threshold|(segmentation|filtering)_\w+|qc_(measure|method|weights|device|max_\w+)"
)


def is_tiling_option(name: object) -> bool:
    """Whether a column or key is an option of `Slide.tiling`."""
    return isinstance(name, str) and _TILING_OPTION.fullmatch(name) is not None


def as_slide(given: SlideLike, spacing_at_level_0: float | None = None, id_from: IdFrom = "name") -> Slide:
    """A Slide from a path (`id_of` makes its sample_id), a mapping with the fields of `Slide`, an object that
    has them as attributes, or a Slide.

    `spacing_at_level_0` (µm/px), when given, overrides the slide's own.

    Raises:
        ManifestError: a field is missing, unknown or not allowed.
    """
    slide = given if isinstance(given, Slide) else _from_path_or_mapping(given, id_from)
    if spacing_at_level_0 is None:
        return slide
    return replace(slide, spacing_at_level_0=float(spacing_at_level_0))


def _from_path_or_mapping(
    given: str | os.PathLike[str] | Mapping[str, Any] | DescribedSlide, id_from: IdFrom
) -> Slide:
    if isinstance(given, str | os.PathLike) or is_remote(given):
        path = _file(given, "image_path")
        return Slide(sample_id=id_of(path, id_from), image_path=path)
    if not isinstance(given, Mapping):
        if not (hasattr(given, "sample_id") and hasattr(given, "image_path")):
            kind = type(given).__name__
            raise ManifestError(f"a slide is a path, a mapping or a Slide, got {kind}: {given!r}")
        return slide_from_fields({name: getattr(given, name, None) for name in _DESCRIBED})
    for key in given:
        if key not in _FIELDS and not is_tiling_option(key):
            raise ManifestError(f"unknown slide field {key!r}. {nearest_names(str(key), _FIELDS)}")
    return slide_from_fields(given)


def slide_from_fields(given: Mapping[str, Any]) -> Slide:
    """A Slide from a mapping with its fields; values that mean absent (`is_missing`) are.

    Raises:
        ManifestError: image_path is missing, or a value is not allowed.
    """
    values = {key: value for key, value in given.items() if not is_missing(value)}
    name = given.get("sample_id")
    if isinstance(name, str) and name.strip() and is_missing(name):
        raise ManifestError(f"sample_id={name!r} means that there is none; give the slide a name")
    if "image_path" not in values:
        raise ManifestError(f"a slide needs image_path, got the fields {sorted(given)}")
    path = _file(values["image_path"], "image_path")
    mask = values.get("mask_path")
    spacing = values.get("spacing_at_level_0")
    patient = values.get("patient_id")
    return Slide(
        sample_id=str(values["sample_id"]) if "sample_id" in values else id_of(path),
        image_path=path,
        mask_path=None if mask is None else _file(mask, "mask_path"),
        spacing_at_level_0=None if spacing is None else _as_float(spacing),
        patient_id=None if patient is None else str(patient),
        tiling={
            **values.get("tiling", {}),
            **{name: value for name, value in values.items() if is_tiling_option(name)},
        },
    )


def _file(given: Any, field: str) -> Path:
    try:
        path = as_path(given)
    except ConfigError as error:
        raise ManifestError(f"{field}: {error}") from None
    return path if is_remote(path) else path.expanduser()


def is_missing(value: Any) -> bool:
    """Whether a value means that there is none: None, NaN, blank text, or what tables write for it."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or bool(value != value)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ManifestError(f"spacing_at_level_0 must be a number in µm/px, got {value!r}") from None


def as_slides(given: Iterable[SlideLike]) -> list[Slide]:
    """Several slides; two with one sample_id raise ManifestError (give sample_id explicitly)."""
    if isinstance(given, str | os.PathLike | Mapping | Slide):
        raise ManifestError("embed_slides takes a list of slides; for a single one use embed_slide")
    slides = [as_slide(item) for item in given]
    seen: dict[str, Slide] = {}
    for slide in slides:
        if slide.sample_id in seen:
            raise ManifestError(
                f"sample_id {slide.sample_id!r} appears twice ({seen[slide.sample_id].image_path} and "
                f"{slide.image_path}): give each slide its own sample_id, or make ids of the paths "
                "(--id-from path)"
            )
        seen[slide.sample_id] = slide
    return slides
