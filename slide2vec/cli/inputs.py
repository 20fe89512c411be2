"""From what was typed to slides: files, directories, glob patterns, CSV manifests."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slide2vec.cli.console import note
from slide2vec.errors import ManifestError
from slide2vec.files import as_path, is_remote
from slide2vec.manifests import MANIFEST_SUFFIXES, read_manifest
from slide2vec.slides import SLIDE_SUFFIXES, IdFrom, Slide, as_slide, id_of

if TYPE_CHECKING:
    from slide2vec.readers.dicom_head import DicomHead

__all__ = ["find_slides"]

logger = logging.getLogger(__name__)

#: Names of skipped files that are listed.
_MOST_NAMES = 5


def find_slides(
    given: Sequence[str],
    *,
    recursive: bool = False,
    spacing_at_level_0: float | None = None,
    slides_dir: Path | None = None,
    id_from: IdFrom = "name",
) -> list[Slide]:
    """The slides that arguments name, in their order, each once; files of a directory by name.

    Args:
        given: files, directories, glob patterns and manifests.
        recursive: look into the subdirectories of directories.
        spacing_at_level_0: µm/px, for all of them.
        slides_dir: the folder of slides that manifests name.
        id_from: what ids are made of, where a manifest gives none; paths count from the directory that was
            given.

    Raises:
        ManifestError: a directory or a pattern gives no slide, or a manifest is wrong.
    """
    slides: dict[tuple[str, Path], Slide] = {}
    for argument in given:
        for found in _expanded(argument, recursive, slides_dir, id_from):
            slide = as_slide(found, spacing_at_level_0, id_from)
            slides.setdefault((slide.sample_id, slide.image_path), slide)
    return list(slides.values())


def _expanded(
    argument: str, recursive: bool, slides_dir: Path | None, id_from: IdFrom
) -> Iterable[Slide | Path]:
    path = as_path(argument)
    is_manifest = path.suffix.lower() in MANIFEST_SUFFIXES
    if is_remote(path):
        return read_manifest(path, slides_dir=slides_dir, id_from=id_from) if is_manifest else [path]
    path = path.expanduser()
    if path.is_dir():
        found = _in_directory(path, recursive)
        if id_from == "name":
            return found
        return [Slide(sample_id=id_of(file.relative_to(path), id_from), image_path=file) for file in found]
    if is_manifest:
        return read_manifest(path, slides_dir=slides_dir, id_from=id_from)
    if glob.has_magic(argument) and not path.exists():
        return _matching(str(path))
    return [path]


def _in_directory(folder: Path, recursive: bool) -> list[Path]:
    files = sorted(folder.rglob("*") if recursive else folder.iterdir())
    slides = [file for file in files if _is_slide(file)]
    _tell_skipped(folder, files, slides)
    if not slides:
        deeper = "" if recursive else " (--recursive looks into its subdirectories)"
        raise ManifestError(
            f"directory {folder} holds no slides{deeper}; looked for {' '.join(sorted(SLIDE_SUFFIXES))}"
        )
    return list(_one_per_series(slides))


def _is_slide(path: Path) -> bool:
    """By its name, or DICOM without one; a link that leads nowhere is one, and fails when it is opened."""
    if path.name.startswith("."):
        return False
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return path.is_file() or (path.is_symlink() and not path.exists())
    return _is_dicom_without_suffix(path)


def _tell_skipped(folder: Path, files: Sequence[Path], slides: Sequence[Path]) -> None:
    """Name the files of a directory that are not taken; those that belong to a slide (MRXS) are its own."""
    from slide2vec.readers.slide_files import folder_of

    taken = set(slides)
    homes = set(filter(None, map(folder_of, slides)))
    skipped = [
        str(file.relative_to(folder))
        for file in files
        if file not in taken and not file.name.startswith(".") and not file.is_dir()
        if homes.isdisjoint(file.parents)
    ]
    if skipped:
        more = f" and {len(skipped) - _MOST_NAMES:,} more" if len(skipped) > _MOST_NAMES else ""
        files_are = "1 file that is" if len(skipped) == 1 else f"{len(skipped):,} files that are"
        note(f"{folder}: skipped {files_are} no slide by name: {', '.join(skipped[:_MOST_NAMES])}{more}")


def _matching(pattern: str) -> list[Path]:
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute patterns)
    found = [Path(name) for name in names if Path(name).is_file()]
    if not found:
        raise ManifestError(f"no file matches {pattern}")
    return list(_one_per_series(found))


def _one_per_series(paths: Sequence[Path]) -> Iterator[Path]:
    """A DICOM slide is many files, and any of them opens the slide: keep the first of its levels."""
    heads = {path: _dicom_head(path) for path in paths}
    levels_first = sorted(paths, key=lambda path: not _is_level(heads[path]))  # stable: else in their order
    chosen: dict[tuple[Path, str], Path] = {}
    for path in levels_first:
        if head := heads[path]:
            chosen.setdefault((path.parent, head.series or path.name), path)
    for path in paths:
        head = heads[path]
        if head is None or chosen[path.parent, head.series or path.name] == path:
            yield path
        else:
            logger.info("%s belongs to the same DICOM slide as another file", path)


def _is_level(head: DicomHead | None) -> bool:
    return head is not None and head.is_level


def _is_dicom_without_suffix(path: Path) -> bool:
    """Named by a number or an UID, as archives do, and a whole-slide image by its head."""
    suffix = path.suffix[1:]
    if suffix and not suffix.isdigit():
        return False
    head = _dicom_head(path)
    return head is not None and head.is_whole_slide


def _dicom_head(path: Path) -> DicomHead | None:
    from slide2vec.readers.dicom_head import dicom_head

    try:
        return dicom_head(path)
    except OSError:  # the run reports it
        return None
