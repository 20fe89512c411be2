"""Files of ready images: `image_embeddings/<sample_id>.{pt,npz,…}` and a sidecar with the keys of slide2vec
7.1.4, which is written last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slide2vec.artifacts.formats import FeatureFile, write_feature_file
from slide2vec.artifacts.records import SIDECAR, ImageEmbeddingArtifact
from slide2vec.artifacts.writing import remove_others, write_json
from slide2vec.choices import OutputFormat
from slide2vec.files import atomic_path, remove

if TYPE_CHECKING:
    import torch

__all__ = ["IMAGE_EMBEDDINGS", "image_artifact", "write_image_embedding"]

#: The folder, and the artifact_type.
IMAGE_EMBEDDINGS = "image_embeddings"


def image_artifact(
    output_dir: Path, sample_id: str, file_format: OutputFormat, feature_dim: int
) -> ImageEmbeddingArtifact:
    """Where an image's files are, or will be."""
    folder = output_dir / IMAGE_EMBEDDINGS
    return ImageEmbeddingArtifact(
        sample_id=sample_id,
        path=folder / f"{sample_id}.{file_format}",
        metadata_path=folder / f"{sample_id}{SIDECAR}",
        format=file_format,
        feature_dim=feature_dim,
    )


def write_image_embedding(
    output_dir: Path, values: torch.Tensor, metadata: Mapping[str, Any]
) -> ImageEmbeddingArtifact:
    """Write an embedding (D,) and its sidecar; the old sidecar goes before the new features are there, the
    new one comes last, and then files of other formats go.

    Args:
        metadata: of the sidecar, with `sample_id` and `format`; `feature_dim` is added.

    Raises:
        OutputError: a file cannot be written.
    """
    name, file_format = metadata["sample_id"], metadata["format"]
    made = image_artifact(output_dir, name, file_format, values.shape[-1])
    encoder = metadata["encoder_name"]
    content = FeatureFile(
        name="features",
        values=values.detach().cpu().contiguous(),
        metadata={"artifact_type": IMAGE_EMBEDDINGS, "sample_id": name, "encoder_name": encoder},
        values_attributes={"name": name, "encoder": encoder},
    )
    with atomic_path(made.path) as temporary:
        write_feature_file(temporary, content, file_format)
        remove(made.metadata_path)
    write_json(made.metadata_path, {**metadata, "feature_dim": made.feature_dim})
    remove_others(made.path.parent, name, keep=made.path)
    return made
