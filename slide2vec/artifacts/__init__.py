"""Embedding files: what is in them, written whole or not at all, read without trusting them.

Layout under an output directory: tile_embeddings/<sample_id>.{pt,npz,safetensors,h5} with a sidecar
<sample_id>.meta.json that is written last, so that a sidecar means a complete artifact; likewise
hierarchical_embeddings/, slide_embeddings/ (and slide_latents/, certified by the same sidecar) and
patient_embeddings/. docs/formats.md describes the
files.
"""

from __future__ import annotations

from slide2vec.artifacts.dense_files import DenseImageArtifact, DenseRegionArtifact
from slide2vec.artifacts.reading import load_coords, load_embeddings
from slide2vec.artifacts.records import (
    SCHEMA_VERSION,
    HierarchicalEmbeddingArtifact,
    ImageEmbeddingArtifact,
    PatientEmbeddingArtifact,
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
    find_hierarchical_artifact,
    find_patient_artifact,
    find_slide_artifact,
    find_tile_artifact,
    read_metadata,
    tile_artifacts,
)
from slide2vec.artifacts.tile_features import (
    StoredTiles,
    TileFeatures,
    TileFeaturesLike,
    as_embedded,
    load_stored,
)
from slide2vec.artifacts.vectors import write_patient_embedding, write_slide_embedding
from slide2vec.artifacts.writing import write_hierarchical_embeddings, write_json, write_tile_embeddings

__all__ = [
    "SCHEMA_VERSION",
    "DenseImageArtifact",
    "DenseRegionArtifact",
    "HierarchicalEmbeddingArtifact",
    "ImageEmbeddingArtifact",
    "PatientEmbeddingArtifact",
    "SlideEmbeddingArtifact",
    "StoredTiles",
    "TileEmbeddingArtifact",
    "TileFeatures",
    "TileFeaturesLike",
    "as_embedded",
    "find_hierarchical_artifact",
    "find_patient_artifact",
    "find_slide_artifact",
    "find_tile_artifact",
    "load_coords",
    "load_embeddings",
    "load_stored",
    "read_metadata",
    "tile_artifacts",
    "write_hierarchical_embeddings",
    "write_json",
    "write_patient_embedding",
    "write_slide_embedding",
    "write_tile_embeddings",
]
