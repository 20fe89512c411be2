"""Write the embeddings of a slide: features file first, sidecar last, older files of the slide removed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from slide2vec.artifacts.encoding import Content, about_coords, write_content
from slide2vec.artifacts.records import (
    FORMATS,
    SCHEMA_VERSION,
    SIDECAR,
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
)
from slide2vec.config import OutputFormat
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import ArtifactError, ConfigError, OutputError
from slide2vec.files import atomic_path
from slide2vec.slides import check_id
from slide2vec.tiling import Tiling

if TYPE_CHECKING:
    import torch

__all__ = ["write_json", "write_slide_embedding", "write_tile_embeddings"]

_NOTHING: Mapping[str, Any] = MappingProxyType({})
#: What a safetensors file says of itself, from its sidecar: what is read without knowing the run.
_IN_SAFETENSORS = (
    "schema_version",
    "artifact_type",
    "sample_id",
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
    if isinstance(value, PurePath):
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
    compatibility: Mapping[str, Any] = _NOTHING,
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
    check_id(embedded.sample_id, "sample_id")
    values, coords = embedded.tile_embeddings, np.stack([embedded.x, embedded.y], axis=1)
    if values.ndim != 2 or len(values) != len(coords):
        raise ArtifactError(
            f"slide {embedded.sample_id}: embeddings of shape {tuple(values.shape)} do not belong to "
            f"{len(coords)} tiles"
        )
    geometry = tiling.geometry
    metadata = {
        **_common_metadata(embedded.sample_id, "tile_embeddings", file_format, values, encoder),
        "image_path": embedded.image_path,
        "mask_path": embedded.mask_path,
        "num_tiles": len(values),
        "encoder_input_size_px": encoder["input_size_px"],
        "backend": tiling.backend,
        "tile_size_lv0": geometry.tile_size_lv0,
        "read_tile_size_px": geometry.read_tile_size_px,
        "requested_tile_size_px": geometry.requested_tile_size_px,
        "requested_spacing_um": geometry.requested_spacing_um,
        "coordinates_npz_path": coordinates[0],
        "coordinates_meta_path": coordinates[1],
        "tiles_tar_path": tiles_tar_path,
        "skipped_tiles": list(skipped_tiles),
        "compatibility": compatibility,
    }
    content = _content(metadata, "features", values, coords=coords, about_coords=about_coords(tiling))
    path, metadata_path = _write(Path(output_dir), metadata, [("tile_embeddings", content)])
    return TileEmbeddingArtifact(
        sample_id=embedded.sample_id,
        path=path,
        metadata_path=metadata_path,
        format=file_format,
        feature_dim=values.shape[1],
        num_tiles=len(values),
    )


def write_slide_embedding(
    output_dir: str | Path,
    sample_id: str,
    embedding: torch.Tensor,
    *,
    file_format: OutputFormat = "pt",
    encoder: Mapping[str, Any],
    metadata: Mapping[str, Any] = _NOTHING,
    compatibility: Mapping[str, Any] = _NOTHING,
    latents: torch.Tensor | None = None,
) -> SlideEmbeddingArtifact:
    """Write a slide's embedding (D,) to `slide_embeddings/`, its latents to `slide_latents/`; the
    sidecar, which stands for both, last.

    Args:
        file_format, encoder, compatibility: as for `write_tile_embeddings`.
        metadata: more for the sidecar.
        latents: of slide encoders that have them; any shape.

    Raises:
        ArtifactError: the embedding is no vector, or the format cannot hold it.
        OutputError: a file cannot be written.
    """
    check_id(sample_id, "sample_id")
    if embedding.ndim != 1:
        raise ArtifactError(
            f"slide {sample_id}: a slide embedding is a vector, got shape {tuple(embedding.shape)}"
        )
    sidecar = {
        **metadata,
        **_common_metadata(sample_id, "slide_embeddings", file_format, embedding, encoder),
        "compatibility": compatibility,
    }
    contents = [("slide_embeddings", _content(sidecar, "features", embedding))]
    if latents is not None:
        contents.append(("slide_latents", _content(sidecar, "latents", latents)))
    path, metadata_path = _write(Path(output_dir), sidecar, contents)
    latents_folder = Path(output_dir) / "slide_latents"
    latent_path = None if latents is None else latents_folder / path.name
    _remove_others(latents_folder, sample_id, keep=latent_path)
    return SlideEmbeddingArtifact(
        sample_id=sample_id,
        path=path,
        metadata_path=metadata_path,
        format=file_format,
        feature_dim=len(embedding),
        latent_path=latent_path,
    )


def _common_metadata(
    sample_id: str,
    artifact_type: str,
    file_format: OutputFormat,
    values: torch.Tensor,
    encoder: Mapping[str, Any],
) -> dict[str, Any]:
    if file_format not in FORMATS:
        raise ConfigError(f"embeddings cannot be written as {file_format!r}; allowed: {', '.join(FORMATS)}")
    return {
        "schema_version": SCHEMA_VERSION,
        "artifact_type": artifact_type,
        "format": file_format,
        "sample_id": sample_id,
        "feature_dim": values.shape[-1],
        "feature_dtype": str(values.dtype).removeprefix("torch."),
        "encoder_name": encoder["name"],
        "encoder_level": encoder["level"],
    }


def _content(metadata: Mapping[str, Any], name: str, values: torch.Tensor, **more: Any) -> Content:
    sample_id = metadata["sample_id"]
    return Content(
        name=name,
        values=values.detach().cpu().contiguous(),
        about={key: str(metadata[key]) for key in _IN_SAFETENSORS if key in metadata},
        about_values={"name": sample_id, "encoder": metadata["encoder_name"]},
        **more,
    )


def _write(
    output_dir: Path, metadata: Mapping[str, Any], contents: Sequence[tuple[str, Content]]
) -> tuple[Path, Path]:
    """Write (folder, content) pairs and the sidecar of the first.

    The old sidecar goes when all new files are written beside the old ones and before the first is
    renamed: a process killed at any time leaves the old artifact whole, or none, or the new one.
    """
    sample_id, file_format = metadata["sample_id"], metadata["format"]
    paths = [output_dir / folder / f"{sample_id}.{file_format}" for folder, _ in contents]
    metadata_path = paths[0].with_name(f"{sample_id}{SIDECAR}")
    with ExitStack() as renamed:  # on leaving, the last first: latents before the embedding
        for path, (_, content) in zip(paths, contents, strict=True):
            temporary = renamed.enter_context(atomic_path(path))
            with _naming_slide(sample_id):
                write_content(temporary, content, file_format)
            if path == paths[0]:
                size = temporary.stat().st_size
        metadata_path.unlink(missing_ok=True)
    write_json(metadata_path, {**metadata, "file_size_bytes": size})
    _remove_others(paths[0].parent, sample_id, keep=paths[0])
    return paths[0], metadata_path


def _remove_others(folder: Path, sample_id: str, keep: Path | None) -> None:
    """Remove a slide's files in other formats: one artifact per slide."""
    for path in (folder / f"{sample_id}.{file_format}" for file_format in FORMATS):
        try:
            if path != keep:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError.of(path, error) from error


@contextmanager
def _naming_slide(sample_id: str) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"slide {sample_id}: {error}") from None
