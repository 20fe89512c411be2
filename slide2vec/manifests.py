"""Manifests: tables of slides, as people have them: CSV files, and DataFrames of pandas.

The columns are those of HS2P; those of CLAM (`slide_id`, `case_id`) and TRIDENT (`wsi`, `mpp`) mean the same.
"""

from __future__ import annotations

import csv
import difflib
import io
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from slide2vec.config import MaskSamplingConfig, PreprocessingConfig
from slide2vec.errors import ConfigError, ManifestError, did_you_mean, why_of
from slide2vec.files import as_os_errors, as_path, is_remote
from slide2vec.labels import class_name
from slide2vec.slides import (
    SLIDE_SUFFIXES,
    IdFrom,
    Slide,
    SlideLike,
    as_slides,
    id_of,
    is_missing,
    is_tiling_option,
    slide_from_fields,
)

if TYPE_CHECKING:
    import pandas

__all__ = ["MANIFEST_SUFFIXES", "SlidesLike", "by_class", "classes_of", "given_slides", "read_manifest"]

logger = logging.getLogger(__name__)

#: How names of manifests end; the last ones are named, not read.
MANIFEST_SUFFIXES = (".csv", ".tsv", ".xlsx", ".xls")
#: How Excel's own files begin: a zip archive, and a compound document.
_WORKBOOK_MAGIC = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")

#: What we call a column -> the names that are understood, ours first: HS2P's, CLAM's, TRIDENT's.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "sample_id": ("sample_id", "slide_id"),
    "image_path": ("image_path", "wsi"),
    "mask_path": ("mask_path",),
    "spacing_at_level_0": ("spacing_at_level_0", "mpp"),
    "patient_id": ("patient_id", "case_id"),
}
#: How alike (difflib's ratio) an unknown column has to be to be taken for a slip of the pen.
_NEAR = 0.85
#: Wrong lines of a manifest that an error lists.
_MOST_LINES = 5

_Row: TypeAlias = "list[str] | dict[str, Any]"
#: Several slides, as users give them.
SlidesLike: TypeAlias = "Iterable[SlideLike] | pandas.DataFrame"


def read_manifest(
    path: str | os.PathLike[str],
    *,
    slides_dir: str | os.PathLike[str] | None = None,
    id_from: IdFrom = "name",
) -> list[Slide]:
    """The slides of a manifest.

    Columns: `sample_id` (or `slide_id`) and `image_path` (or `wsi`), one of them at least; optional
    `mask_path`, `spacing_at_level_0` (or `mpp`), `patient_id` (or `case_id`) and options of a slide's tiling
    (see `Slide.tiling`). Other columns are ignored. Blank cells, "nan", "NA" and "None" mean absent.

    A path may begin with "~"; a relative one is looked for in `slides_dir`, the working directory and the
    manifest's folder. Without a column of paths the ids name files of `slides_dir`, with their suffix or
    without.

    Args:
        path: of the file, or its URL (s3://…, https://…; by the extra [cloud]); separated by commas,
            semicolons or tabs; UTF-8, UTF-16 or, with a warning, Windows-1252.
        slides_dir: the folder of the slides.
        id_from: where there is no column of ids, what they are made of: see `slide2vec.slides.id_of`.

    Raises:
        ManifestError: naming the file and the lines that are wrong.
    """
    try:
        path = as_path(path)
        folder = None if slides_dir is None else as_path(slides_dir).expanduser()
    except ConfigError as error:
        raise ManifestError(f"manifest {error}") from None
    columns, rows = _table(path)
    return _collected(f"manifest {path}", "line", _Rows(columns, _Places(path, folder), id_from), rows)


def by_class(
    slides: Iterable[Slide], masks: MaskSamplingConfig, annotations: Sequence[str] | None = None
) -> list[Slide]:
    """Each slide once for every class that masks sample, named by it: one slide after the other, of each the
    classes in the order of `min_coverage`. Slides as they are where tiles are of tissue, or named already.

    Args:
        annotations: only these classes, in this order.

    Raises:
        ConfigError: one of them is not sampled.
    """
    for name in annotations or ():
        if name not in masks.classes:
            raise ConfigError(
                f"annotation {name!r} is not sampled; masks.min_coverage samples: {', '.join(masks.classes)}"
            )
    if not masks.by_class:
        return list(slides)
    asked = masks.classes if annotations is None else dict.fromkeys(annotations)
    return [
        named
        for slide in slides
        for named in (
            [slide]
            if slide.annotation is not None
            else [
                replace(slide, sample_id=class_name(name, slide.sample_id), annotation=name) for name in asked
            ]
        )
    ]


def classes_of(slide: Slide, masks: MaskSamplingConfig, annotation: str | list[str] | None) -> list[Slide]:
    """One slide, as `by_class`: with one of its classes, with several, or with the only one that it has.

    Raises:
        ConfigError: a class is not sampled, or several are and none is named.
    """
    asked = by_class([slide], masks, [annotation] if isinstance(annotation, str) else annotation)
    if annotation is None and len(asked) > 1:
        raise ConfigError(
            f"slide {slide.sample_id}: masks samples {len(asked)} classes, and one slide has one result: say "
            f"annotation={masks.classes[0]!r}, or a list, or embed_slides([…]), which gives all "
            f"({', '.join(masks.classes)})"
        )
    return asked


def given_slides(
    given: SlidesLike, *, slides_dir: str | os.PathLike[str] | None = None, id_from: IdFrom = "name"
) -> list[Slide]:
    """Several slides: `slide2vec.slides.as_slides`, or those of a DataFrame, a slide a row.

    Its columns (and levels of its index that are named like them) are those of `read_manifest`; a cell is
    text, a number or a path, and None, NaN and pandas.NA mean absent, too.

    Args:
        slides_dir, id_from: of a DataFrame, as `read_manifest`.

    Raises:
        ManifestError: a slide is not well given, with the label of its row; or two have one sample_id.
    """
    pandas = sys.modules.get("pandas")  # not imported for those who do not use it
    if pandas is None or not isinstance(given, pandas.DataFrame):
        return as_slides(given)
    source, labels = "the DataFrame of slides", given.index
    known = {name for names in _NAMES.values() for name in names} - set(given.columns)
    if known & set(given.index.names):
        given = given.reset_index()
    header = [str(name).strip() for name in given.columns]
    columns = _columns(source, header)
    folder = None if slides_dir is None else as_path(slides_dir).expanduser()
    cells = given.astype(object).where(given.notna(), "").itertuples(index=False, name=None)
    rows = ((label, dict(zip(header, row, strict=True))) for label, row in zip(labels, cells, strict=True))
    return _collected(source, "row", _Rows(columns, _Places(None, folder), id_from), rows)


def _collected(source: str, unit: str, reader: _Rows, rows: Iterable[tuple[Any, _Row]]) -> list[Slide]:
    """The slides of a table.

    Args:
        source, unit: what the table and its rows are called in errors.
        rows: with their numbers or labels.
    """
    if "image_path" not in reader.columns and reader.places.slides_dir is None:
        raise ManifestError(
            f"{source} names slides (column {reader.columns['sample_id']}) without their paths: say in which "
            "folder they are (--slides-dir DIR, slides_dir=), or add a column image_path"
        )
    slides: dict[str, Slide] = {}
    labels: dict[str, Any] = {}
    wrong: list[str] = []
    for label, row in rows:
        try:
            slide = reader.slide(row)
            if slide.sample_id in slides:
                raise ManifestError(
                    f"sample_id {slide.sample_id!r} is already in {unit} {labels[slide.sample_id]}"
                    + reader.distinct
                )
        except ManifestError as error:
            wrong.append(f"{unit} {label}: {error}")
        else:
            slides[slide.sample_id], labels[slide.sample_id] = slide, label
    if wrong:
        more = f"; and {len(wrong) - _MOST_LINES} more {unit}s" if len(wrong) > _MOST_LINES else ""
        raise ManifestError(f"{source}, {'; '.join(wrong[:_MOST_LINES])}{more}")
    if not slides:
        raise ManifestError(f"{source} lists no slides")
    return list(slides.values())


# the file ------------------------------------------------------------------------------------------


def _table(path: Path) -> tuple[dict[str, str], Iterator[tuple[int, _Row]]]:
    """Which column is what (ours -> the file's), and the line number and cells of every row; those of a row
    that is too long as a list."""
    text = _text(path)
    try:
        first = next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
        delimiter = _delimiter(first)
        table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(table, [])]
    except csv.Error as error:
        raise ManifestError(f"manifest {path} cannot be read: {error}") from error
    return _columns(f"manifest {path}", header), _rows(path, table, header)


def _rows(path: Path, table: Any, header: Sequence[str]) -> Iterator[tuple[int, _Row]]:
    """Of a csv.reader, after the header."""
    try:
        for cells in table:
            if any(cell.strip() for cell in cells):
                fits = not any(cells[len(header) :])
                padded = [*cells, *[""] * (len(header) - len(cells))]
                yield table.line_num, dict(zip(header, padded, strict=False)) if fits else cells
    except csv.Error as error:
        raise ManifestError(f"manifest {path} cannot be read: {error}") from error


def _text(path: Path) -> str:
    """The file as text.

    Raises:
        ManifestError: it is missing, or an Excel workbook.
    """
    try:
        with as_os_errors(path), path.open("rb") as file:
            content = file.read()
    except (OSError, ValueError) as error:
        raise ManifestError(f"manifest {path} cannot be read: {why_of(error)}") from error
    if content.startswith(_WORKBOOK_MAGIC):
        raise ManifestError(
            f"manifest {path} is an Excel workbook: save it as text (File, Save As, CSV UTF-8) and give that"
        )
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16" or b"\0" in content:
            raise ManifestError(f"manifest {path} is no text: {error}") from error
    try:
        text = content.decode("windows-1252")
    except UnicodeDecodeError as error:
        raise ManifestError(f"manifest {path} is neither UTF-8 nor Windows-1252 text: {error}") from error
    logger.warning("manifest %s is not UTF-8 and was read as Windows-1252: check names with accents", path)
    return text


def _delimiter(first: Sequence[str]) -> str:
    """What separates the cells, from the first line split at commas."""
    if len(first) > 1:
        return ","
    known = {name for names in _NAMES.values() for name in names}
    for delimiter in (";", "\t"):
        if known & {name.strip() for name in "".join(first).split(delimiter)}:
            return delimiter
    return ","


def _columns(source: str, header: Sequence[str]) -> dict[str, str]:
    """What we call a column -> what the table calls it.

    Raises:
        ManifestError: a column is missing or there twice, or is a near miss of one that is not there.
    """
    found = {
        ours: name for ours, names in _NAMES.items() if (name := next((n for n in names if n in header), ""))
    }
    for name in header:
        if name and header.count(name) > 1 and (name in found.values() or is_tiling_option(name)):
            raise ManifestError(f"{source} has {header.count(name)} columns {name!r}; keep one")
    _refuse_near_misses(source, header, found)
    found |= {name: name for name in header if is_tiling_option(name)}
    if "image_path" not in found and "sample_id" not in found:
        raise ManifestError(
            f"{source} needs the columns 'sample_id' and 'image_path' (slide_id and wsi are "
            f"understood, too), separated by commas; found {list(header)}"
        )
    if "image_path" not in found and found["sample_id"] == "sample_id":
        raise ManifestError(
            f"{source} needs one column 'image_path' (wsi is understood, too), separated by commas; "
            f"found {list(header)}"
        )
    return found


def _refuse_near_misses(source: str, header: Sequence[str], found: Mapping[str, str]) -> None:
    absent = [name for ours, names in _NAMES.items() if ours not in found for name in names]
    absent += [] if "tissue_threshold" in header else ["tissue_threshold"]
    for name in header:
        if name in found.values() or is_tiling_option(name):
            continue
        plain = name.lower().replace(" ", "_").replace("-", "_")
        near = difflib.get_close_matches(plain, absent, n=1, cutoff=_NEAR)
        if near:
            raise ManifestError(
                f"{source} has a column {name!r}. {did_you_mean(near)} Rename it, so that it is neither "
                "overlooked nor guessed"
            )


# rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Makes slides of rows."""

    columns: Mapping[str, str]
    places: _Places
    id_from: IdFrom

    @property
    def distinct(self) -> str:
        """What to do about equal ids."""
        if "sample_id" in self.columns or self.id_from == "path":
            return ""
        return " (--id-from path makes ids of the whole paths)"

    def slide(self, row: _Row) -> Slide:
        if isinstance(row, list):
            raise ManifestError(f"it has {len(row)} cells, more than the header: {','.join(row)[:200]}")
        values = {ours: _cell(ours, row[name]) for ours, name in self.columns.items()}
        given = values.get("sample_id")
        if given is not None and is_missing(given):
            raise ManifestError(
                "sample_id is blank" if not given else f"sample_id {given!r} means that there is none"
            )
        if "image_path" not in self.columns:
            values["image_path"] = str(self.places.by_name(str(given)))
            values["sample_id"] = _without_suffix(str(given))
        elif is_missing(values["image_path"]):
            raise ManifestError(f"{'' if given is None else f'slide {given}: '}image_path is blank")
        elif given is None:
            values["sample_id"] = id_of(as_path(values["image_path"]), self.id_from)
        slide = slide_from_fields(values)
        PreprocessingConfig().for_slide(slide.sample_id, slide.tiling)  # wrong ones are found at once
        mask = slide.mask_path and self.places.resolved(slide.mask_path)
        return replace(slide, image_path=self.places.resolved(slide.image_path), mask_path=mask)


def _cell(column: str, value: Any) -> Any:
    if isinstance(value, float) and column in ("sample_id", "patient_id"):
        raise ManifestError(
            f"{column} is the number {value}: pandas makes such numbers of whole ones when some are missing. "
            "Give it as text (pandas.read_csv(…, dtype=str), say)"
        )
    return value.strip() if isinstance(value, str) else value


def _without_suffix(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in SLIDE_SUFFIXES else name


class _Places:
    """Where files that a manifest names relatively are looked for, in order."""

    def __init__(self, manifest: Path | None, slides_dir: Path | None) -> None:
        self.slides_dir = slides_dir
        own = [] if manifest is None or is_remote(manifest) else [manifest.parent]
        self._folders = [*([] if slides_dir is None else [slides_dir]), Path(), *own]
        self._by_name: dict[str, list[Path]] | None = None

    def resolved(self, path: Path) -> Path:
        """The path as it is, where it is absolute or leads nowhere."""
        if is_remote(path):
            return path
        path = path.expanduser()
        if path.is_absolute():
            return path
        there = (folder / path for folder in self._folders)
        return next((found for found in there if _exists(found)), path)

    def by_name(self, name: str) -> Path:
        """A slide of the folder, by its name with or without suffix."""
        assert self.slides_dir is not None
        if self._by_name is None:
            self._by_name = self._listed(self.slides_dir)
        found = self._by_name.get(name, [])
        if len(found) > 1:
            raise ManifestError(f"{name!r} may be any of {', '.join(sorted(path.name for path in found))}")
        if not found:
            raise ManifestError(f"folder {self.slides_dir} holds no slide named {name!r}")
        return found[0]

    @staticmethod
    def _listed(folder: Path) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = defaultdict(list)
        try:
            with as_os_errors(folder):
                for path in sorted(folder.iterdir()):
                    if path.suffix.lower() in SLIDE_SUFFIXES:
                        found[path.stem].append(path)
                    found[path.name].append(path)
        except OSError as error:
            raise ManifestError(f"folder {folder} of the slides cannot be listed: {error}") from error
        return found


def _exists(path: Path) -> bool:
    """False also where the name itself is impossible: that fails its slide alone."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
