"""Slides as users give them: a path, a mapping, a row of a manifest."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

from slide2vec.errors import ConfigError, ManifestError, nearest_names
from slide2vec.files import as_os_errors, as_path, is_remote

__all__ = ["Slide", "SlideLike", "as_slide", "as_slides", "read_manifest"]

#: µm/px that a user may state; wider than what is believed of a file (an overview may have 30).
GIVEN_SPACING_UM = (0.01, 100.0)

#: Wrong lines of a manifest that an error lists.
_MOST_LINES = 5
#: Bytes; file systems allow 255 with what we add.
_LONGEST_ID = 200

SlideLike: TypeAlias = "Slide | str | os.PathLike[str] | Mapping[str, Any]"


@dataclass(frozen=True, kw_only=True)
class Slide:
    """One slide to embed.

    Attributes:
        sample_id: its name, unique in a call; a file stem, so without path separators.
        image_path: the slide file; a UPath where it is on remote storage, which ExecutionOptions(stage_dir=…)
            makes readable.
        mask_path: an optional tissue mask raster (tissue = 1) that replaces segmentation.
        spacing_at_level_0: µm/px of level 0, where the file's own value is missing or wrong.
        patient_id: for patient-level models.
        tiling: options of this slide that count over those of the run: "tissue_threshold", and
            "segmentation_…" and "filtering_…" with the fields of SegmentationConfig and FilterConfig, such as
            "segmentation_method". Checked when the slide is planned.
    """

    sample_id: str
    image_path: Path
    mask_path: Path | None = None
    spacing_at_level_0: float | None = None
    patient_id: str | None = None
    tiling: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_id(self.sample_id, "sample_id")
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


_FIELDS = tuple(field.name for field in fields(Slide))
#: Columns and keys that go into `Slide.tiling`.
_TILING_OPTION = re.compile(r"tissue_threshold|(segmentation|filtering)_\w+")


def _is_tiling_option(name: object) -> bool:
    return isinstance(name, str) and _TILING_OPTION.fullmatch(name) is not None


def as_slide(given: SlideLike, spacing_at_level_0: float | None = None) -> Slide:
    """A Slide from a path (sample_id = its stem), a mapping with the fields of `Slide`, or a Slide.

    `spacing_at_level_0` (µm/px), when given, overrides the slide's own.

    Raises:
        ManifestError: a field is missing, unknown or not allowed.
    """
    slide = given if isinstance(given, Slide) else _from_path_or_mapping(given)
    if spacing_at_level_0 is None:
        return slide
    return replace(slide, spacing_at_level_0=float(spacing_at_level_0))


def _from_path_or_mapping(given: str | os.PathLike[str] | Mapping[str, Any]) -> Slide:
    if isinstance(given, str | os.PathLike) or is_remote(given):
        path = _file(given, "image_path")
        return Slide(sample_id=path.stem, image_path=path)
    if not isinstance(given, Mapping):
        raise ManifestError(f"a slide is a path, a mapping or a Slide, got {type(given).__name__}: {given!r}")
    for key in given:
        if key not in _FIELDS and not _is_tiling_option(key):
            raise ManifestError(f"unknown slide field {key!r}. {nearest_names(str(key), _FIELDS)}")
    return _from_fields(given)


def _from_fields(given: Mapping[str, Any]) -> Slide:
    """Build a Slide from a mapping whose blank values (None, "", NaN) mean absent."""
    values = {key: value for key, value in given.items() if not _is_blank(value)}
    if "image_path" not in values:
        raise ManifestError(f"a slide needs image_path, got the fields {sorted(given)}")
    path = _file(values["image_path"], "image_path")
    mask = values.get("mask_path")
    spacing = values.get("spacing_at_level_0")
    patient = values.get("patient_id")
    return Slide(
        sample_id=str(values.get("sample_id", path.stem)),
        image_path=path,
        mask_path=None if mask is None else _file(mask, "mask_path"),
        spacing_at_level_0=None if spacing is None else _as_float(spacing),
        patient_id=None if patient is None else str(patient),
        tiling={
            **values.get("tiling", {}),
            **{name: value for name, value in values.items() if _is_tiling_option(name)},
        },
    )


def _file(given: Any, field: str) -> Path:
    try:
        return as_path(given)
    except ConfigError as error:
        raise ManifestError(f"{field}: {error}") from None


def _is_blank(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


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
                f"{slide.image_path}): give each slide its own sample_id"
            )
        seen[slide.sample_id] = slide
    return slides


def read_manifest(path: str | os.PathLike[str]) -> list[Slide]:
    """The slides of a CSV manifest: sample_id and image_path, optional mask_path,
    spacing_at_level_0, patient_id and options of a slide's tiling (see `Slide.tiling`); other columns are
    ignored, blank cells mean absent.

    Args:
        path: of the file, or its URL (s3://…, https://…; `slide2vec[cloud]`).

    Raises:
        ManifestError: naming the file and the lines that are wrong.
    """
    try:
        path = as_path(path)
    except ConfigError as error:
        raise ManifestError(f"manifest {error}") from None
    slides: dict[str, Slide] = {}
    lines: dict[str, int] = {}
    wrong: list[str] = []
    for number, row in _rows(path):
        try:
            slide = _from_row(row)
            if slide.sample_id in slides:
                raise ManifestError(
                    f"sample_id {slide.sample_id!r} is already in line {lines[slide.sample_id]}"
                )
        except ManifestError as error:
            wrong.append(f"line {number}: {error}")
        else:
            slides[slide.sample_id], lines[slide.sample_id] = slide, number
    if wrong:
        more = f"; and {len(wrong) - _MOST_LINES} more lines" if len(wrong) > _MOST_LINES else ""
        raise ManifestError(f"manifest {path}, {'; '.join(wrong[:_MOST_LINES])}{more}")
    if not slides:
        raise ManifestError(f"manifest {path} lists no slides")
    return list(slides.values())


def _rows(path: Path) -> Iterator[tuple[int, list[str] | dict[str, str]]]:
    """The line number and the cells of every row; those of a row that is too long as a list."""
    try:
        with as_os_errors(path), path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.reader(file, strict=True)
            header = [name.strip() for name in next(table, [])]
            for column in ("sample_id", "image_path"):
                if header.count(column) != 1:
                    raise ManifestError(
                        f"manifest {path} needs one column {column!r}, separated by commas; found {header}"
                    )
            for cells in table:
                if any(cells):
                    fits = not any(cells[len(header) :])
                    yield (
                        table.line_num,
                        dict(zip_longest(header, cells[: len(header)], fillvalue="")) if fits else cells,
                    )
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise ManifestError(f"manifest {path} cannot be read: {error}") from error


def _from_row(row: list[str] | dict[str, str]) -> Slide:
    if isinstance(row, list):
        raise ManifestError(f"it has {len(row)} cells, more than the header: {','.join(row)[:200]}")
    if _is_blank(row["sample_id"]):
        raise ManifestError("sample_id is blank")
    columns = [name for name in row if name in _FIELDS[:-1] or _is_tiling_option(name)]
    return _from_fields({name: row[name].strip() for name in columns})
