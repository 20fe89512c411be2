"""Previews show tissue, holes and tiles where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiling_helpers import TISSUE, WHITE, ArrayReader, a_slide, blank, settings

from slide2vec.config import PreviewConfig
from slide2vec.tiling import tile_slide, write_mask_preview, write_tiling_preview
from slide2vec.tiling.previews import draw_tiles, draw_tissue, thumbnail

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


def test_the_mask_preview_tints_tissue_and_spares_holes() -> None:
    slide = reader()
    _, tissue = tile_slide(slide, a_slide(), 0.5, settings(requested_tile_size_px=100))
    picture = draw_tissue(thumbnail(slide, 4), tissue, CONFIG)
    tint = (np.array(TISSUE) + CONFIG.tissue_contour_color) / 2
    assert np.abs(picture[220, 150] - tint).max() <= 2
    for row, column in ((140, 140), (20, 20)):  # hole, background
        assert np.abs(picture[row, column] - np.array(WHITE, float)).max() <= 1
    edge = picture[150, 45:55].astype(int).sum(-1)
    assert edge.min() < 450  # a dark outline at x = 200 / 4


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


@pytest.mark.parametrize("empty", [False, True])
def test_previews_are_written_as_jpeg(empty: bool, tmp_path: Path) -> None:
    slide = ArrayReader([blank(1600, 1200)]) if empty else reader()
    tiling, tissue = tile_slide(slide, a_slide(), 0.5, settings(requested_tile_size_px=200))
    write_mask_preview(tmp_path / "mask" / "s.jpg", slide, tissue, CONFIG)
    write_tiling_preview(tmp_path / "tiling" / "s.jpg", slide, tiling, CONFIG)
    for name in ("mask", "tiling"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["s.jpg"]
        with Image.open(tmp_path / name / "s.jpg") as image:
            assert image.format == "JPEG" and image.size == (400, 300)


def test_a_flat_slide_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slide2vec.tiling.levels.BLOCK_PX", 128)
    slide = ArrayReader([blank(1600, 1200, (200, 200, 800, 800))])
    thumbnail(slide, 32)
    assert slide.largest_read_px <= 128 * 128
