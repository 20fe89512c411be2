"""From tile embeddings to slide embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from slide2vec.artifacts import (
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
    load_embeddings,
    write_slide_embedding,
)
from slide2vec.config import ExecutionOptions
from slide2vec.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Aggregator", "aggregate", "aggregate_artifact"]

Aggregator = Literal["mean", "max"]


def aggregate(tiles: Tensor, aggregator: Aggregator) -> Tensor:
    """(N, D) tile embeddings -> (D,), in float32 and back to their dtype; N must not be 0.

    Raises:
        ConfigError: no such aggregator.
    """
    values = tiles.float()
    if aggregator == "mean":
        return values.mean(0).to(tiles.dtype)
    if aggregator == "max":
        return values.amax(0).to(tiles.dtype)
    raise ConfigError(f'aggregator={aggregator!r} is not "mean" or "max"')


def aggregate_artifact(
    artifact: TileEmbeddingArtifact, aggregator: Aggregator, execution: ExecutionOptions
) -> SlideEmbeddingArtifact:
    """The slide embedding of tile embeddings on disk, written beside them or elsewhere.

    Raises:
        ArtifactError: they cannot be read, or there are none.
    """
    assert execution.output_dir is not None
    recorded = artifact.metadata
    tiles = load_embeddings(artifact.path)
    if not len(tiles):
        raise ArtifactError(
            f"slide {artifact.sample_id} has no tissue, so no tiles to aggregate: leave it out"
        )
    encoder = {"name": recorded.get("encoder_name"), "level": "slide"}
    compatibility = recorded.get("compatibility") or {}
    return write_slide_embedding(
        execution.output_dir,
        artifact.sample_id,
        aggregate(tiles, aggregator),
        file_format=execution.output_format,
        encoder=encoder,
        metadata={"aggregator": aggregator, "image_path": recorded.get("image_path")},
        compatibility={"tiles": compatibility, "aggregator": aggregator},
    )
