"""What a picture shows, in a strip below it: lines of text, a scale bar, and what its colours mean.

The strip is below, so that a pixel of the picture stays where it is: (x, y) of it is (x, y) of the slide over
its downsample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

__all__ = ["scale_bar_um", "slide_size", "with_footer"]

Pixels: TypeAlias = NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]

_INK, _PAPER = (40, 40, 40), (255, 255, 255)
#: Of the picture's longer side: the height of letters, and its limits in px.
_LETTERS, _LEAST_PX, _MOST_PX = 1 / 64, 14, 48
#: A narrower picture is widened, so that words fit: letters.
_LEAST_LETTERS = 30
#: A scale bar is at most this share of the picture's width.
_MOST_BAR = 0.25


def with_footer(
    picture: Pixels,
    lines: Sequence[str],
    *,
    um_per_px: float | None = None,
    key: Pixels | None = None,
    swatches: Mapping[str, Colour] | None = None,
) -> Pixels:
    """A picture with a white strip below it.

    Args:
        picture: (h, w, 3) uint8 RGB.
        lines: of text, broken where the picture is too narrow.
        um_per_px: of the picture, for a scale bar; None = without.
        key: (a, b, 3) uint8 RGB, drawn at the left of the strip.
        swatches: name -> colour, drawn in a row of their own.

    Returns:
        (H, W, 3) uint8 RGB, with the picture in its top left corner; W is larger than w where the picture is
        narrower than words.
    """
    from PIL import Image, ImageDraw

    height, width = picture.shape[:2]
    size = int(np.clip(round(max(height, width) * _LETTERS), _LEAST_PX, _MOST_PX))
    font, gap, line = _font(size), size // 2, round(size * 1.5)
    whole = max(width, _LEAST_LETTERS * size // 2)
    bar_um = None if um_per_px is None else scale_bar_um(width * um_per_px)
    bar_px = 0 if bar_um is None or um_per_px is None else max(1, round(bar_um / um_per_px))
    at_right = 0 if bar_um is None else max(bar_px, round(_width(_length(bar_um), font))) + 2 * gap
    key_px = 0 if key is None else min(5 * line, whole // 4)
    left = gap + (key_px * key.shape[1] // key.shape[0] + gap if key is not None else 0)
    broken = _broken(lines, whole - left - at_right - gap, font)
    if whole - left - at_right < _LEAST_LETTERS * size // 3:  # the bar has a line of its own
        broken, at_right = ["", "", *_broken(lines, whole - left - gap, font)], 0
    rows = _swatch_rows(swatches or {}, whole - left - gap, font)
    strip = max(line * (len(broken) + len(rows)), key_px, 2 * line if bar_um else 0) + 2 * gap
    canvas = Image.new("RGB", (whole, height + strip), _PAPER)
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    if key is not None:
        smaller = Image.fromarray(key).resize((left - 2 * gap, key_px), Image.Resampling.BILINEAR)
        canvas.paste(smaller, (gap, height + gap))
    top = height + gap
    for text in broken:
        _write(draw, (left, top), text, font)
        top += line
    for row in rows:
        _draw_swatches(draw, (left, top), row, font)
        top += line
    if bar_um is not None:
        start = whole - gap - max(bar_px, at_right - 2 * gap) if at_right else left
        _draw_bar(draw, (start, height + gap), bar_px, _length(bar_um), font)
    return np.asarray(canvas)


def scale_bar_um(width_um: float) -> float:
    """The length of a scale bar: 1, 2 or 5 times a power of ten, at most a quarter of a picture's width."""
    most = width_um * _MOST_BAR
    power = 10.0 ** np.floor(np.log10(most))
    return float(max(step * power for step in (1, 2, 5) if step * power <= most * (1 + 1e-9)))


def slide_size(dimensions: tuple[int, int], spacing_um: float | None) -> str:
    """Of a slide in words: "46,000 x 32,914 px, 23.0 x 16.5 mm, 0.499 µm/px"."""
    pixels = " x ".join(f"{side:,}" for side in dimensions) + " px"
    if spacing_um is None:
        return pixels
    unit, per_um, places = ("mm", 1e-3, 1) if max(dimensions) * spacing_um >= 1000 else ("µm", 1.0, 0)
    size = " x ".join(f"{side * spacing_um * per_um:,.{places}f}" for side in dimensions)
    return f"{pixels}, {size} {unit}, {spacing_um:.4g} µm/px"


def _length(um: float) -> str:
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"


@lru_cache(maxsize=8)
def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _width(text: str, font: FreeTypeFont | ImageFont) -> float:
    return float(font.getlength(text.replace("µ", "u")))


def _broken(lines: Sequence[str], room: int, font: FreeTypeFont | ImageFont) -> list[str]:
    """The lines, between words, so that each fits."""
    found = []
    for text in lines:
        held = ""
        for word in text.split(" "):
            longer = f"{held} {word}" if held else word
            if held and _width(longer, font) > room:
                found.append(held)
                longer = word
            held = longer
        found.append(held)
    return found


def _swatch_rows(
    swatches: Mapping[str, Colour], room: int, font: FreeTypeFont | ImageFont
) -> list[dict[str, Colour]]:
    rows: list[dict[str, Colour]] = []
    used = float(room)
    for name, colour in swatches.items():
        needed = _swatch_width(name, font)
        if used + needed > room:
            rows.append({})
            used = 0.0
        rows[-1][name] = colour
        used += needed
    return rows


def _swatch_width(name: str, font: FreeTypeFont | ImageFont) -> float:
    return _width(name, font) + 2.5 * _width("x", font) * 2


def _draw_swatches(
    draw: ImageDraw, place: tuple[int, int], row: Mapping[str, Colour], font: FreeTypeFont | ImageFont
) -> None:
    left, top = place
    side = round(_width("x", font) * 1.5)
    for name, colour in row.items():
        draw.rectangle((left, top + side // 4, left + side, top + side // 4 + side), fill=colour)
        _write(draw, (round(left + 1.4 * side), top), name, font)
        left += round(_swatch_width(name, font))


def _draw_bar(
    draw: ImageDraw, place: tuple[int, int], length: int, text: str, font: FreeTypeFont | ImageFont
) -> None:
    left, top = place
    thick = max(3, round(_width("x", font) / 2))
    draw.rectangle((left, top, left + length - 1, top + thick - 1), fill=_INK)
    _write(draw, (left, top + 2 * thick), text, font)


def _write(draw: ImageDraw, place: tuple[int, int], text: str, font: FreeTypeFont | ImageFont) -> None:
    """Pillow's own font has no µ: it is drawn as a u with a longer stem."""
    left, top = float(place[0]), place[1]
    for number, part in enumerate(text.split("µ")):
        if number:
            left = float(round(left))
            box = draw.textbbox((left, top), "u", font=font)
            draw.text((left, top), "u", fill=_INK, font=font)
            stem = max(1, round((box[2] - box[0]) / 6))
            draw.rectangle((box[0], box[1], box[0] + stem - 1, box[3] + (box[3] - box[1]) // 3), fill=_INK)
            left += _width("u", font)
        draw.text((left, top), part, fill=_INK, font=font)
        left += _width(part, font)
