"""Configuration files: every key, older spellings, references, round trips, and files made to harm."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import random
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from slide2vec.config import (
    ExecutionOptions,
    FilterConfig,
    MaskSamplingConfig,
    PreprocessingConfig,
    PreviewConfig,
    QualityConfig,
    SegmentationConfig,
)
from slide2vec.errors import ConfigError
from slide2vec.settings import RunSettings, load_settings, settings_as_yaml, versions
from slide2vec.settings.keys import KEYS, LABELS, OLDER
from slide2vec.settings.text import as_yaml, parse_yaml

Load = Callable[..., RunSettings]

#: What the original 7.1 has as its default file, with a manifest and a preset filled in.
NEWEST = """
csv: slides.csv
output_dir: "output"
resume: false
resume_dirname:
save_tiles: false
seed: 0
model:
  name: uni
  output_variant:
  batch_size: 32
  save_tile_embeddings: false
  save_slide_embeddings: false
  save_latents: false
  allow_non_recommended_settings: false
tiling:
  on_the_fly: true
  gpu_decode: false
  adaptive_batching: false
  use_supertiles: true
  jpeg_backend: "pil"
  read_coordinates_from:
  read_tiles_from:
  backend: "auto"
  mask_backend: "auto"
  masks:
    output_mode: per_annotation
    strategy: joint
    pixel_mapping:
      background: 0
      tissue: 1
    colors:
      background:
      tissue: [157, 219, 129]
    min_coverage:
      background:
      tissue: 0.01
  params:
    requested_spacing_um:
    tolerance: 0.05
    requested_tile_size_px:
    requested_region_size_px:
    region_tile_multiple:
    overlap: 0.0
  seg_params:
    downsample: 64
    sthresh: 8
    sthresh_up: 255
    mthresh: 7
    close: 4
    method: "hsv"
    sam2_checkpoint_path:
    sam2_config_path:
    sam2_device: "cpu"
    sam2_num_workers:
  filter_params:
    ref_tile_size: ${tiling.params.requested_tile_size_px}
    a_t: 4
    a_h: 2
    filter_white: false
    filter_black: false
    white_threshold: 220
    black_threshold: 25
    fraction_threshold: 0.9
    filter_grayspace: false
    grayspace_saturation_threshold: 0.05
    grayspace_fraction_threshold: 0.6
    filter_blur: false
    blur_threshold: 50.0
    qc_spacing_um: 2.0
  preview:
    save_mask_preview: true
    save_tiling_preview: true
    downsample: 32
    tissue_contour_color: [157, 219, 129]
    mask_overlay_alpha: 0.5
speed:
  precision:
  output_dtype:
  num_dataloader_workers:
  num_gpus:
  num_preprocessing_workers:
  num_cucim_workers: 4
  prefetch_factor_embedding: 4
wandb:
  enable: false
  project: ""
  tags: ["features", "${model.name}", "${tiling.params.requested_tile_size_px}"]
  dir: "/home/user/"
  group:
  resume_id: "${resume_dirname}"
"""

#: As 4.0 and 4.1 spell what differs from it.
OLDEST = """
csv: slides.csv
model: {name: uni}
tiling:
  jpeg_backend: turbojpeg
  params:
    target_spacing_um: 0.5
    target_tile_size_px: 256
    target_region_size_px: 2048
    tissue_threshold: 0.2
  seg_params: {use_otsu: true, use_hsv: false}
  filter_params: {ref_tile_size: "${tiling.params.target_tile_size_px}"}
  preview: {save: false, mask_overlay_color: [1, 2, 3]}
speed: {num_dataloader_workers: 8, persistent_workers_embedding: false}
"""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads settings from text, with overrides; `model.name` is given unless the text gives it."""

    def loaded(text: str = "", *overrides: str, named: bool = True) -> RunSettings:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_settings(path, (["model.name=uni"] if named else []) + list(overrides))

    return loaded


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


# errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tiling: {parms: {overlap: 0.5}}", ["tiling.parms", "tiling.params"]),
        ("tiling: {params: {overlpa: 0.5}}", ["tiling.params.overlpa", "tiling.params.overlap"]),
        ("overlap: 0.5", ["no key overlap", "tiling.params.overlap"]),
        ("model: {level: tile}", ["model.level", "model has", "batch_size"]),
        ("visualize: true", ["visualize", "There are", "tiling"]),
        ("model: uni", ["model is a section", "'uni'"]),
        ("- csv", ["must be a mapping", "['csv']"]),
        ("tiling: {params: {overlap: lots}}", ["tiling.params.overlap", "valid number", "'lots'"]),
        ("tiling: {params: {overlap: '0.5'}}", ["tiling.params.overlap", "valid number"]),
        ("tiling: {params: {overlap: 1.0}}", ["tiling.params.overlap", "less than 1", "1.0"]),
        ("tiling: {params: {overlap: .nan}}", ["tiling.params.overlap", "finite"]),
        ("tiling: {params: {requested_spacing_um: .inf}}", ["requested_spacing_um", "finite"]),
        ("tiling: {seg_params: {mthresh: 4}}", ["tiling.seg_params.mthresh", "odd", "5"]),
        ("tiling: {preview: {tissue_contour_color: [1, 2]}}", ["tissue_contour_color", "[1, 2]"]),
        ("model: {batch_size: true}", ["model.batch_size", "valid integer", "True"]),
        ("model: {batch_size: 2.5}", ["model.batch_size", "valid integer", "2.5"]),
        ("resume: 1", ["resume", "valid boolean", "1"]),
        ("save_tiles: 'false'", ["save_tiles", "valid boolean", "'false'"]),
        ("csv: 7", ["csv", "7"]),
        ('csv: "a\\0b"', ["csv", "NUL"]),
        ("seed: -1", ["seed", "greater than or equal to 0"]),
        ("seed: 99999999999", ["seed", "less than"]),
        ("output_format: csv", ["output_format", "'pt'", "'csv'"]),
        ("speed: {precision: fp7}", ["speed.precision", "'fp7'"]),
        ("model: {output_variant: cls}", ["model.output_variant", "uni", "cls"]),
        ("tiling: {seg_params: {method: hsv, use_hsv: false}}", ["method=hsv", "threshold"]),
        (
            "tiling: {params: {requested_tile_size_px: 224, requested_region_size_px: 300}}",
            ["tiling.params.requested_region_size_px=300", "tiling.params.requested_tile_size_px=224"],
        ),
    ],
)
def test_errors_name_key_value_and_remedy(load: Load, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert [word for word in words if word not in str(caught.value)] == []


def test_errors_name_the_file_or_the_command_line(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: seed: "):
        load("seed: x")
    with pytest.raises(ConfigError, match=r"^command line: seed: "):
        load("seed: 1", "seed=x")


@pytest.mark.parametrize("name", ["unii", "x" * 4000, "../uni"])
def test_presets_are_checked(load: Load, name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.name: "):
        load("", f"model.name={name}")


def test_a_missing_preset(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"model\.name is missing"):
        load("csv: a.csv", named=False)
    assert load_settings(None, values={"model.name": "uni"}).preset == "uni"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"{re.escape(str(path))} cannot be read"):
            load_settings(path)


# overrides --------------------------------------------------------------------------------------


def test_overrides_are_yaml_values_and_the_last_counts(load: Load) -> None:
    settings = load(
        "tiling: {params: {overlap: 0.1, tolerance: 0.2}}",
        "tiling.params.overlap=0.25",
        "tiling.params.tolerance=null",
        "tiling.preview.tissue_contour_color=[1, 2, 3]",
        "model.device=cuda:1",
        "csv=slides=2.csv",
        "speed.prefetch_factor_embedding=8",
        "tiling.params.overlap=5e-1",
    )
    assert settings.preprocessing.overlap == 0.5
    assert settings.preprocessing.tolerance == 0.05, "null is the default"
    assert settings.preprocessing.preview.tissue_contour_color == (1, 2, 3)
    assert settings.device == "cuda:1" and settings.manifest_path == Path("slides=2.csv")
    assert settings.execution.prefetch_factor == 8


def test_values_come_over_overrides(tmp_path: Path) -> None:
    settings = load_settings(
        None, ["model.name=uni", "seed=1"], {"seed": 2, "tiling.params.overlap": 0.5, "csv": "${seed}"}
    )
    assert (settings.seed, settings.preprocessing.overlap) == (2, 0.5)
    assert settings.manifest_path == Path("${seed}"), "taken literally"


@pytest.mark.parametrize("text", ["", "seed", "=1", "+seed=1", "~seed", "~seed=", "a" * 5000])
def test_what_is_no_override(load: Load, text: str) -> None:
    with pytest.raises(ConfigError, match=r"override '"):
        load("", text)


def test_deep_overrides(load: Load) -> None:
    with pytest.raises(ConfigError, match="no key"):
        load("", "wandb." + "a." * 5000 + "b=1")


def test_home_is_expanded(load: Load) -> None:
    settings = load("output_dir: ~/run", "csv=~/slides.csv")
    assert settings.execution.output_dir == Path.home() / "run"
    assert settings.manifest_path == Path.home() / "slides.csv"


# references -------------------------------------------------------------------------------------


def test_references(load: Load) -> None:
    settings = load(
        "seed: 7\n"
        "wandb: {exp_name: night, project: 'p-${seed}'}\n"
        "output_dir: 'out/${ model.name }-${seed}/${wandb.project}/${tiling.params.tolerance}'\n"
        "csv: ${resume_dirname}\n"
        "resume_dirname: ${wandb.exp_name}\n"
        "speed: {num_gpus: '${seed}'}\n"
        "model: {weights: '\\${seed}'}\n"
    )
    assert settings.execution.output_dir == Path("out/uni-7/p-7/0.05"), "defaults can be referred to"
    assert settings.manifest_path == Path("night")
    assert settings.execution.num_gpus == 7, "a whole reference keeps its type"
    assert settings.weights == "${seed}", "an escaped one is text"


def test_references_see_overrides(load: Load) -> None:
    assert load("output_dir: out/${seed}", "seed=3").execution.output_dir == Path("out/3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: '${oc.env:HOME}'", "resolvers"),
        ("output_dir: '${model.${seed}}'", "not supported"),
        ("output_dir: '${.seed}'", "not supported"),
        ("output_dir: '${}'", "not supported"),
        ("output_dir: '${seed'", "not supported"),
        ("output_dir: ${tiling.parms.overlap}", "Did you mean tiling.params.overlap"),
        ("output_dir: ${tiling.params}", "no key tiling.params"),
        ("output_dir: ${csv}\ncsv: ${output_dir}", "csv -> output_dir -> csv"),
        ("output_dir: out/${csv}", "is blank"),
        ("output_dir: out/${wandb.tags}\nwandb: {tags: [a]}", "is a list"),
        ("csv: ${wandb.a}\nwandb: {a: ['${wandb.b}'], b: [c]}", "is a list"),
    ],
)
def test_references_that_are_not_supported(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(text)
    assert "run.yaml: " in str(caught.value)


# YAML -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("+.5", 0.5), ("1_000.5", 1000.5), ("-2", -2), ("0x10", 16),
        ("2024-01-31", "2024-01-31"), ("yes", True), ("~", None), ("", None), ("'1'", "1"), ("!!str 1", "1"),
        ("1:30.5", "1:30.5"), ("1.2.3", "1.2.3"),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("{a: &x {b: 1}, c: {<<: [{b: 3}, *x], d: 2}}", {"a": {"b": 1}, "c": {"b": 3, "d": 2}}),
    ],
)  # fmt: skip
def test_plain_values(text: str, expected: object) -> None:
    assert parse_yaml(text, "here") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' appears twice"),
        ("a: 1\nb: !!python/object/apply:os.system [echo]\n", "line 2: !!python/object/apply:os.system"),
        ("a: !!binary aGk=", "line 1: !!binary"),
        ("a: !local x", "line 1: !local"),
        ("a: !!set {x}", "line 1: !!set"),
        ("a: !!float [1]", "line 1: !!float"),
        ("a: !!int x", "line 1: 'x' is no int"),
        ("1: a", "line 1: key 1 is not text"),
        ("on: a", "line 1: key True is not text"),
        ("[a]: b", "line 1: key ['a'] is not text"),
        ("a: *b", "line 1: found undefined alias"),
        ("a: [1\nb: 2", "line 2"),
        ("a:\n\tb: 1", "line 2: found character '\\t'"),
        ("--- a\n--- b", "line 2: but found another document"),
        ("a: {<<: 1}", "line 1: << takes a mapping"),
        ('a: "\\U99999999"', "not YAML"),
        ("a: \x01", "special characters are not allowed"),
    ],
)
def test_what_is_not_plain_yaml(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_yaml(text, "here")


def test_text_that_looks_like_something_else_survives() -> None:
    values = [
        "1e5",
        "1e-3",
        "2024-01-31",
        "yes",
        "null",
        "~",
        "",
        " a",
        "a: b",
        "#a",
        "é",
        "1:30",
        "<<",
        "=",
        "[x",
    ]
    assert parse_yaml(as_yaml({"values": values}), "here") == {"values": values}


def _aliased(first: str, item: str) -> str:
    """a: &a ..., b: &b [*a, *a, …] and so on: each level nine times the one before."""
    lines = [f"  k0: &k0 {first}"]
    for level in range(1, 12):
        aliases = ", ".join([f"*k{level - 1}"] * 9)
        lines.append(f"  k{level}: &k{level} {item.format(aliases)}")
    return "\n".join(["wandb:", *lines])


def _referring(first: str, item: str, levels: int, joined: str = "", times: int = 20) -> str:
    """The same with references in place of aliases, and a key that is read at the end."""
    lines = [f"  k0: {first}"]
    for level in range(1, levels):
        references = joined.join([f"${{wandb.k{level - 1}}}"] * times)
        lines.append(f"  k{level}: {item.format(references)}")
    return "\n".join([f"csv: ${{wandb.k{levels - 1}}}", "wandb:", *lines])


BOMBS = {
    "aliases": _aliased("[x, x, x]", "[{}]"),
    "merges": _aliased("{x: 1}", "{{<<: [{}]}}"),
    "itself": "wandb: &a {b: *a}",
    "merges itself": "wandb: &a {<<: *a}",
    "references": _referring("xxxxxxxx", "'{}'", 20),
    "empty references": _referring("''", "'{}'", 30),
    "references to lists": _referring("[x]", "['{}']", 30, "', '"),
    "long chain": _referring("x", "'{}'", 1000, times=1),
    "deep flow": "[" * 500_000,
    "deep mapping": "{a: " * 200_000,
    "deep block": "- " * 400_000,
    "deep indent": "\n".join(" " * i + "a:" for i in range(1000)),
    "many": "csv: [" + "1, " * 100_000 + "1]",
    "long text": "csv: " + "a" * 100_000,
    "long number": "seed: " + "9" * 100_000,
    "base 60": "seed: 1" + ":1" * 100_000,
    "large": "#" * 1_000_001,
    "junk": "\x00\xff\xfe",
    "UTF-16": "csv: a".encode("utf-16").decode("latin-1"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_files_made_to_harm_are_refused_within_bounds(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(BOMBS[name].encode("latin-1"))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            load_settings(path, ["model.name=uni"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 600 + len(str(path))
    assert peak < 30e6, "a file of 1 MB is held a few times, as text"


#: What mutations put in.
TOKENS = [
    "&a ", "*a", "<<: ", "!!python/object:os.system ", "!!int ", "!!float ", "!!set ", "!x ", "{", "}", "[",
    "]", ": ", "- ", "? ", "|", ">", "'", '"', "\t", "\n", "---\n", "...\n", "%YAML 9.9\n", "${",
    "${model.name}", "\\U99999999", "\0", "\ufeff", "\x85", "1e999", "0x", "1:1", "~", "null", ".nan", "=",
    "@", "  ", "[[[[[[[[[[[[[[[[[[", "é",
]  # fmt: skip


def _mutated(text: str, rng: random.Random) -> bytes:
    content = bytearray(text.encode())
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(content))
        match rng.randrange(5):
            case 0:
                content[place] = rng.randrange(256)
            case 1:
                content[place:place] = rng.choice(TOKENS).encode()
            case 2:
                del content[place : place + rng.randrange(1, 30)]
            case 3:
                start = rng.randrange(len(content))
                content[place:place] = content[start : start + rng.randrange(1, 200)]
            case 4:
                values = [found.end() for found in re.finditer(rb": ?", bytes(content))] or [0]
                place = rng.choice(values)
                content[place:place] = rng.choice(TOKENS).encode()
    return bytes(content)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_files_load_or_are_refused(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    loaded = 0
    for _ in range(120):
        path.write_bytes(_mutated(rng.choice([NEWEST, OLDEST]), rng))
        try:
            settings = load_settings(path)
        except ConfigError as error:
            assert str(error)
            continue
        loaded += 1
        again.write_text(settings_as_yaml(settings, {}), encoding="utf-8")
        assert load_settings(again) == settings
    assert 0 < loaded < 120, "both kinds were tried"


# round trips ------------------------------------------------------------------------------------


def _random_settings(rng: random.Random) -> RunSettings:
    """Settings whose every field has a random allowed value."""

    def maybe(value: Any) -> Any:
        return rng.choice([None, value])

    def flag() -> bool:
        return rng.random() < 0.5

    def path() -> Path:
        names = [
            "a b",
            "ü",
            "1e5",
            "yes",
            "${seed}",
            "#x",
            "a: b",
            "null",
            "-",
            "'q\"",
            "2024-01-01",
            "x" * 200,
        ]
        return Path(*rng.sample(names, rng.randrange(1, 4)))

    tile, multiple = maybe(rng.randrange(1, 2000)), maybe(rng.randrange(2, 9))
    segmentation = SegmentationConfig(
        method=rng.choice(["hsv", "otsu", "threshold"]),
        downsample=rng.uniform(1, 100),
        sthresh=rng.randrange(256),
        sthresh_up=rng.randrange(256),
        mthresh=rng.randrange(1, 30, 2),
        close=rng.randrange(9),
    )
    filtering = FilterConfig(
        ref_tile_size=maybe(rng.randrange(1, 500)),
        a_t=rng.uniform(0, 9),
        a_h=rng.randrange(9),
        filter_white=flag(),
        filter_black=flag(),
        white_threshold=rng.randrange(256),
        black_threshold=rng.randrange(256),
        fraction_threshold=rng.random(),
        filter_grayspace=flag(),
        grayspace_saturation_threshold=rng.random() * 1e-7,
        grayspace_fraction_threshold=rng.random(),
        filter_blur=flag(),
        blur_threshold=rng.uniform(0, 1e20),
        qc_spacing_um=rng.uniform(0.1, 9),
    )
    preview = PreviewConfig(
        save_mask_preview=flag(),
        save_tiling_preview=flag(),
        downsample=rng.uniform(1, 100),
        tissue_contour_color=(rng.randrange(256), rng.randrange(256), rng.randrange(256)),
        mask_overlay_alpha=rng.random(),
    )
    preprocessing = PreprocessingConfig(
        backend=rng.choice(["auto", "cucim", "openslide", "vips", "asap"]),
        requested_spacing_um=maybe(rng.uniform(0.1, 9)),
        requested_tile_size_px=tile,
        requested_region_size_px=maybe(tile * multiple) if tile and multiple else None,
        region_tile_multiple=multiple,
        tolerance=rng.random(),
        overlap=0.0 if multiple else rng.random(),
        tissue_threshold=rng.random(),
        read_coordinates_from=maybe(path()),
        read_tiles_from=maybe(path()),
        on_the_fly=flag(),
        save_tiles=flag(),
        on_bad_tile=rng.choice(["fail", "skip"]),
        gpu_decode=rng.choice([True, False, "auto"]),
        use_supertiles=flag(),
        num_cucim_workers=rng.randrange(1, 9),
        resume=flag(),
        segmentation=segmentation,
        filtering=filtering,
        preview=preview,
    )
    execution = ExecutionOptions(
        output_dir=path(),
        output_format=rng.choice(["pt", "npz", "safetensors", "h5"]),
        batch_size=maybe(rng.randrange(1, 512)),
        num_workers=maybe(rng.randrange(1, 64)),
        num_preprocessing_workers=maybe(rng.randrange(1, 64)),
        num_gpus=maybe(rng.randrange(8)),
        precision=rng.choice([None, "fp16", "bf16", "fp32"]),
        prefetch_factor=rng.randrange(1, 9),
        persistent_workers=flag(),
        save_tile_embeddings=flag(),
        save_slide_embeddings=flag(),
        save_latents=flag(),
        save_patch_tokens=flag(),
        output_dtype=rng.choice([None, "fp16", "fp32"]),
        on_bad_slide=rng.choice(["fail", "skip"]),
    )
    return RunSettings(
        manifest_path=maybe(path()),
        preset=rng.choice(["uni", "virchow2", "scattering"]),
        output_variant=None,
        weights=maybe(str(path())),
        seed=rng.randrange(2**32),
        device=rng.choice([None, "cpu", "cuda:1"]),
        allow_non_recommended_settings=flag(),
        preprocessing=preprocessing,
        execution=execution,
    )


def _without_tissue(settings: RunSettings) -> RunSettings:
    """As a file says it: with coordinate files nothing of how tissue would be found."""
    config = settings.preprocessing
    if config.read_coordinates_from is None:
        return settings
    tissue = {"segmentation": SegmentationConfig(), "filtering": FilterConfig(), "tissue_threshold": 0.1}
    return replace(settings, preprocessing=config.updated(tolerance=0.05, overlap=0.0, **tissue))


def test_settings_are_what_is_read_back(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "config.yaml"
    for _ in range(80):
        settings = _random_settings(rng)
        text = settings_as_yaml(settings, {"versions": versions()})
        path.write_text(text, encoding="utf-8")
        assert load_settings(path) == _without_tissue(settings), text
        assert isinstance(yaml.safe_load(text), dict), "any YAML parser reads it"


def test_written_settings_have_every_field() -> None:
    owners = (PreprocessingConfig, ExecutionOptions, SegmentationConfig, FilterConfig, PreviewConfig)
    owners = (*owners, QualityConfig, MaskSamplingConfig)
    fields = {(owner, field) for owner in owners for field in owner.model_fields}
    parts = ("segmentation", "filtering", "preview", "masks", "qc")
    sections = {(PreprocessingConfig, name) for name in parts}
    sections |= {(MaskSamplingConfig, name) for name in LABELS}
    of_images = {(ExecutionOptions, "on_image_mismatch")}  # which no configuration file names
    assert fields - sections - of_images == {
        (key.owner, key.field) for key in KEYS.values() if key.owner is not None
    }
    assert set(OLDER).isdisjoint(KEYS)
    assert {target for targets in OLDER.values() for target in targets} <= set(KEYS)


def test_extra_keys_are_written_and_versions_ignored(load: Load) -> None:
    settings = load(NEWEST)
    text = settings_as_yaml(settings, {"versions": {"torch": "2.0", "${x": "${y"}})
    assert yaml.safe_load(text)["versions"]["torch"] == "2.0"
    assert load(text, named=False) == settings


def test_a_run_over_coordinate_files_claims_no_segmentation(load: Load) -> None:
    text = settings_as_yaml(load("tiling: {read_coordinates_from: /there}"), {})
    tiling = yaml.safe_load(text)["tiling"]
    assert tiling["read_coordinates_from"] == "/there"
    assert "seg_params" not in tiling and "filter_params" not in tiling
    assert {"tissue_threshold", "overlap", "tolerance"}.isdisjoint(tiling["params"])


def test_what_nobody_gave_is_not_set(load: Load) -> None:
    config = load("tiling: {params: {overlap: 0.0}, seg_params: {close: 4}}", "tiling.backend=auto")
    made = config.preprocessing
    assert made.model_fields_set == {"overlap", "backend", "segmentation", "filtering", "preview", "qc"}
    assert made.segmentation.model_fields_set == {"close"} and not made.filtering.model_fields_set
    assert made.resolved(0.5, 224).model_fields_set == made.model_fields_set, (
        "the preset's are not the user's"
    )
    assert made.updated(tolerance=0.1).model_fields_set == made.model_fields_set | {"tolerance"}
    older = load("tiling: {seg_params: {use_otsu: true, use_hsv: false}}").preprocessing
    assert older.segmentation.model_fields_set == {"method"}


def test_output_dir_of_resumed_runs_is_written_whole(load: Load) -> None:
    settings = load("resume: true\nresume_dirname: night")
    text = settings_as_yaml(settings, {})
    assert load(text, named=False) == settings
    assert settings.execution.output_dir == Path("output/night")


def test_a_settings_default_is_enough(load: Load) -> None:
    settings = RunSettings(
        preset="uni", preprocessing=PreprocessingConfig(), execution=ExecutionOptions(output_dir=Path("o"))
    )
    assert load(settings_as_yaml(settings, {}), named=False) == settings
    assert replace(settings, seed=1) != settings


# versions ---------------------------------------------------------------------------------------


def test_versions_are_those_installed() -> None:
    found = versions()
    assert {"python", "torch", "timm", "numpy", "opencv", "openslide"} <= found.keys()
    assert found["torch"] == importlib.metadata.version("torch")
    assert json.dumps(found)


# the documentation ------------------------------------------------------------------------------


def _documented() -> dict[str, str]:
    """Keys and defaults of the tables of the page."""
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([\w.]+)` \| *(?:`([^`]*)`)? *\|", page, flags=re.MULTILINE))


def test_the_page_has_every_key_and_its_default() -> None:
    documented = _documented()
    unlisted = {"tiling.seg_params.use_hsv", "tiling.seg_params.use_otsu"}
    assert set(KEYS) - unlisted == set(documented)
    for name, default in documented.items():
        expected = KEYS[name].default
        expected = str(expected) if isinstance(expected, Path) else expected
        given = parse_yaml(default, name)
        assert given == (list(expected) if isinstance(expected, tuple) else expected), name


def test_the_example_of_the_page_is_a_configuration(load: Load) -> None:
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert load(example, named=False).preset == "virchow2"
