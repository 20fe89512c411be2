"""Slides as users give them, and manifests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import ManifestError
from slide2vec.manifests import read_manifest
from slide2vec.slides import Slide, as_slide, as_slides, id_of


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


def test_object_that_describes_a_slide() -> None:
    """As hs2p's SlideSpec, which has no patient_id."""
    given = SimpleNamespace(sample_id="7", image_path="a.svs", mask_path=None, spacing_at_level_0=0.5, more=1)
    assert as_slide(given) == Slide(sample_id="7", image_path=Path("a.svs"), spacing_at_level_0=0.5)
    with pytest.raises(ManifestError, match="a path, a mapping or a Slide"):
        as_slide(SimpleNamespace(image_path="a.svs"))  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("path", "by_name", "by_path"),
    [
        ("a/b/c.svs", "c", "a__b__c"),
        ("/a/b/c.svs", "c", "a__b__c"),
        ("../x/c.svs", "c", "x__c"),
        ("./c.ome.tiff", "c.ome", "c.ome"),
        ("a..b.svs", "a__b", "a__b"),
        ("tab\there.svs", "tab_here", "tab_here"),
    ],
)
def test_ids_of_paths(path: str, by_name: str, by_path: str) -> None:
    assert (id_of(Path(path)), id_of(Path(path), "path")) == (by_name, by_path)


def test_long_names_end_in_a_digest(caplog: pytest.LogCaptureFixture) -> None:
    long = [id_of(Path(f"{'ä' * 120}{end}.svs")) for end in "xy"]
    assert len(set(long)) == 2 and all(len(name.encode()) <= 200 for name in long)
    assert "is called" in caplog.text
    for name in long:
        assert as_slide({"image_path": "a.svs", "sample_id": name}).sample_id == name


@pytest.mark.parametrize("name", ["nan", "NA", "None"])
def test_a_name_that_means_none_is_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="means that there is none"):
        as_slide({"image_path": "a.svs", "sample_id": name})
    assert as_slide(f"{name}.svs").sample_id == name  # the name of a file is what it is


def test_home_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert as_slide("~/a.svs").image_path == Path("/home/me/a.svs")
    assert as_slide({"image_path": "~/a.svs", "mask_path": "~/m.png"}).mask_path == Path("/home/me/m.png")
