"""What keys may say: errors, overrides of the command line, references to other keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from settings_files import Load

from slide2vec.errors import ConfigError
from slide2vec.settings import load_settings

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
