"""Files of the original slide2vec: every spelling that it has had, what has no effect, labels of masks."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from settings_files import NEWEST, OLDEST, Load

from slide2vec.config import ExecutionOptions, PreprocessingConfig, PreviewConfig, SegmentationConfig
from slide2vec.errors import ConfigError
from slide2vec.settings import RunSettings, settings_as_yaml

# the original's files ---------------------------------------------------------------------------


def test_the_originals_default_file(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    assert load(NEWEST, named=False) == RunSettings(
        manifest_path=Path("slides.csv"),
        preset="uni",
        preprocessing=PreprocessingConfig(
            gpu_decode=False,
            preview=PreviewConfig(save_mask_preview=True, save_tiling_preview=True, mask_overlay_alpha=0.5),
        ),
        execution=ExecutionOptions(output_dir=Path("output"), batch_size=32),
    )
    assert not caplog.records


def test_an_almost_empty_file(load: Load) -> None:
    settings = load("csv: slides.csv\nmodel:\n  name: uni\ntiling:\n", named=False)
    assert settings == RunSettings(
        manifest_path=Path("slides.csv"),
        preset="uni",
        preprocessing=PreprocessingConfig(
            tissue_threshold=0.1, preview=PreviewConfig(save_mask_preview=True, save_tiling_preview=True)
        ),
        execution=ExecutionOptions(output_dir=Path("output")),
    )


def test_older_spellings(load: Load) -> None:
    settings = load(OLDEST, named=False)
    config = settings.preprocessing
    assert (config.requested_spacing_um, config.requested_tile_size_px) == (0.5, 256)
    assert (config.requested_region_size_px, config.tissue_threshold) == (2048, 0.2)
    assert config.segmentation.method == "otsu"
    assert config.filtering.ref_tile_size == 256
    assert not (config.preview.save_mask_preview or config.preview.save_tiling_preview)
    assert config.preview.tissue_contour_color == (1, 2, 3)
    assert (settings.execution.num_workers, settings.execution.persistent_workers) == (8, False)


@pytest.mark.parametrize(
    ("params", "method"),
    [
        ("{}", "hsv"),
        ("{use_otsu: true}", "hsv"),  # use_hsv was on unless turned off, and came first
        ("{use_hsv: false}", "threshold"),
        ("{use_hsv: false, use_otsu: true}", "otsu"),
        ("{use_hsv: true, method: hsv}", "hsv"),
    ],
)
def test_segmentation_methods_of_before_4_3(load: Load, params: str, method: str) -> None:
    settings = load(f"tiling: {{seg_params: {params}}}")
    assert settings.preprocessing.segmentation.method == method


def test_tissue_threshold_has_two_spellings(load: Load) -> None:
    def threshold(text: str, *overrides: str) -> float:
        return load(f"tiling: {text}", *overrides).preprocessing.tissue_threshold

    assert threshold("{}") == 0.1
    assert threshold("{masks: {min_coverage: {tissue: 0.02}}}") == 0.02
    assert threshold("{params: {tissue_threshold: 0.3}}") == 0.3
    assert threshold("{params: {tissue_threshold: 0.3}, masks: {min_coverage: {tissue: 0.3}}}") == 0.3
    assert threshold("{params: {tissue_threshold: 0.3}, masks: {min_coverage: {tissue: }}}") == 0.3
    with pytest.raises(
        ConfigError, match=r"min_coverage\.tissue=0\.2 and tiling\.params\.tissue_threshold=0\.3"
    ):
        threshold("{params: {tissue_threshold: 0.3}, masks: {min_coverage: {tissue: 0.2}}}")
    newer = "{masks: {min_coverage: {tissue: 0.2}}}"
    assert threshold(newer, "tiling.params.tissue_threshold=0.4") == 0.4, "an override comes over the file"


def test_gpu_decode_is_auto_only_where_nothing_is_said(load: Load) -> None:
    for text, expected in (("", "auto"), ("{gpu_decode: false}", False), ("{gpu_decode: true}", True)):
        assert load(f"tiling: {text}").preprocessing.gpu_decode is expected or expected == "auto"
    assert load("tiling: {gpu_decode: shared}").preprocessing.gpu_decode == "shared"
    assert load("").preprocessing.gpu_decode == "auto"


@pytest.mark.parametrize(
    ("given", "expected"), [("float16", "fp16"), ("16", "fp16"), ("BF16", "bf16"), ("32", "fp32")]
)
def test_other_names_of_precisions(load: Load, given: str, expected: str) -> None:
    assert load(f"speed: {{precision: {given}}}").execution.precision == expected


def test_no_workers_besides_the_main_process_is_one(load: Load) -> None:
    options = load("speed: {num_dataloader_workers: 0, num_preprocessing_workers: 0}").execution
    assert (options.num_workers, options.num_preprocessing_workers) == (1, 1)


def test_resume_goes_on_in_its_folder(load: Load) -> None:
    def output_dir(*overrides: str) -> Path | None:
        return load("output_dir: out", *overrides).execution.output_dir

    assert output_dir() == output_dir("resume=true") == output_dir("resume_dirname=night") == Path("out")
    assert output_dir("resume=true", "resume_dirname=night") == Path("out/night")


# what has no effect, and what is not supported --------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "tiling.adaptive_batching=true",
        "tiling.jpeg_backend=magic",
        "tiling.mask_backend=openslide",
        "tiling.masks.colors.tissue=[1,2,3]",
        "tiling.seg_params.sam2_device=cuda",
        "wandb.enable=true",
    ],
)
def test_what_has_no_effect_is_said(load: Load, override: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load(NEWEST, override) == load(NEWEST)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and override.partition("=")[0] in record.getMessage()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tiling.seg_params.method=sam3", "'grandqc-artefact-2um' or 'sam2', got 'sam3'"),
        ("tiling.seg_params.sam2_config_path=a.yaml", "SAM 2.1 with Hiera-T"),
    ],
)
def test_what_is_not_supported_is_an_error(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(NEWEST, override)
    assert override.partition("=")[0] in str(caught.value)


def test_sam2_of_the_original_is_ours(load: Load) -> None:
    found = load(NEWEST, "tiling.seg_params.method=sam2", "tiling.seg_params.sam2_checkpoint_path=a.pth")
    assert found.preprocessing.segmentation == SegmentationConfig(method="sam2", weights="a.pth")
    with pytest.raises(ConfigError, match=r"weights=a\.pth is for methods that are networks"):
        load(NEWEST, "tiling.seg_params.sam2_checkpoint_path=a.pth")


# labels of masks ----------------------------------------------------------------------------------


def test_labels_are_added_to_those_of_tissue(load: Load) -> None:
    masks = load(
        NEWEST,
        "tiling.masks.pixel_mapping.tumor=[2, 3]",
        "tiling.masks.min_coverage.tumor=0.5",
        "tiling.masks.min_coverage.tissue=null",
        "tiling.masks.colors.tumor=[255, 0, 0]",
        "tiling.masks.output_mode=merged",
    ).preprocessing.masks
    assert masks.pixel_mapping == {"background": (0,), "tissue": (1,), "tumor": (2, 3)}
    assert masks.min_coverage == {"tumor": 0.5}
    assert masks.colors == {"background": None, "tissue": (157, 219, 129), "tumor": (255, 0, 0)}
    assert (masks.output_mode, masks.strategy, masks.classes) == ("merged", "joint", ("merged",))


def test_a_label_left_blank_is_removed(load: Load) -> None:
    masks = load(
        "tiling: {masks: {pixel_mapping: [{tissue: }, {tumor: 1}], min_coverage: {tumor: 0.3}}}"
    ).preprocessing.masks
    assert masks.pixel_mapping == {"background": (0,), "tumor": (1,)}
    assert masks.min_coverage == {"tumor": 0.3} and masks.colors is None


@pytest.mark.parametrize("masks", ["{pixel_mapping: {tissue: , tumor: 1}, min_coverage: {tumor: 0.3}}", "{}"])
def test_labels_are_what_is_read_back(load: Load, masks: str) -> None:
    settings = load(f"tiling: {{masks: {masks}}}")
    assert load(settings_as_yaml(settings, {}), named=False) == settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pixel_mapping.tumor=1", "labels 'tissue' and 'tumor' both have the value 1"),
        ("pixel_mapping.tissue=true", "label 'tissue' has the value True"),
        ("pixel_mapping.merged=2", "the label 'merged' stands for all labels"),
        (
            "min_coverage.tumor=0.5",
            "there is no label 'tumor' in pixel_mapping. Allowed: background, tissue.",
        ),
        ("min_coverage.background=5", "label 'background' has 5; a least coverage is a fraction, 0 to 1"),
        ("min_coverage.tissue=null", None),
        ("colors.tissue=red", "label 'tissue' has the colour 'red'"),
        ("strategy=both", "'joint' or 'independent', got 'both'"),
    ],
)
def test_labels_that_are_wrong(load: Load, override: str, message: str | None) -> None:
    if message is None:  # the threshold of tissue, as ever
        assert load(NEWEST, f"tiling.masks.{override}").preprocessing.masks.min_coverage == {"tissue": 0.1}
        return
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(NEWEST, f"tiling.masks.{override}")
    assert f"tiling.masks.{override.partition('=')[0].partition('.')[0]}" in str(caught.value)
