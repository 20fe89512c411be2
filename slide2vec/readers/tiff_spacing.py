"""What the tags of a TIFF claim its µm/px to be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from slide2vec.readers.ome_xml import OmeImage
from slide2vec.readers.spacing import SpacingCandidate, objective_claim

__all__ = ["tiff_claims"]

Page: TypeAlias = Any


def tiff_claims(vendor: str, page: Page, image: OmeImage | None) -> Iterator[SpacingCandidate]:
    """The claims of level 0, the most trustworthy first."""
    text = page.description
    if vendor == "aperio":
        yield from (("mpp", value) for value in _numbers(r"\bMPP *= *([-+.\deE]+)", text))
    if vendor == "philips":
        yield from _philips_claim(text)
    if image is not None and image.x_um is not None:
        yield ("PhysicalSizeX", image.x_um, image.y_um) if image.y_um else ("PhysicalSizeX", image.x_um)
    yield from _resolution_claims(page)
    if vendor == "aperio":
        yield from (objective_claim(value) for value in _numbers(r"\bAppMag *= *([-+.\deE]+)", text))
    if vendor == "hamamatsu":
        lens = page.tags.valueof(65421)
        yield from [objective_claim(float(lens))] if lens else []


def _philips_claim(text: str) -> Iterator[SpacingCandidate]:
    """DICOM_PIXEL_SPACING in mm: of rows, then of columns, which are equal in scanners' files."""
    pattern = r'DICOM_PIXEL_SPACING"[^>]*>\s*(?:"|&quot;)?([-+.\deE]+)'
    yield from (("DICOM_PIXEL_SPACING", value * 1000) for value in _numbers(pattern, text))


def _numbers(pattern: str, text: str) -> Iterator[float]:
    """The number that the first match of `pattern` captures, if there is one."""
    found = re.search(pattern, text)
    if found:
        try:
            yield float(found[1])
        except ValueError:
            return


def _resolution_claims(page: Page) -> Iterator[SpacingCandidate]:
    """XResolution and YResolution in pixels per inch (unit 2) or centimetre (3)."""
    um = {2: 25_400.0, 3: 10_000.0}.get(_whole(page.tags.valueof("ResolutionUnit", 0)))
    x, y = (_ratio(page.tags.valueof(f"{axis}Resolution")) for axis in "XY")
    if um and x:
        yield ("resolution", um / x, um / y) if y else ("resolution", um / x)


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int) else 0


def _ratio(value: Any) -> float:
    """A rational tag as a number, 0 where it is missing, zero or divided by zero."""
    pixels, per = value if isinstance(value, tuple) and len(value) == 2 else (0, 0)
    return pixels / per if per else 0.0
