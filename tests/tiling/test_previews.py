"""Previews show tissue, holes and tiles where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiling_helpers import TISSUE, WHITE, ArrayReader, a_slide, blank, settings

from slide2vec.config import PreviewConfig
from slide2vec.tiling import tile_slide, write_mask_preview, write_tiling_preview
from slide2vec.tiling.previews import draw_tiles, draw_tissue, overview, thumbnail, tiles_in_words

CONFIG = PreviewConfig(downsample=4)


def reader() -> ArrayReader:
    image = blank(1600, 1200, (200, 200, 800, 800))
    image[440:680, 440:680] = WHITE
    return ArrayReader([image, image[::2, ::2]])


def test_a_thumbnail_has_the_size_asked_for_whatever_the_levels() -> None:
    for downsample, size in ((4, (300, 400)), (3.3, (364, 485)), (2, (600, 800)), (0.5, (1200, 1600))):
        picture = thumbnail(reader(), downsample)
        assert picture.shape == (*size, 3)
        scale = max(downsample, 1)
        assert np.abs(picture[int(800 / scale), int(600 / scale)].astype(int) - TISSUE).max() < 3


def tissue_drawn(**options: Any) -> NDArray[np.int64]:
    slide = reader()
    _, tissue = tile_slide(slide, a_slide(), 0.5, settings(requested_tile_size_px=100))
    return draw_tissue(thumbnail(slide, 4), tissue, CONFIG.updated(**options)).astype(int)


def test_the_mask_preview_outlines_tissue_and_leaves_the_stain_as_it_is() -> None:
    picture, before = tissue_drawn(), thumbnail(reader(), 4)
    changed = (picture != before).any(-1)
    for row, column in ((220, 150), (140, 140), (20, 20)):  # tissue, hole, background
        assert not changed[row - 3 : row + 4, column - 3 : column + 4].any()
    edge = picture[150, 45:56]  # around x = 200 / 4: the colour, dark on both sides
    line = np.flatnonzero(np.abs(edge - CONFIG.tissue_contour_color).max(-1) < 60)
    outside, inside = edge[: line[0]].max(-1), edge[line[-1] + 1 :].max(-1)
    assert 1 <= line.size <= 3 and outside.min() < 120 and inside.min() < 120
    hole = picture[140, 105:116]
    assert (np.abs(hole - (226, 92, 48)).max(-1) < 60).any()


def test_holes_too_small_to_be_seen_do_not_hide_the_tissue() -> None:
    """Of a slide with 64 holes of 16 px, 4 in the picture, under lines 4 px wide, and one of 240."""
    image = blank(1600, 1200, (200, 200, 800, 800))
    image[440:680, 440:680] = WHITE
    for x in range(8):
        for y in range(8):
            image[700 + 32 * y : 716 + 32 * y, 500 + 32 * x : 516 + 32 * x] = WHITE
    slide = ArrayReader([image])
    _, tissue = tile_slide(slide, a_slide(), 0.5, settings(requested_tile_size_px=100))
    (piece,) = tissue.pieces
    assert len(piece.holes) == 65
    picture = draw_tissue(thumbnail(slide, 4), tissue, CONFIG)
    orange = np.abs(picture.astype(int) - (226, 92, 48)).max(-1) < 60
    assert orange[140, 100:120].any() and not orange[175:240, 120:195].any()


def test_the_mask_preview_tints_tissue_where_it_is_asked_to() -> None:
    picture = tissue_drawn(mask_overlay_alpha=0.5)
    tint = (np.array(TISSUE) + CONFIG.tissue_contour_color) / 2
    assert np.abs(picture[220, 150] - tint).max() <= 2
    for row, column in ((140, 140), (20, 20)):  # hole, background
        assert np.abs(picture[row, column] - np.array(WHITE, float)).max() <= 1


def test_the_tiling_preview_outlines_every_tile() -> None:
    slide = reader()
    tiling, _ = tile_slide(slide, a_slide(), 0.5, settings(requested_tile_size_px=200))
    before = thumbnail(slide, 4)
    changed = (draw_tiles(before, tiling) != before).any(-1)
    for x, y in zip(tiling.x // 4, tiling.y // 4, strict=True):
        assert changed[y, x : x + 50].all() and changed[y : y + 50, x].all()
    assert not changed[:45].any() and not changed[:, :45].any()
    assert changed.mean() < 0.05


def test_tiny_tiles_are_tinted() -> None:
    slide = reader()
    tiling, _ = tile_slide(slide, a_slide(), 0.5, settings(requested_tile_size_px=16))
    picture = draw_tiles(thumbnail(slide, 4), tiling)
    assert np.ptp(picture[60:100, 60:100].astype(int), axis=(0, 1)).max() <= 4


def test_tiny_tiles_are_where_they_are_to_a_fraction_of_a_pixel() -> None:
    """The centre of what is drawn is that of the tiles, and so is its area; whatever the slide's size is in
    pixels of the picture."""
    slide = ArrayReader([blank(1600, 1200, (213, 341, 777, 550))])
    tiling, _ = tile_slide(slide, a_slide(), 0.5, settings(requested_tile_size_px=21))
    for downsample in (5, 13, 37):
        before = np.full((round(1200 / downsample), round(1600 / downsample), 3), 255, np.uint8)
        strength = (before.astype(int) - draw_tiles(before, tiling)).sum(-1) / (255 * 3 - sum((20, 80, 220)))
        rows, columns = np.indices(strength.shape) + 0.5
        scale = np.array([1600, 1200]) / strength.shape[::-1]
        found = [(strength * place).sum() / strength.sum() for place in (columns, rows)] * scale
        middle = [tiling.x.mean() + 10.5, tiling.y.mean() + 10.5]
        assert np.abs(found - middle).max() < 0.15 * downsample
        if downsample < 21:  # those below a pixel are drawn larger than they are
            assert strength.sum() * scale.prod() / 0.4 == pytest.approx(len(tiling) * 21**2, rel=0.05)


@pytest.mark.parametrize("empty", [False, True])
def test_previews_are_written_as_jpeg(empty: bool, tmp_path: Path) -> None:
    slide = ArrayReader([blank(1600, 1200)]) if empty else reader()
    config = settings(requested_tile_size_px=200, preview={"downsample": 1.25})
    tiling, tissue = tile_slide(slide, a_slide(), 0.5, config)
    write_mask_preview(tmp_path / "mask" / "s.jpg", slide, tissue, config)
    write_tiling_preview(tmp_path / "tiling" / "s.jpg", slide, tiling, config)
    for name in ("mask", "tiling"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["s.jpg"]
        with Image.open(tmp_path / name / "s.jpg") as image:
            assert image.format == "JPEG" and image.width == 1280 and 960 < image.height < 1200
            strip = np.asarray(image)[960:]
        assert strip[:4].min() > 240 and strip.min() < 90  # white, with words


@pytest.mark.parametrize(("size", "drawn"), [((1600, 1200), (1000, 750)), ((300, 400), (900, 1200))])
def test_small_slides_are_drawn_with_1000_px(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    image = blank(*size, (100, 100, 200, 150))
    picture = overview(ArrayReader([image]), 32)
    assert picture.shape == (drawn[1], drawn[0], 3)
    if size == (300, 400):
        np.testing.assert_array_equal(picture[::3, ::3], image)
    assert overview(ArrayReader([blank(6400, 400)]), 4).shape == (100, 1600, 3)


def test_captions_say_what_is_drawn() -> None:
    slide = reader()
    tiling, _ = tile_slide(slide, a_slide(), 0.5, settings(requested_tile_size_px=200))
    assert tiles_in_words(tiling) == f"{len(tiling)} tiles of 200 px at 0.5 µm/px (200 px of level 0)"
    assert tiles_in_words(tiling, 4).endswith("(200 px of level 0), each 4 x 4 tiles")
    assert tiles_in_words(tiling, 4).startswith(f"{len(tiling)} regions of 200 px")


def test_a_flat_slide_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slide2vec.tiling.levels.BLOCK_PX", 128)
    slide = ArrayReader([blank(1600, 1200, (200, 200, 800, 800))])
    thumbnail(slide, 32)
    assert slide.largest_read_px <= 128 * 128
