"""Defaults of the contract, validation, and the CPU budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ConfigError


def test_preprocessing_defaults() -> None:
    config = PreprocessingConfig()
    assert config.backend == "auto"
    assert config.requested_spacing_um is config.requested_tile_size_px is None
    assert (config.tolerance, config.overlap, config.tissue_threshold) == (0.05, 0.0, 0.01)
    assert config.on_the_fly and config.use_supertiles and not config.resume
    assert config.segmentation.model_dump() == {
        "method": "hsv", "downsample": 64, "sthresh": 8, "sthresh_up": 255, "mthresh": 7, "close": 4,
    }  # fmt: skip
    assert config.filtering.model_dump() == {
        "ref_tile_size": None, "a_t": 4, "a_h": 2,
        "filter_white": False, "filter_black": False, "white_threshold": 220, "black_threshold": 25,
        "fraction_threshold": 0.9, "filter_grayspace": False, "grayspace_saturation_threshold": 0.05,
        "grayspace_fraction_threshold": 0.6, "filter_blur": False, "blur_threshold": 50.0,
        "qc_spacing_um": 2.0,
    }  # fmt: skip
    assert config.preview.tissue_contour_color == (157, 219, 129)
    assert (config.preview.downsample, config.preview.mask_overlay_alpha) == (32, 0)


def test_execution_defaults() -> None:
    options = ExecutionOptions()
    assert options.output_format == "pt"
    assert options.batch_size is options.num_workers is options.num_gpus is options.precision is None
    assert (options.prefetch_factor, options.persistent_workers) == (4, True)
    assert not (options.save_tile_embeddings or options.save_slide_embeddings or options.save_latents)


def test_mappings_merge_over_the_defaults() -> None:
    config = PreprocessingConfig(segmentation={"downsample": 32}, filtering={"ref_tile_size": 224})  # type: ignore[arg-type]
    assert (config.segmentation.downsample, config.segmentation.method) == (32, "hsv")
    assert (config.filtering.ref_tile_size, config.filtering.a_t) == (224, 4)


def test_paths_may_be_text() -> None:
    assert ExecutionOptions(output_dir="out").output_dir == Path("out")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"requested_spacing": 0.5}, "requested_spacing_um"),
        ({"segmentation": {"downsampel": 64}}, "Did you mean downsample"),
        ({"backend": "cucm"}, "backend"),
        ({"requested_spacing_um": -1}, "requested_spacing_um"),
        ({"overlap": 1.0}, "overlap"),
        ({"tissue_threshold": 2}, "tissue_threshold"),
        ({"segmentation": {"mthresh": 4}}, "odd"),
        ({"region_tile_multiple": 1}, "region_tile_multiple"),
        ({"requested_tile_size_px": 224, "requested_region_size_px": 1000}, "1000"),
        (
            {"requested_tile_size_px": 224, "requested_region_size_px": 448, "region_tile_multiple": 3},
            "requested_region_size_px=448",
        ),
    ],
)
def test_bad_values_name_the_field(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreprocessingConfig(**values)  # type: ignore[arg-type]


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ExecutionOptions().batch_size = 3  # type: ignore[misc]


def test_updated_validates() -> None:
    config = PreprocessingConfig(overlap=0.5, segmentation={"close": 2})  # type: ignore[arg-type]
    changed = config.updated(requested_tile_size_px=256)
    assert (changed.overlap, changed.segmentation.close, changed.requested_tile_size_px) == (0.5, 2, 256)
    with pytest.raises(ConfigError):
        config.updated(requested_tile_size_px=0)


@pytest.mark.parametrize(
    ("options", "computed_in", "stored_in"),
    [
        ({}, "bf16", "float32"),
        ({}, "fp16", "float32"),  # the preset's own
        ({"precision": "fp16"}, "fp16", "float16"),
        ({"precision": "fp16"}, "fp32", "float32"),  # an engine that stepped up
        ({"precision": "fp16", "output_dtype": "fp32"}, "fp16", "float32"),
        ({"output_dtype": "fp16"}, "bf16", "float16"),
    ],
)
def test_embeddings_are_in_fp16_where_it_is_asked_for(
    options: dict[str, Any], computed_in: str, stored_in: str
) -> None:
    assert ExecutionOptions(**options).feature_dtype(computed_in) == stored_in


def test_locations_behind_urls_are_text_in_json() -> None:
    """By which plans of one configuration are known."""
    written = PreprocessingConfig(read_coordinates_from="memory://bucket/tiles").model_dump_json()  # type: ignore[arg-type]
    assert '"read_coordinates_from":"memory://bucket/tiles"' in written
