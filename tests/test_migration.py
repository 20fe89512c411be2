"""docs/migration.md says of every entry of slide2vec 7.1.4 whether it is here, and what it says is true."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import slide2vec
from slide2vec.runtime import pick_device

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()

#: `slide2vec.__all__` of 7.1.4, without `__version__`.
PUBLIC = [
    "Model",
    "list_models",
    "EncoderProviderDiagnostic",
    "list_encoder_provider_diagnostics",
    "register_encoder",
    "TileEncoder",
    "TimmTileEncoder",
    "TorchTileEncoder",
    "Pipeline",
    "PreprocessingConfig",
    "DenseOptions",
    "DenseImageOptions",
    "DenseEncodeGeometry",
    "DenseEncodeKit",
    "SlideRegions",
    "ImageSpec",
    "ExecutionOptions",
    "RunResult",
    "EmbeddedPatient",
    "EmbeddedSlide",
    "SlideEmbeddingArtifact",
    "HierarchicalEmbeddingArtifact",
    "TileEmbeddingArtifact",
    "DenseRegionArtifact",
    "DenseImageArtifact",
    "ImageEmbeddingArtifact",
    "MISSING_FIELD",
]
#: Public methods of its Model and Pipeline.
METHODS = [
    "from_preset",
    "embed_slide",
    "embed_slides",
    "embed_tiles",
    "aggregate_tiles",
    "embed_patient",
    "embed_patients",
    "embed_images",
    "embed_regions_dense",
    "embed_images_dense",
    "prepare_dense_encoder",
    "pooled_identity_differences",
    "dense_identity_differences",
]
#: Arguments of its register_encoder, with their defaults; the two without have none.
REGISTRATION = {
    "name": inspect.Parameter.empty,
    "encode_dim": None,
    "output_variants": None,
    "default_output_variant": None,
    "input_size": None,
    "supports_variable_input_size": None,
    "variable_input_model_kwargs": None,
    "patch_size": None,
    "level": "tile",
    "tile_encoder": None,
    "tile_encoder_output_variant": None,
    "aggregation_revision": None,
    "supported_spacing_um": inspect.Parameter.empty,
    "default_spacing_um": None,
    "precision": "fp16",
    "source": "",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_here(name: str) -> None:
    assert name in slide2vec.__all__ and getattr(slide2vec, name) is not None
    assert name.endswith("Artifact") or name in PAGE


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_here(name: str) -> None:
    assert callable(getattr(slide2vec.Model, name)) and name in PAGE


def test_registration_has_its_arguments() -> None:
    found = inspect.signature(slide2vec.register_encoder).parameters
    assert {name: each.default for name, each in found.items()} == REGISTRATION


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / link).is_file(), link


def test_auto_is_the_best_device() -> None:
    assert pick_device("auto") == pick_device(None)
    assert slide2vec.Model.from_preset("scattering", device="auto").device == pick_device(None)
