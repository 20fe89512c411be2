"""Manifests, as they are and as they should not be."""

from __future__ import annotations

import random
from pathlib import Path

import pandas as pd
import pytest

from slide2vec.errors import ManifestError
from slide2vec.manifests import given_slides, read_manifest
from slide2vec.slides import Slide


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_manifest(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.csv",
        "sample_id,image_path,mask_path,spacing_at_level_0,cohort\n0007,/a.svs,,0.25,x\ns2,/b.svs,/m.png,,y\n",
    )
    first, second = read_manifest(path)
    assert first == Slide(sample_id="0007", image_path=Path("/a.svs"), spacing_at_level_0=0.25)
    assert second == Slide(sample_id="s2", image_path=Path("/b.svs"), mask_path=Path("/m.png"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample_id,path\ns,a\n", "image_path"),
        ("sample_id,image_path\ns,a.svs\n,b.svs\n", "line 3"),
        ("sample_id,image_path\ns,a.svs\ns,b.svs\n", "line 3: .*already in line 2"),
        (
            "sample_id,image_path\n\ns,a.svs\n\n,b.svs\nt\n",
            "line 5: sample_id is blank; line 6: .*image_path",
        ),
        ("sample_id,image_path\ns,a.svs,x\n", "line 2: it has 3 cells"),
        ("sample_id|image_path\ns|a.svs\n", "separated by commas"),
        ("sample_id,image_path\n", "no slides"),
        ("sample_id,image_path\ns\n" + "".join(f"{n}\n" for n in range(9)), "and 5 more lines"),
        (f"sample_id,image_path\n{'s' * 300},a.svs\n", "line 2: .*200 bytes"),
        ("sample_id,image_path,spacing_at_level_0\ns,a.svs,oops\n", "line 2.*oops"),
        ("", "needs the columns"),
    ],
)
def test_bad_manifests(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(tmp_path / "m.csv", text))


def test_manifests_of_spreadsheets(tmp_path: Path) -> None:
    text = '\ufeffsample_id, image_path,notes,mask_path\r\n0007, a b.svs,"x, y\nz"\r\n\r\ns2,b.svs,,,\r\n'
    path = tmp_path / "m.csv"
    path.write_bytes(text.encode())
    assert [(s.sample_id, str(s.image_path)) for s in read_manifest(path)] == [
        ("0007", "a b.svs"),
        ("s2", "b.svs"),
    ]


def test_random_manifests_are_errors_at_worst(tmp_path: Path) -> None:
    whole = "sample_id,image_path,mask_path,spacing_at_level_0\n"
    whole += "".join(f's{n},"/data/{n}.svs",,0.2{n}\n' for n in range(9))
    chance, path = random.Random(0), tmp_path / "m.csv"
    outcomes = set()
    for _ in range(1000):
        data = bytearray(whole.encode()[: chance.randrange(1, len(whole))])
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] = chance.choice([chance.randrange(256), 0, 10, 34, 44, 47])
        path.write_bytes(data)
        try:
            slides = read_manifest(path)
        except ManifestError as error:
            assert str(path) in str(error)
            outcomes.add("error")
        else:
            assert all("/" not in slide.sample_id and slide.sample_id.strip() for slide in slides)
            outcomes.add("slides")
    assert outcomes == {"error", "slides"}


# other tools' columns -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Slides that manifests name, in a folder of their own."""
    folder = tmp_path / "slides"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.svs", "b.ndpi", "b.txt", "c.svs", "c.tiff", "deep/d.svs"):
        (folder / name).touch()
    return folder


def test_columns_of_trident(tmp_path: Path, folder: Path) -> None:
    """`wsi` is a path in the folder of slides, `mpp` the spacing of level 0."""
    path = write(tmp_path / "m.csv", "wsi,mpp\na.svs,0.25\ndeep/d.svs,\n")
    first, second = read_manifest(path, slides_dir=folder)
    assert first == Slide(sample_id="a", image_path=folder / "a.svs", spacing_at_level_0=0.25)
    assert second == Slide(sample_id="d", image_path=folder / "deep" / "d.svs")


@pytest.mark.parametrize("names", [("a", "b"), ("a.svs", "b.ndpi")])
def test_columns_of_clam(tmp_path: Path, folder: Path, names: tuple[str, str]) -> None:
    """`slide_id` names files of a folder, `case_id` is the patient."""
    text = "case_id,slide_id,label\n" + "".join(f"patient_{name[0]},{name},tumor\n" for name in names)
    slides = read_manifest(write(tmp_path / "m.csv", text), slides_dir=folder)
    assert [slide.sample_id for slide in slides] == ["a", "b"]
    assert [slide.image_path for slide in slides] == [folder / "a.svs", folder / "b.ndpi"]
    assert [slide.patient_id for slide in slides] == ["patient_a", "patient_b"]


def test_names_need_a_folder_and_one_file_each(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "m.csv", "slide_id\na\n")
    with pytest.raises(ManifestError, match=r"column slide_id.*--slides-dir"):
        read_manifest(path)
    with pytest.raises(ManifestError, match=r"line 2: .*holds no slide named 'x'"):
        read_manifest(write(path, "slide_id\nx\n"), slides_dir=folder)
    with pytest.raises(ManifestError, match=r"line 2: 'c' may be any of c\.svs, c\.tiff"):
        read_manifest(write(path, "slide_id\nc\n"), slides_dir=folder)
    with pytest.raises(ManifestError, match="cannot be listed"):
        read_manifest(write(path, "slide_id\nc\n"), slides_dir=tmp_path / "gone")


def test_our_own_columns_come_first(tmp_path: Path) -> None:
    text = "slide_id,sample_id,wsi,image_path,mpp,spacing_at_level_0\nx,s,w.svs,/i.svs,9,0.5\n"
    assert read_manifest(write(tmp_path / "m.csv", text)) == [
        Slide(sample_id="s", image_path=Path("/i.svs"), spacing_at_level_0=0.5)
    ]


@pytest.mark.parametrize(
    ("header", "meant"),
    [
        ("sample_id,image_path,spacing_at_level0", "spacing_at_level_0"),
        ("sample_id,image_path,Spacing-at-level-0", "spacing_at_level_0"),
        ("sample_id,image_path,patientid", "patient_id"),
        ("sample_id,image_path,maskpath", "mask_path"),
        ("sampleid,image_path", "sample_id"),
        ("sample_id,image_paths", "image_path"),
        ("sample_id,image_path,tissue_treshold", "tissue_threshold"),
    ],
)
def test_near_misses_are_named(tmp_path: Path, header: str, meant: str) -> None:
    wrong = next(name for name in header.split(",") if name not in ("sample_id", "image_path"))
    path = write(tmp_path / "m.csv", f"{header}\n" + ",".join("x" for _ in header.split(",")) + "\n")
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    assert f"column {wrong!r}. Did you mean {meant}?" in str(error.value)


def test_near_misses_beside_the_right_one_and_other_columns_are_allowed(tmp_path: Path) -> None:
    text = "sample_id,image_path,image_paths,mask_path,mask_path2,split,label,stain\ns,/a.svs,x,,y,1,2,3\n"
    assert len(read_manifest(write(tmp_path / "m.csv", text))) == 1


# values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["", " ", "nan", "NaN", "NA", "None", "null"])
def test_missing_values(tmp_path: Path, missing: str) -> None:
    header = "sample_id,image_path,mask_path,spacing_at_level_0,patient_id,segmentation_method\n"
    path = write(tmp_path / "m.csv", f"{header}s,/a.svs,{missing},{missing},{missing},{missing}\n")
    assert read_manifest(path) == [Slide(sample_id="s", image_path=Path("/a.svs"))]
    for row, what in ((f"{missing},/a.svs,,,,", "sample_id"), (f"s,{missing},,,,", "image_path")):
        with pytest.raises(ManifestError, match=f"line 2: .*{what}"):
            read_manifest(write(path, f"{header}{row}\n"))


def test_where_relative_paths_lead(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the folder that was given, the working directory, the manifest's folder; else they stay."""
    home, here = tmp_path / "home", tmp_path / "here"
    for place in (home, here):
        place.mkdir()
        for name in ("a.svs", "here.svs", "m.png"):
            (place / name).touch()
    (home / "here.svs").unlink()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (tmp_path / "beside.svs").touch()
    names = ("a.svs", "here.svs", "beside.svs", "nowhere.svs", "~/a.svs")
    text = "sample_id,image_path,mask_path\n" + "".join(f"s{i},{n},m.png\n" for i, n in enumerate(names))
    path = write(tmp_path / "m.csv", text)
    found = [slide.image_path for slide in read_manifest(path, slides_dir=folder)]
    assert found == [
        folder / "a.svs",
        Path("here.svs"),
        tmp_path / "beside.svs",
        Path("nowhere.svs"),
        home / "a.svs",
    ]
    assert read_manifest(path)[0].image_path == Path("a.svs")
    assert read_manifest(path)[0].mask_path == Path("m.png")


def test_wrong_options_of_single_slides_are_found_with_their_line(tmp_path: Path) -> None:
    text = "sample_id,image_path,segmentation_method\na,/a.svs,otsu\nb,/b.svs,magic\n"
    with pytest.raises(ManifestError, match=r"line 3: slide b: SegmentationConfig\.method"):
        read_manifest(write(tmp_path / "m.csv", text))


# files ----------------------------------------------------------------------------------------------

ROWS = "sample_id,image_path\nmüller,/daten/müller.svs\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "windows-1252"])
def test_encodings(tmp_path: Path, encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(ROWS.encode(encoding))
    assert read_manifest(path) == [Slide(sample_id="müller", image_path=Path("/daten/müller.svs"))]
    assert ("Windows-1252" in caplog.text) == (encoding == "windows-1252")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_separators(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "m.csv", ROWS.replace(",", delimiter))
    assert [slide.sample_id for slide in read_manifest(path)] == ["müller"]


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\xd0\xcf\x11\xe0"])
def test_workbooks_are_named(tmp_path: Path, magic: bytes) -> None:
    path = tmp_path / "m.xlsx"
    path.write_bytes(magic + bytes(200))
    with pytest.raises(ManifestError, match="Excel workbook: save it as text"):
        read_manifest(path)


def test_no_text(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b"sample_id,image_path\n" + bytes([0, 255, 129]))
    with pytest.raises(ManifestError, match="is no text"):
        read_manifest(path)


def test_ids_of_paths(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "wsi\nsite1/a.svs\nsite2/a.svs\n/data/a.svs\n")
    with pytest.raises(ManifestError, match=r"line 3: sample_id 'a' is already in line 2 \(--id-from path"):
        read_manifest(path)
    slides = read_manifest(path, id_from="path")
    assert [slide.sample_id for slide in slides] == ["site1__a", "site2__a", "data__a"]


def test_an_impossible_name_fails_its_slide_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", f"sample_id,image_path,mask_path\ns,a.svs,{'x' * 300}.png\nt,b.svs,\n")
    assert [slide.sample_id for slide in read_manifest(path)] == ["s", "t"]


# DataFrames ------------------------------------------------------------------------------------------


def test_data_frame_means_what_its_file_means(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.csv",
        "slide_id,wsi,mpp,mask_path,case_id,tissue_threshold,score\n"
        "0007,/a.svs,0.25,,p1,0.2,1\ns2,/b.svs,,/m.png,,,\n",
    )
    expected = read_manifest(path)
    as_text = pd.read_csv(path, dtype=str)
    assert [vars(slide) for slide in given_slides(as_text)] == [vars(slide) for slide in expected]
    frame = pd.read_csv(path, dtype={"slide_id": str})  # numbers as numbers, NaN where there are none
    (first, second) = given_slides(frame)
    assert (first.spacing_at_level_0, second.spacing_at_level_0) == (0.25, None)
    assert (first.tiling, second.tiling) == ({"tissue_threshold": 0.2}, {})
    assert (first.sample_id, first.patient_id, second.patient_id) == ("0007", "p1", None)
    assert second.mask_path == Path("/m.png") and first.mask_path is None


def test_cells_of_data_frames() -> None:
    columns = {"sample_id": ["a", 7], "image_path": [Path("/a.svs"), "/b.svs"], "mask_path": [pd.NA, None]}
    frame = pd.DataFrame(columns, index=[1, 1])
    frame["patient_id"] = pd.array([1, None], dtype="Int64")
    first, second = given_slides(frame)
    assert first == Slide(sample_id="a", image_path=Path("/a.svs"), patient_id="1")
    assert second == Slide(sample_id="7", image_path=Path("/b.svs"))


def test_index_of_data_frame_is_a_column() -> None:
    frame = pd.DataFrame({"image_path": ["/a.svs"]}, index=pd.Index(["first"], name="sample_id"))
    assert [slide.sample_id for slide in given_slides(frame)] == ["first"]


def test_paths_of_data_frames(tmp_path: Path) -> None:
    (tmp_path / "a.svs").touch()
    named = pd.DataFrame({"slide_id": ["a"]})
    assert given_slides(named, slides_dir=tmp_path) == given_slides(
        pd.DataFrame({"image_path": ["a.svs"]}), slides_dir=tmp_path
    )
    with pytest.raises(ManifestError, match=r"slide_id.*without their paths"):
        given_slides(named)
    (slide,) = given_slides(pd.DataFrame({"image_path": ["x/a.svs"]}), id_from="path")
    assert slide.sample_id == "x__a"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sample_id": ["s"], "path": ["a"]}, "the DataFrame of slides needs one column 'image_path'"),
        ({"sample_id": ["s"], "imagepath": ["a"]}, r"column 'imagepath'\. Did you mean image_path\?"),
        ({"sample_id": ["s", None], "image_path": ["a.svs"] * 2}, "row y: sample_id is blank"),
        ({"sample_id": ["s", "s"], "image_path": ["a.svs"] * 2}, "row y: .*'s' is already in row x"),
        ({"sample_id": ["s", "t"], "image_path": ["a.svs", pd.NA]}, "row y: slide t: image_path is blank"),
        ({"sample_id": ["s", "t"], "image_path": ["a.svs", 5]}, "row y: image_path: .*got 5"),
        ({"image_path": ["a.svs", "b.svs"], "mpp": [0.5, "oops"]}, "row y: .*oops"),
        ({"image_path": ["a.svs", "b.svs"], "patient_id": [7, None]}, "row x: patient_id .*7.0.*dtype=str"),
        ({"image_path": []}, "the DataFrame of slides lists no slides"),
        ({}, "needs the columns"),
    ],
)
def test_bad_data_frames(columns: dict[str, list[object]], message: str) -> None:
    frame = pd.DataFrame(columns)
    frame.index = pd.Index(["x", "y"][: len(frame)])
    with pytest.raises(ManifestError, match=message):
        given_slides(frame)
