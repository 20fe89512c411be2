"""Coordinate files of previous runs: of which slides they are, and whether they still hold."""

from __future__ import annotations

from pathlib import Path

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import ManifestError, TilingError
from slide2vec.files import as_os_errors, entries
from slide2vec.readers import SlideReader
from slide2vec.slides import Slide
from slide2vec.tiling.coordinates import check_tiling, coordinate_paths, load_coordinates
from slide2vec.tiling.records import PRECOMPUTED, Segmentation, Tiling

__all__ = ["find_reusable", "is_newer", "recorded_slides"]

_SUFFIX = ".coordinates.meta.json"


def find_reusable(
    directory: Path, slide: Slide, reader: SlideReader, config: PreprocessingConfig
) -> Tiling | None:
    """The tiling in a directory of coordinate files, if it is of this slide, as it is now, with these
    settings; else None."""
    metadata = coordinate_paths(directory, slide.sample_id)[1]
    if not is_newer(metadata, slide):
        return None
    try:
        tiling = load_coordinates(directory, slide.sample_id)
        check_tiling(tiling, slide, reader, config)
    except TilingError:
        return None
    return tiling if _same_settings(tiling, slide, config) else None


def is_newer(made: Path, slide: Slide) -> bool:
    """Whether a file was made after the slide's files were last changed."""
    sources = [path for path in (slide.image_path, slide.mask_path) if path is not None]
    try:
        return _changed_at(made) >= max(map(_changed_at, sources))
    except OSError:
        return False


def _changed_at(path: Path) -> float:
    with as_os_errors(path):
        return path.stat().st_mtime


def _same_settings(tiling: Tiling, slide: Slide, config: PreprocessingConfig) -> bool:
    reference = config.filtering.ref_tile_size or config.requested_tile_size_px
    return (
        (tiling.image_path, tiling.mask_path, tiling.spacing_at_level_0)
        == (slide.image_path, slide.mask_path, slide.spacing_at_level_0)
        and (tiling.geometry.tolerance, tiling.geometry.overlap) == (config.tolerance, config.overlap)
        and tiling.tissue_threshold == config.tissue_threshold
        and tiling.filtering == config.filtering.updated(ref_tile_size=reference)
        and _same_segmentation(tiling.segmentation, slide, config)
    )


def _same_segmentation(made: Segmentation, slide: Slide, config: PreprocessingConfig) -> bool:
    asked = config.segmentation
    if int(made.requested_downsample) != int(asked.downsample):
        return False
    if slide.mask_path is not None:
        return made.method == PRECOMPUTED
    return (made.method, made.sthresh, made.sthresh_up, made.mthresh, made.close) == (
        asked.method,
        asked.sthresh,
        asked.sthresh_up,
        asked.mthresh,
        asked.close,
    )


def recorded_slides(directory: Path) -> list[Slide]:
    """The slides whose coordinate files are in a directory or in its folder `tiles`, by name.

    A slide whose metadata cannot be read has these as its image: it fails when it is planned.

    Raises:
        ManifestError: there are none.
    """
    found = {
        path.name: path
        for folder in (directory / "tiles", directory)
        for path in entries(folder)
        if path.name.endswith(_SUFFIX)
    }
    if not found:
        raise ManifestError(f"{directory} holds no coordinate files (*{_SUFFIX}), nor does its folder tiles/")
    return [_recorded_slide(found[name]) for name in sorted(found)]


def _recorded_slide(metadata: Path) -> Slide:
    name = metadata.name.removesuffix(_SUFFIX)
    try:
        tiling = load_coordinates(metadata.parent, name)
    except TilingError:
        return Slide(sample_id=name, image_path=metadata)
    return Slide(
        sample_id=name,
        image_path=tiling.image_path,
        mask_path=tiling.mask_path,
        spacing_at_level_0=tiling.spacing_at_level_0,
    )
