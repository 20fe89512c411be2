"""Which of the images in a TIFF is the slide: what each writer's metadata say."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypeAlias

from slide2vec.readers.ome_xml import OmeImage, parse_ome
from slide2vec.readers.refusal import EXPORT, Refusal
from slide2vec.readers.tiff_levels import (
    RIVAL,
    Levels,
    copies_of,
    joined,
    the_largest,
)
from slide2vec.readers.tiff_pixels import refuse_pixels

__all__ = ["OPENSLIDE_VENDORS", "SlideImage", "find_slide", "vendor_of"]

logger = logging.getLogger(__name__)

Page: TypeAlias = Any

#: OpenSlide alone knows which directories of these are what.
OPENSLIDE_VENDORS = {"hamamatsu", "leica", "ventana", "trestle"}
#: Names of images that show the glass, not the tissue at full size.
_ASIDE = re.compile(r"\b(label|macro|overview|thumbnail)\b", re.IGNORECASE)


@dataclass(frozen=True)
class SlideImage:
    """The slide in a TIFF.

    Attributes:
        page: directory of level 0.
        levels: of the slide.
        ome: what OME-XML says of it, None where there is none.
    """

    page: Page
    levels: Levels
    ome: OmeImage | None = None


class StaleMetadata(ValueError):
    """Metadata that were copied from another image."""


def vendor_of(pages: Sequence[Page]) -> str:
    """Who wrote a TIFF: aperio, hamamatsu, philips, leica, ventana, trestle, ome or generic."""
    page = pages[0]
    text, software = page.description, str(page.software)
    if any(each.description.startswith("Aperio") for each in pages):
        return "aperio"
    if page.is_ndpi:
        return "hamamatsu"
    if software.startswith("Philips") or "DPUfsImport" in text:
        return "philips"
    if page.is_scn or "leica-microsystems.com/scn" in text:
        return "leica"
    if any("<iScan" in _xmp(each) for each in pages):
        return "ventana"
    if software.startswith("MedScan"):
        return "trestle"
    return "ome" if page.is_ome else "generic"


def _xmp(page: Page) -> str:
    value = page.tags.valueof("XMP", b"")
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def find_slide(vendor: str, pages: Sequence[Page], filename: str) -> SlideImage:
    """The slide's image and its levels.

    Raises:
        Refusal: the file holds none that is read, or several that may be it.
    """
    if vendor == "ome" and (images := parse_ome(pages[0].description, filename)):
        try:
            return _of_ome(images, pages)
        except StaleMetadata as error:
            logger.warning("%s: %s; it is not believed", filename, error)
    if vendor in OPENSLIDE_VENDORS:
        refuse_pixels(pages[0], None)
        return SlideImage(pages[0], ((), 0))
    if vendor == "philips":
        base, levels = pages[0], copies_of(pages[0], pages, slack_px=inf)  # padded to whole tiles
    elif vendor == "aperio":
        full = [page for page in pages if not _ASIDE.match(_second_line(page.description))]
        base = the_largest(full or pages)
        levels = copies_of(base, full, flagged=False)
    else:
        _refuse_hyperstack(pages[0])
        full = list(_of_qptiff(pages))
        base = the_largest(full)
        huron = str(pages[0].tags.valueof("Make", "")).startswith("Huron")
        levels = copies_of(base, full, flagged=not huron)  # OpenSlide takes all that Huron tiles for levels
    refuse_pixels(base, None)
    return SlideImage(base, levels)


def _second_line(description: str) -> str:
    """Of an Aperio description, where labels and macro images are named."""
    lines = description.splitlines()
    return lines[1] if len(lines) > 1 else ""


def _refuse_hyperstack(page: Page) -> None:
    """Refuse ImageJ's stacks: one directory may stand for all of their images."""
    if not page.description.startswith("ImageJ="):
        return
    sizes = dict(re.findall(r"^(channels|slices|frames)=(\d+)", page.description, re.MULTILINE))
    if more := [f"{name}={size}" for name, size in sizes.items() if int(size) > 1]:
        raise Refusal(
            f"it is a hyperstack of ImageJ ({', '.join(more)}), not one brightfield image; {EXPORT}"
        )


def _of_qptiff(pages: Sequence[Page]) -> Sequence[Page]:
    """The directories that are the slide's levels by a PerkinElmer QPTIFF's own words; all of other files.

    Raises:
        Refusal: it is multispectral.
    """
    if not any("PerkinElmer-QPI" in page.description for page in pages):
        return pages
    kinds = [re.search(r"<ImageType>\s*(\w+)", page.description) for page in pages]
    full = [page for page, kind in zip(pages, kinds, strict=True) if kind and kind[1] == "FullResolution"]
    if len(full) > 1:
        raise Refusal(
            f"it is a multispectral QPTIFF of {len(full)} channels; slide2vec reads brightfield slides: "
            f"render it as 8-bit RGB, and {EXPORT}"
        )
    wanted = ("FullResolution", "ReducedResolution")
    return [page for page, kind in zip(pages, kinds, strict=True) if kind and kind[1] in wanted] or pages


def _of_ome(described: Sequence[OmeImage], pages: Sequence[Page]) -> SlideImage:
    images = [image for image in described if not _ASIDE.search(image.name)] or described
    largest = max(image.width * image.height for image in images)
    plausible = [image for image in images if image.width * image.height >= RIVAL * largest]
    image = plausible[0]
    if len(plausible) > 1:
        named = ", ".join(
            f"{number} {each.name!r} ({each.width}x{each.height} px)"
            for number, each in enumerate(images)
            if each in plausible
        )
        raise Refusal(
            f"its OME-XML describes {len(plausible)} images that may be the slide: {named}; write the one "
            "that is to be read into a file of its own (bfconvert -series N IN OUT.ome.tiff, or QuPath)"
        )
    if image.elsewhere:
        raise Refusal(
            f"the pixels of its image {image.name!r} are in another file, {image.elsewhere!r}: give that "
            f"file, or {EXPORT}"
        )
    return _of_ome_image(image, described, pages)


def _of_ome_image(image: OmeImage, images: Sequence[OmeImage], pages: Sequence[Page]) -> SlideImage:
    planes = _planes(image, pages)
    base = planes[0]
    if image.width and (base.imagewidth, base.imagelength) != (image.width, image.height):
        raise StaleMetadata(
            f"its OME-XML is of another image: {image.width}x{image.height} px, and directory {base.index} "
            f"has {base.imagewidth}x{base.imagelength} px"
        )
    if _are_red_green_blue(image, planes):
        return SlideImage(base, _joined_levels([planes[number] for number in _order(image)]), image)
    refuse_pixels(base, image)
    of_others = {page.index for other in images if other is not image for page in _planes(other, pages)}
    return SlideImage(base, copies_of(base, [page for page in pages if page.index not in of_others]), image)


def _planes(image: OmeImage, pages: Sequence[Page]) -> list[Page]:
    """The directories of an image."""
    planes: list[Page] = []
    for first, count in image.directories or ((0, 0),):
        if not 0 <= first < len(pages):
            raise StaleMetadata(f"its OME-XML names directory {first}, and there are {len(pages)}")
        per_directory = max(1, pages[first].samplesperpixel)
        planes += pages[first : first + (count or image.z * image.t * -(-image.c // per_directory))]
    return planes


def _are_red_green_blue(image: OmeImage, planes: Sequence[Page]) -> bool:
    single = all(page.samplesperpixel == 1 for page in planes)
    alike = len({(page.imagewidth, page.imagelength, page.compression) for page in planes}) == 1
    plain = image.type == "uint8" and image.z == image.t == 1
    glows = any(channel.fluorescence for channel in image.channels)
    return len(planes) == 3 and single and alike and plain and not glows and len(_order(image)) == 3


def _order(image: OmeImage) -> list[int]:
    """Where red, green and blue are among the channels, by their names."""
    names = [channel.name.strip().lower() for channel in image.channels]
    return [
        number
        for colour in ("red", "green", "blue")
        for number, name in enumerate(names)
        if name in (colour, colour[0])
    ]


def _joined_levels(planes: Sequence[Page]) -> Levels:
    """The levels of an image whose red, green and blue are three directories."""
    for page in planes:
        refuse_pixels(page, None)
    each = [copies_of(page, ())[0] for page in planes]
    alike = len({tuple((level.width, level.height) for level in levels) for levels in each}) == 1
    levels = tuple(map(joined, zip(*each, strict=True) if alike else [[level[0] for level in each]]))
    return levels, 1
