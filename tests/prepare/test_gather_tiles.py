"""Tiles cut straight out of decoded compressed tiles, by PyTorch and Triton's interpreter, against OpenCV's
cut of a region that was put together first; and Triton's compiler takes its kernels for each GPU."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec.prepare import gather_tiles
from slide2vec.prepare.cut import cut_tiles
from slide2vec.prepare.gather_tiles import Gather, choose_gather, gather_by_kernel, gather_by_torch
from slide2vec.readers.jpeg_tiles import DecodedTiles

CPU = torch.device("cpu")
#: A level of 3 x 4 tiles of 20 x 24 px, the last ones reaching beyond it.
TILE_H, TILE_W, ROWS, COLUMNS, LEVEL = 20, 24, 3, 4, (90, 55)
#: Corners of tiles: inside, over each edge, outside.
CORNERS = np.array([[0, 0], [17, 9], [-5, -3], [70, 30], [61, 2], [200, 200]], np.int64)


class Memory:
    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels


def level(seed: int = 0) -> tuple[DecodedTiles, np.ndarray]:
    """Decoded tiles, from the second row and column on, without one; and the level they are of, white around
    it by 300 px."""
    rng = np.random.default_rng(seed)
    slots = np.array([[-1, 4, 0, 3], [5, 1, -1, 2], [7, 8, 9, 10]], np.int64)
    tiles = rng.integers(0, 256, (12, TILE_H, TILE_W, 3)).astype(np.uint8)
    whole = np.full((ROWS * TILE_H, COLUMNS * TILE_W, 3), 255, np.uint8)
    for row in range(ROWS):
        for column in range(COLUMNS):
            if slots[row, column] >= 0:
                place = (
                    slice(row * TILE_H, (row + 1) * TILE_H),
                    slice(column * TILE_W, (column + 1) * TILE_W),
                )
                whole[place] = tiles[slots[row, column]]
    around = np.full((600 + LEVEL[1], 600 + LEVEL[0], 3), 255, np.uint8)
    around[300:-300, 300:-300] = whole[: LEVEL[1], : LEVEL[0]]
    return DecodedTiles(Memory(torch.from_numpy(tiles)), slots, 0, 0, LEVEL), around


def part_of(decoded: DecodedTiles) -> DecodedTiles:
    """Without the first row and column of tiles, whose slots nobody needs."""
    return DecodedTiles(decoded.memory, decoded.slots[1:, 1:].copy(), TILE_W, TILE_H, decoded.level_size)


@pytest.fixture(params=["torch", "triton"])
def gather(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gather]:
    if request.param == "torch":
        yield gather_by_torch
        return
    pytest.importorskip("triton", reason="Triton is not installed")
    kernels = importlib.import_module("slide2vec.prepare.triton_kernel")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.reload(kernels)
    yield gather_by_kernel
    monkeypatch.undo()
    importlib.reload(kernels)


@pytest.mark.parametrize(
    ("side", "kind"), [*((side, "arrays") for side in (8, 16, 24, 32, 56, 9, 12, 21)), (12, "tensors")]
)
def test_pixels_are_those_of_a_region_that_is_cut(side: int, kind: str, gather: Gather) -> None:
    """Whole ratios and others, bit by bit."""
    decoded, around = level()
    expected = np.zeros((len(CORNERS), 8, 8, 3), np.uint8)
    cut_tiles(around, CORNERS + 300, side, list(expected))
    found = torch.zeros(expected.shape, dtype=torch.uint8)
    gather(decoded, CORNERS, side, list(found if kind == "tensors" else found.numpy()))
    np.testing.assert_array_equal(found.numpy(), expected)


def test_only_what_is_needed_is_decoded(gather: Gather) -> None:
    decoded, around = level(1)
    corners = np.array([[25, 21], [60, 30], [90, 55]], np.int64)
    expected, found = np.zeros((3, 8, 8, 3), np.uint8), np.zeros((3, 8, 8, 3), np.uint8)
    cut_tiles(around, corners + 300, 16, list(expected))
    gather(part_of(decoded), corners, 16, list(found))
    np.testing.assert_array_equal(found, expected)


def test_halves_are_rounded_as_opencv_does(gather: Gather) -> None:
    """Sums at a half are rare in noise: here every cell has one, in products that single precision rounds."""
    for ratio in (2, 4, 6):
        size = 24 // ratio
        tiles = np.zeros((1, 24, 24, 3), np.uint8)
        cells = tiles[0].reshape(size, ratio, size, ratio, 3)
        for number in range(size * size):
            total = ratio * ratio * (3 * number % 250) + ratio * ratio // 2
            values = np.full(ratio * ratio, total // ratio**2)
            values[: total % ratio**2] += 1
            cells[number // size, :, number % size] = values.reshape(ratio, ratio, 1)
        expected, found = np.zeros((1, size, size, 3), np.uint8), np.zeros((1, size, size, 3), np.uint8)
        corner = np.zeros((1, 2), np.int64)
        cut_tiles(tiles[0], corner, 24, list(expected))
        gather(
            DecodedTiles(Memory(torch.from_numpy(tiles)), np.array([[0]]), 0, 0, (24, 24)),
            corner,
            24,
            list(found),
        )
        np.testing.assert_array_equal(found, expected)


def test_nothing_under_them_is_white(gather: Gather) -> None:
    decoded, _ = level()
    nothing = DecodedTiles(decoded.memory, np.full((1, 1), -1), 0, 0, LEVEL)
    found = np.zeros((1, 8, 8, 3), np.uint8)
    gather(nothing, np.array([[-50, 10]]), 16, list(found))
    assert (found == 255).all()


# choice ---------------------------------------------------------------------------------------


def test_the_kernel_is_taken_where_it_works(
    gather: Gather, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_gather(CPU) is gather  # the interpreter is asked for, or not
    if gather is gather_by_torch:
        return

    def breaks(*_: Any) -> None:
        raise RuntimeError("no C compiler")

    def wrong(decoded: DecodedTiles, corners: Any, side: int, targets: Any) -> None:
        gather_by_torch(decoded, corners + 1, side, targets)

    for kernel, reason in ((breaks, "no C compiler"), (wrong, "its pixels differ")):
        caplog.clear()
        monkeypatch.setattr(gather_tiles, "gather_by_kernel", kernel)
        with caplog.at_level(logging.WARNING, logger=gather_tiles.__name__):
            assert choose_gather(CPU) is gather_by_torch
        assert f"tiles are cut on cpu without Triton, which costs time: {reason}" in caplog.text


# compiler -------------------------------------------------------------------------------------

GATHER = {
    **{name: "i32" for name in ("slots", "columns", "left", "top", "right", "bottom")},
    **{"pixels": "*u8", "plan": "*i64"},
}
#: taps, whole: 1:1, halved, as 0.25 -> 1 µm/px, fractional.
GATHERS = [(1, True), (2, True), (4, True), (3, False)]
NORMALISE = {
    **{name: "i32" for name in ("side", "crop", "corner")},
    **{f"{kind}_{channel}": "fp32" for kind in ("scale", "shift") for channel in "rgb"},
}


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_kernels_compile_for_every_gpu(
    capability: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A100, H100, B200 and RTX 50; without a GPU."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    compiler = importlib.import_module("triton.compiler")
    backends = importlib.import_module("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module("slide2vec.prepare.triton_kernel")
    sources = []
    variants = slice(None) if capability == 90 else slice(-1, None)
    for taps, whole in GATHERS[variants]:
        tables = {"first": "*i64", "weights": "*i64"} if whole else {"first": "*i32", "weights": "*fp32"}
        constants = {"size": 224, "taps": taps, "whole": whole, "block": 1024}
        constants |= {"tile_width": 240, "tile_height": 256}
        sources.append((kernels.gather, {**GATHER, **tables}, constants))
    for packed, out in ((True, "*u8"), (False, "*fp32"))[variants]:
        constants = {"packed": packed, "block": 1024}
        sources.append((kernels.normalise, {**NORMALISE, "tiles": "*u8", "out": out}, constants))
    for kernel, types, constants in sources:
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        compiled = triton.compile(
            compiler.ASTSource(kernel, signature, constants),
            target=backends.GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": False},
        )
        assert compiled.asm["cubin"].startswith(b"\x7fELF")
        if kernel is kernels.gather:  # or its pixels would not be OpenCV's
            assert "fma." not in compiled.asm["ptx"]
