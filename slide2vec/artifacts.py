"""Embedding files: their schema, written atomically.

Layout under an output directory: tile_embeddings/<sample_id>.{pt,npz} with a sidecar
<sample_id>.meta.json that is written last, so that a sidecar means a complete artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slide2vec.embedded import EmbeddedSlide
from slide2vec.files import atomic_path
from slide2vec.tiling import Tiling

if TYPE_CHECKING:
    import torch

__all__ = ["SCHEMA_VERSION", "TileArtifact", "write_json", "write_tile_embeddings"]

SCHEMA_VERSION = 1
Format = Literal["pt", "npz"]


@dataclass(frozen=True)
class TileArtifact:
    """The files of one slide's tile embeddings."""

    sample_id: str
    path: Path
    metadata_path: Path
    num_tiles: int
    feature_dim: int


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically: indent 2, sorted keys; paths become text."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


def write_tile_embeddings(
    output_dir: Path,
    embedded: EmbeddedSlide,
    tiling: Tiling,
    *,
    file_format: Format = "pt",
    encoder: Mapping[str, Any],
    coordinates: tuple[Path | None, Path | None] = (None, None),
) -> TileArtifact:
    """Write a slide's tile embeddings and their sidecar; the sidecar last.

    Args:
        file_format: "pt" (one bare tensor (N, D)) or "npz" (`features`, `tile_index`).
        encoder: what identifies the encoder, `Model.identity()`.
        coordinates: the HS2P coordinate files (.npz, .json) of these tiles.
    """
    folder = output_dir / "tile_embeddings"
    path = folder / f"{embedded.sample_id}.{file_format}"
    with atomic_path(path) as temporary:
        _WRITERS[file_format](temporary, embedded.tile_embeddings)
    metadata_path = folder / f"{embedded.sample_id}.meta.json"
    write_json(metadata_path, _tile_metadata(embedded, tiling, file_format, encoder, coordinates))
    count, dim = embedded.tile_embeddings.shape
    return TileArtifact(embedded.sample_id, path, metadata_path, count, dim)


def _write_pt(path: Path, embeddings: torch.Tensor) -> None:
    import torch

    torch.save(embeddings.clone(), path)  # a view would store the whole tensor behind it


def _write_npz(path: Path, embeddings: torch.Tensor) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, features=embeddings.numpy(), tile_index=np.arange(len(embeddings), dtype=np.int64))


_WRITERS: dict[str, Callable[[Path, torch.Tensor], None]] = {"pt": _write_pt, "npz": _write_npz}


def _tile_metadata(
    embedded: EmbeddedSlide,
    tiling: Tiling,
    file_format: str,
    encoder: Mapping[str, Any],
    coordinates: tuple[Path | None, Path | None],
) -> dict[str, Any]:
    geometry = tiling.geometry
    return {
        "schema_version": SCHEMA_VERSION,
        "artifact_type": "tile_embeddings",
        "format": file_format,
        "sample_id": embedded.sample_id,
        "image_path": embedded.image_path,
        "mask_path": embedded.mask_path,
        "num_tiles": embedded.num_tiles,
        "feature_dim": embedded.tile_embeddings.shape[1],
        "feature_dtype": str(embedded.tile_embeddings.dtype).removeprefix("torch."),
        "encoder_name": encoder["name"],
        "encoder_level": encoder["level"],
        "encoder_input_size_px": encoder["input_size_px"],
        "backend": tiling.backend,
        "tile_size_lv0": geometry.tile_size_lv0,
        "read_tile_size_px": geometry.read_tile_size_px,
        "requested_tile_size_px": geometry.requested_tile_size_px,
        "requested_spacing_um": geometry.requested_spacing_um,
        "coordinates_npz_path": coordinates[0],
        "coordinates_meta_path": coordinates[1],
        "tiles_tar_path": None,
        "compatibility": {
            "image_path": embedded.image_path,
            "encoder": dict(encoder),
            "geometry": {
                "requested_spacing_um": geometry.requested_spacing_um,
                "requested_tile_size_px": geometry.requested_tile_size_px,
                "base_spacing_um": geometry.base_spacing_um,
                "tolerance": geometry.tolerance,
                "overlap": geometry.overlap,
            },
        },
    }
