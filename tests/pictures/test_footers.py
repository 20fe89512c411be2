"""The strip below a picture: the picture stays as it is, the scale bar is as long as it says."""

from __future__ import annotations

import numpy as np
import pytest

from slide2vec.pictures import pca_key, slide_size, with_footer
from slide2vec.pictures.footers import scale_bar_um

PICTURE = np.random.default_rng(0).integers(100, 200, (400, 1000, 3), np.uint8)
WORDS = ["1,204 tiles of 224 px at 0.5 µm/px", "46,000 x 32,914 px"]


def test_a_picture_stays_where_it_is_and_has_words_below() -> None:
    framed = with_footer(PICTURE, WORDS)
    np.testing.assert_array_equal(framed[:400], PICTURE)
    strip = framed[400:]
    assert strip.shape[1] == 1000 and 30 < len(strip) < 120
    assert strip.min() < 60 and np.median(strip) == 255


@pytest.mark.parametrize(
    ("width_um", "bar"),
    [(4000, 1000), (3999, 500), (2000, 500), (900, 200), (30_000, 5000), (4, 1), (0.9, 0.2)],
)
def test_a_scale_bar_is_round_and_no_more_than_a_quarter(width_um: float, bar: float) -> None:
    assert scale_bar_um(width_um) == pytest.approx(bar)


def test_the_scale_bar_is_as_long_as_it_says() -> None:
    """500 µm of a picture of 1,000 px with 2.5 µm each: 200 px in one row, and no other row is as long."""
    strip = with_footer(PICTURE, [], um_per_px=2.5)[400:].max(axis=2)
    longest = max(int((row < 100).sum()) for row in strip)
    assert longest == 200


def test_a_narrow_picture_is_widened_for_words() -> None:
    framed = with_footer(PICTURE[:, :60], WORDS, um_per_px=2.5, key=pca_key())
    np.testing.assert_array_equal(framed[:400, :60], PICTURE[:, :60])
    assert framed.shape[1] > 150 and framed[:400, 60:].min() == 255
    assert len(with_footer(PICTURE[:, :60], WORDS)) > len(with_footer(PICTURE, WORDS))  # broken between words


def test_colours_are_explained() -> None:
    pen, blur = (240, 140, 0), (200, 40, 40)
    strip = with_footer(PICTURE, WORDS, swatches={"pen: 3": pen, "blur: 12": blur})[400:]
    for colour in (pen, blur):
        assert (strip == colour).all(-1).sum() > 100
    keyed = with_footer(PICTURE, WORDS, key=pca_key())[400:]
    hue = keyed.astype(int).max(-1) - keyed.min(-1)
    assert (hue[:, :200] > 60).sum() > 1000 and (hue[:, 200:] > 60).sum() == 0


def test_sizes_in_words() -> None:
    assert slide_size((46_000, 32_914), 0.499) == "46,000 x 32,914 px, 23.0 x 16.4 mm, 0.499 µm/px"
    assert slide_size((50, 40), 0.5) == "50 x 40 px, 25 x 20 µm, 0.5 µm/px"
    assert slide_size((50, 40), None) == "50 x 40 px"
