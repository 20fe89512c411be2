"""Write what is one vector: the embeddings of slides and of patients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slide2vec.artifacts.records import PatientEmbeddingArtifact, SlideEmbeddingArtifact
from slide2vec.artifacts.writing import (
    NO_METADATA,
    common_metadata,
    content_of,
    remove_others,
    write_artifact,
)
from slide2vec.choices import OutputFormat
from slide2vec.errors import ArtifactError
from slide2vec.files import as_path

if TYPE_CHECKING:
    import torch

__all__ = ["write_patient_embedding", "write_slide_embedding"]


def write_slide_embedding(
    output_dir: str | Path,
    sample_id: str,
    embedding: torch.Tensor,
    *,
    file_format: OutputFormat = "pt",
    encoder: Mapping[str, Any],
    metadata: Mapping[str, Any] = NO_METADATA,
    compatibility: Mapping[str, Any] = NO_METADATA,
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
    _check_vector(f"slide {sample_id}", embedding)
    sidecar = {
        **metadata,
        **common_metadata(sample_id, "slide_embeddings", file_format, embedding, encoder),
        "compatibility": compatibility,
    }
    contents = [("slide_embeddings", content_of(sidecar, "features", embedding))]
    if latents is not None:
        contents.append(("slide_latents", content_of(sidecar, "latents", latents)))
    path, metadata_path = write_artifact(as_path(output_dir), sidecar, contents)
    latents_folder = as_path(output_dir) / "slide_latents"
    latent_path = None if latents is None else latents_folder / f"{sample_id}.{file_format}"
    remove_others(latents_folder, sample_id, keep=latent_path)
    return SlideEmbeddingArtifact(
        sample_id=sidecar["sample_id"],
        annotation=sidecar.get("annotation"),
        path=path,
        metadata_path=metadata_path,
        format=file_format,
        feature_dim=len(embedding),
        latent_path=latent_path,
    )


def write_patient_embedding(
    output_dir: str | Path,
    patient_id: str,
    embedding: torch.Tensor,
    *,
    num_slides: int,
    file_format: OutputFormat = "pt",
    encoder: Mapping[str, Any],
    metadata: Mapping[str, Any] = NO_METADATA,
    compatibility: Mapping[str, Any] = NO_METADATA,
) -> PatientEmbeddingArtifact:
    """Write a patient's embedding (D,) to `patient_embeddings/`; the sidecar last.

    Args:
        num_slides: that it was made from.
        file_format, encoder, metadata, compatibility: as for `write_slide_embedding`.

    Raises:
        ArtifactError, OutputError: as `write_slide_embedding`.
    """
    _check_vector(f"patient {patient_id}", embedding)
    sidecar = {
        **metadata,
        **common_metadata(patient_id, "patient_embeddings", file_format, embedding, encoder),
        "num_slides": num_slides,
        "compatibility": compatibility,
    }
    contents = [("patient_embeddings", content_of(sidecar, "features", embedding))]
    path, metadata_path = write_artifact(as_path(output_dir), sidecar, contents)
    return PatientEmbeddingArtifact(
        patient_id=patient_id,
        path=path,
        metadata_path=metadata_path,
        format=file_format,
        feature_dim=len(embedding),
        num_slides=num_slides,
    )


def _check_vector(whose: str, embedding: torch.Tensor) -> None:
    if embedding.ndim != 1:
        raise ArtifactError(f"{whose}: its embedding is a vector, got shape {tuple(embedding.shape)}")
