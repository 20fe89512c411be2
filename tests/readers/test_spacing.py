from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slide2vec.errors import SpacingError
from slide2vec.readers import open_slide, resolve_spacing
from slide2vec.readers.probe import probe
from slide2vec.readers.refusal import Refusal
from slide2vec.readers.spacing import (
    SpacingCandidate,
    choose_spacing,
    objective_claim,
    refuse_oblong_pixels,
)
from slide2vec.slides import as_slide

APERIO = "Aperio Image Library v12.0.15 \r\n400x300 (64x64) JPEG/RGB Q=85"
OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Pixels {} /></OME>'
)
PHILIPS = (
    '<DataObject ObjectType="DPUfsImport">'
    '<Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">&quot;0.000227&quot; &quot;0.000227&quot;'
)


@pytest.mark.parametrize(
    ("text", "mpp", "spacing", "source"),
    [
        (APERIO + "|AppMag = 40|MPP = 0.2521", None, 0.2521, "mpp"),
        (APERIO + "|AppMag = 40", None, 0.25, "objective power"),
        (APERIO + "|AppMag = 20|MPP = 0", None, 0.5, "objective power"),
        (APERIO + "|AppMag = 10", None, 1.0, "objective power"),
        (APERIO + "|MPP = unknown", None, None, "no spacing"),
        ("", 0.5, 0.5, "resolution"),
        ("", 0.00499, None, "implausible spacing (resolution 0.00499"),
        ("", 352.8, None, "implausible spacing (resolution 352.8"),
        ("", None, None, "no spacing"),
        (OME.format('PhysicalSizeX="0.33"'), None, 0.33, "PhysicalSizeX"),
        (OME.format('PhysicalSizeX="330" PhysicalSizeXUnit="nm"'), None, 0.33, "PhysicalSizeX"),
        (OME.format('PhysicalSizeX="3.3" PhysicalSizeXUnit="pixel"'), 0.5, 0.5, "resolution"),
        (PHILIPS, None, 0.227, "DICOM_PIXEL_SPACING"),
    ],
)
def test_tags(
    text: str, mpp: float | None, spacing: float | None, source: str, tmp_path: Path, tiffs: Any
) -> None:
    found = probe(as_slide(tiffs.write_plain(tmp_path / "slide.tif", text, mpp)))
    assert found.spacing_um == (None if spacing is None else pytest.approx(spacing, rel=1e-5))
    assert source in found.spacing_source


@pytest.mark.parametrize(
    ("power", "spacing"), [(80, 0.125), (40, 0.25), (20, 0.5), (10, 1.0), (5, 2.0), (1.25, 8.0), (0.5, 20.0)]
)
def test_every_objective_implies_a_spacing(power: float, spacing: float) -> None:
    assert choose_spacing([objective_claim(power)]) == (spacing, "objective power")


@pytest.mark.parametrize("power", [0, -20, 0.4, 400])
def test_objectives_that_no_scanner_has(power: float) -> None:
    spacing, why = choose_spacing([objective_claim(power)])
    assert spacing is None and "implausible spacing (objective power" in why


def test_the_first_plausible_claim_counts() -> None:
    claims: list[SpacingCandidate] = [("mpp", 0.0), ("x and y", 0.5, 0.5), ("resolution", 1.0)]
    assert choose_spacing(claims) == (0.5, "x and y")
    assert objective_claim(0) == ("objective power", 0.0)
    assert choose_spacing([("mpp", 0.0), ("resolution", 1234.5678)]) == (
        None,
        "the file gives an implausible spacing (mpp 0, resolution 1234.57; 0.05 to 20.0 µm/px is plausible)",
    )


@pytest.mark.parametrize(
    "claims",
    [
        [("mpp", 0.5)],
        [("mpp", 0.5, 0.504)],
        [("mpp", 0.504, 0.5)],
        [("mpp", 352.8, 100.0)],  # implausible: not believed in this, either
    ],
)
def test_pixels_that_count_as_square(claims: list[SpacingCandidate]) -> None:
    refuse_oblong_pixels(claims)


def test_pixels_as_oblong_as_allowed_count_as_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slide2vec.readers.spacing.MOST_OBLONG", 0.25)
    refuse_oblong_pixels([("mpp", 1.0, 1.25), ("mpp", 1.25, 1.0)])


@pytest.mark.parametrize(
    ("x", "y", "scales"),
    [
        (0.5, 0.25, "OUT.tif 1 --vscale 0.5)"),
        (0.25, 0.5, "OUT.tif 0.5 --vscale 1)"),
        (0.5, 0.506, "OUT.tif 0.988142 --vscale 1)"),
    ],
)
def test_oblong_pixels_are_refused_with_the_scales_that_make_them_square(
    x: float, y: float, scales: str
) -> None:
    with pytest.raises(Refusal, match="not square") as caught:
        refuse_oblong_pixels([("mpp", 0.5), ("tags", x, y)])
    assert scales in str(caught.value) and f"{x} µm wide and {y} µm high (tags)" in str(caught.value)


@pytest.mark.parametrize(
    ("of_the_file", "given", "expected", "logged"),
    [
        (0.5, None, 0.5, ""),
        (0.5, 0.5, 0.5, ""),
        (0.5, 0.5 + 5e-7, 0.5 + 5e-7, ""),
        (0.5, 0.51, 0.51, "0.51 µm/px as given (the file says 0.5)"),
        (0.5, 1.0, 1.0, "1 µm/px as given (the file says 0.5)"),
        (0.51, 0.5, 0.5, "0.5 µm/px as given (the file says 0.51)"),
        (None, 0.5, 0.5, "0.5 µm/px as given (tags)"),
    ],
)
def test_spacing_of_a_slide(
    of_the_file: float | None,
    given: float | None,
    expected: float,
    logged: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "slide2vec.readers")
    reader: Any = SimpleNamespace(spacing_um=of_the_file, spacing_source="tags")
    assert resolve_spacing(reader, as_slide("s.svs", spacing_at_level_0=given)) == expected
    assert [each.partition(": ")[2] for each in caplog.messages] == ([logged] if logged else [])


def test_given_spacing_wins(tmp_path: Path, tiffs: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "slide2vec.readers")
    slide = as_slide(tiffs.write_plain(tmp_path / "slide.tif", mpp=0.5), spacing_at_level_0=0.25)
    with open_slide(slide) as reader:
        assert resolve_spacing(reader, slide) == 0.25
    assert "0.25 µm/px as given (the file says 0.5)" in caplog.text


def test_objective_power_warns(tmp_path: Path, tiffs: Any, caplog: pytest.LogCaptureFixture) -> None:
    slide = as_slide(tiffs.write_plain(tmp_path / "slide.tif", APERIO + "|AppMag = 20"))
    with open_slide(slide) as reader:
        assert resolve_spacing(reader, slide) == 0.5
    assert "assumed from its objective power" in caplog.text


@pytest.mark.parametrize(("mpp", "said"), [(None, "gives no spacing"), (352.8, "implausible spacing")])
def test_no_spacing_says_what_to_do(mpp: float | None, said: str, tmp_path: Path, tiffs: Any) -> None:
    slide = as_slide(tiffs.write_plain(tmp_path / "slide.tif", mpp=mpp))
    with (
        open_slide(slide) as reader,
        pytest.raises(SpacingError, match=f"slide slide: .*{said}.*spacing_at_level_0"),
    ):
        resolve_spacing(reader, slide)
