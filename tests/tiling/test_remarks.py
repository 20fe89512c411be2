"""What is said of slides whose tissue or tiles are implausible, on made-up pictures whose cause is known."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiling_helpers import ArrayReader, a_slide, blank, settings

from slide2vec.tiling import Tiling, tile_slide
from slide2vec.tiling import remarks as remarks_module

BROWN, GREEN_PEN, PINK = (150, 100, 60), (40, 160, 60), (200, 120, 180)
SIDE = 2240  # 20 tiles of 112 px


def noisy(image: NDArray[np.uint8], levels: int = 2) -> NDArray[np.uint8]:
    """With the noise of a camera, so that no picture is of one colour by chance."""
    noise = np.random.default_rng(0).integers(-levels, levels, image.shape, np.int16, endpoint=True)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def painted(*patches: tuple[tuple[int, int, int, int], tuple[int, int, int]], glass=(242, 242, 242)):
    """Patches of colour on glass; (x, y, width, height) of each in half px."""
    image = np.full((SIDE, SIDE, 3), glass, np.uint8)
    for box, colour in patches:
        x, y, width, height = (edge // 2 for edge in box)
        image[y : y + height, x : x + width] = colour
    return noisy(image)


def tiled(image: NDArray[np.uint8], **changes) -> Tiling:
    """As HS2P's defaults have it, at 0.5 µm/px, with tiles of 112 px."""
    asked = {"segmentation": {}, "filtering": {}, "requested_tile_size_px": 112, **changes}
    slide = a_slide(mask_path=asked.pop("mask_path", None))
    return tile_slide(ArrayReader([image]), slide, 0.5, settings(**asked))[0]


def only(tiling: Tiling) -> str:
    (remark,) = tiling.remarks
    return remark


TISSUE = ((448, 448, 1500, 1500), PINK)


def test_nothing_is_said_of_a_plausible_slide() -> None:
    tiling = tiled(painted(TISSUE))
    assert len(tiling) > 30 and tiling.remarks == ()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((900, 900, 3), np.uint8), ["all its pixels are black"]),
        (np.full((900, 900, 3), 255, np.uint8), ["one colour, RGB (255, 255, 255)", "nothing on the glass"]),
        (noisy(np.full((900, 900, 1), 240, np.uint8), 12).repeat(3, axis=2), ["all its pixels are white"]),
        (noisy(np.full((900, 900, 3), (180, 90, 140), np.uint8)), ["one colour, RGB (180, 90, 140)"]),
    ],
    ids=["black", "white", "noisy white", "pink"],
)
def test_a_picture_of_nothing(image: NDArray[np.uint8], words: list[str]) -> None:
    for word in words:
        assert word in only(tiled(image))


def test_a_greyscale_slide_cannot_be_segmented_by_colour() -> None:
    grey = cv2.cvtColor(painted(TISSUE), cv2.COLOR_RGB2GRAY)
    for method in ("hsv", "otsu"):
        tiling = tiled(np.dstack([grey] * 3), segmentation={"method": method})
        assert len(tiling) == 0
        assert "greyscale" in only(tiling) and f"method {method}" in only(tiling)
        assert "mask_path" in only(tiling)


def test_a_dark_background_looks_like_fluorescence() -> None:
    image = painted(((1000, 1000, 900, 900), (60, 60, 250)), glass=(8, 8, 12))
    tiling, auto = tiled(image), tiled(image, segmentation={"method": "auto"})
    assert "fluorescence" in only(tiling) and "median grey level" in only(tiling)
    assert "--segmentation-method auto" in only(tiling) and len(auto) >= 16
    assert "fluorescence" in only(auto) and "what shines was taken for tissue" in only(auto)


def test_brown_is_outside_the_hues_of_hsv_and_found_by_auto() -> None:
    image = painted(TISSUE, ((2500, 2500, 1200, 1200), BROWN))
    tiling = tiled(image)
    assert len(tiling) > 0
    assert "brown" in only(tiling) and "DAB" in only(tiling) and "--segmentation-method auto" in only(tiling)
    other = tiled(image, segmentation={"method": "auto"})
    assert len(other) > len(tiling) and other.remarks == ()


def test_a_slide_of_brown_only_says_so() -> None:
    tiling = tiled(painted(((500, 500, 1500, 1500), BROWN)))
    assert len(tiling) == 0 and "100% of what is coloured is brown" in only(tiling)


def test_green_is_named_green_and_little_of_it_is_not_told() -> None:
    assert "is green" in only(tiled(painted(TISSUE, ((3000, 500, 400, 3000), GREEN_PEN))))
    assert tiled(painted(TISSUE, ((3000, 500, 100, 300), GREEN_PEN))).remarks == ()


@pytest.mark.parametrize("cast", [12, 20])
def test_glass_with_a_cast_counts_as_tissue(cast: int) -> None:
    glass = (240, 240 - cast, 242)
    tiling = tiled(painted(TISSUE, glass=glass))
    assert len(tiling) == 400
    for words in ("nearly everywhere", "glass is not white", "cast of", "--segmentation-method auto"):
        assert words in only(tiling)
    assert abs(int(only(tiling).split("a cast of ")[1].split()[0]) - (cast + 2)) <= 1
    for method in ("otsu", "auto"):
        assert len(tiled(painted(TISSUE, glass=glass), segmentation={"method": method})) < 100


def test_a_slide_that_is_tissue_everywhere_is_not_blamed_on_its_glass() -> None:
    everywhere = noisy(np.full((1120, 1120, 3), PINK, np.uint8), 25)
    assert "no glass is to be seen" in only(tiled(everywhere))


def test_small_biopsies_are_counted() -> None:
    biopsies = [((400, 300 + 650 * i, 400, 400), PINK) for i in range(6)]  # 3.2 tiles each; a_t is 4
    tiling = tiled(painted(*biopsies))
    assert len(tiling) == 0
    assert (
        "6 pieces of tissue" in only(tiling) and "a_t = 4" in only(tiling) and "--min-piece" in only(tiling)
    )
    assert len(tiled(painted(*biopsies), filtering={"a_t": 1})) > 0


def test_dust_beside_tissue_is_not_told() -> None:
    specks = [((3000 + 40 * i, 3000, 9, 9), PINK) for i in range(20)]
    assert tiled(painted(TISSUE, *specks)).remarks == ()


def test_pieces_that_are_left_out_beside_tissue_are_told_when_they_are_many() -> None:
    biopsies = [((3000, 100 + 500 * i, 400, 400), PINK) for i in range(8)]
    assert "8 pieces of tissue" in only(tiled(painted(((200, 200, 900, 900), PINK), *biopsies)))


def test_a_segmentation_level_that_is_too_coarse() -> None:
    image = blank(4096, 4096, (0, 0, 2048, 2048))
    coarse = blank(16, 16, (0, 0, 8, 8))
    tiling, _ = tile_slide(
        ArrayReader([image, coarse]), a_slide(), 0.5, settings(segmentation={"downsample": 200, "close": 0})
    )
    assert "level 1 (downsample 256)" in only(tiling) and "0.88 px" in only(tiling)


def test_no_tile_holds_enough_tissue() -> None:
    tiling = tiled(painted(((300, 300, 900, 900), PINK)), requested_tile_size_px=600, filtering={"a_t": 0})
    assert len(tiling) == 1
    tiling = tiled(
        painted(((300, 300, 900, 900), PINK)),
        requested_tile_size_px=600,
        filtering={"a_t": 0},
        tissue_threshold=0.9,
    )
    assert len(tiling) == 0 and "tissue_threshold = 0.9" in only(tiling)


def test_filters_that_leave_out_everything() -> None:
    tiling = tiled(painted(TISSUE), filtering={"filter_white": True, "white_threshold": 100})
    assert len(tiling) == 0 and "pixel filters" in only(tiling)


def test_masks(tmp_path: Path) -> None:
    for name, value in (("none", 0), ("all", 1)):
        Image.fromarray(np.full((70, 70), value, np.uint8)).save(tmp_path / f"{name}.png")
    image = painted(TISSUE)
    assert only(tiled(image, mask_path=tmp_path / "none.png")) == "its tissue mask holds no tissue"
    assert "mask covers the slide" in only(tiled(image, mask_path=tmp_path / "all.png"))


def test_the_overview_of_a_large_level_is_of_the_pixels_that_were_segmented() -> None:
    image = painted(((3000, 200, 900, 4000), BROWN), ((100, 100, 900, 900), PINK))
    _, tissue = tile_slide(ArrayReader([image]), a_slide(), 0.5, settings())
    assert tissue.overview is not None and tissue.overview_step == 3
    assert np.array_equal(tissue.overview, image[::3, ::3])
    assert tissue.overview_mask.shape == tissue.overview.shape[:2]


def test_medians_of_counted_grey_levels() -> None:
    """NumPy's, of the levels themselves: of an even number between the two in the middle."""
    random = np.random.default_rng(0)
    for count in (1, 2, 7, 1000, 1001):
        for highest in (1, 2, 256):
            levels = random.integers(0, highest, count, np.uint8)
            counts = np.bincount(levels, minlength=256).astype(np.float32)
            assert remarks_module._median(counts) == np.median(levels)
    assert remarks_module._median(np.eye(256, dtype=np.float32)[[0, 3]].sum(axis=0)) == 1.5
