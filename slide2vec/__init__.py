"""Whole-slide pathology images to foundation-model embeddings.

from slide2vec import Model
embedded = Model.from_preset("virchow2").embed_slide("slide.svs")
embedded.tile_embeddings, embedded.x, embedded.y
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slide2vec.lazy import lazy_attributes
from slide2vec.version import __version__

if TYPE_CHECKING:
    from slide2vec.artifacts import (
        DenseImageArtifact,
        DenseRegionArtifact,
        HierarchicalEmbeddingArtifact,
        ImageEmbeddingArtifact,
        PatientEmbeddingArtifact,
        SlideEmbeddingArtifact,
        TileEmbeddingArtifact,
        TileFeatures,
    )
    from slide2vec.bags import BagDataset
    from slide2vec.cohort import RunResult
    from slide2vec.config import ExecutionOptions, MaskSamplingConfig, PreprocessingConfig
    from slide2vec.embedded import EmbeddedPatient, EmbeddedSlide, SlideAttention
    from slide2vec.encoders import TileEncoder, TimmTileEncoder, TorchTileEncoder, register_encoder
    from slide2vec.errors import EmbedImagesError, EmbedPatientsError, EmbedSlidesError, Slide2VecError
    from slide2vec.images import (
        MISSING_FIELD,
        DenseEncodeGeometry,
        DenseEncodeKit,
        DenseImageOptions,
        DenseOptions,
        ImageSpec,
        PatchTokensArtifact,
        SlideRegions,
    )
    from slide2vec.model import Model
    from slide2vec.models import Models
    from slide2vec.pipeline import Pipeline
    from slide2vec.plugins import EncoderProviderDiagnostic
    from slide2vec.recipes import list_encoder_provider_diagnostics, list_models
    from slide2vec.slides import Slide
    from slide2vec.stream import SlideOutcome

__all__ = [
    "MISSING_FIELD",
    "BagDataset",
    "DenseEncodeGeometry",
    "DenseEncodeKit",
    "DenseImageArtifact",
    "DenseImageOptions",
    "DenseOptions",
    "DenseRegionArtifact",
    "EmbedImagesError",
    "EmbedPatientsError",
    "EmbedSlidesError",
    "EmbeddedPatient",
    "EmbeddedSlide",
    "EncoderProviderDiagnostic",
    "ExecutionOptions",
    "HierarchicalEmbeddingArtifact",
    "ImageEmbeddingArtifact",
    "ImageSpec",
    "MaskSamplingConfig",
    "Model",
    "Models",
    "PatchTokensArtifact",
    "PatientEmbeddingArtifact",
    "Pipeline",
    "PreprocessingConfig",
    "RunResult",
    "Slide",
    "Slide2VecError",
    "SlideAttention",
    "SlideEmbeddingArtifact",
    "SlideOutcome",
    "SlideRegions",
    "TileEmbeddingArtifact",
    "TileEncoder",
    "TileFeatures",
    "TimmTileEncoder",
    "TorchTileEncoder",
    "__version__",
    "list_encoder_provider_diagnostics",
    "list_models",
    "register_encoder",
]

#: Loaded on first use, so that `import slide2vec` costs nothing.
_HOMES = {
    "BagDataset": "bags",
    "DenseEncodeGeometry": "images",
    "DenseEncodeKit": "images",
    "DenseImageArtifact": "artifacts",
    "DenseImageOptions": "images",
    "DenseOptions": "images",
    "DenseRegionArtifact": "artifacts",
    "MISSING_FIELD": "images",
    "SlideRegions": "images",
    "EmbedImagesError": "errors",
    "EmbedPatientsError": "errors",
    "EmbedSlidesError": "errors",
    "EmbeddedPatient": "embedded",
    "EmbeddedSlide": "embedded",
    "EncoderProviderDiagnostic": "plugins",
    "ExecutionOptions": "config",
    "HierarchicalEmbeddingArtifact": "artifacts",
    "ImageEmbeddingArtifact": "artifacts",
    "ImageSpec": "images",
    "MaskSamplingConfig": "config",
    "Model": "model",
    "Models": "models",
    "PatchTokensArtifact": "images",
    "PatientEmbeddingArtifact": "artifacts",
    "Pipeline": "pipeline",
    "PreprocessingConfig": "config",
    "RunResult": "cohort",
    "Slide": "slides",
    "Slide2VecError": "errors",
    "SlideAttention": "embedded",
    "SlideEmbeddingArtifact": "artifacts",
    "SlideOutcome": "stream",
    "TileEmbeddingArtifact": "artifacts",
    "TileEncoder": "encoders",
    "TileFeatures": "artifacts",
    "TimmTileEncoder": "encoders",
    "TorchTileEncoder": "encoders",
    "list_encoder_provider_diagnostics": "recipes",
    "list_models": "recipes",
    "register_encoder": "encoders",
}

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
