"""From what was typed to slides: files, directories, glob patterns, CSV manifests."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from slide2vec.errors import ManifestError
from slide2vec.files import as_path, is_remote
from slide2vec.slides import Slide, as_slide, read_manifest

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
    return path.suffix.lower() in SLIDE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _matching(pattern: str) -> list[Path]:
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute patterns)
    found = [Path(name) for name in names if Path(name).is_file()]
    if not found:
        raise ManifestError(f"no file matches {pattern}")
    return list(_one_per_series(found))


def _one_per_series(paths: Sequence[Path]) -> Iterator[Path]:
    """A DICOM slide is many files, and opening any of them opens the slide: keep the first of each."""
    seen: set[tuple[Path, str]] = set()
    for path in paths:
        series = _dicom_series(path) if path.suffix.lower() == ".dcm" else None
        if series is None:
            yield path
        elif (path.parent, series) not in seen:
            seen.add((path.parent, series))
            yield path
        else:
            logger.info("%s belongs to the same DICOM slide as a file before it", path)


def _dicom_series(path: Path) -> str | None:
    """What files of one DICOM slide share; None for a file that OpenSlide does not open."""
    import openslide

    try:
        with openslide.OpenSlide(path) as handle:
            series = handle.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None
    return None if series is None else str(series)
