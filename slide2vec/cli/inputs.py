"""From what was typed to slides: files, directories, glob patterns, CSV manifests."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slide2vec.errors import ManifestError
from slide2vec.files import as_path, is_remote
from slide2vec.slides import Slide, as_slide, read_manifest

if TYPE_CHECKING:
    from slide2vec.readers.dicomhead import DicomHead

__all__ = ["SLIDE_SUFFIXES", "find_slides"]

logger = logging.getLogger(__name__)

#: Files of a directory that are taken for slides.
SLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".vms", ".vmu", ".svslide"}
)


def find_slides(
    given: Sequence[str], *, recursive: bool = False, spacing_at_level_0: float | None = None
) -> list[Slide]:
    """The slides that arguments name, in their order, each once; files of a directory by name.

    Args:
        given: files, directories, glob patterns and CSV manifests.
        recursive: look into the subdirectories of directories.
        spacing_at_level_0: µm/px, for all of them.

    Raises:
        ManifestError: a directory or a pattern gives no slide, or a manifest is wrong.
    """
    slides: dict[tuple[str, Path], Slide] = {}
    for argument in given:
        for found in _expanded(argument, recursive):
            slide = as_slide(found, spacing_at_level_0)
            slides.setdefault((slide.sample_id, slide.image_path), slide)
    return list(slides.values())


def _expanded(argument: str, recursive: bool) -> Iterable[Slide | Path]:
    path = as_path(argument)
    if is_remote(path):
        return read_manifest(path) if path.suffix.lower() == ".csv" else [path]
    path = path.expanduser()
    if path.is_dir():
        return _in_directory(path, recursive)
    if path.suffix.lower() == ".csv":
        return read_manifest(path)
    if glob.has_magic(argument) and not path.exists():
        return _matching(str(path))
    return [path]


def _in_directory(folder: Path, recursive: bool) -> list[Path]:
    files = sorted(folder.rglob("*") if recursive else folder.iterdir())
    slides = [file for file in files if _is_slide(file)]
    if not slides:
        deeper = "" if recursive else " (--recursive looks into its subdirectories)"
        raise ManifestError(
            f"directory {folder} holds no slides{deeper}; looked for {' '.join(sorted(SLIDE_SUFFIXES))}"
        )
    return list(_one_per_series(slides))


def _is_slide(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_file():
        return False
    return path.suffix.lower() in SLIDE_SUFFIXES or _is_dicom_without_suffix(path)


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
    from slide2vec.readers.dicomhead import dicom_head

    try:
        return dicom_head(path)
    except OSError:  # the run will tell
        return None
