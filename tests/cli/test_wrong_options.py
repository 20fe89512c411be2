"""What is said of an option that is not allowed names the option."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("embed", "SLIDE", "--tile-size", "0"), "error: --tile-size: input should be greater than 0, got 0"),
        (("embed", "SLIDE", "--spacing", "-1"), "error: --spacing: input should be greater than 0, got -1.0"),
        (("plan", "SLIDE", "--encoders-gb", "0"), "error: --encoders-gb: input should be greater than 0"),
        (("plan", "SLIDE", "--segmentation-downsample", "0"), "error: --segmentation-downsample: input"),
        (
            ("run", "-m", "MANIFEST", "--overlap", "2"),
            "error: --overlap: input should be less than 1, got 2.0",
        ),
        (("run", "-m", "MANIFEST", "--shard", "5/4"), 'error: --shard: a shard is "i/n"'),
        (
            ("run", "-m", "MANIFEST", "--segmentation-downsample", "0"),
            "error: --segmentation-downsample: input",
        ),
        (("run", "-m", "MANIFEST", "-p", "scatering"), "error: --preset: there is no preset 'scatering'"),
    ],
)
def test_options(run, small_slide: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"sample_id,image_path\na,{small_slide}\n")
    places = {"SLIDE": small_slide, "MANIFEST": manifest}
    preset = () if "-p" in arguments else ("-p", "scattering")
    output = () if arguments[0] == "plan" else ("-o", tmp_path / "out")
    result = run(*(places.get(each, each) for each in arguments), *preset, *output)
    assert result.exit_code == 1 and " ".join(result.stderr.split()).startswith(said)


def test_a_preset_that_is_missing(run, tmp_path: Path) -> None:
    result = run("run", "-m", "slides.csv", "-o", tmp_path)
    assert result.stderr.startswith("error: --preset is missing: name a preset")


def test_keys_stay_keys(run, tmp_path: Path) -> None:
    result = run("run", "model.name=scattering", f"output_dir={tmp_path}", "tiling.params.overlap=2")
    assert result.stderr.startswith("error: command line: tiling.params.overlap: input should be less than 1")
    config = tmp_path / "a.yaml"
    config.write_text("model: {name: scattering}\ntiling: {params: {overlap: 2}}\n")
    result = run("run", config, "-o", tmp_path)
    assert result.stderr.startswith(f"error: {config}: tiling.params.overlap: input should be less than 1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("embed", "a.svs", "--tilesize", "256"),
            "error: there is no option --tilesize. Did you mean --tile-size",
        ),
        (("embed", "a.svs", "--zzzzzzzz"), "error: there is no option --zzzzzzzz."),
        (("embed", "a.svs", "-o", "out"), "error: Missing option '--preset' / '-p'."),
        (
            ("export", "a", "-o", "b", "--layout", "clm"),
            "error: Invalid value for '--layout': 'clm' is not one of",
        ),
        (("--verson",), "error: there is no option --verson. Did you mean --version?"),
        (("embde", "a.svs"), "error: No such command 'embde'. Did you mean 'embed'?"),
    ],
)
def test_what_typer_says_is_said_as_other_errors_are(run, arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    *usage, last = result.stderr.splitlines()
    assert result.exit_code == 2 and last.startswith(said) and usage[0].startswith("Usage: ")
