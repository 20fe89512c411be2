"""DALI's pipeline from compressed tiles to tiles: libjpeg's pixels, OpenCV's averages."""

from __future__ import annotations

import ast
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import slide2vec
from slide2vec.errors import ExtraMissingError
from slide2vec.prepare import dali_archive, dali_tiles
from slide2vec.prepare.dali_tiles import DaliTiles, Geometry
from slide2vec.prepare.tile_parts import TileParts, parts_of_boxes
from slide2vec.readers.codecs import check_jpeg, decode_tile
from slide2vec.readers.tile_table import TileFormat

Pixels = NDArray[np.uint8]

CPU = torch.device("cpu")
TILE, ACROSS, DOWN = 48, 4, 3
LEVEL = (ACROSS * TILE - 11, DOWN * TILE - 7)


@pytest.fixture
def dali() -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (slide2vec[cuda])")


def a_level(*, rgb: bool = False) -> tuple[list[bytes], Pixels]:
    """Compressed tiles of a level, and its pixels by libjpeg, white around."""
    codecs = pytest.importorskip("imagecodecs")
    noise = np.random.default_rng(0).integers(0, 256, (DOWN * 12, ACROSS * 12, 3), np.uint8)
    pixels = cv2.resize(noise, (ACROSS * TILE, DOWN * TILE), interpolation=cv2.INTER_CUBIC)
    jpegs = [
        codecs.jpeg8_encode(
            np.ascontiguousarray(pixels[y : y + TILE, x : x + TILE]),
            level=90,
            outcolorspace="RGB" if rgb else "YCBCR",
            subsampling="444" if rgb else "420",
        )
        for y in range(0, DOWN * TILE, TILE)
        for x in range(0, ACROSS * TILE, TILE)
    ]
    tiles = np.stack([codecs.jpeg8_decode(jpeg, outcolorspace="RGB") for jpeg in jpegs])
    whole = tiles.reshape(DOWN, ACROSS, TILE, TILE, 3).swapaxes(1, 2).reshape(DOWN * TILE, ACROSS * TILE, 3)
    level = np.full((400, 400, 3), 255, np.uint8)
    level[100 : 100 + LEVEL[1], 100 : 100 + LEVEL[0]] = whole[: LEVEL[1], : LEVEL[0]]
    return jpegs, level


def some_boxes(corners: list[tuple[int, int]], size: tuple[int, int]) -> TileParts:
    return parts_of_boxes(np.array(corners), size, LEVEL, (TILE, TILE), np.arange(ACROSS * DOWN))


def expected(level: Pixels, corners: list[tuple[int, int]], size: tuple[int, int], ratio: int) -> Pixels:
    cut = [level[y + 100 : y + 100 + size[1], x + 100 : x + 100 + size[0]] for x, y in corners]
    reduced = (size[0] // ratio, size[1] // ratio)
    return np.stack([cv2.resize(box, reduced, interpolation=cv2.INTER_AREA) for box in cut])


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("rgb", [False, True])
@pytest.mark.parametrize("ratio", dali_tiles.RATIOS)
@pytest.mark.parametrize("corners", [[(3, 5), (60, 40), (96, 48)], [(-20, -8), (150, 100), (0, 0), (96, 96)]])
def test_boxes_are_libjpegs_pixels_averaged_as_opencv_does(
    rgb: bool, ratio: int, corners: list[tuple[int, int]]
) -> None:
    jpegs, level = a_level(rgb=rgb)
    size = (64, 32)
    parts = some_boxes(corners, size)
    decoder = DaliTiles(CPU)
    found = decoder.boxes([jpegs[tile] for tile in parts.tiles], parts, Geometry(*size, ratio, rgb))
    assert found.dtype == torch.uint8 and found.is_contiguous()
    np.testing.assert_array_equal(found.numpy(), expected(level, corners, size, ratio))


@pytest.mark.usefixtures("dali")
def test_what_came_out_is_not_written_again() -> None:
    jpegs, level = a_level()
    size, corners = (40, 40), [(x, y) for x in range(0, 90, 30) for y in range(0, 90, 30)]
    decoder, geometry = DaliTiles(CPU), Geometry(40, 40, 1, False)
    found = []
    for corner in corners:
        parts = some_boxes([corner], size)
        found.append(decoder.boxes([jpegs[tile] for tile in parts.tiles], parts, geometry))
    np.testing.assert_array_equal(torch.cat(found).numpy(), expected(level, corners, size, 1))


@pytest.mark.usefixtures("dali")
def test_a_batch_that_fails_spoils_no_other() -> None:
    jpegs, level = a_level()
    size, corners, decoder = (40, 40), [(0, 0), (40, 40), (80, 80)], DaliTiles(CPU)
    parts, geometry = some_boxes(corners, size), Geometry(*size, 1, False)
    given = [jpegs[tile] for tile in parts.tiles]
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"^DALI: Failed to decode sample #0$"):
            decoder.boxes([given[0][: len(given[0]) * 3 // 4], *given[1:]], parts, geometry)
        np.testing.assert_array_equal(
            decoder.boxes(given, parts, geometry).numpy(), expected(level, corners, size, 1)
        )


def odd_jpegs(jpeg: bytes) -> dict[str, bytes]:
    """That are in order, though few writers make them so."""
    codecs = pytest.importorskip("imagecodecs")
    tables, head = jpeg.index(b"\xff\xdb"), jpeg[:2]
    pixels = codecs.jpeg8_decode(jpeg, outcolorspace="RGB")
    return {
        "fill bytes before a marker": jpeg[:tables] + b"\xff\xff\xff" + jpeg[tables:],
        "padded": jpeg + bytes(64),
        "another picture behind it": jpeg + b"\xff\xd8\xff\x12abc",
        "no JFIF marker": head + jpeg[tables:],
        "a comment": head + b"\xff\xfe\x00\x08hello!" + jpeg[2:],
        "Exif that ends too early": head + b"\xff\xe1\x00\x10Exif\0\0MM\0\x2a\0\0\0\xff" + jpeg[2:],
        "a short Adobe marker": head + b"\xff\xee\x00\x06Adob" + jpeg[2:],
        "progressive": cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes(),
        "restart markers": cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_RST_INTERVAL, 1])[1].tobytes(),
    }


@pytest.mark.usefixtures("dali")
def test_what_the_strict_check_takes_is_decoded_to_the_strict_decoders_pixels() -> None:
    """DALI may end the process over a JPEG that it cannot parse: the check must refuse all of these."""
    form = TileFormat(width=TILE, height=TILE, compression="JPEG", photometric="YCBCR")
    decoder = DaliTiles(CPU)
    for kind, jpeg in odd_jpegs(a_level()[0][0]).items():
        check_jpeg(jpeg, form, (TILE, TILE))
        found = decoder.boxes([jpeg], some_boxes([(0, 0)], (TILE, TILE)), Geometry(TILE, TILE, 1, False))
        np.testing.assert_array_equal(found[0], decode_tile([jpeg], form, (TILE, TILE), None), kind)


@pytest.mark.usefixtures("dali")
def test_a_larger_batch_gets_a_larger_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_tiles, "_LEAST_SAMPLES", 1)
    jpegs, level = a_level()
    size, decoder = (40, 40), DaliTiles(CPU)
    for corners in ([(0, 0)], [(0, 0), (40, 40), (80, 80)]):
        parts = some_boxes(corners, size)
        found = decoder.boxes([jpegs[tile] for tile in parts.tiles], parts, Geometry(*size, 1, False))
        np.testing.assert_array_equal(found.numpy(), expected(level, corners, size, 1))


@pytest.mark.usefixtures("dali")
def test_pipelines_of_many_geometries_are_bounded() -> None:
    jpegs, _ = a_level()
    decoder = DaliTiles(CPU)
    for side in range(20, 20 + 2 * dali_tiles._MOST_PIPELINES):
        parts = some_boxes([(0, 0)], (side, side))
        decoder.boxes([jpegs[tile] for tile in parts.tiles], parts, Geometry(side, side, 1, False))
    assert len(decoder._pipelines) == dali_tiles._MOST_PIPELINES


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("ratio", dali_tiles.RATIOS)
def test_the_pipeline_for_a_gpu_can_be_defined(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not built, which takes a GPU; but its operators know their options, and work there."""
    import nvidia.dali

    given = []
    monkeypatch.setattr(nvidia.dali.Pipeline, "build", lambda self: None)
    monkeypatch.setattr(nvidia.dali.Pipeline, "set_outputs", lambda self, *nodes: given.extend(nodes))
    dali_tiles._build(Geometry(64, 32, ratio, True), torch.device("cuda:0"), 4)
    assert [node.device for node in given] == ["gpu"]


def test_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_archive, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match=r"\[cuda\]"):
        DaliTiles(CPU)


def test_every_decoder_of_dali_is_asked_for_fancy_upsampling() -> None:
    """What a GPU does otherwise is up to 2.35 grey levels off, and no CPU shows it."""
    asked = []
    for path in sorted(Path(slide2vec.__file__).parent.rglob("*.py")):
        text = path.read_text()
        for call in ast.walk(ast.parse(text)) if "decoders.image" in text else ():
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("decoders.image"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                asked.append((path.name, options.get("jpeg_fancy_upsampling")))
    assert asked == [("dali_archive.py", "True"), ("dali_tiles.py", "True")]
