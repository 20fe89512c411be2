"""Tile embeddings on disk with their coordinates, ours and other tools': what slide encoders take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slide2vec.artifacts.finite import rows_not_finite
from slide2vec.artifacts.reading import load_coords, load_embeddings, load_tile_size
from slide2vec.artifacts.records import SIDECAR, TileEmbeddingArtifact, read_metadata
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import ArtifactError
from slide2vec.files import as_path
from slide2vec.labels import class_name, split_class_name
from slide2vec.slides import Slide, check_id
from slide2vec.tiling import load_coordinates
from slide2vec.tiling.coordinates import coordinate_paths
from slide2vec.tiling.previous_files import are_of_other_files, were_given

if TYPE_CHECKING:
    import torch

__all__ = [
    "StoredTiles",
    "TileFeatures",
    "TileFeaturesLike",
    "as_embedded",
    "check_same_files",
    "coordinates_folder",
    "load_stored",
]

_COORDINATES = ".coordinates.npz"


@dataclass(frozen=True, kw_only=True)
class TileFeatures:
    """Where the tile embeddings of a slide are, for files that slide2vec has not written.

    Attributes:
        path: .pt, .npz, .safetensors or .h5 with (N, D) embeddings, see docs/formats.md.
        sample_id: of the slide; None = as the sidecar says, else the stem of the file.
        coords_path: where the tiles' coordinates are, if not in `path`: an .h5 or .safetensors with
            `coords` (CLAM's and TRIDENT's), or HS2P's <sample_id>.coordinates.npz.
        tile_size_lv0: side of a tile in level-0 px; None = as the attributes of the coordinates say.
        patient_id: for patient-level models.
    """

    path: Path
    sample_id: str | None = None
    coords_path: Path | None = None
    tile_size_lv0: int | None = None
    patient_id: str | None = None


TileFeaturesLike: TypeAlias = "TileEmbeddingArtifact | TileFeatures | str | os.PathLike[str]"


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTiles:
    """Tile embeddings that were loaded.

    Attributes:
        sample_id: with the class before it, where the tiles are of one: "tumor/a".
        features: (N, D), as stored.
        coords: (N, 2) int64, x and y of the tiles in level-0 px; None where no file has them.
        tile_size_lv0: side of a tile in level-0 px; None where nothing says so.
        tissue_fractions: (N,) float32; only HS2P's coordinate files have them.
        metadata: the sidecar of the embeddings; empty without.
    """

    sample_id: str
    path: Path
    features: torch.Tensor
    coords: NDArray[np.int64] | None = None
    tile_size_lv0: int | None = None
    tissue_fractions: NDArray[np.float32] | None = None
    patient_id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def load_stored(given: TileFeaturesLike) -> StoredTiles:
    """Load a slide's tile embeddings with what is known of its tiles.

    Raises:
        ArtifactError: they cannot be read, are not (N, D), or have another number of coordinates.
        TilingError: their coordinate files cannot be read.
    """
    if isinstance(given, TileEmbeddingArtifact):
        asked = TileFeatures(path=given.path)
    else:
        asked = given if isinstance(given, TileFeatures) else TileFeatures(path=as_path(given))
    path = as_path(asked.path)
    metadata = _sidecar(path)
    sample_id = asked.sample_id or str(metadata.get("sample_id", path.stem))
    check_id(sample_id, "sample_id")
    found = StoredTiles(
        sample_id=class_name(metadata.get("annotation"), sample_id),
        path=path,
        features=load_embeddings(path, most=_numbers(metadata)),
        tile_size_lv0=metadata.get("tile_size_lv0"),
        patient_id=asked.patient_id,
        metadata=metadata,
    )
    found = _with_coordinates(found, asked.coords_path)
    if asked.tile_size_lv0 is not None:
        found = replace(found, tile_size_lv0=asked.tile_size_lv0)
    return _checked(found)


def _numbers(metadata: Mapping[str, Any]) -> int | None:
    """How many numbers a sidecar announces; None where it does not say."""
    tiles, dim = metadata.get("num_tiles"), metadata.get("feature_dim")
    return tiles * dim if type(tiles) is int and type(dim) is int else None


def _sidecar(path: Path) -> dict[str, Any]:
    sidecar = path.with_name(f"{path.stem}{SIDECAR}")
    return read_metadata(sidecar) if sidecar.is_file() else {}


def _with_coordinates(found: StoredTiles, coords_path: Path | None) -> StoredTiles:
    """From where the caller says, else from the run's coordinate files, else from the features file."""
    if coords_path is None and (there := _coordinates_there(found)) is not None:
        return _from_hs2p(found, *there)
    path = as_path(coords_path or found.path)
    if path.name.endswith(_COORDINATES):
        return _from_hs2p(found, path.parent, path.name.removesuffix(_COORDINATES))
    return replace(
        found,
        coords=load_coords(path),
        tile_size_lv0=found.tile_size_lv0 or load_tile_size(path) or load_tile_size(found.path),
    )


def _coordinates_there(found: StoredTiles) -> tuple[Path, str] | None:
    """Where the coordinate files are that the sidecar names, and under which name; they may have moved with
    the run."""
    recorded = found.metadata.get("coordinates_meta_path")
    if not isinstance(recorded, str) or not recorded:
        return None
    annotation, own = split_class_name(found.sample_id)
    run = found.path.parents[1 if annotation is None else 2]
    places = (as_path(recorded).parent, own), (run / "tiles", found.sample_id)
    return next((place for place in places if coordinate_paths(*place)[1].is_file()), None)


def coordinates_folder(metadata: Mapping[str, Any], tiles: Path, name: str) -> Path:
    """Where a slide's coordinate files are: those that were given to the run where they were given, as long
    as they are there; else in the run.

    Args:
        metadata: the sidecar of the embeddings.
        tiles: of the run.
        name: of the slide, with the class before it: "tumor/a".
    """
    recorded = metadata.get("coordinates_meta_path")
    if not (isinstance(recorded, str) and were_given(metadata.get("compatibility"))):
        return tiles
    folder = as_path(recorded).parents[0 if split_class_name(name)[0] is None else 1]
    return folder if coordinate_paths(folder, name)[1].is_file() else tiles


def check_same_files(metadata: Mapping[str, Any], folder: Path, name: str) -> None:
    """Refuse coordinates that were made from other contents of a slide's files than its embeddings: there may
    be as many.

    Args:
        metadata: the sidecar of the embeddings.
        folder: of the coordinate files.
        name: of the slide, with the class before it: "tumor/a".

    Raises:
        ArtifactError: they were.
    """
    if are_of_other_files(folder, name, metadata.get("compatibility")):
        raise ArtifactError(
            f"slide {name}: its image or mask has changed between its embeddings by "
            f"{metadata.get('encoder_name')} and its coordinates in {folder}: it was tiled anew since; embed "
            "it again"
        )


def _from_hs2p(found: StoredTiles, folder: Path, name: str) -> StoredTiles:
    check_same_files(found.metadata, folder, name)
    tiling = load_coordinates(folder, name)
    geometry = tiling.geometry
    for key in ("requested_tile_size_px", "requested_spacing_um", "tile_size_lv0"):
        if (recorded := found.metadata.get(key, getattr(geometry, key))) != getattr(geometry, key):
            raise ArtifactError(
                f"slide {found.sample_id}: its embeddings have {key} {recorded}, its coordinates in {folder} "
                f"{getattr(geometry, key)}: it was tiled anew since; embed it again"
            )
    return replace(
        found,
        coords=np.stack([tiling.x, tiling.y], axis=1),
        tile_size_lv0=geometry.tile_size_lv0,
        tissue_fractions=tiling.tissue_fractions,
    )


def _checked(found: StoredTiles) -> StoredTiles:
    shape = tuple(found.features.shape)
    if len(shape) != 2:
        raise ArtifactError(
            f"slide {found.sample_id}: {found.path} holds embeddings of shape {shape}; (N, D) of tiles are "
            "needed"
        )
    if found.coords is not None and len(found.coords) != shape[0]:
        raise ArtifactError(
            f"slide {found.sample_id}: {found.path} has {shape[0]} embeddings, its coordinates are "
            f"{len(found.coords)}: they are not of the same tiles"
        )
    wrong = rows_not_finite(found.features)
    if len(wrong):
        first = int(wrong[0])
        place = "" if found.coords is None else f" at level-0 px ({', '.join(map(str, found.coords[first]))})"
        raise ArtifactError(
            f"slide {found.sample_id}: {len(wrong)} of the {shape[0]} embeddings in {found.path} hold NaN or "
            f"infinities, the first that of tile {first}{place}: embed the slide again in bf16 or fp32"
        )
    return found


def as_embedded(slide: Slide, stored: StoredTiles) -> EmbeddedSlide:
    """Loaded tile embeddings as those of a slide that has just been embedded.

    Raises:
        ArtifactError: coordinates or tile size are not known.
    """
    if stored.coords is None or stored.tile_size_lv0 is None:
        missing = "tile_size_lv0" if stored.coords is not None else "coords_path"
        raise ArtifactError(
            f"slide {stored.sample_id}: neither {stored.path} nor a file beside it says "
            f"{'how large its tiles are' if stored.coords is not None else 'where its tiles are'}: give "
            f"TileFeatures(path=…, {missing}=…)"
        )
    return EmbeddedSlide(
        sample_id=slide.sample_id,
        tile_embeddings=stored.features,
        slide_embedding=None,
        x=stored.coords[:, 0],
        y=stored.coords[:, 1],
        tile_size_lv0=stored.tile_size_lv0,
        image_path=slide.image_path,
        mask_path=slide.mask_path,
        num_tiles=len(stored.features),
    )
