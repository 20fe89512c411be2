"""The tissue and the tiles of a run as GeoJSON, which QuPath opens beside the slides."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from slide2vec.artifacts.places import tiling_folders
from slide2vec.config import MaskSamplingConfig, PreviewConfig
from slide2vec.errors import ArtifactError, ConfigError, OutputError, Slide2VecError
from slide2vec.files import as_path, atomic_path, names_below
from slide2vec.labels import TISSUE, class_folder
from slide2vec.readers import open_slide
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling
from slide2vec.tiling.coordinates import load_coordinates
from slide2vec.tiling.outlines import tile_features, tissue_features
from slide2vec.tiling.previous_files import recorded_masks
from slide2vec.tiling.tile import tissue_again

__all__ = ["AreasNotWritten", "WrittenAreas", "export_areas", "tiled_in"]

_COORDINATES = ".coordinates.meta.json"
#: What a file holds.
What: TypeAlias = Literal["tissue", "tiles"]


@dataclass(frozen=True, kw_only=True)
class WrittenAreas:
    """A file that was written.

    Attributes:
        sample_id: of the slide; with the class before it, "tumor/a".
        what: "tissue" (or the class) or "tiles".
        count: of its features.
    """

    sample_id: str
    what: What
    path: Path
    count: int


@dataclass(frozen=True, kw_only=True)
class AreasNotWritten:
    """A slide whose tissue or tiles cannot be exported, and why."""

    sample_id: str
    what: What
    error: Slide2VecError


def export_areas(
    run: str | os.PathLike[str], output: str | os.PathLike[str]
) -> tuple[list[WrittenAreas], list[AreasNotWritten]]:
    """Write `tissue/<sample_id>.geojson` and `tiles/<sample_id>.geojson` of every slide that a run has tiled,
    in level-0 px; those of classes in folders of theirs.

    Tissue is looked for again in the slide (or its mask), with the settings of the tiles; what was too small
    to be tiled is left out. A slide that cannot be read does not stop the others; its tiles are written.

    Args:
        run: output directory of a run or of `slide2vec tile`, or its URL.
        output: another directory, or its URL.

    Raises:
        ConfigError: the output is the run itself.
        ArtifactError: the run has no coordinate files.
        OutputError: a file cannot be written.
    """
    done: list[WrittenAreas] = []
    failed: list[AreasNotWritten] = []
    for place, directory, name in tiled_in(as_path(run), as_path(output)):
        try:
            tiling, masks = load_coordinates(directory, name), recorded_masks(directory, name)
        except Slide2VecError as error:
            failed.append(AreasNotWritten(sample_id=name, what="tiles", error=error))
            continue
        color = masks.color_of(name) or PreviewConfig().tissue_contour_color
        label = tiling.annotation or TISSUE
        tiles = list(tile_features(tiling, label, color))
        done.append(_written(place, name, "tiles", tiles))
        try:
            tissue = list(_tissue(name, tiling, masks, label, color))
            done.append(_written(place, name, "tissue", tissue))
        except OutputError:
            raise
        except Slide2VecError as error:
            failed.append(AreasNotWritten(sample_id=name, what="tissue", error=error))
    return done, failed


def tiled_in(run: Path, output: Path) -> list[tuple[Path, Path, str]]:
    """Where files go, where coordinate files are, and of which slides.

    Raises:
        ConfigError: the output is the run itself.
        ArtifactError: there are none.
    """
    if run.resolve() == output.resolve():
        raise ConfigError(
            f"--output {output} is the run itself, among whose files these would be: name another"
        )
    found = [
        (output.joinpath(*folder.parts[len(run.parts) :]), folder / "tiles", name)
        for folder in tiling_folders(run)
        for name in names_below(folder / "tiles", _COORDINATES)
    ]
    if not found:
        raise ArtifactError(f"{run} has no coordinate files in tiles/: give the output directory of a run")
    return found


def _tissue(
    name: str, tiling: Tiling, masks: MaskSamplingConfig, label: str, color: tuple[int, int, int]
) -> Iterator[dict[str, Any]]:
    slide = Slide(
        sample_id=name,
        image_path=tiling.image_path,
        mask_path=tiling.mask_path,
        spacing_at_level_0=tiling.spacing_at_level_0,
        annotation=class_folder(label),
    )
    with open_slide(slide) as reader:
        if reader.dimensions != tiling.dimensions:
            raise ArtifactError(
                f"slide {name}: {slide.image_path} has {reader.dimensions} px, and its tiles are of a slide "
                f"of {tiling.dimensions} px: tile it anew"
            )
        yield from tissue_features(tissue_again(reader, slide, tiling, masks), label, color)


def _written(place: Path, name: str, what: What, features: list[dict[str, Any]]) -> WrittenAreas:
    path = place / what / f"{name}.geojson"
    content: Mapping[str, Any] = {"type": "FeatureCollection", "features": features}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return WrittenAreas(sample_id=name, what=what, path=path, count=len(features))
