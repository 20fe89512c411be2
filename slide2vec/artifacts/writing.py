"""Write the embeddings of a slide: features file first, sidecar last, older files of the slide removed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from slide2vec.artifacts.finite import rows_not_finite
from slide2vec.artifacts.formats import FeatureFile, coords_attributes, write_feature_file
from slide2vec.artifacts.records import (
    FORMATS,
    SCHEMA_VERSION,
    SIDECAR,
    HierarchicalEmbeddingArtifact,
    TileEmbeddingArtifact,
    recorded_dtype,
)
from slide2vec.choices import OutputFormat
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.files import as_path, atomic_path, is_remote, remove
from slide2vec.labels import class_name, split_class_name
from slide2vec.slides import check_id
from slide2vec.tiling import Tiling

if TYPE_CHECKING:
    import torch

__all__ = [
    "NO_METADATA",
    "common_metadata",
    "content_of",
    "remove_others",
    "tiles_metadata",
    "write_artifact",
    "write_hierarchical_embeddings",
    "write_json",
    "write_tile_embeddings",
]

NO_METADATA: Mapping[str, Any] = MappingProxyType({})
#: What a safetensors file says of itself, from its sidecar: what is read without knowing the run.
_IN_SAFETENSORS = (
    "schema_version",
    "artifact_type",
    "sample_id",
    "patient_id",
    "encoder_name",
    "encoder_level",
    "requested_spacing_um",
    "requested_tile_size_px",
    "tile_size_lv0",
)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically: indent 2, sorted keys; paths become text, NumPy's numbers plain ones."""
    text = json.dumps(content, indent=2, sort_keys=True, default=_plain) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _plain(value: object) -> Any:
    if isinstance(value, PurePath) or is_remote(value):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) has no place in JSON")


def write_tile_embeddings(
    output_dir: str | Path,
    embedded: EmbeddedSlide,
    tiling: Tiling,
    *,
    file_format: OutputFormat = "pt",
    encoder: Mapping[str, Any],
    compatibility: Mapping[str, Any] = NO_METADATA,
    coordinates: tuple[Path | None, Path | None] = (None, None),
    tiles_tar_path: Path | None = None,
    skipped_tiles: Sequence[Mapping[str, Any]] = (),
) -> TileEmbeddingArtifact:
    """Write a slide's tile embeddings to `tile_embeddings/` and their sidecar; the sidecar last.

    What was there of the slide stays whole until the new features file is; then its sidecar goes
    first, and its files in other formats last.

    Args:
        file_format: "pt", "npz", "safetensors" or "h5"; docs/formats.md says what is in each.
        encoder: what identifies the encoder, `Model.identity()`: `name`, `level`, `input_size_px`.
        compatibility: what resuming compares; recorded as it is.
        coordinates: the HS2P coordinate files (.npz, .json) of these tiles.
        tiles_tar_path: the archive of these tiles.
        skipped_tiles: `x`, `y` (level-0 px) and `error` of tiles that could not be decoded.

    Raises:
        ArtifactError: the embeddings do not fit their coordinates or the format.
        OutputError: a file cannot be written.
    """
    values = embedded.tile_embeddings
    _check_shape(embedded, (len(embedded.x),))
    metadata = {
        **common_metadata(embedded.sample_id, "tile_embeddings", file_format, values, encoder),
        **tiles_metadata(embedded, tiling, encoder, coordinates, tiles_tar_path, skipped_tiles),
        "compatibility": compatibility,
    }
    common = _write_tiles(output_dir, embedded, tiling, metadata)
    return TileEmbeddingArtifact(**common, num_tiles=len(values))


def write_hierarchical_embeddings(
    output_dir: str | Path,
    embedded: EmbeddedSlide,
    tiling: Tiling,
    *,
    file_format: OutputFormat = "pt",
    encoder: Mapping[str, Any],
    compatibility: Mapping[str, Any] = NO_METADATA,
    coordinates: tuple[Path | None, Path | None] = (None, None),
    tiles_tar_path: Path | None = None,
    skipped_tiles: Sequence[Mapping[str, Any]] = (),
) -> HierarchicalEmbeddingArtifact:
    """Write a slide's embeddings by region, (R, m², D), to `hierarchical_embeddings/`; the sidecar last.

    Args:
        tiling: of the tiles of the regions.
        coordinates: the HS2P coordinate files of the regions.
        file_format, encoder, compatibility, tiles_tar_path, skipped_tiles: as for `write_tile_embeddings`.

    Raises:
        ArtifactError, OutputError: as `write_tile_embeddings`.
    """
    multiple, regions = tiling.region_tile_multiple, tiling.recorded.geometry
    values = embedded.tile_embeddings
    _check_shape(embedded, (len(embedded.x), multiple**2))
    metadata = {
        **common_metadata(embedded.sample_id, "hierarchical_embeddings", file_format, values, encoder),
        **tiles_metadata(embedded, tiling, encoder, coordinates, tiles_tar_path, skipped_tiles),
        "num_regions": len(values),
        "tiles_per_region": multiple**2,
        "region_tile_multiple": multiple,
        "requested_region_size_px": regions.requested_tile_size_px,
        "read_region_size_px": tiling.geometry.read_tile_size_px * multiple,
        "subtile_order": "row_major",
        "compatibility": compatibility,
    }
    common = _write_tiles(output_dir, embedded, tiling, metadata)
    return HierarchicalEmbeddingArtifact(**common, num_regions=len(values), tiles_per_region=multiple**2)


def _check_shape(embedded: EmbeddedSlide, expected: tuple[int, ...]) -> None:
    shape = tuple(embedded.tile_embeddings.shape)
    if len(shape) != len(expected) + 1 or shape[:-1] != expected:
        what = "regions of tiles" if len(expected) == 2 else "tiles"
        raise ArtifactError(
            f"slide {embedded.sample_id}: embeddings of shape {shape} do not belong to "
            f"{' x '.join(map(str, expected))} {what}"
        )


def tiles_metadata(
    embedded: EmbeddedSlide,
    tiling: Tiling,
    encoder: Mapping[str, Any],
    coordinates: tuple[Path | None, Path | None],
    tiles_tar_path: Path | None,
    skipped_tiles: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What sidecars say of the tiles."""
    geometry = tiling.geometry
    remarks = {"remarks": list(tiling.remarks)} if tiling.remarks else {}
    return {
        **remarks,
        "num_tiles": len(tiling),
        "image_path": embedded.image_path,
        "mask_path": embedded.mask_path,
        "encoder_input_size_px": encoder.get("input_size_px"),
        "backend": tiling.backend,
        "tile_size_lv0": geometry.tile_size_lv0,
        "read_tile_size_px": geometry.read_tile_size_px,
        "requested_tile_size_px": geometry.requested_tile_size_px,
        "requested_spacing_um": geometry.requested_spacing_um,
        "coordinates_npz_path": coordinates[0],
        "coordinates_meta_path": coordinates[1],
        "tiles_tar_path": tiles_tar_path,
        "skipped_tiles": list(skipped_tiles),
    }


def _write_tiles(
    output_dir: str | Path, embedded: EmbeddedSlide, tiling: Tiling, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Write features and sidecar; what every artifact has."""
    coords = np.stack([embedded.x, embedded.y], axis=1)
    attributes = coords_attributes(tiling.recorded)
    content = content_of(
        metadata, "features", embedded.tile_embeddings, coords=coords, coords_attributes=attributes
    )
    path, metadata_path = write_artifact(
        as_path(output_dir), metadata, [(metadata["artifact_type"], content)]
    )
    return {
        "sample_id": metadata["sample_id"],
        "annotation": metadata.get("annotation"),
        "path": path,
        "metadata_path": metadata_path,
        "format": metadata["format"],
        "feature_dim": embedded.tile_embeddings.shape[-1],
    }


def common_metadata(
    name: str,
    artifact_type: str,
    file_format: OutputFormat,
    values: torch.Tensor,
    encoder: Mapping[str, Any],
) -> dict[str, Any]:
    """What the sidecar of every artifact says.

    Raises:
        ConfigError: an unknown format.
    """
    key = _id_key(artifact_type)
    annotation, own = (None, name) if key == "patient_id" else split_class_name(name)
    check_id(own, key)
    if annotation is not None:
        check_id(annotation, "annotation")
    if file_format not in FORMATS:
        raise ConfigError(f"embeddings cannot be written as {file_format!r}; allowed: {', '.join(FORMATS)}")
    return {
        "schema_version": SCHEMA_VERSION,
        "artifact_type": artifact_type,
        "format": file_format,
        key: own,
        **({"annotation": annotation} if annotation or artifact_type == "tile_embeddings" else {}),
        "feature_dim": values.shape[-1],
        "feature_dtype": recorded_dtype(str(values.dtype).removeprefix("torch.")),
        "encoder_name": encoder["name"],
        "encoder_level": encoder["level"],
    }


def _id_key(artifact_type: str) -> str:
    return "patient_id" if artifact_type == "patient_embeddings" else "sample_id"


def content_of(metadata: Mapping[str, Any], name: str, values: torch.Tensor, **more: Any) -> FeatureFile:
    """What goes into a features file that a sidecar describes; `name` is the array's."""
    key = _id_key(metadata["artifact_type"])
    whose = metadata[key]
    wrong = rows_not_finite(values.detach().cpu())
    if len(wrong):
        raise ArtifactError(
            f"{'patient' if key == 'patient_id' else 'slide'} {whose}: its {name}, as "
            f"{metadata['feature_dtype']}, hold NaN or infinities, the first at index {int(wrong[0])}; "
            "nothing is written: use fp32 (--dtype, --output-dtype), or embed it again in bf16 or fp32"
        )
    return FeatureFile(
        name=name,
        values=values.detach().cpu().contiguous(),
        metadata={key: str(metadata[key]) for key in _IN_SAFETENSORS if key in metadata},
        values_attributes={"name": whose, "encoder": metadata["encoder_name"]},
        **more,
    )


def write_artifact(
    output_dir: Path, metadata: Mapping[str, Any], contents: Sequence[tuple[str, FeatureFile]]
) -> tuple[Path, Path]:
    """Write (folder, content) pairs and the sidecar of the first.

    The old sidecar goes when all new files are written beside the old ones and before the first is
    renamed: a process killed at any time leaves the old artifact whole, or none, or the new one.
    """
    key, file_format = _id_key(metadata["artifact_type"]), metadata["format"]
    name = class_name(metadata.get("annotation"), metadata[key])
    paths = [output_dir / folder / f"{name}.{file_format}" for folder, _ in contents]
    metadata_path = paths[0].with_name(f"{metadata[key]}{SIDECAR}")
    with ExitStack() as renamed:  # on leaving, the last first: latents before the embedding
        for path, (_, content) in zip(paths, contents, strict=True):
            temporary = renamed.enter_context(atomic_path(path))
            with _naming(f"{'patient' if key == 'patient_id' else 'slide'} {name}"):
                write_feature_file(temporary, content, file_format)
            if path == paths[0]:
                size = temporary.stat().st_size
        remove(metadata_path)
    write_json(metadata_path, {**metadata, "file_size_bytes": size})
    remove_others(paths[0].parent, metadata[key], keep=paths[0])
    return paths[0], metadata_path


def remove_others(folder: Path, name: str, keep: Path | None) -> None:
    """Remove files of that name in other formats: one artifact per slide or patient."""
    for path in (folder / f"{name}.{file_format}" for file_format in FORMATS):
        if path != keep:
            remove(path)


@contextmanager
def _naming(whose: str) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{whose}: {error}") from None
