"""Slides as users give them, and manifests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import ManifestError
from slide2vec.slides import Slide, as_slide, as_slides, read_manifest


def test_path_gives_its_stem() -> None:
    assert as_slide("a/b.c.svs") == Slide(sample_id="b.c", image_path=Path("a/b.c.svs"))


def test_mapping_with_blanks() -> None:
    slide = as_slide(
        {
            "sample_id": "s",
            "image_path": "a.svs",
            "mask_path": "",
            "spacing_at_level_0": float("nan"),
            "patient_id": None,
        }
    )
    assert slide == Slide(sample_id="s", image_path=Path("a.svs"))


def test_call_spacing_overrides() -> None:
    slide = as_slide({"image_path": "a.svs", "spacing_at_level_0": "0.5"}, spacing_at_level_0=0.25)
    assert (slide.sample_id, slide.spacing_at_level_0) == ("a", 0.25)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_id": "s"}, "image_path"),
        ({"image_path": "a.svs", "mask": "m.png"}, "mask_path"),
        ({"image_path": "a.svs", "sample_id": "../x"}, "file name"),
        ({"image_path": "a.svs", "sample_id": "a/b"}, "file name"),
        ({"image_path": "a.svs", "sample_id": "a\0b"}, "file name"),
        ({"image_path": "a.svs", "spacing_at_level_0": 352.8}, "plausible"),
        ({"image_path": "a.svs", "spacing_at_level_0": "fine"}, "number"),
        (7, "int"),
    ],
)
def test_bad_slides_are_named(given: object, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        as_slide(given)  # type: ignore[arg-type]


def test_equal_names_are_refused() -> None:
    with pytest.raises(ManifestError, match="twice"):
        as_slides(["a/x.svs", "b/x.svs"])


def test_one_slide_is_not_a_list() -> None:
    with pytest.raises(ManifestError, match="embed_slide"):
        as_slides("a.svs")  # type: ignore[arg-type]


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
        ("sample_id;image_path\ns;a.svs\n", "separated by commas"),
        ("sample_id,image_path\n", "no slides"),
        ("sample_id,image_path\ns\n" + "".join(f"{n}\n" for n in range(9)), "and 5 more lines"),
        (f"sample_id,image_path\n{'s' * 300},a.svs\n", "line 2: .*200 bytes"),
        ("sample_id,image_path,spacing_at_level_0\ns,a.svs,oops\n", "line 2.*oops"),
        ("", "needs one column"),
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


def test_options_of_a_single_slide(tmp_path: Path) -> None:
    manifest = tmp_path / "slides.csv"
    manifest.write_text(
        "sample_id,image_path,segmentation_method,segmentation_sthresh,filtering_a_t,tissue_threshold,notes\n"
        "a,a.svs,otsu,,1,0.3,brown\n"
        "b,b.svs,,,,,\n"
    )
    a, b = read_manifest(manifest)
    assert a.tiling == {"segmentation_method": "otsu", "filtering_a_t": "1", "tissue_threshold": "0.3"}
    assert b.tiling == {} and hash(a) != hash(b)
    assert as_slide({"image_path": "c.svs", "segmentation_close": 2}).tiling == {"segmentation_close": 2}

    config = PreprocessingConfig(segmentation={"sthresh": 20})
    own = config.for_slide("a", a.tiling)
    assert (own.segmentation.method, own.segmentation.sthresh) == ("otsu", 20)
    assert (own.filtering.a_t, own.tissue_threshold) == (1.0, 0.3)
    assert config.for_slide("b", b.tiling) is config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segmentation_metod": "otsu"}, "slide s: SegmentationConfig has no field 'metod'"),
        ({"segmentation_method": "magic"}, "slide s: SegmentationConfig.method"),
        ({"tissue_threshold": "lots"}, "slide s: PreprocessingConfig.tissue_threshold"),
        ({"color": "red"}, "slide s: tiling has no option 'color'"),
    ],
)
def test_wrong_options_name_the_slide(options: dict[str, str], message: str) -> None:
    with pytest.raises(ManifestError) as error:
        PreprocessingConfig().for_slide("s", options)
    assert message in str(error.value)
