"""`slide2vec info`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slide2vec import Model
from slide2vec.config import PreprocessingConfig

Slides = Callable[[str], Path]


def test_facts_of_the_reference_slide(run, reference_slide: Path) -> None:
    found = json.loads(run("info", reference_slide, "--json", "--backend", "openslide").stdout)
    assert found["dimensions"] == [2220, 2967] and found["backend"] == "openslide"
    assert (found["vendor"], found["compression"]) == ("aperio", "JPEG")
    assert found["spacing_um"] == pytest.approx(0.499) and found["spacing_source"] == "mpp"
    (level,) = found["levels"]
    assert level == {
        "level": 0,
        "dimensions": [2220, 2967],
        "downsample": 1.0,
        "spacing_um": 0.499,
        "file_tile": [240, 240],
    }
    assert 0.2 < found["tissue"]["share"] < 0.5


def test_tiles_are_those_that_a_preset_takes(run, small_slide: Path) -> None:
    found = json.loads(run("info", small_slide, "--preset", "scattering", "--json").stdout)
    embedded = Model.from_preset("scattering", device="cpu").embed_slide(small_slide, PreprocessingConfig())
    assert found["tissue"]["tiles"] == embedded.num_tiles > 0
    assert found["preset"] == "scattering"


def test_text(run, reference_slide: Path) -> None:
    result = run("info", reference_slide, "--spacing", "1", "--tile-size", "128")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "Aperio TIFF, JPEG" in text and "2,220 × 2,967 px, 1.11 × 1.48 mm" in text
    assert "0.499 µm/px at level 0 (mpp)" in text
    assert "of 128 px at 1 µm/px" in text and "read at level 0 as 257 px and reduced" in text


def test_why_a_back_end_was_passed_over(run, real_slide: Slides) -> None:
    found = json.loads(run("info", real_slide("fluorescence-dapi.ndpi"), "--json").stdout)
    assert found["backend"] == "openslide"
    assert list(found["passed_over"]) == ["tiff", "dicom", "cucim", "vips"]
    assert "hamamatsu" in found["passed_over"]["cucim"]


def test_unknown_spacing_is_said_and_can_be_given(run, real_slide: Slides) -> None:
    path = real_slide("CMU-1-Small-Region.webp.tiff")
    unknown = run("info", path)
    assert unknown.exit_code == 0
    assert "unknown: the file gives an implausible spacing" in unknown.stdout
    assert "--spacing-at-level-0" in unknown.stdout and "tissue" not in unknown.stdout
    given = run("info", path, "--spacing-at-level-0", "0.499")
    assert "0.499 µm/px at level 0 (as given" in given.stdout and "tissue" in given.stdout


def test_tiles_too_fine_are_explained(run, real_slide: Slides) -> None:
    result = run("info", real_slide("rationai-CMU-1-small.tiff"))
    assert result.exit_code == 0
    assert "not upsampled" in " ".join(result.stdout.split())


def test_missing_file(run, tmp_path: Path) -> None:
    result = run("info", tmp_path / "gone.svs")
    assert result.exit_code == 1 and result.stderr.startswith("error: slide gone: there is no file")


def test_a_back_end_that_does_not_read_it(run, real_slide: Slides) -> None:
    result = run("info", real_slide("fluorescence-dapi.ndpi"), "--backend", "vips")
    assert result.exit_code == 1 and "hamamatsu" in result.stderr
    assert run("info", real_slide("fluorescence-dapi.ndpi"), "--backend", "gdal").exit_code == 2
