"""`slide2vec run`, for real: from files, from flags, from both."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from slide2vec import Model, PreprocessingConfig
from slide2vec.cohort.process_list import read_process_list
from slide2vec.settings import RunSettings, load_settings
from slide2vec.tiling import load_coordinates

#: Few, small tiles.
FAST = ("--preset", "scattering", "--device", "cpu", "--spacing", "2", "--tile-size", "64")
CONFIG = {
    "model": {"name": "scattering", "device": "cpu"},
    "tiling": {
        "params": {"requested_spacing_um": 2.0, "requested_tile_size_px": 64, "tissue_threshold": 0.01},
        "preview": {"save": False},
    },
}


@pytest.fixture
def manifest(small_slide: Path, tmp_path: Path) -> Path:
    """Two slides: the small one, under two names."""
    return _manifest(tmp_path / "slides.csv", [("a", small_slide), ("b", small_slide)])


def _manifest(path: Path, slides: list[tuple[str, Path]]) -> Path:
    rows = ["sample_id,image_path", *(f"{name},{image}" for name, image in slides)]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def config(manifest: Path, tmp_path: Path) -> Path:
    """A configuration file of a run into tmp_path/out."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"csv": str(manifest), "output_dir": str(tmp_path / "out"), **CONFIG}))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunSettings]:
    """The settings of runs that are asked for in a test, and not made."""
    seen: list[RunSettings] = []
    module = importlib.import_module("slide2vec.cli.run")  # the package has the command by this name
    monkeypatch.setattr(module, "_run", lambda settings, **_: seen.append(settings))
    return seen


def _finished(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "tile_embeddings").glob("*.pt"))


def _settings(output_dir: Path) -> RunSettings:
    return load_settings(output_dir / "config.yaml")


# from flags -------------------------------------------------------------------------------------


def test_flags_alone(run, manifest: Path, small_slide: Path, tmp_path: Path) -> None:
    result = run("run", "--manifest", manifest, *FAST, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    preprocessing = PreprocessingConfig(requested_spacing_um=2.0, requested_tile_size_px=64)
    expected = Model.from_preset("scattering", device="cpu").embed_slide(small_slide, preprocessing)
    assert expected.num_tiles > 5
    for name in ("a", "b"):
        features = torch.load(tmp_path / "out" / "tile_embeddings" / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(features, expected.tile_embeddings)
    states = {
        row["sample_id"]: row["feature_status"]
        for row in read_process_list(tmp_path / "out" / "process_list.csv")
    }
    assert states == {"a": "success", "b": "success"}
    assert "of 2 slides" in result.stdout and "bottleneck" in result.stdout


def test_a_manifest_comes_first(run, manifest: Path, tmp_path: Path) -> None:
    """As with `plan`."""
    result = run("run", manifest, "tiling.params.tissue_threshold=0.5", *FAST, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert _finished(tmp_path / "out") == ["a.pt", "b.pt"]
    assert _settings(tmp_path / "out").preprocessing.tissue_threshold == 0.5
    both = run("run", manifest, "--manifest", manifest, *FAST, "-o", tmp_path / "out")
    assert both.exit_code == 1 and "two manifests" in both.stderr


def test_slides_are_not_taken_for_a_configuration(run, small_slide: Path, tmp_path: Path) -> None:
    for given in (small_slide, small_slide.parent, "*.svs"):
        result = run("run", given, *FAST, "-o", tmp_path / "out")
        assert result.exit_code == 1 and "slide2vec embed" in result.stderr


def test_flags_resume_and_say_so(run, manifest: Path, tmp_path: Path) -> None:
    command = ("run", "--manifest", manifest, *FAST, "-o", tmp_path / "out")
    run(*command)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "tile_embeddings").iterdir()}
    again = run(*command)
    assert again.exit_code == 0 and "2 slides finished by an earlier run" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written
    other = run(*command, "--tissue-threshold", "0.5")
    assert other.exit_code == 1 and "tissue_threshold 0.01, not 0.5" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written
    form = run(*command, "--format", "npz")
    assert form.exit_code == 0 and "2 slides embedded anew: finished before with another" in form.stdout
    anew = run(*command, "--tissue-threshold", "0.5", "--no-resume")
    assert "earlier run" not in anew.stdout and "of 2 slides" in anew.stdout


def test_key_value_counts_over_the_defaults_of_flags(run, asked: list[RunSettings], tmp_path: Path) -> None:
    command = ("run", "model.name=scattering", f"output_dir={tmp_path}")
    assert run(*command).exit_code == 0
    preview = "tiling.preview.save_mask_preview=true"
    given = ("tiling.masks.min_coverage.tissue=0.25", preview, "resume=false")
    assert run(*command, *given).exit_code == 0
    assert run(*command, *given, "--resume", "--no-previews", "--tissue-threshold", "0.5").exit_code == 0
    found = [
        (
            config.tissue_threshold,
            config.preview.save_mask_preview,
            config.preview.save_tiling_preview,
            config.resume,
        )
        for config in (settings.preprocessing for settings in asked)
    ]
    assert found == [(0.01, False, False, True), (0.25, True, False, False), (0.5, False, False, True)]


def test_every_flag_reaches_its_setting(
    run, asked: list[RunSettings], manifest: Path, tmp_path: Path
) -> None:
    flags = {
        "manifest": manifest, "preset": "virchow2", "output": tmp_path / "${x}", "weights": "random",
        "seed": 3, "output-variant": "cls", "spacing": 0.25, "tile-size": 256, "overlap": 0.5,
        "tissue-threshold": 0.3,
        "backend": "openslide", "device": "cuda:1", "precision": "bf16", "batch-size": 7, "num-workers": 3,
        "num-preprocessing-workers": 2, "format": "h5", "output-dtype": "fp16", "on-bad-tile": "skip",
        "read-coordinates-from": tmp_path / "c", "read-tiles-from": tmp_path / "t",
    }  # fmt: skip
    options = [text for name, value in flags.items() for text in (f"--{name}", value)]
    result = run("run", *options, "--save-tiles", "--previews", "--no-resume")
    assert result.exit_code == 0, result.output
    (settings,) = asked
    config, execution = settings.preprocessing, settings.execution
    found = {
        "manifest": settings.manifest_path, "preset": settings.preset, "output": execution.output_dir,
        "weights": settings.weights, "seed": settings.seed, "output-variant": settings.output_variant,
        "spacing": config.requested_spacing_um, "tile-size": config.requested_tile_size_px,
        "overlap": config.overlap, "tissue-threshold": config.tissue_threshold, "backend": config.backend,
        "device": settings.device, "precision": execution.precision, "batch-size": execution.batch_size,
        "num-workers": execution.num_workers,
        "num-preprocessing-workers": execution.num_preprocessing_workers, "format": execution.output_format,
        "output-dtype": execution.output_dtype,
        "on-bad-tile": config.on_bad_tile, "read-coordinates-from": config.read_coordinates_from,
        "read-tiles-from": config.read_tiles_from,
    }  # fmt: skip
    assert found == flags
    assert config.save_tiles and config.preview.save_mask_preview and config.preview.save_tiling_preview
    assert not config.resume


def test_flags_alone_have_the_defaults_of_python(
    run, asked: list[RunSettings], manifest: Path, tmp_path: Path
) -> None:
    run("run", "-m", manifest, "-p", "uni", "-o", tmp_path)
    (settings,) = asked
    assert settings.preprocessing == PreprocessingConfig(resume=True)


# from files -------------------------------------------------------------------------------------


def test_a_file_and_what_it_leaves_behind(run, config: Path, tmp_path: Path) -> None:
    result = run("run", config)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert _finished(out) == ["a.pt", "b.pt"], "and no folder is named after the time"
    assert not (out / "preview").exists()
    settings = _settings(out)
    assert settings.manifest_path == tmp_path / "slides.csv" and settings.preset == "scattering"
    assert settings.preprocessing.requested_tile_size_px == 64
    assert yaml.safe_load((out / "config.yaml").read_text())["versions"]["torch"]
    again = run("run", out / "config.yaml", "resume=true")
    assert again.exit_code == 0 and "2 slides finished by an earlier run" in again.stdout


@pytest.mark.parametrize(
    "arguments", [["--skip-datetime", "CONFIG"], ["CONFIG", "seed=5"], ["--seed", "5", "CONFIG"]]
)
def test_a_file_needs_no_command(run, asked: list[RunSettings], config: Path, arguments: list[str]) -> None:
    result = run(*(config if text == "CONFIG" else text for text in arguments))
    assert result.exit_code == 0, result.output
    expected = load_settings(config, ["seed=5"] if "--skip-datetime" not in arguments else [])
    assert asked == [expected]


def test_flags_come_over_overrides_and_these_over_the_file(
    run, asked: list[RunSettings], config: Path, tmp_path: Path
) -> None:
    run(config, "seed=1", "tiling.params.overlap=0.25", "--seed", "2", "--manifest", tmp_path / "other.csv")
    (settings,) = asked
    assert (settings.seed, settings.preprocessing.overlap) == (2, 0.25)
    assert settings.manifest_path == tmp_path / "other.csv"
    assert settings.preprocessing.requested_tile_size_px == 64
    assert not settings.preprocessing.resume, "as the file says"


def test_the_originals_flags(run, config: Path, tmp_path: Path) -> None:
    result = run(
        config, "--skip-datetime", "--run-on-cpu", "--output-dir", tmp_path / "other", "speed.precision=fp16"
    )
    assert result.exit_code == 0, result.output
    assert _finished(tmp_path / "other") == ["a.pt", "b.pt"]
    settings = _settings(tmp_path / "other")
    assert (settings.device, settings.execution.precision) == ("cpu", "fp32")


def test_resume_is_as_the_file_says_unless_a_flag_says_otherwise(run, config: Path) -> None:
    run(config)
    assert "earlier run" not in run(config).stdout
    assert "2 slides finished by an earlier run" in run(config, "--resume").stdout
    assert "2 slides finished by an earlier run" in run(config, "resume=true").stdout


# only tiling ------------------------------------------------------------------------------------


def test_tiling_only_needs_no_weights(run, manifest: Path, config: Path, tmp_path: Path) -> None:
    assert run(config).exit_code == 0
    result = run(config, "--tiling-only", "model.name=uni", "-o", tmp_path / "tiled")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "tiled" / "tile_embeddings").exists()
    for name in ("a", "b"):
        tiled, embedded = (load_coordinates(tmp_path / place / "tiles", name) for place in ("tiled", "out"))
        assert np.array_equal(tiled.x, embedded.x) and np.array_equal(tiled.y, embedded.y) and len(tiled) > 5
    settings = _settings(tmp_path / "tiled")
    assert (settings.preset, settings.manifest_path) == ("uni", manifest), "and it can be repeated"


def test_tiling_only_then_embedding_with_these_coordinates(run, config: Path, tmp_path: Path) -> None:
    run(config, "--tiling-only", "-o", tmp_path / "tiled", "tiling.params.tissue_threshold=0.4")
    result = run(config, "--read-coordinates-from", tmp_path / "tiled" / "tiles")
    assert result.exit_code == 0, result.output
    tiles = len(load_coordinates(tmp_path / "tiled" / "tiles", "a"))
    features = torch.load(tmp_path / "out" / "tile_embeddings" / "a.pt", weights_only=True)
    assert 0 < tiles == len(features)
    assert run(config).exit_code == 0
    assert tiles < len(load_coordinates(tmp_path / "out" / "tiles", "a")), "and these were not those"


# what goes wrong --------------------------------------------------------------------------------


def test_failed_slides_are_listed_and_the_others_done(run, small_slide: Path, tmp_path: Path) -> None:
    slides = [("good", small_slide), *((f"gone{i}", tmp_path / f"gone{i}.svs") for i in range(60))]
    manifest = _manifest(tmp_path / "slides.csv", slides)
    result = run("run", "-m", manifest, *FAST, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert _finished(tmp_path / "out") == ["good.pt"]
    assert "60 slides failed" in result.stdout
    listed = [line.split()[:2] for line in result.stdout.splitlines() if line.startswith("gone")]
    assert listed == [[f"gone{i}", "tiling"] for i in range(50)]
    assert "… and 10 more in" in result.stdout and "process_list.csv" in result.stdout.replace("\n", "")
    rows = read_process_list(tmp_path / "out" / "process_list.csv")
    assert sum(row["tiling_status"] == "failed" and "gone" in row["error"] for row in rows) == 60
    assert "Traceback" not in result.output


def test_slides_without_tissue_are_named(run, small_slide: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"sample_id,image_path,mask_path\nblank,{small_slide},{tmp_path}/mask.png\n")
    result = run("run", "-m", manifest, *FAST, "-o", tmp_path / "out")
    assert result.exit_code == 0 and "1 slide without tissue: blank" in result.stdout


def test_json_is_all_there_is_on_stdout(run, small_slide: Path, tmp_path: Path) -> None:
    manifest = _manifest(tmp_path / "slides.csv", [("good", small_slide), ("gone", tmp_path / "gone.svs")])
    result = run("run", "-m", manifest, *FAST, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert [slide["sample_id"] for slide in content["slides"]] == ["good"]
    (failed,) = content["failed"]
    assert (failed["sample_id"], failed["stage"]) == ("gone", "tiling")
    assert content["process_list_path"] == str(tmp_path / "out" / "process_list.csv")
    with Path(content["process_list_path"]).open(newline="") as file:
        assert len(list(csv.reader(file))) == 3


def test_a_slide_that_fails_with_every_encoder_is_listed_once(run, small_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(small_slide.read_bytes()[:3000])
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"sample_id,image_path\na,{small_slide}\nbroken,{tmp_path / 'broken.svs'}\n")
    several = ("--preset", "scattering,timm:resnet10t", *FAST[2:], "--weights", "random")
    out = tmp_path / "out"
    result = run("run", "--manifest", manifest, "-o", out, *several)
    assert result.exit_code == 1, result.output
    assert result.stdout.count("1 slide failed") == 1 and result.stdout.count("truncated") == 1
    assert f"Look at it: slide2vec view {out}\n" in result.stdout
    assert not re.search(r"(?<![\d.,])0 tiles/s", result.stdout) and "by an earlier run" not in result.stdout
    shown = run("status", out).stdout
    assert shown.count("truncated") == 1 and "scattering, " in shown
    again = run("run", "--manifest", manifest, "-o", out, *several).stdout
    assert again.count("1 slide finished by an earlier run") == 1 and again.count("truncated") == 1


def test_folders_of_several_encoders_are_told_whole(run, small_slide: Path, tmp_path: Path) -> None:
    manifest = _manifest(tmp_path / "slides.csv", [("good", small_slide)])
    several = ("--preset", "scattering,timm:resnet10t", *FAST[2:], "--weights", "random")
    lines = run("run", "--manifest", manifest, "-o", tmp_path / "out", *several).stdout.splitlines()
    assert "scattering      tile_embeddings/" in map(str.rstrip, lines)
    assert any(line.rstrip().endswith("  encoders/timm-resnet10t/tile_embeddings/") for line in lines)


def test_json_of_several_encoders_has_their_common_bill(run, small_slide: Path, tmp_path: Path) -> None:
    manifest = _manifest(tmp_path / "slides.csv", [("good", small_slide)])
    several = ("--preset", "scattering,timm:resnet10t", *FAST[2:], "--weights", "random")
    options = ("--engine", "torch", "--allow-non-recommended-settings", "-o", tmp_path / "out", "--json")
    result = run("run", "-m", manifest, *several, *options)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    whole, each = content["summary"], [part["summary"] for part in content["encoders"].values()]
    assert len(each) == 2 and whole["slides"] == 1
    assert whole["tiles"] == sum(part["tiles"] for part in each) == 2 * each[0]["tiles"] > 0
    assert max(part["seconds"] for part in each) <= whole["seconds"]
    assert whole["per_slide"]["seconds"] == whole["seconds"] and whole["measured_by"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "scattering", "-o", "OUT"], ["--manifest", "csv"]),
        (["-m", "MANIFEST", "-p", "scattering"], ["--output"]),
        (["-m", "MANIFEST", "-o", "OUT"], ["--preset is missing"]),
        (["-m", "MANIFEST", "-p", "scatering", "-o", "OUT"], ["scattering"]),
        (
            ["-m", "MANIFEST", "-p", "scattering", "-o", "OUT", "--overlap", "2"],
            ["--overlap: input", "2.0"],
        ),
        (
            ["-m", "gone.csv", "-p", "scattering", "-o", "OUT"],
            ["manifest gone.csv cannot be read: No such file or directory"],
        ),
        (["gone.yaml"], ["gone.yaml cannot be read: No such file or directory"]),
        (["CONFIG", "other.yaml"], ["other.yaml", "key=value"]),
        (["CONFIG", "tiling.parms.overlap=1"], ["tiling.parms", "tiling.params"]),
        (["CONFIG", "csv=null"], ["--manifest", "csv"]),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_made(
    run: Callable[..., object],
    config: Path,
    manifest: Path,
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
) -> None:
    places = {"OUT": tmp_path / "out", "MANIFEST": manifest, "CONFIG": config}
    result = run("run", *(places.get(text, text) for text in arguments))
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and [word for word in words if word not in line] == []
    assert not (tmp_path / "out").exists()


def test_wrong_lines_of_a_manifest_are_found_before_weights_are_loaded(run, tmp_path: Path) -> None:
    manifest = tmp_path / "slides.csv"
    manifest.write_text("sample_id,image_path\na,\n")
    result = run("run", "-m", manifest, "-p", "uni", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "line 2" in result.stderr and "loading" not in result.stderr


def test_coordinates_alone_are_enough(run, small_slide: Path, tmp_path: Path) -> None:
    tiles = ("--spacing", "1", "--tile-size", "64")
    assert run("tile", small_slide, *tiles, "-o", tmp_path / "tiled").exit_code == 0
    options = ("--preset", "scattering", "--device", "cpu", *tiles, "-o", tmp_path / "out")
    result = run("run", "--read-coordinates-from", tmp_path / "tiled", *options, "--json")
    assert result.exit_code == 0, result.output
    (slide,) = json.loads(result.stdout)["slides"]
    assert slide["coordinates_npz_path"] == str(tmp_path / "tiled/tiles/small.coordinates.npz")
    result = run("run", *options)
    assert result.exit_code == 1 and "--read-coordinates-from" in result.stderr
