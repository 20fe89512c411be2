"""Which image of a file is the slide, and what is refused, each with a file made for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from slide2vec.errors import SlideOpenError
from slide2vec.readers import open_slide
from slide2vec.readers.probe import probe
from slide2vec.slides import as_slide

#: (width, height), and options of TiffWriter.write.
Image = tuple[tuple[int, int], dict[str, Any]]

REDUCED = {"subfiletype": 1}
MASK = {"subfiletype": 5, "photometric": "minisblack"}
STRIPS = {"tile": None}
APERIO = "Aperio Image Library v12.0.15 \r\n"


def picture(size: tuple[int, int], channels: int = 3) -> np.ndarray:
    width, height = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([60 + x % 180, 60 + y % 180, 60 + (x + y) % 180, 255 - x % 90], axis=-1)
    return pixels[..., :channels].astype(np.uint8)


def write(path: Path, *images: Image) -> Path:
    defaults = {
        "photometric": "rgb",
        "tile": (64, 64),
        "resolution": (20_000, 20_000),
        "resolutionunit": "CENTIMETER",
        "metadata": None,
    }
    with tifffile.TiffWriter(path) as tiff:
        for size, options in images:
            pixels = picture(size)
            if options.get("photometric") == "minisblack":
                pixels = pixels[..., 0]
            if options.get("subfiletype", 0) & 4:
                pixels = pixels > 100
            tiff.write(pixels, **{**defaults, **options})
    return path


def said(path: Path, **slide: Any) -> str:
    """The error that a file is refused with, by every back end alike."""
    with pytest.raises(SlideOpenError) as refused:
        open_slide(as_slide({"sample_id": "s", "image_path": path, **slide}))
    return str(refused.value)


LEVELS: dict[str, tuple[list[Image], list[tuple[int, int | None]], int]] = {
    "a pyramid": (
        [((800, 600), {}), ((400, 300), REDUCED), ((200, 150), REDUCED)],
        [(0, None), (1, None), (2, None)],
        3,
    ),
    "the smallest first": (
        [((200, 150), REDUCED), ((400, 300), REDUCED), ((800, 600), {})],
        [(2, None), (1, None), (0, None)],
        3,
    ),
    "rounded sides": ([((2220, 2967), {}), ((138, 185), REDUCED)], [(0, None), (1, None)], 2),
    "a thumbnail first, in strips": (
        [((100, 75), STRIPS), ((800, 600), {}), ((400, 300), REDUCED)],
        [(1, None), (2, None)],
        2,
    ),
    "a macro image first, in tiles": ([((128, 96), {}), ((800, 600), {})], [(1, None), (0, None)], 1),
    "a larger macro image in strips": ([((900, 700), STRIPS), ((800, 600), {})], [(1, None)], 1),
    "a label that says it is reduced": (
        [((800, 600), {}), ((400, 300), REDUCED), ((300, 300), REDUCED)],
        [(0, None), (1, None)],
        2,
    ),
    "a small label": ([((800, 600), {}), ((300, 300), {})], [(0, None)], 1),
    "masks": (
        [
            ((800, 600), {}),
            ((800, 600), {**MASK, "subfiletype": 4}),
            ((400, 300), REDUCED),
            ((400, 300), MASK),
        ],
        [(0, None), (2, None)],
        2,
    ),
    "copies that do not say so": (
        [((800, 600), {}), ((400, 300), {}), ((200, 150), {})],
        [(0, None), (1, None), (2, None)],
        1,
    ),
    "copies in SubIFDs": (
        [((800, 600), {"subifds": 2}), ((400, 300), REDUCED), ((200, 150), REDUCED)],
        [(0, None), (0, 0), (0, 1)],
        1,
    ),
    "a grayscale overview": (
        [((800, 600), {}), ((400, 300), {**REDUCED, "photometric": "minisblack"})],
        [(0, None)],
        1,
    ),
    "Aperio in an unusual order": (
        [
            ((300, 200), {**STRIPS, "description": APERIO + "label 300x200"}),
            ((400, 300), {"description": APERIO + "800x600 (64x64) -> 400x300 JPEG/RGB Q=85|MPP = 0.5"}),
            ((900, 700), {"description": APERIO + "macro 900x700"}),
            ((800, 600), {"description": APERIO + "800x600 (64x64) JPEG/RGB Q=85|MPP = 0.5"}),
        ],
        [(3, None), (1, None)],
        2,
    ),
}


@pytest.mark.parametrize("case", LEVELS)
def test_levels(case: str, tmp_path: Path) -> None:
    images, levels, planning = LEVELS[case]
    found = probe(as_slide(write(tmp_path / "slide.tif", *images)))
    assert [(level.page, level.subifd) for level in found.levels] == levels
    assert found.planning == planning
    assert found.spacing_um == 0.5


RIVALS: dict[str, list[Image]] = {
    "equal": [((800, 600), {}), ((800, 600), {})],
    "like": [((800, 600), {}), ((700, 640), {})],
    "in strips": [((800, 600), STRIPS), ((700, 640), STRIPS)],
}


@pytest.mark.parametrize("case", RIVALS)
def test_two_images_that_may_be_the_slide(case: str, tmp_path: Path) -> None:
    (first, _), (second, _) = RIVALS[case]
    message = said(write(tmp_path / "slide.tif", *RIVALS[case]))
    assert "slide s: " in message and "2 images that may be the slide" in message
    assert f"directory 0 ({first[0]}x{first[1]} px)" in message
    assert f"directory 1 ({second[0]}x{second[1]} px)" in message
    assert "a file of its own" in message


def tagged(path: Path, **tags: Any) -> Path:
    """A slide with tags overwritten."""
    write(path, ((128, 128), {"extratags": [(274, "H", 1, 1, True), (339, "H", 3, (1, 1, 1), True)]}))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name, value in tags.items():
            tiff.pages[0].tags[name].overwrite(value)
    return path


def of_array(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, pixels, tile=(64, 64), metadata=None, **{"photometric": "rgb", **options})
    return path


WRONG_PIXELS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "turned": (lambda path: tagged(path, Orientation=6), ["Orientation tag is 6 (turned by 90°)", "tiffset"]),
    "mirrored": (lambda path: tagged(path, Orientation=2), ["Orientation tag is 2 (mirrored)"]),
    "oblong": (
        lambda path: write(path, ((128, 128), {"resolution": (20_000, 10_000)})),
        ["0.5 µm wide and 1 µm high (resolution)", "--vscale 1", "spacing_at_level_0"],
    ),
    "16 bits": (lambda path: of_array(path, picture((128, 128)).astype(np.uint16)), ["16 bits per channel"]),
    "signed": (
        lambda path: of_array(path, picture((128, 128)).astype(np.int8)),
        ["signed samples (SampleFormat 2)"],
    ),
    "float": (
        lambda path: of_array(path, picture((128, 128)).astype(np.float32)),
        ["32 bits per channel", "floating-point samples (SampleFormat 3)"],
    ),
    "bits unlike": (lambda path: tagged(path, BitsPerSample=(8, 8, 16)), ["8 and 16 bits per channel"]),
    "two channels": (
        lambda path: of_array(path, picture((128, 128), 2), photometric="minisblack", extrasamples=[0]),
        ["2 channels per pixel, where 1, 3 or 4 are read"],
    ),
    "seven channels": (
        lambda path: of_array(
            path,
            np.repeat(picture((128, 128), 1), 7, axis=2),
            photometric="minisblack",
            planarconfig="contig",
            extrasamples=[0] * 6,
        ),
        ["7 channels per pixel"],
    ),
    "no width": (lambda path: tagged(path, ImageWidth=0), ["directory 0 claims 0x128 px"]),
    "no tile height": (lambda path: tagged(path, TileLength=0), ["directory 0 claims tiles of 64x0 px"]),
}


@pytest.mark.parametrize("case", WRONG_PIXELS)
def test_pixels_that_are_refused(case: str, tmp_path: Path) -> None:
    make, expected = WRONG_PIXELS[case]
    message = said(make(tmp_path / "slide.tif"))
    for part in ["slide s: ", "slide.tif", *expected]:
        assert part in message
    for backend in ("vips", "openslide", "cucim"):
        with pytest.raises(SlideOpenError):
            open_slide(as_slide(tmp_path / "slide.tif"), backend)


def test_spacing_that_is_given_makes_pixels_square(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", ((128, 128), {"resolution": (20_000, 10_000)}))
    with open_slide(as_slide(path, spacing_at_level_0=0.5)) as reader:
        assert reader.dimensions == (128, 128)


@pytest.mark.parametrize("resolution", [(20_000, 20_100), (1, 2), (20_000, 0)])
def test_what_counts_as_square(resolution: tuple[int, int], tmp_path: Path) -> None:
    """Within 1 %; implausible values say nothing; a missing one neither."""
    assert probe(as_slide(write(tmp_path / "slide.tif", ((128, 128), {"resolution": resolution})))).levels


def ome(path: Path, pixels: str = "", images: list[Image] | None = None, *, xml: str = "") -> Path:
    """An OME-TIFF, of 800x600 px unless `images` say otherwise; `pixels` go into Pixels, or `xml` is all."""
    head = '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    xml = xml or f'<Image ID="Image:0" Name="slide"><Pixels SizeX="800" SizeY="600" {pixels}</Pixels></Image>'
    (size, options), *more = images or [((800, 600), {})]
    description = {"description": (head + xml + "</OME>").encode()}
    return write(path, (size, {**options, **description}), *more)


RGB = 'Type="uint8" SizeC="3" SizeZ="1" SizeT="1"><Channel SamplesPerPixel="3"'
GRAYS: list[Image] = [((800, 600), {"photometric": "minisblack"})] * 3


def three(*channels: str, sizes: str = 'SizeC="3" SizeZ="1" SizeT="1"') -> str:
    return f'Type="uint8" {sizes}>' + "".join(f"<Channel {channel}/>" for channel in channels)


OME_REFUSED: dict[str, tuple[str, list[Image] | None, list[str]]] = {
    "contrast": (
        f'{RGB} ContrastMethod="Fluorescence" Name="all"/>',
        None,
        ["fluorescence in 1 of 1 channels (all: ContrastMethod Fluorescence)"],
    ),
    "emission": (f'{RGB} EmissionWavelength="620"/>', None, ["(EmissionWavelength 620)"]),
    "fluor": (f'{RGB} Fluor="DAPI"/>', None, ["(Fluor DAPI)"]),
    "mode": (
        f'{RGB} AcquisitionMode="LaserScanningConfocalMicroscopy"/>',
        None,
        ["(AcquisitionMode LaserScanningConfocalMicroscopy)"],
    ),
    "focus stack": (
        'Type="uint8" SizeC="3" SizeZ="3" SizeT="1"><TiffData IFD="0" PlaneCount="3"/>',
        [((800, 600), {})] * 3,
        ["a focus stack of 3 planes (SizeZ)"],
    ),
    "time series": (
        'Type="uint8" SizeC="3" SizeZ="1" SizeT="2"><TiffData IFD="0" PlaneCount="2"/>',
        [((800, 600), {})] * 2,
        ["a time series of 2 images (SizeT)"],
    ),
    "channels": (
        three('Name="CD3"', 'Name="CD8"', 'Name="DAPI"') + '<TiffData IFD="0" PlaneCount="3"/>',
        GRAYS,
        ["3 channels (SizeC; CD3, CD8, DAPI) in 1 per directory"],
    ),
    "coloured channels that glow": (
        three('Name="Red" Fluor="Cy5"', 'Name="Green"', 'Name="Blue"') + '<TiffData IFD="0" PlaneCount="3"/>',
        GRAYS,
        ["fluorescence in 1 of 3 channels (Red: Fluor Cy5)"],
    ),
    "oblong": (
        f'PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.5" {RGB}/>',
        None,
        ["0.25 µm wide and 0.5 µm high (PhysicalSizeX)"],
    ),
    "in another file": (
        f'{RGB}/><TiffData FirstC="0"><UUID FileName="b.tif"/></TiffData><TiffData FirstC="1"><UUID FileName='
        '"c.tif"/></TiffData>',
        None,
        ["are in another file, 'b.tif'"],
    ),
    "damaged": (f"{RGB}/", None, ["its OME-XML is damaged"]),
    "sizes that are no numbers": (f'{RGB}/><Channel SamplesPerPixel="many"/>', None, ["wrong attribute"]),
}


@pytest.mark.parametrize("case", OME_REFUSED)
def test_ome_that_is_refused(case: str, tmp_path: Path) -> None:
    pixels, images, expected = OME_REFUSED[case]
    message = said(ome(tmp_path / "slide.ome.tif", pixels, images))
    for part in ["slide s: ", *expected]:
        assert part in message


def test_ome_entities_are_not_expanded(tmp_path: Path) -> None:
    bomb = "<!DOCTYPE lolz [<!ENTITY lol 'lol'>]>"
    path = ome(tmp_path / "slide.ome.tif", xml=bomb + "<Image/>")
    assert "document type or entities" in said(path)


@pytest.mark.parametrize(
    ("given", "spacing"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
        ('PhysicalSizeX="0.25"', 0.25),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="2.5E-4" PhysicalSizeYUnit="mm"', 0.25),
        ('PhysicalSizeX="0.25" PhysicalSizeXUnit="μm"', 0.25),
        ('PhysicalSizeX="0.25" PhysicalSizeXUnit="reference frame"', 0.5),
        ('PhysicalSizeX="0.00001"', 0.5),
    ],
)
def test_ome_spacing(given: str, spacing: float, tmp_path: Path) -> None:
    found = probe(as_slide(ome(tmp_path / "slide.ome.tif", f"{given} {RGB}/>")))
    assert (found.vendor, found.spacing_um) == ("ome", pytest.approx(spacing))


def series(name: str, size: str, directory: int) -> str:
    width, height = size.split("x")
    return (
        f'<Image Name="{name}"><Pixels SizeX="{width}" SizeY="{height}" {RGB}/>'
        f'<TiffData IFD="{directory}" PlaneCount="1"/></Pixels></Image>'
    )


def test_ome_series(tmp_path: Path) -> None:
    """The slide is the second image of three, and SubIFDs are its levels."""
    images: list[Image] = [
        ((900, 700), {}),
        ((800, 600), {"subifds": 1}),
        ((400, 300), REDUCED),
        ((300, 300), {}),
    ]
    xml = (
        series("macro image", "900x700", 0)
        + series("20x", "800x600", 1)
        + series("label image", "300x300", 2)
    )
    found = probe(as_slide(ome(tmp_path / "slide.ome.tif", images=images, xml=xml)))
    assert [(level.page, level.subifd, level.width) for level in found.levels] == [
        (1, None, 800),
        (1, 0, 400),
    ]
    assert found.planning == 1


def test_ome_of_two_slides(tmp_path: Path) -> None:
    xml = series("A", "800x600", 0) + series("B", "700x600", 1)
    path = ome(tmp_path / "slide.ome.tif", images=[((800, 600), {}), ((700, 600), {})], xml=xml)
    assert "2 images that may be the slide: 0 'A' (800x600 px), 1 'B' (700x600 px)" in said(path)


def test_ome_of_another_image_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """libvips hands the description on to what it cuts out."""
    path = ome(tmp_path / "slide.ome.tif", f'PhysicalSizeX="0.25" {RGB} Fluor="x"/>', [((400, 300), {})])
    found = probe(as_slide(path))
    assert found.spacing_um == 0.5
    assert "OME-XML is of another image: 800x600 px" in caplog.text


def test_ome_renamed(tmp_path: Path) -> None:
    body = f'{RGB}/><TiffData IFD="0" PlaneCount="1"><UUID FileName="before.ome.tif"/></TiffData>'
    assert probe(as_slide(ome(tmp_path / "slide.ome.tif", body))).levels[0].width == 800


def test_red_green_and_blue_in_three_directories(tmp_path: Path) -> None:
    body = three('Name="Blue"', 'Name="Red"', 'Name="Green"') + '<TiffData IFD="0" PlaneCount="3"/>'
    path = ome(tmp_path / "slide.ome.tif", body, GRAYS)
    (level,) = probe(as_slide(path)).levels
    assert (level.planes, level.planar, level.samples, level.photometric) == ((1, 2, 0), True, 3, "RGB")
    with tifffile.TiffFile(path) as tiff:
        expected = [offset for page in (1, 2, 0) for offset in tiff.pages[page].dataoffsets]
    assert level.offsets.tolist() == expected


def qptiff(kind: str) -> dict[str, Any]:
    xml = (
        f"<PerkinElmer-QPI-ImageDescription><ImageType>{kind}</ImageType></PerkinElmer-QPI-ImageDescription>"
    )
    return {"description": xml}


def test_qptiff(tmp_path: Path) -> None:
    overview = ((700, 600), qptiff("Overview"))
    path = write(
        tmp_path / "slide.qptiff",
        ((800, 600), qptiff("FullResolution")),
        ((600, 450), {**qptiff("Thumbnail"), "tile": None}),
        ((400, 300), {**qptiff("ReducedResolution"), **REDUCED}),
        overview,
    )
    assert [level.page for level in probe(as_slide(path)).levels] == [0, 2]
    channel = ((800, 600), {**qptiff("FullResolution"), "photometric": "minisblack"})
    assert "multispectral QPTIFF of 2 channels" in said(write(tmp_path / "many.qptiff", channel, channel))


def test_hyperstacks_of_imagej(tmp_path: Path) -> None:
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, np.zeros((3, 64, 64), np.uint8), imagej=True, metadata={"axes": "CYX"})
    assert "hyperstack of ImageJ (channels=3)" in said(path)
