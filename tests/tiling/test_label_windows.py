"""Labels of a slide, window by window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiling_helpers import ArrayReader

from slide2vec.tiling.label_windows import MARGIN_PX, label_map, slide_windows

SIDE = 256


class Red:
    """The label of a pixel is its red; in a margin along a window's edge it is 255."""

    names = tuple(map(str, range(256)))
    spacing_um, window_px, batch_windows = 1.0, SIDE, 3

    def __init__(self) -> None:
        self.batches: list[int] = []

    def label(self, windows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        self.batches.append(len(windows))
        labels = np.full(windows.shape[:3], 255, np.uint8)
        within = np.s_[:, MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]
        labels[within] = windows[..., 0][within]
        return labels


def picture(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 200, (height, width, 3), np.uint8)


def labelled(pixels: NDArray[np.uint8], most_px: int = 10**9, **changes: Any) -> tuple[Any, Red]:
    segmenter = Red()
    size, read = slide_windows(ArrayReader([pixels]), 1.0, SIDE)
    assert size == pixels.shape[1::-1]
    found = label_map(segmenter, size, read, most_px=most_px, most_overview_px=10_000, **changes)
    return found, segmenter


@pytest.mark.parametrize("size", [(700, 900), (256, 513), (385, 384)])
def test_pixels_have_labels_of_windows_that_see_around_them(size: tuple[int, int]) -> None:
    pixels = picture(*size)
    found, segmenter = labelled(pixels)
    inner = np.s_[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]
    assert (found.labels[inner] == pixels[..., 0][inner]).all() and found.step == 1
    assert found.labels[0, 0] == 255  # at the slide's edge there is nothing around
    assert (found.overview == pixels[:: found.overview_step, :: found.overview_step]).all()
    assert found.overview.shape[0] * found.overview.shape[1] <= 10_000 and max(segmenter.batches) <= 3


def test_of_large_slides_every_nth_label_is_kept() -> None:
    pixels = picture(700, 900)
    whole, (some, _) = labelled(pixels)[0], labelled(pixels, most_px=700 * 900 // 8)
    assert some.step == 3 and (some.labels == whole.labels[::3, ::3]).all()
    step = some.step * some.overview_step
    assert (some.overview == pixels[::step, ::step]).all()


def test_a_slide_smaller_than_a_window_is_padded_with_white() -> None:
    pixels, windows = picture(150, 90), []

    class Seen(Red):
        def label(self, given: NDArray[np.uint8]) -> NDArray[np.uint8]:
            windows.append(given)
            return given[..., 0]

    size, read = slide_windows(ArrayReader([pixels]), 1.0, SIDE)
    found = label_map(Seen(), size, read, most_px=10**9, most_overview_px=10**9)
    assert (found.labels == pixels[..., 0]).all()
    (window,) = windows[0]
    assert (window[90:] == 255).all() and (window[:, 150:] == 255).all()


def test_only_what_is_wanted_is_looked_at() -> None:
    found, segmenter = labelled(picture(900, 256), wanted=lambda left, top: left == 256 - 2 * MARGIN_PX)
    assert segmenter.batches == [1] and not found.labels[:, :128].any() and found.labels[100, 300]


@pytest.mark.parametrize("downsample", [0.5, 2.0, 3.0])
def test_pixels_are_brought_to_the_segmenters_spacing(downsample: float) -> None:
    pixels = np.zeros((480, 600, 3), np.uint8)
    pixels[:, 300:] = 120  # what is drawn stays where it was, whatever the level is that is read
    reader = ArrayReader([pixels, np.ascontiguousarray(pixels[::2, ::2])])
    size, read = slide_windows(reader, downsample, 128)
    assert size == (round(600 / downsample), round(480 / downsample))
    edge = round(300 / downsample)
    window = read(edge - 60, 10)
    assert (window[:, :58] == 0).all() and (window[:, 62:100] == 120).all()
