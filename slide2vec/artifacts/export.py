"""The embeddings of a run in another format or precision."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from slide2vec.artifacts.places import KINDS, Kind, names_of_all, owners, owners_called
from slide2vec.artifacts.reading import load_embeddings
from slide2vec.artifacts.records import FORMATS, SCHEMA_VERSION, SIDECAR, read_metadata
from slide2vec.artifacts.tile_features import check_same_files, coordinates_folder
from slide2vec.artifacts.vectors import write_patient_embedding, write_slide_embedding
from slide2vec.artifacts.writing import write_hierarchical_embeddings, write_tile_embeddings
from slide2vec.choices import OutputFormat
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import ArtifactError, ConfigError, OutputError, Slide2VecError
from slide2vec.files import as_path, is_remote, names_below
from slide2vec.tiling import Tiling
from slide2vec.tiling.coordinates import coordinate_paths, load_coordinates
from slide2vec.tiling.types import expand_regions

__all__ = [
    "Dtype",
    "Exported",
    "NotExported",
    "RunSource",
    "check_tiles",
    "described",
    "export_run",
    "found_in",
    "loaded",
]

Dtype = Literal["fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class RunSource:
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
    """An artifact in its new format.

    Attributes:
        sample_id: of the slide; of a patient the patient_id.
        encoder: its name in the run.
        num_tiles: of the tiles or regions that it is of; None for slides and patients.
        feature_dim: D.
        feature_dtype: of PyTorch, "float32".
    """

    sample_id: str
    encoder: str
    kind: Kind
    path: Path
    num_tiles: int | None
    feature_dim: int
    feature_dtype: str


@dataclass(frozen=True, kw_only=True)
class NotExported:
    """An artifact that is not exported, and why.

    Attributes:
        left_out: nothing is wrong with it: the tool that the files are for has no place for such a thing.
    """

    sample_id: str
    encoder: str
    kind: Kind
    error: Slide2VecError
    left_out: bool = False


def export_run(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    file_format: OutputFormat = "h5",
    dtype: Dtype | None = None,
    *,
    encoder: str | None = None,
) -> tuple[list[Exported], list[NotExported]]:
    """Write the embeddings of a run in another format; h5 is what CLAM and TRIDENT read.

    h5 and safetensors files hold the tiles' coordinates, too. What cannot be exported does not stop the rest.

    Args:
        run: output directory of a run, or its URL.
        output: another directory, or its URL. Of a run with several encoders its folders are as in the run;
            with `encoder`, those of that one alone.
        dtype: of the embeddings; None = as they are.
        encoder: only of this one, by its name in the run.

    Raises:
        ConfigError: the output is the run itself, or there is no such encoder.
        ArtifactError: the run has no embeddings.
        OutputError: a file cannot be written.
    """
    done: list[Exported] = []
    failed: list[NotExported] = []
    for source, kind, name in found_in(as_path(run), as_path(output), encoder):
        try:
            done.append(_EXPORTERS[kind](source, name, file_format, dtype))
        except OutputError:
            raise
        except Slide2VecError as error:
            failed.append(NotExported(sample_id=name, encoder=source.encoder, kind=kind, error=error))
    return done, failed


def found_in(run: Path, output: Path, encoder: str | None) -> list[tuple[RunSource, Kind, str]]:
    """What there is to export, by encoder, kind and name.

    Raises:
        ConfigError: the output is the run itself, or there is no such encoder.
        ArtifactError: the run has no embeddings.
    """
    if run.resolve() == output.resolve():
        raise ConfigError(f"--output {output} is the run itself, whose files would be replaced: name another")
    found = [
        (source, kind, name)
        for source in _sources(run, output, encoder)
        for kind in KINDS
        for name in _names(source.features / f"{kind}_embeddings")
    ]
    if not found:
        places = ", ".join(f"{kind}_embeddings/" for kind in KINDS)
        raise ArtifactError(f"{run} has no files in {places}: give the output directory of a run")
    return found


def _sources(run: Path, output: Path, encoder: str | None) -> list[RunSource]:
    """The encoders of a run; its own folder, where none of its sidecars can be read."""
    there = owners(run)
    chosen = there if encoder is None else owners_called(encoder, there)
    if encoder is not None and not chosen:
        names = ", ".join(names_of_all(there)) or "none that can be read"
        raise ConfigError(f"{run} has no embeddings of {encoder!r}; it has: {names}")
    found = [
        RunSource(
            encoder=owner.name,
            features=owner.folder,
            tiles=owner.tiling / "tiles",
            output=output if encoder is not None else _below(output, owner.folder, run),
        )
        for owner in chosen
    ]
    if encoder is None and all(source.features != run for source in found):
        found.insert(0, RunSource(encoder="", features=run, tiles=run / "tiles", output=output))
    return found


def _names(folder: Path) -> list[str]:
    """Slides, and classes of them, of which there is a sidecar or a features file, whole or not."""
    suffixes = (SIDECAR, *(f".{file_format}" for file_format in FORMATS))
    named = {name for ending in suffixes for name in names_below(folder, ending)}
    return sorted(name for name in named if any(_is_file(folder / f"{name}{ending}") for ending in suffixes))


def _is_file(path: Path) -> bool:
    return is_remote(path) or path.is_file()


def _below(output: Path, folder: Path, run: Path) -> Path:
    """The same place below the output as a folder has below its run; either may be behind a URL."""
    return output.joinpath(*folder.parts[len(run.parts) :])


def _export_tiles(
    source: RunSource, sample_id: str, file_format: OutputFormat, dtype: Dtype | None
) -> Exported:
    metadata, path = described(source.features / "tile_embeddings", sample_id)
    values = loaded(path, sample_id, dtype)
    tiles = coordinates_folder(metadata, source.tiles, sample_id)
    tiling = load_coordinates(tiles, sample_id)
    check_tiles(tiling, values, metadata, tiles)
    embedded = _embedded(tiling, values)
    more = _as_it_was(metadata, tiles, tiling)
    artifact = write_tile_embeddings(source.output, embedded, tiling, file_format=file_format, **more)
    return _exported(source, sample_id, "tile", artifact.path, values, len(tiling))


def _export_regions(
    source: RunSource, sample_id: str, file_format: OutputFormat, dtype: Dtype | None
) -> Exported:
    metadata, path = described(source.features / "hierarchical_embeddings", sample_id)
    values = loaded(path, sample_id, dtype)
    multiple = metadata.get("region_tile_multiple")
    if type(multiple) is not int or multiple < 2:
        raise ArtifactError(f"slide {sample_id}: its sidecar has region_tile_multiple {multiple!r}")
    tiles = coordinates_folder(metadata, source.tiles, sample_id)
    tiling = expand_regions(load_coordinates(tiles, sample_id), multiple)
    check_tiles(tiling, values, metadata, tiles)
    embedded = _embedded(tiling, values)
    more = _as_it_was(metadata, tiles, tiling)
    artifact = write_hierarchical_embeddings(source.output, embedded, tiling, file_format=file_format, **more)
    return _exported(source, sample_id, "hierarchical", artifact.path, values, len(tiling))


def _embedded(tiling: Tiling, values: torch.Tensor) -> EmbeddedSlide:
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


def _as_it_was(metadata: dict[str, Any], tiles: Path, tiling: Tiling) -> dict[str, Any]:
    """What the sidecar of tiles or regions says besides; their coordinate files are in `tiles`."""
    arrays, coordinates = coordinate_paths(tiles, tiling.sample_id)
    archive, skipped = metadata.get("tiles_tar_path"), metadata.get("skipped_tiles")
    return {
        "encoder": _encoder(metadata, tiling.sample_id),
        "compatibility": _mapping(metadata.get("compatibility")),
        "coordinates": (arrays if len(tiling) else None, coordinates),
        "tiles_tar_path": None if archive is None else as_path(archive),
        "skipped_tiles": skipped if isinstance(skipped, list) else (),
    }


def _export_slide(
    source: RunSource, sample_id: str, file_format: OutputFormat, dtype: Dtype | None
) -> Exported:
    metadata, path = described(source.features / "slide_embeddings", sample_id)
    values = loaded(path, sample_id, dtype)
    latents = source.features / "slide_latents" / f"{sample_id}{path.suffix}"
    artifact = write_slide_embedding(
        source.output,
        sample_id,
        values,
        file_format=file_format,
        encoder=_encoder(metadata, sample_id),
        metadata=metadata,
        compatibility=_mapping(metadata.get("compatibility")),
        latents=loaded(latents, sample_id, dtype) if latents.exists() else None,
    )
    return _exported(source, sample_id, "slide", artifact.path, values, None)


def _export_patient(
    source: RunSource, patient_id: str, file_format: OutputFormat, dtype: Dtype | None
) -> Exported:
    metadata, path = described(source.features / "patient_embeddings", patient_id)
    values = loaded(path, patient_id, dtype)
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
    source: RunSource, sample_id: str, kind: Kind, path: Path, values: torch.Tensor, num_tiles: int | None
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


def described(folder: Path, sample_id: str) -> tuple[dict[str, Any], Path]:
    """The sidecar of an artifact, ours or the original slide2vec's, and its features file."""
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


def loaded(path: Path, sample_id: str, dtype: Dtype | None) -> torch.Tensor:
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


def check_tiles(tiling: Tiling, values: torch.Tensor, metadata: dict[str, Any], folder: Path) -> None:
    """Refuse coordinates in a folder that are not of the embeddings (the slide was tiled anew since)."""
    check_same_files(metadata, folder, tiling.sample_id)
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
    name, level = metadata.get("encoder_name"), metadata.get("encoder_level")
    if not isinstance(name, str) or not isinstance(level, str):
        raise ArtifactError(f"slide {sample_id}: its sidecar does not name encoder_name and encoder_level")
    return {"name": name, "level": level, "input_size_px": metadata.get("encoder_input_size_px")}


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


#: RunSource, name, format, dtype (None = as it is) -> what was written.
_EXPORTERS: Mapping[Kind, Callable[[RunSource, str, OutputFormat, Dtype | None], Exported]] = {
    "tile": _export_tiles,
    "hierarchical": _export_regions,
    "slide": _export_slide,
    "patient": _export_patient,
}
