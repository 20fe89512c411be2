"""One artifact of a run in another format, for `slide2vec export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slide2vec.files import as_path

if TYPE_CHECKING:
    import torch

    from slide2vec.config import OutputFormat
    from slide2vec.embedded import EmbeddedSlide
    from slide2vec.tiling import Tiling

__all__ = ["EXPORTERS", "KINDS", "Dtype", "Exported", "Kind", "Source"]

Kind = Literal["tile", "hierarchical", "slide", "patient"]
Dtype = Literal["fp16", "fp32"]

#: As in slide2vec.artifacts.places, which is not imported for the sake of start-up time.
KINDS: tuple[Kind, ...] = ("tile", "hierarchical", "slide", "patient")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the embeddings of an encoder come from, and where they go.

    Attributes:
        encoder: its name in the run.
        features: the folder of its `tile_embeddings/` and the like.
        tiles: of its coordinate files.
        output: where they go.
    """

    encoder: str
    features: Path
    tiles: Path
    output: Path


@dataclass(frozen=True, kw_only=True)
class Exported:
    sample_id: str
    encoder: str
    kind: Kind
    path: Path
    num_tiles: int | None
    feature_dim: int
    feature_dtype: str


def _export_tiles(source: Source, sample_id: str, file_format: OutputFormat, dtype: Dtype | None) -> Exported:
    from slide2vec.artifacts import write_tile_embeddings
    from slide2vec.tiling.coordinates import load_coordinates

    metadata, path = _described(source.features / "tile_embeddings", sample_id)
    values = _loaded(path, sample_id, dtype)
    tiling = load_coordinates(source.tiles, sample_id)
    _check_tiles(tiling, values, metadata)
    embedded = _embedded(tiling, values)
    more = _as_it_was(metadata, source, tiling)
    artifact = write_tile_embeddings(source.output, embedded, tiling, file_format=file_format, **more)
    return _exported(source, sample_id, "tile", artifact.path, values, len(tiling))


def _export_regions(
    source: Source, sample_id: str, file_format: OutputFormat, dtype: Dtype | None
) -> Exported:
    from slide2vec.artifacts import write_hierarchical_embeddings
    from slide2vec.errors import ArtifactError
    from slide2vec.tiling.coordinates import load_coordinates
    from slide2vec.tiling.regions import unroll

    metadata, path = _described(source.features / "hierarchical_embeddings", sample_id)
    values = _loaded(path, sample_id, dtype)
    multiple = metadata.get("region_tile_multiple")
    if type(multiple) is not int or multiple < 2:
        raise ArtifactError(f"slide {sample_id}: its sidecar has region_tile_multiple {multiple!r}")
    tiling = unroll(load_coordinates(source.tiles, sample_id), multiple)
    _check_tiles(tiling, values, metadata)
    embedded = _embedded(tiling, values)
    more = _as_it_was(metadata, source, tiling)
    artifact = write_hierarchical_embeddings(source.output, embedded, tiling, file_format=file_format, **more)
    return _exported(source, sample_id, "hierarchical", artifact.path, values, len(tiling))


def _embedded(tiling: Tiling, values: torch.Tensor) -> EmbeddedSlide:
    from slide2vec.embedded import EmbeddedSlide

    return EmbeddedSlide(
        sample_id=tiling.sample_id,
        tile_embeddings=values,
        slide_embedding=None,
        x=tiling.recorded.x,
        y=tiling.recorded.y,
        tile_size_lv0=tiling.geometry.tile_size_lv0,
        image_path=tiling.image_path,
        mask_path=tiling.mask_path,
        num_tiles=len(tiling),
    )


def _as_it_was(metadata: dict[str, Any], source: Source, tiling: Tiling) -> dict[str, Any]:
    """What the sidecar of tiles or regions says besides."""
    from slide2vec.tiling.coordinates import coordinate_paths

    arrays, coordinates = coordinate_paths(source.tiles, tiling.sample_id)
    archive, skipped = metadata.get("tiles_tar_path"), metadata.get("skipped_tiles")
    return {
        "encoder": _encoder(metadata, tiling.sample_id),
        "compatibility": _mapping(metadata.get("compatibility")),
        "coordinates": (arrays if len(tiling) else None, coordinates),
        "tiles_tar_path": None if archive is None else as_path(archive),
        "skipped_tiles": skipped if isinstance(skipped, list) else (),
    }


def _export_slide(source: Source, sample_id: str, file_format: OutputFormat, dtype: Dtype | None) -> Exported:
    from slide2vec.artifacts import write_slide_embedding

    metadata, path = _described(source.features / "slide_embeddings", sample_id)
    values = _loaded(path, sample_id, dtype)
    latents = source.features / "slide_latents" / path.name
    artifact = write_slide_embedding(
        source.output,
        sample_id,
        values,
        file_format=file_format,
        encoder=_encoder(metadata, sample_id),
        metadata=metadata,
        compatibility=_mapping(metadata.get("compatibility")),
        latents=_loaded(latents, sample_id, dtype) if latents.exists() else None,
    )
    return _exported(source, sample_id, "slide", artifact.path, values, None)


def _export_patient(
    source: Source, patient_id: str, file_format: OutputFormat, dtype: Dtype | None
) -> Exported:
    from slide2vec.artifacts import write_patient_embedding

    metadata, path = _described(source.features / "patient_embeddings", patient_id)
    values = _loaded(path, patient_id, dtype)
    artifact = write_patient_embedding(
        source.output,
        patient_id,
        values,
        num_slides=int(metadata.get("num_slides") or 0),
        file_format=file_format,
        encoder=_encoder(metadata, patient_id),
        metadata=metadata,
        compatibility=_mapping(metadata.get("compatibility")),
    )
    return _exported(source, patient_id, "patient", artifact.path, values, None)


def _exported(
    source: Source, sample_id: str, kind: Kind, path: Path, values: torch.Tensor, num_tiles: int | None
) -> Exported:
    return Exported(
        sample_id=sample_id,
        encoder=source.encoder,
        kind=kind,
        path=path,
        num_tiles=num_tiles,
        feature_dim=values.shape[-1],
        feature_dtype=str(values.dtype).removeprefix("torch."),
    )


def _described(folder: Path, sample_id: str) -> tuple[dict[str, Any], Path]:
    """The sidecar of an artifact, ours or the original slide2vec's, and its features file."""
    from slide2vec.artifacts.records import FORMATS, SCHEMA_VERSION, SIDECAR, read_metadata
    from slide2vec.errors import ArtifactError

    metadata = read_metadata(folder / f"{sample_id}{SIDECAR}")
    version, file_format = metadata.get("schema_version", 1), metadata.get("format")
    if version not in range(1, SCHEMA_VERSION + 1) or file_format not in FORMATS:
        raise ArtifactError(
            f"slide {sample_id}: its sidecar has schema_version {version!r} and format {file_format!r}; "
            f"known are versions up to {SCHEMA_VERSION} and {', '.join(FORMATS)}"
        )
    path = folder / f"{sample_id}.{file_format}"
    size = path.stat().st_size if path.is_file() else None
    if size != metadata.get("file_size_bytes", size):
        raise ArtifactError(
            f"slide {sample_id}: {path} has {size} bytes, its sidecar says {metadata['file_size_bytes']}: "
            "embed it again"
        )
    return metadata, path


def _loaded(path: Path, sample_id: str, dtype: Dtype | None) -> torch.Tensor:
    import torch

    from slide2vec.artifacts import load_embeddings
    from slide2vec.errors import ArtifactError

    values = load_embeddings(path)
    if dtype is None:
        return values
    made = values.to(torch.float16 if dtype == "fp16" else torch.float32)
    if not torch.equal(made.isfinite(), values.isfinite()):
        largest = values[values.isfinite()].abs().max().item()
        raise ArtifactError(
            f"slide {sample_id}: embeddings of up to {largest:.3g} do not fit into fp16; keep fp32"
        )
    return made


def _check_tiles(tiling: Tiling, values: torch.Tensor, metadata: dict[str, Any]) -> None:
    """Refuse coordinates that are not those of the embeddings (the slide was tiled anew since)."""
    from slide2vec.errors import ArtifactError

    geometry = tiling.geometry
    checks = [("tiles", values.shape[:-1].numel(), len(tiling))]
    for key in ("requested_tile_size_px", "requested_spacing_um", "tile_size_lv0"):
        expected = getattr(geometry, key)
        checks.append((key, metadata.get(key, expected), expected))
    for what, embedded, tiled in checks:
        if embedded != tiled:
            raise ArtifactError(
                f"slide {tiling.sample_id}: its embeddings have {what} {embedded}, its coordinates in tiles/ "
                f"{tiled}: embed it again"
            )


def _encoder(metadata: dict[str, Any], sample_id: str) -> dict[str, Any]:
    from slide2vec.errors import ArtifactError

    name, level = metadata.get("encoder_name"), metadata.get("encoder_level")
    if not isinstance(name, str) or not isinstance(level, str):
        raise ArtifactError(f"slide {sample_id}: its sidecar does not name encoder_name and encoder_level")
    return {"name": name, "level": level, "input_size_px": metadata.get("encoder_input_size_px")}


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


#: Source, name, format, dtype (None = as it is) -> what was written.
EXPORTERS: Mapping[Kind, Callable[[Source, str, OutputFormat, Dtype | None], Exported]] = {
    "tile": _export_tiles,
    "hierarchical": _export_regions,
    "slide": _export_slide,
    "patient": _export_patient,
}
