"""What a run's directory says of each of its slides, for the page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slide2vec.artifacts.places import Owner, owners, tiling_folders
from slide2vec.artifacts.records import (
    HierarchicalEmbeddingArtifact,
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
    find_hierarchical_artifact,
    find_slide_artifact,
    find_tile_artifact,
)
from slide2vec.artifacts.tile_features import coordinates_folder
from slide2vec.cohort.process_list import STATES, Row, key_of, state_of, state_of_all
from slide2vec.cohort.shard_lists import merged_process_list
from slide2vec.errors import ArtifactError, Slide2VecError
from slide2vec.files import as_os_errors, as_path, is_remote
from slide2vec.labels import split_class_name
from slide2vec.pictures import slide_size
from slide2vec.tiling import Tiling
from slide2vec.tiling.coordinates import coordinate_paths, load_coordinates
from slide2vec.tiling.previews import tiles_in_words

__all__ = ["ReportedRun", "ReportedSlide"]

_FINDERS = (find_tile_artifact, find_hierarchical_artifact, find_slide_artifact)


@dataclass
class ReportedSlide:
    """One slide (or class of one) of a run.

    Attributes:
        name: sample_id, with the class before it: "tumor/a".
        rows: of the process list, one per encoder.
        tilings: the folder that coordinates are in -> the tiling.
        places: the same folders -> that of the coordinate files, which is elsewhere where they were given.
        given: encoders whose coordinates were given -> the folder of these.
        problems: what cannot be read of it, and why.
    """

    name: str
    rows: list[Row]
    run: ReportedRun
    tilings: dict[Path, Tiling] = field(default_factory=dict)
    places: dict[Path, Path] = field(default_factory=dict)
    given: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def image_path(self) -> Path:
        """The slide's file; in the folder that slides were moved to, where it is said."""
        path = as_path(self.rows[0]["image_path"] or self.name)
        return path if self.run.slides_dir is None else self.run.slides_dir / path.name

    @property
    def mask_path(self) -> Path | None:
        """Of its mask."""
        path = self.rows[0]["mask_path"]
        return as_path(path) if path else None

    def load(self) -> None:
        """Read its coordinates; those that were given to the run, where it has none of its own."""
        places = {folder: folder / "tiles" for folder in self.run.tilings}
        found = {
            folder: tiles
            for folder, tiles in places.items()
            if coordinate_paths(tiles, self.name)[1].is_file()
        }
        self.given = self._given_coordinates()
        elsewhere = {self.run.owners[encoder].tiling: tiles for encoder, tiles in self.given.items()}
        for folder, tiles in {**elsewhere, **found}.items():
            try:
                self.tilings[folder], self.places[folder] = load_coordinates(tiles, self.name), tiles
            except Slide2VecError as error:
                self.problems.append(str(error))

    def _given_coordinates(self) -> dict[str, Path]:
        """Where coordinates are that were given to the run, by encoder."""
        found: dict[str, Path] = {}
        for encoder, owner in self.run.owners.items():
            for artifact in self.artifacts(encoder)[:1]:
                tiles = owner.tiling / "tiles"
                folder = coordinates_folder(artifact.metadata, tiles, self.name)
                found |= {} if folder == tiles else {encoder: folder}
        return found

    def artifacts(
        self, encoder: str
    ) -> list[TileEmbeddingArtifact | HierarchicalEmbeddingArtifact | SlideEmbeddingArtifact]:
        """Its complete embeddings by one encoder, those of tiles first: with those of its tile encoder, where
        the run does not name that."""
        owner = self.run.owners.get(encoder)
        if owner is None:
            return []
        annotation, own = split_class_name(self.name)
        found = [find(owner.folder, own, annotation) for find in _FINDERS]
        return [
            artifact
            for artifact in found
            if artifact is not None
            and self.run.name_of(owner, str(artifact.metadata.get("encoder_name"))) == encoder
        ]

    def facts(self) -> dict[str, Any]:
        """JSON-ready, without pictures; all text is other people's."""
        first = next(iter(self.tilings.values()), None)
        counts = [row["num_tiles"] for row in self.rows]
        failed = [row for row in self.rows if state_of(row) == "failed"]
        remarks = [row["error"] for row in self.rows if row["error"] and state_of(row) != "failed"]
        return {
            "id": self.name,
            "file": str(self.image_path),
            "href": self.run.link(self.image_path),
            "state": self.run.states[self.name],
            "tiles": max((int(float(count)) for count in counts if count), default=None),
            "backend": self.rows[0]["backend"],
            "size": slide_size(first.dimensions, first.geometry.base_spacing_um) if first else "",
            "tiled": [tiles_in_words(each, self._multiple(at)) for at, each in self.tilings.items()],
            "tissue": _mean(first.tissue_fractions) if first else None,
            "qc": {name: _mean(share) for name, share in sorted(first.artefacts.items())} if first else {},
            "errors": _errors(failed),
            "warnings": list(dict.fromkeys([*remarks, *self.problems])),
            "encoders": [fact for row in self.rows if (fact := self._of_encoder(row)) is not None],
            "links": list(self._links()),
        }

    def _multiple(self, folder: Path) -> int | None:
        """Tiles along a side of the regions whose coordinates are in a folder; None for those of tiles."""
        there = (name for name, owner in self.run.owners.items() if owner.tiling == folder)
        for artifact in (found for name in there for found in self.artifacts(name)):
            if isinstance(artifact, HierarchicalEmbeddingArtifact):
                return isqrt(artifact.tiles_per_region)
        return None

    def _of_encoder(self, row: Row) -> dict[str, Any] | None:
        name = row["encoder_name"]
        if not name:
            return None
        found = self.artifacts(name)
        links = [
            [f"{artifact.path.parent.name.replace('_', ' ')}", self.run.link(artifact.path)]
            for artifact in found
        ]
        return {
            "name": name,
            "state": state_of(row),
            "tiles": row["num_tiles"],
            "dim": found[0].feature_dim if found else None,
            "links": [link for link in links if link[1]],
        }

    def _links(self) -> Iterator[list[str]]:
        for folder, tiling in self.tilings.items():
            of = f" of {tiling.geometry.requested_tile_size_px} px" if len(self.tilings) > 1 else ""
            arrays, metadata = coordinate_paths(folder / "tiles", self.name)
            for name, path in (("coordinates", arrays), ("tiling metadata", metadata)):
                if path.is_file() and (link := self.run.link(path)):
                    yield [f"{name}{of}", link]


class ReportedRun:
    """An output directory, for a page that will lie in a folder.

    Args:
        directory: may be behind a URL; then nothing is linked to.
        page: the folder of the page.
        slides_dir: where the slides are now, if they were moved.

    Raises:
        ArtifactError: it is not the output directory of a run.
    """

    def __init__(self, directory: Path, page: Path, slides_dir: Path | None = None) -> None:
        self.directory, self.page, self.slides_dir = directory, page, slides_dir
        with as_os_errors(directory):
            rows = list(merged_process_list(directory).rows.values())
            if not rows:
                raise ArtifactError(
                    f"{directory} is not the output directory of a run: no process_list.csv names slides"
                )
            there = owners(directory)
            #: By every name of their encoders.
            self.owners: Mapping[str, Owner] = {
                **{name: owner for owner in there for name in owner.names},
                **{owner.name: owner for owner in there},
            }
            self.tilings: Sequence[Path] = tiling_folders(directory)
        self.states = state_of_all(rows)
        by_name: dict[str, list[Row]] = {}
        for row in rows:
            by_name.setdefault(key_of(row)[0], []).append(row)
        self.slides = [ReportedSlide(name, theirs, self) for name, theirs in by_name.items()]

    @cached_property
    def encoders(self) -> list[str]:
        """Names, in order of first appearance."""
        names = dict.fromkeys(row["encoder_name"] for slide in self.slides for row in slide.rows)
        return [name for name in names if name]

    def name_of(self, owner: Owner, preset: str) -> str:
        """Of the encoder in a folder whose embeddings have a preset's name: as the process list has it, else
        that of the folder's encoder of slides, which has made them for itself."""
        name = owner.name_of(preset)
        return name if name in self.encoders else owner.name

    def link(self, path: Path) -> str:
        """To a file from the page; none to what is not there, or behind a URL."""
        if is_remote(path) or is_remote(self.page) or not path.is_file():
            return ""
        try:
            relative = os.path.relpath(path.resolve(), self.page.resolve())
        except ValueError:  # on another drive
            return path.resolve().as_uri()
        return quote(relative.replace(os.sep, "/"))

    def facts(self) -> dict[str, Any]:
        """What is said of the run as a whole, JSON-ready."""
        files = ("process_list.csv", "config.yaml", "bill.json", "audit.json")
        counts = {state: sum(each == state for each in self.states.values()) for state in STATES}
        return {
            "directory": str(self.directory),
            "states": counts,
            "encoders": self.encoders,
            "links": [[name, link] for name in files if (link := self.link(self.directory / name))],
        }


def _mean(values: Any) -> float | None:
    return round(float(values.mean()), 5) if len(values) else None


def _errors(failed: Sequence[Row]) -> list[str]:
    """Each once; of which encoder, where they differ."""
    texts = list(dict.fromkeys(row["error"] for row in failed))
    if len(texts) < 2:
        return texts
    return [f"{row['encoder_name']}: {row['error']}" for row in failed]
