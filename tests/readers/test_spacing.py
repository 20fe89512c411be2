from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slide2vec.errors import SpacingError
from slide2vec.readers import open_slide, resolve_spacing
from slide2vec.readers.probe import probe
from slide2vec.readers.spacing import choose_spacing, objective_claim
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
