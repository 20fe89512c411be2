"""What OME-XML says about the images of a file.

The model: https://docs.openmicroscopy.org/ome-model/6.3.1/ome-tiff/specification.html
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from xml.etree import ElementTree

from slide2vec.readers.refusal import Refusal

__all__ = ["OmeChannel", "OmeImage", "parse_ome"]

#: Of OME-XML with the metadata of thousands of planes; more is not read.
_MOST_BYTES = 64 << 20
#: µm in the units of length that the OME model has and a scanner may write.
_UM = {
    "pm": 1e-6,
    "nm": 1e-3,
    "Å": 1e-4,
    "µm": 1.0,
    "um": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "dm": 1e5,
    "m": 1e6,
    "in": 25_400.0,
}
_DEFAULT_UNIT = "µm"


@dataclass(frozen=True, kw_only=True)
class OmeChannel:
    """A channel of an image.

    Attributes:
        name: empty where none is given.
        samples: per pixel: 3 where red, green and blue are interleaved.
        fluorescence: what says that it is fluorescence ("ContrastMethod Fluorescence"), else empty.
    """

    name: str
    samples: int
    fluorescence: str


@dataclass(frozen=True, kw_only=True)
class OmeImage:
    """An image of a file.

    Attributes:
        name: empty where none is given.
        width, height: in px, 0 where not given.
        z, t, c: planes in depth and time, samples of all channels.
        type: of samples: "uint8", …
        significant_bits: of a sample, 0 where not given.
        channels: those that are described.
        x_um, y_um: µm/px, None where not given or in units that are no length.
        directories: (first directory, number of them, 0 for all) of its planes in this file, by channel.
        elsewhere: the file its planes are in, where that is another one, else empty.
    """

    name: str
    width: int
    height: int
    z: int
    t: int
    c: int
    type: str
    significant_bits: int
    channels: tuple[OmeChannel, ...]
    x_um: float | None
    y_um: float | None
    directories: tuple[tuple[int, int], ...]
    elsewhere: str


def parse_ome(xml: str, filename: str) -> list[OmeImage]:
    """The images that OME-XML describes, in its order; none where it is no OME-XML.

    Args:
        filename: of the file that it was in, to tell planes of this file from others'.

    Raises:
        Refusal: it is damaged, too large or has declarations that are no part of OME-XML.
    """
    if len(xml) > _MOST_BYTES:
        raise Refusal(f"its OME-XML has {len(xml):,} characters, of which {_MOST_BYTES:,} are read at most")
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise Refusal("its OME-XML declares a document type or entities, which OME-XML has not")
    try:
        root = ElementTree.fromstring(xml.encode())
    except ElementTree.ParseError as error:
        raise Refusal(f"its OME-XML is damaged ({error}); export the slide again") from error
    if _tag(root) != "OME":
        return []
    images = [
        (image, pixels) for image in [root, *_all(root, "Image")] for pixels in _all(image, "Pixels")[:1]
    ]
    try:
        return [_image(image, pixels, filename) for image, pixels in images]
    except ValueError as error:
        raise Refusal(f"its OME-XML has a wrong attribute ({error}); export the slide again") from error


def _image(image: ElementTree.Element, pixels: ElementTree.Element, filename: str) -> OmeImage:
    directories, elsewhere = _directories(pixels, filename)
    return OmeImage(
        name=image.get("Name", ""),
        width=int(pixels.get("SizeX", "0")),
        height=int(pixels.get("SizeY", "0")),
        z=int(pixels.get("SizeZ", "1")),
        t=int(pixels.get("SizeT", "1")),
        c=int(pixels.get("SizeC", "1")),
        type=pixels.get("Type", pixels.get("PixelType", "")),
        significant_bits=int(pixels.get("SignificantBits", "0")),
        channels=tuple(map(_channel, _all(pixels, "Channel"))),
        x_um=_um(pixels, "PhysicalSizeX"),
        y_um=_um(pixels, "PhysicalSizeY"),
        directories=directories,
        elsewhere=elsewhere,
    )


def _channel(channel: ElementTree.Element) -> OmeChannel:
    found = ""
    contrast, mode = channel.get("ContrastMethod", ""), channel.get("AcquisitionMode", "")
    if "fluorescence" in contrast.lower():
        found = f"ContrastMethod {contrast}"
    elif "fluorescence" in mode.lower() or "confocal" in mode.lower():
        found = f"AcquisitionMode {mode}"
    elif channel.get("EmissionWavelength"):
        found = f"EmissionWavelength {channel.get('EmissionWavelength')}"
    elif channel.get("Fluor"):
        found = f"Fluor {channel.get('Fluor')}"
    return OmeChannel(
        name=channel.get("Name", ""), samples=int(channel.get("SamplesPerPixel", "1")), fluorescence=found
    )


def _um(pixels: ElementTree.Element, name: str) -> float | None:
    unit = pixels.get(f"{name}Unit", _DEFAULT_UNIT).replace("\u03bc", "\u00b5")
    try:
        value = float(pixels.get(name, "")) * _UM.get(unit, nan)
    except ValueError:
        return None
    return None if value != value else value


def _directories(pixels: ElementTree.Element, filename: str) -> tuple[tuple[tuple[int, int], ...], str]:
    """Where an image's planes are; planes of another file only where several files are named."""
    places, files = [], []
    for data in sorted(_all(pixels, "TiffData"), key=lambda data: int(data.get("FirstC", "0"))):
        uuids = _all(data, "UUID")
        files.append(uuids[0].get("FileName", "") if uuids else "")
        first = data.get("IFD")
        default = "1" if first is not None else "0"
        places.append((int(first or 0), int(data.get("PlaneCount", default))))
    named = {file for file in files if file}
    if len(named) < 2:  # one file, perhaps renamed since
        return tuple(places), ""
    here = tuple(place for place, file in zip(places, files, strict=True) if file in ("", filename))
    return here, "" if here else sorted(named)[0]


def _all(element: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [child for child in element if _tag(child) == name]


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
