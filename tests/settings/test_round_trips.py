"""What is read back is what was written; docs/configuration.md has every key."""

from __future__ import annotations

import importlib.metadata
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from settings_files import NEWEST, Load

from slide2vec.config import (
    ExecutionOptions,
    FilterConfig,
    MaskSamplingConfig,
    PreprocessingConfig,
    PreviewConfig,
    QualityConfig,
    SegmentationConfig,
)
from slide2vec.settings import RunSettings, load_settings, settings_as_yaml, versions
from slide2vec.settings.keys import KEYS, LABELS, OLDER
from slide2vec.settings.text import parse_yaml

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
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
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
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert load(example, named=False).preset == "virchow2"
