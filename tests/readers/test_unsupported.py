"""Files of other formats, each refused with its own sentence, never with another image's pixels."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from slide2vec.errors import SlideOpenError
from slide2vec.readers import open_slide
from slide2vec.slides import as_slide

LABEL, SLIDE, COPY = (
    np.full((height, width, 3), value, np.uint8)
    for width, height, value in ((128, 256, 10), (800, 600, 200), (400, 300, 200))
)


def refused(path: Path) -> str:
    with pytest.raises(SlideOpenError) as error:
        open_slide(as_slide({"sample_id": "s", "image_path": path}))
    return str(error.value)


def write(path: Path, *pages: tuple[np.ndarray, dict[str, Any]]) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for pixels, options in pages:
            tiff.write(pixels, **{"photometric": "rgb", "tile": (64, 64), "metadata": None, **options})
    return path


FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "JP2": ("s.jp2", b"\x00\x00\x00\x0cjP  \r\n\x87\n", ["is a JPEG 2000 image (JP2)", "vips tiffsave"]),
    "JPEG": ("s.jpg", b"\xff\xd8\xff\xe0", ["is a JPEG image", "spacing_at_level_0"]),
    "PDF": ("s.pdf", b"%PDF-1.7", ["is a PDF, not a slide"]),
    "GeoJSON": (
        "s.geojson",
        b'{"type": "FeatureCollection"}',
        ["a text of JSON", "the slide file itself"],
    ),
    "XML": ("s.xml", b'<?xml version="1.0"?><Annotations/>', ["is a text of XML"]),
    "iSyntax": (
        "s.isyntax",
        b"<DataObject ObjectType=",
        ["a Philips iSyntax file", "QuPath", "bfconvert"],
    ),
    "MRXS": ("s.mrxs", b"\xff\xd8\xff\xe0", ["in the folder s beside it, which is not there"]),
    "CZI": (
        "s.czi",
        b"ZISRAWFILE" + bytes(600),
        ["a Zeiss CZI of a kind that OpenSlide", "QuPath"],
    ),
    "unknown": ("s.svs", b"this is no slide", ["no kind that OpenSlide knows", "bfconvert"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files_by_their_beginning(case: str, tmp_path: Path) -> None:
    name, content, expected = FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(path)
    assert message.startswith("slide s: ")
    for part in [name, *expected]:
        assert part in message


def test_mrxs_without_its_index(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s.mrxs").write_bytes(b"\xff\xd8\xff\xe0")
    assert "folder s has no Slidedat.ini" in refused(tmp_path / "s.mrxs")


def test_vsi_is_an_index(tmp_path: Path) -> None:
    path = write(tmp_path / "s.vsi", (LABEL, {}))
    assert "in the folder _s_, which is not there" in refused(path)
    (tmp_path / "_s_").mkdir()
    assert "in the folder _s_, and no back end reads them" in refused(path)


def test_one_reason_is_given_and_the_others_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slide2vec.readers")
    path = tmp_path / "s.svs"
    path.write_bytes(b"this is no slide")
    assert "cuCIM" not in refused(path)
    assert "cucim: cuCIM does not read unrecognised files" in caplog.text


def scn(path: Path, *areas: list[np.ndarray], light: str = "brightfield") -> Path:
    """A Leica SCN: a macro image, and areas of the levels given."""
    images, directory = "", 0
    for number, levels in enumerate([[LABEL], *areas]):
        at = (number - 1) * 1_000_000 if number else 0
        images += scn_image(
            [pixels.shape[1::-1] for pixels in levels], directory, at, light if number else ""
        )
        directory += len(levels)
    text = (
        '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c" sizeX="9000000" '
        f'sizeY="9000000"><barcode/>{images}</collection></scn>'
    )
    pages = [LABEL, *(pixels for levels in areas for pixels in levels)]
    return write(path, (pages[0], {"description": text}), *((pixels, {}) for pixels in pages[1:]))


def scn_image(sizes: list[tuple[int, int]], directory: int, at: int, light: str) -> str:
    """An area of 1 µm/px at a place in nm or, without a light, the macro image that spans all."""
    dimensions = "".join(
        f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{directory + r}"/>'
        for r, (w, h) in enumerate(sizes)
    )
    w, h = sizes[0]
    view = (w * 1000, h * 1000) if light else (9_000_000, 9_000_000)
    return (
        f'<image name="{directory}"><pixels sizeX="{w}" sizeY="{h}">{dimensions}</pixels>'
        f'<view sizeX="{view[0]}" sizeY="{view[1]}" offsetX="{at}" offsetY="{at}"/><scanSettings>'
        f"<objectiveSettings><objective>{20 if light else 0.6}</objective></objectiveSettings>"
        f"<illuminationSettings><illuminationSource>{light or 'brightfield'}</illuminationSource>"
        "</illuminationSettings></scanSettings></image>"
    )


def test_scn(tmp_path: Path) -> None:
    with open_slide(as_slide(scn(tmp_path / "one.scn", [SLIDE, COPY]))) as reader:
        assert (reader.backend, len(reader.level_dimensions)) == ("openslide", 2)
    assert "a Leica SCN of areas that are too unlike" in refused(
        scn(tmp_path / "two.scn", [SLIDE, COPY], [SLIDE])
    )
    glowing = scn(tmp_path / "glow.scn", [SLIDE, COPY], light="fluorescence")
    assert "a Leica SCN without a brightfield image" in refused(glowing)


def test_bif_never_gives_its_label(tmp_path: Path) -> None:
    """OpenSlide takes the label of a BIF without Ventana's XML for the slide."""
    label = (LABEL, {"description": "Label_Image"})
    levels = [(SLIDE, {"description": "level=0 mag=20"}), (COPY, {"description": "level=1 mag=10"})]
    xml = b'<Metadata><iScan Magnification="20" ScanRes="0.5" ScannerModel="VENTANA DP 600"/></Metadata>'
    whole = write(
        tmp_path / "whole.bif", (LABEL, {**label[1], "extratags": [(700, 1, len(xml), xml, True)]}), *levels
    )
    for path in (whole, write(tmp_path / "bare.bif", label, *levels)):
        with open_slide(as_slide(path)) as reader:
            assert reader.dimensions == (800, 600)
            assert (reader.read_region((100, 100), 0, (50, 50)) == 200).all()


def test_trestle_with_oblong_pixels(tmp_path: Path) -> None:
    """OpenSlide gives its µm/px."""
    options = {"software": "MedScan", "description": "Objective Power=20"}
    for y, oblong in ((0.5, False), (1, True)):
        path = write(tmp_path / f"{y}.tif", (SLIDE, {**options, "resolution": (0.5, y)}), (COPY, {}))
        if oblong:
            assert "0.5 µm wide and 1 µm high (mpp)" in refused(path)
        else:
            open_slide(as_slide(path)).close()
