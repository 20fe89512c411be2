"""What the pixels of a slide must be, whatever reads them: 8-bit brightfield RGB (or gray), upright."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from slide2vec.readers.ome_xml import OmeImage
from slide2vec.readers.refusal import CONVERT, COPY_AGAIN, EXPORT, Refusal
from slide2vec.readers.tiff_levels import TiffLevel

__all__ = ["refuse_contradictions", "refuse_pixels"]

Page: TypeAlias = Any

_CHANNELS = (1, 3, 4)
#: TIFF 6.0, section 19; 4 is "undefined", which readers take for unsigned.
_SAMPLE_FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex floating-point"}
#: TIFF 6.0, Orientation.
_ORIENTATIONS = {
    2: "mirrored",
    3: "turned by 180°",
    4: "upside down",
    5: "transposed",
    6: "turned by 90°",
    7: "transposed and turned by 180°",
    8: "turned by 270°",
}
#: Photometric interpretation -> channels that hold its colours (TIFF 6.0); others may follow in ExtraSamples.
_COLOURS = {"RGB": 3, "YCBCR": 3, "CIELAB": 3, "SEPARATED": 4, "MINISBLACK": 1, "MINISWHITE": 1, "PALETTE": 1}
_RENDER = f"slide2vec reads 8-bit brightfield slides; render it as 8-bit RGB, and {EXPORT}"


def refuse_pixels(page: Page, image: OmeImage | None) -> None:
    """Refuse a slide whose pixels would be read as something that they are not.

    Args:
        page: directory of level 0.
        image: what OME-XML says of it.

    Raises:
        Refusal: with all that was found.
    """
    found = [*_samples(page, image), *(_planes(image, page.samplesperpixel) if image else ())]
    if found:
        raise Refusal(f"it has {' and '.join(found)}; {_RENDER}")
    orientation = page.tags.valueof(274, 1)
    if orientation != 1:
        raise Refusal(
            f"its Orientation tag is {orientation} ({_ORIENTATIONS.get(orientation, 'unknown')}), which "
            f"readers of slides do not follow; turn it upright (vips autorot) and {CONVERT}. If its pixels "
            "are upright already, set the tag to 1: tiffset -s 274 1 FILE"
        )


def _samples(page: Page, image: OmeImage | None) -> Iterator[str]:
    bits = page.tags.valueof(258, page.bitspersample)
    each: Sequence[int] = bits if isinstance(bits, tuple) else (bits,)
    if any(value != 8 for value in each):
        known = sorted(set(each))
        yield f"{' and '.join(map(str, known))} bits per channel{_significant(image, max(known))}, not 8"
    formats = page.tags.valueof(339, 1)
    for value in sorted(set(formats if isinstance(formats, tuple) else (formats,))):
        if value in _SAMPLE_FORMATS:
            yield f"{_SAMPLE_FORMATS[value]} samples (SampleFormat {value})"
    if page.samplesperpixel not in _CHANNELS:
        yield f"{page.samplesperpixel} channels per pixel, where 1, 3 or 4 are read"
    if page.imagedepth != 1:
        yield f"a depth of {page.imagedepth} planes (ImageDepth)"


def _significant(image: OmeImage | None, bits: int) -> str:
    if image is None or not 0 < image.significant_bits < bits:
        return ""
    return f" (of which {image.significant_bits} are significant)"


def _planes(image: OmeImage, samples: int) -> Iterator[str]:
    """What OME-XML says that no brightfield slide has."""
    glowing = [channel for channel in image.channels if channel.fluorescence]
    if glowing:
        yield (
            f"fluorescence in {len(glowing)} of {len(image.channels)} channels "
            f"({', '.join(_named(channel.name, channel.fluorescence) for channel in glowing[:4])})"
        )
    if image.z > 1:
        yield f"a focus stack of {image.z} planes (SizeZ)"
    if image.t > 1:
        yield f"a time series of {image.t} images (SizeT)"
    if image.c > samples:
        names = [channel.name or "unnamed" for channel in image.channels]
        yield f"{image.c} channels (SizeC; {', '.join(names[:6])}) in {samples} per directory"


def _named(name: str, what: str) -> str:
    return f"{name}: {what}" if name else what


def refuse_contradictions(levels: Sequence[TiffLevel], base: Page) -> None:
    """Refuse a slide whose tags contradict each other: libraries take their pick, and most say nothing.

    Raises:
        Refusal: a level has not the tiles that its size needs, or not the channels that its colours need.
    """
    strips = base.tags.get(273)
    in_strips = strips is not None and levels and not levels[0].tile and not levels[0].planes
    # tifffile drops those beyond what the size needs
    if in_strips and strips.count != len(levels[0].offsets):
        raise Refusal(
            f"directory {base.index} has {base.imagewidth}x{base.imagelength} px in strips of "
            f"{base.rowsperstrip} rows, which are {len(levels[0].offsets)}, and lists {strips.count} of "
            f"them: the file is damaged; {COPY_AGAIN}"
        )
    for level in levels:
        width, height = level.tile or (level.width, min(level.rows_per_strip, level.height))
        planes = level.samples if level.planar else 1
        needed = -(-level.width // width) * -(-level.height // height) * planes
        if not len(level.offsets) == len(level.counts) == needed:
            raise Refusal(
                f"directory {level.page} has {level.width}x{level.height} px in "
                f"{'tiles' if level.tile else 'strips'} of {width}x{height}, which are {needed}, and lists "
                f"{len(level.offsets)} of them: the file is damaged; {COPY_AGAIN}"
            )
        colours = _COLOURS.get(level.photometric, level.samples)
        if level.samples < colours or (level.samples > colours and colours == 1 and level.samples != 2):
            raise Refusal(
                f"directory {level.page} has {level.samples} channels, and its colours are "
                f"{level.photometric}, which {'is' if colours == 1 else 'are'} {colours}: it is damaged or "
                f"was written wrongly; {COPY_AGAIN}, or write it anew as RGB"
            )
