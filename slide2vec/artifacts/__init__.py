"""Embedding files: what is in them, written whole or not at all, read without trusting them.

Layout under an output directory: tile_embeddings/<sample_id>.{pt,npz,safetensors,h5} with a sidecar
<sample_id>.meta.json that is written last, so that a sidecar means a complete artifact; likewise
slide_embeddings/ (and slide_latents/, certified by the same sidecar). docs/formats.md describes the
files.
"""

from __future__ import annotations

from slide2vec.artifacts.reading import load_coords, load_embeddings
from slide2vec.artifacts.records import (
    SCHEMA_VERSION,
    HierarchicalEmbeddingArtifact,
    PatientEmbeddingArtifact,
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
    find_tile_artifact,
    read_metadata,
    tile_artifacts,
)
from slide2vec.artifacts.writing import write_json, write_slide_embedding, write_tile_embeddings

__all__ = [
    "SCHEMA_VERSION",
    "HierarchicalEmbeddingArtifact",
    "PatientEmbeddingArtifact",
    "SlideEmbeddingArtifact",
    "TileEmbeddingArtifact",
    "find_tile_artifact",
    "load_coords",
    "load_embeddings",
    "read_metadata",
    "tile_artifacts",
    "write_json",
    "write_slide_embedding",
    "write_tile_embeddings",
]
