"""What arguments of `embed` stand for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from slide2vec.cli.inputs import find_slides
from slide2vec.errors import ManifestError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.svs", "a.tiff", "notes.txt", ".hidden.svs", "C.NDPI", "deep/d.mrxs", "deep/d/Slide1.dat"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(*given: str | Path, recursive: bool = False) -> list[str]:
    return [
        slide.image_path.name for slide in find_slides([str(item) for item in given], recursive=recursive)
    ]


def test_directory_gives_its_slides_by_name(folder: Path) -> None:
    assert names(folder) == ["C.NDPI", "a.tiff", "b.svs"]
    assert names(folder, recursive=True) == ["C.NDPI", "a.tiff", "b.svs", "d.mrxs"]


def test_patterns(folder: Path) -> None:
    assert names(folder / "*.svs") == ["b.svs"]
    assert names(folder / "**" / "*.mrxs") == ["d.mrxs"]
    with pytest.raises(ManifestError, match=r"no file matches .*\*\.scn"):
        names(folder / "*.scn")


def test_a_file_whose_name_looks_like_a_pattern(folder: Path) -> None:
    (folder / "x[1].svs").touch()
    assert names(folder / "x[1].svs") == ["x[1].svs"]


def test_each_slide_once_in_the_order_given(folder: Path) -> None:
    assert names(folder / "b.svs", folder, folder / "*.tiff") == ["b.svs", "C.NDPI", "a.tiff"]


def test_manifest(folder: Path) -> None:
    (folder / "slides.csv").write_text(f"sample_id,image_path,spacing_at_level_0\n007,{folder}/b.svs,0.25\n")
    (slide,) = find_slides([str(folder / "slides.csv")])
    assert (slide.sample_id, slide.spacing_at_level_0) == ("007", 0.25)


def test_spacing_is_given_to_all(folder: Path) -> None:
    assert {slide.spacing_at_level_0 for slide in find_slides([str(folder)], spacing_at_level_0=0.5)} == {0.5}


def test_directory_without_slides(folder: Path) -> None:
    with pytest.raises(ManifestError, match=r"holds no slides.*--recursive.*\.svs"):
        names(folder / "deep" / "d")


def test_missing_files_are_left_to_the_run(folder: Path) -> None:
    assert names(folder / "missing.svs") == ["missing.svs"]


def test_a_dicom_slide_of_several_files_is_one_slide(
    real_slide: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("level-0.dcm", "level-1.dcm"):
        shutil.copy(real_slide("sm_image.dcm"), tmp_path / name)
    shutil.copy(real_slide("camelyon-jpeg.dcm"), tmp_path / "other.dcm")
    assert names(tmp_path) == ["level-0.dcm", "other.dcm"]


def test_levels_of_dicom_slides_whatever_their_names(slides_dir: Path, tmp_path: Path) -> None:
    """The label comes first by name, and is never what stands for the slide."""
    dual = slides_dir.parent / "dialects" / "dicom-tiff-dual-personality"
    if not dual.is_dir():
        pytest.skip(f"no {dual}")
    assert names(dual) == ["05214944.dcm"]
    for number, path in enumerate(sorted(dual.iterdir())):
        shutil.copy(path, tmp_path / f"1.2.840.{number}")
    shutil.copy(slides_dir / "sm_image.dcm", tmp_path / "IM000001")
    (tmp_path / "README").write_text("no slide")
    os.mkfifo(tmp_path / "pipe")
    assert names(tmp_path) == ["1.2.840.1", "IM000001"]


def test_a_label_alone_is_left_to_the_run(slides_dir: Path, tmp_path: Path) -> None:
    label = slides_dir.parent / "dialects" / "dicom-tiff-dual-personality" / "01130795.dcm"
    if not label.is_file():
        pytest.skip(f"no {label}")
    shutil.copy(label, tmp_path / "label.dcm")
    assert names(tmp_path) == ["label.dcm"]


def test_skipped_files_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(folder, recursive=True) == ["C.NDPI", "a.tiff", "b.svs", "d.mrxs"]
    said = capsys.readouterr().err
    assert "skipped 1 file that is no slide by name: notes.txt" in said
    assert "Slide1.dat" not in said and ".hidden" not in said  # of the MRXS slide; hidden on purpose


@pytest.mark.parametrize("suffix", ["czi", "btf", "qptiff", "vsi", "tf8"])
def test_suffixes_of_slides(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").touch()
    assert names(tmp_path) == [f"a.{suffix}"]


def test_odd_names_and_broken_links_concern_themselves_only(tmp_path: Path) -> None:
    for name in ("a..b.svs", f"{'x' * 220}.svs", "good.svs"):
        (tmp_path / name).touch()
    (tmp_path / "link.svs").symlink_to(tmp_path / "gone.svs")
    found = {slide.sample_id: slide.image_path.name for slide in find_slides([str(tmp_path)])}
    assert found["a__b"] == "a..b.svs" and found["good"] == "good.svs" and found["link"] == "link.svs"
    assert len(found) == 4


def test_equal_names_in_different_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("site1/a.svs", "site2/a.svs"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    found = find_slides([str(tmp_path)], recursive=True, id_from="path")
    assert [slide.sample_id for slide in found] == ["site1__a", "site2__a"]
    monkeypatch.chdir(tmp_path)
    found = find_slides(["site1/a.svs", "site2/a.svs"], id_from="path")
    assert [slide.sample_id for slide in found] == ["site1__a", "site2__a"]


def test_a_manifest_that_names_files_of_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("slide_id\nb\n")
    (slide,) = find_slides([str(tmp_path / "list.csv")], slides_dir=folder)
    assert (slide.sample_id, slide.image_path) == ("b", folder / "b.svs")


def test_workbooks_are_no_slides(tmp_path: Path) -> None:
    (tmp_path / "list.xlsx").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ManifestError, match="Excel workbook"):
        find_slides([str(tmp_path / "list.xlsx")])
