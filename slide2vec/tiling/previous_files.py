"""Coordinate files and archives of previous runs: of which slides they are, and whether they are still
valid."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from slide2vec.config import MaskSamplingConfig, PreprocessingConfig, QualityConfig
from slide2vec.errors import ConfigError, ManifestError, SlideError, TilingError
from slide2vec.files import as_os_errors, atomic_path, names_below, open_plain
from slide2vec.labels import MERGED, split_class_name
from slide2vec.readers import SlideReader
from slide2vec.readers.fingerprint import same_content
from slide2vec.readers.probe import probe
from slide2vec.slides import Slide
from slide2vec.tiling.coordinates import check_tiling, coordinate_paths, load_coordinates
from slide2vec.tiling.known_misreads import misread_by_earlier_versions
from slide2vec.tiling.tissue_methods import checkpoint_of
from slide2vec.tiling.types import PRECOMPUTED, Segmentation, Tiling

__all__ = [
    "ARCHIVE",
    "Previous",
    "are_of_other_files",
    "find_reusable",
    "qc_of",
    "record_source",
    "recorded_masks",
    "recorded_qc",
    "recorded_slides",
    "segmenter_of",
    "source_path",
    "were_given",
]

_SUFFIX = ".coordinates.meta.json"
#: Of <sample_id>.source.json.
_SCHEMA = 1
#: A source record has a few hundred bytes; what else it may come to hold is not much.
_MOST_BYTES = 2**20

#: `tiles_from` of what was made from a tile archive, in source records and sidecars.
ARCHIVE = "archive"

#: Fields of `qc` that came later: records of runs without them stay as they were.
_LATER_QC = ("method", "max_spot")

#: What a source record is of: the coordinate files, the tile archive.
What: TypeAlias = Literal["coordinates", "tiles_tar"]


@dataclass(frozen=True)
class Previous:
    """What earlier runs may have made of a slide.

    Attributes:
        directory: of coordinate files and archives.
        content: fingerprints of the slide's files now, "image" and "mask".
        warn: called with the directory where only the files' times show whether they are still valid.
    """

    directory: Path
    slide: Slide
    content: Mapping[str, Any]
    warn: Callable[[Path], None]

    def holds(self, what: What, made: Path) -> bool:
        """Whether it was made from the slide as it is now; by the files' times where nothing else is
        recorded.

        Args:
            made: the file that was written last of it.
        """
        recorded = self._recorded(what)
        if recorded is not None:
            return same_content(recorded, self.content)
        if what == "tiles_tar" or not is_newer(made, self.slide):
            return False  # pixels of earlier versions are read again: some of them were wrong
        self.warn(self.directory)
        return True

    def was_misread(self, backend: str) -> bool:
        """Whether tissue was looked for in pixels that an earlier version read wrongly with a back end."""
        if self._recorded("coordinates") is not None:
            return False
        try:
            return misread_by_earlier_versions(backend, probe(self.slide)) is not None
        except SlideError:  # remote: not known
            return True

    def _recorded(self, what: What) -> Any:
        return _read_source(self.directory, self.slide.sample_id).get(what)

    def record(self, what: What) -> None:
        """Write down that it was made from the slide as it is now.

        Raises:
            OutputError: it cannot be written.
        """
        record_source(self.directory, self.slide.sample_id, {what: self.content})


def source_path(directory: Path, sample_id: str) -> Path:
    """The record of what a slide was when its coordinate files and archive were made."""
    return directory / f"{sample_id}.source.json"


def record_source(directory: Path, sample_id: str, entered: Mapping[str, Any]) -> None:
    """Enter something, JSON-ready, in a slide's source record; what else it holds stays. None removes.

    Raises:
        OutputError: it cannot be written.
    """
    merged = {**_read_source(directory, sample_id), "schema_version": _SCHEMA, **entered}
    found = {name: content for name, content in merged.items() if content is not None}
    with atomic_path(source_path(directory, sample_id)) as temporary:
        temporary.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_source(directory: Path, sample_id: str) -> dict[str, Any]:
    """Nothing where there is none that can be read, of a known schema."""
    try:
        with open_plain(source_path(directory, sample_id)) as file:
            found = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(found, dict) and found.get("schema_version") == _SCHEMA
    return found if known else {}


def are_of_other_files(directory: Path, sample_id: str, compatibility: Any) -> bool:
    """Whether a slide's coordinate files were made from other contents of its image and mask than embeddings:
    one of several encoders that share them has tiled the slide anew, or a run that broke off.

    False where one of the two does not say, and for tiles that were given: they are of no mask. Where one is
    of a tile archive, only the mask counts: what an archive is says nothing of the slide.

    Args:
        compatibility: of the embeddings, as their sidecar has it.
    """
    source = _read_source(directory, sample_id)
    recorded = source.get("coordinates")
    if not (isinstance(recorded, Mapping) and isinstance(compatibility, Mapping)):
        return False
    if were_given(compatibility):
        return False
    of_archive = ARCHIVE in (source.get("tiles_from"), compatibility.get("tiles_from"))
    return any(
        name in compatibility and not same_content(recorded.get(name), compatibility[name])
        for name in (("mask",) if of_archive else ("image", "mask"))
    )


def were_given(compatibility: Any) -> bool:
    """Whether the coordinates of embeddings were given, not found in the slide; those of tile archives alone
    were found.

    Args:
        compatibility: of the embeddings, as their sidecar has it.
    """
    geometry = compatibility.get("geometry") if isinstance(compatibility, Mapping) else None
    return isinstance(geometry, Mapping) and "coordinates" in geometry


def find_reusable(previous: Previous, reader: SlideReader, config: PreprocessingConfig) -> Tiling | None:
    """The tiling that an earlier run has written, if it is of this slide, as it is now, with these
    settings; else None."""
    directory, slide = previous.directory, previous.slide
    metadata = coordinate_paths(directory, slide.sample_id)[1]
    if not previous.holds("coordinates", metadata):
        return None
    try:
        tiling = load_coordinates(directory, slide.sample_id)
        check_tiling(tiling, slide, reader, config)
    except TilingError:
        return None
    same_qc = qc_of(directory, slide.sample_id) == recorded_qc(config.qc)
    if not same_qc or not _same_settings(tiling, slide, config) or previous.was_misread(tiling.backend):
        return None
    recorded = _read_source(directory, slide.sample_id)
    if recorded.get("masks") != config.masks.identity(slide.sample_id):
        return None
    checkpoint = None if slide.mask_path is not None else checkpoint_of(config.segmentation)
    if recorded.get("segmenter") != checkpoint:
        return None
    tiling = replace(tiling, segmentation=replace(tiling.segmentation, checkpoint=checkpoint))
    remarks = recorded.get("remarks")
    known = tuple(map(str, remarks)) if isinstance(remarks, list) else ()
    return replace(tiling, remarks=known, qc=config.qc)


def recorded_qc(config: QualityConfig) -> dict[str, Any] | None:
    """What a source record says of `qc`: nothing where it is off; with a network, the digest of its weights.

    Raises:
        WeightsError: they cannot be had.
    """
    if not config.on:
        return None
    made = {
        name: value
        for name, value in config.model_dump(mode="json").items()
        if name not in _LATER_QC or value != QualityConfig.model_fields[name].default
    }
    network = config.network()
    return made if network is None else {**made, "checkpoint": checkpoint_of(network)}


def segmenter_of(directory: Path, sample_id: str) -> str | None:
    """The digest of the weights with which a slide's tissue was found; None of methods without."""
    found = _read_source(directory, sample_id).get("segmenter")
    return None if found is None else str(found)


def qc_of(directory: Path, sample_id: str) -> Any:
    """With which `qc` a slide's coordinate files were made, as in `recorded_qc`."""
    return _read_source(directory, sample_id).get("qc")


def recorded_masks(directory: Path, sample_id: str) -> MaskSamplingConfig:
    """The masks by which a slide's tiles were sampled; those of tissue, where nothing is recorded.

    Raises:
        TilingError: what is recorded makes no sense.
    """
    found = _read_source(directory, sample_id).get("masks")
    if found is None:
        return MaskSamplingConfig()
    try:
        return MaskSamplingConfig(
            pixel_mapping=dict(found["pixel_mapping"]),
            min_coverage={label: found["min_coverage"].get(label, 1.0) for label in found["sampled"]},
            output_mode="merged" if found["annotation"] == MERGED else "per_annotation",
            strategy=found["strategy"],
        )
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        path = source_path(directory, sample_id)
        raise TilingError(
            f"slide {sample_id}: {path} does not say how its mask was sampled: {error}"
        ) from error


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
        name: folder
        for folder in (directory / "tiles", directory)
        for name in names_below(folder, _SUFFIX)
        if not name.startswith("tiles/")  # of the folder of that name
    }
    if not found:
        raise ManifestError(f"{directory} holds no coordinate files (*{_SUFFIX}), nor does its folder tiles/")
    return [_recorded_slide(found[name], name) for name in sorted(found)]


def _recorded_slide(directory: Path, name: str) -> Slide:
    folder, _ = split_class_name(name)
    try:
        tiling = load_coordinates(directory, name)
    except TilingError:
        metadata = coordinate_paths(directory, name)[1]
        return Slide(sample_id=name, image_path=metadata, annotation=folder)
    return Slide(
        sample_id=name,
        image_path=tiling.image_path,
        mask_path=tiling.mask_path,
        spacing_at_level_0=tiling.spacing_at_level_0,
        annotation=folder or tiling.annotation,
    )
