"""A level that several cut tiles from: right pixels, compressed tiles decoded once, memory with an end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from slide2vec.errors import SlideReadError
from slide2vec.readers import open_slide
from slide2vec.readers.codecs import decode_tile
from slide2vec.readers.reader import Squares
from slide2vec.readers.tile_assembly import HostTileReader
from slide2vec.slides import as_slide
from slide2vec.tiling import shared_level
from slide2vec.tiling.shared_level import SharedLevel

TILE, WIDTH, HEIGHT = 16, 203, 150
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 x 3 compressed tiles, or 6 x 6 of those that are halved."""
    monkeypatch.setattr(shared_level, "CHUNK_PX", 3 * TILE + 5)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each compressed tile that is decoded."""
    found = list[int]()

    def counted(*args: Any, **options: Any) -> Any:
        found.append(1)
        return decode_tile(*args, **options)

    monkeypatch.setattr("slide2vec.readers.decoders.decode_tile", counted)
    return found


def write(path: Path, damage: int | None = None, left_out: int | None = None) -> Path:
    tifffile.imwrite(path, PIXELS, tile=(TILE, TILE), photometric="rgb", compression="zlib", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page: Any = tiff.pages[0]
        if damage is not None:
            tiff.filehandle.seek(page.dataoffsets[damage])
            tiff.filehandle.write(bytes(8))
        if left_out is not None:
            tag = page.tags["TileByteCounts"]
            tag.overwrite([0 if i == left_out else n for i, n in enumerate(tag.value)])
    return path


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[HostTileReader]:
    with open_slide(as_slide(write(tmp_path / "a.tif")), "tiff") as found:
        assert isinstance(found, HostTileReader)
        yield found


def blocks(side: int, *, start: int = 0, end: int = 0, step: int = 0) -> list[Squares]:
    """Columns of a grid, of four tiles each at most."""
    xs, ys = (range(start, size + end - side + 1, step or side) for size in (WIDTH, HEIGHT))
    column = [list(ys)[at : at + 4] for at in range(0, len(ys), 4)]
    return [(np.array([(x, y) for y in part], np.int64), side) for x in xs for part in column]


def tiles_of(level: SharedLevel, squares: Squares, ratio: int = 1) -> list[np.ndarray]:
    held = level.fetch(squares)
    side = squares[1] // ratio
    tiles = [np.full((side, side, 3), 7, np.uint8) for _ in squares[0]]
    for corner, tile in zip(squares[0].tolist(), tiles, strict=True):
        level.cut(held, corner, ratio, tile)
    level.done(held)
    return tiles


def expected(corner: np.ndarray, side: int, ratio: int = 1) -> np.ndarray:
    """Cut out of the picture, white beyond it, and averaged by OpenCV."""
    x, y = corner.tolist()
    padded = np.pad(PIXELS, ((64, 64), (64, 64), (0, 0)), constant_values=255)
    part = padded[y + 64 : y + 64 + side, x + 64 : x + 64 + side]
    if ratio == 1:
        return part
    small: np.ndarray = cv2.resize(part, (side // ratio, side // ratio), interpolation=cv2.INTER_AREA)
    return small


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("ratio", [1, 2])
def test_tiles_of_all_sizes_are_cut_from_what_is_decoded_once(
    reader: HostTileReader, decoded: list[int], ratio: int, threads: int
) -> None:
    reads = [*blocks(14), *blocks(28), *blocks(44, step=22)]
    level = SharedLevel(reader, 0, [(squares, ratio) for squares in reads])
    assert level.chunk_bytes == (3 * TILE) ** 2 * 3
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda squares: tiles_of(level, squares, ratio), reads))
    for (corners, side), tiles in zip(reads, found, strict=True):
        for corner, tile in zip(corners, tiles, strict=True):
            np.testing.assert_array_equal(tile, expected(corner, side, ratio))
    under = {
        (column, row)
        for corners, side in reads
        for x, y in corners.tolist()
        for column in range(x // TILE, (x + side - 1) // TILE + 1)
        for row in range(y // TILE, (y + side - 1) // TILE + 1)
    }
    assert len(decoded) == len(under) < -(-WIDTH // TILE) * -(-HEIGHT // TILE)
    assert level.kept_bytes == 0 and level._free  # all was given back, to be used again


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("ratio", [2, 3, 4, 5])
def test_cells_may_begin_anywhere_and_reach_over_all_edges(
    reader: HostTileReader, decoded: list[int], ratio: int, threads: int
) -> None:
    """Of compressed tiles, of chunks, and of the level, for several grids, sizes and ratios at once."""
    reads = [
        *((squares, ratio) for squares in blocks(4 * ratio, start=1)),
        *((squares, ratio) for squares in blocks(7 * ratio, start=1, end=20, step=3 * ratio)),
        *((squares, ratio) for squares in blocks(5 * ratio, start=-4, end=20)),
        *((squares, 1) for squares in blocks(20, start=-3, end=20)),
        (np.array([(0, 1), (1, 0), (1, 1), (ratio, ratio)], np.int64), 6 * ratio),
    ]
    reads[-1] = reads[-1], ratio  # squares whose cells begin differently
    level = SharedLevel(reader, 0, reads)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda read: tiles_of(level, *read), reads))
    for ((corners, side), reduced), tiles in zip(reads, found, strict=True):
        for corner, tile in zip(corners, tiles, strict=True):
            np.testing.assert_array_equal(tile, expected(corner, side, reduced))
    assert len(decoded) == -(-WIDTH // TILE) * -(-HEIGHT // TILE)
    assert level.kept_bytes == 0 and not level._chunks and level._free


def test_chunks_hold_only_the_averages_that_are_needed_there(reader: HostTileReader) -> None:
    at = np.array([(0, 0)], np.int64), 12
    odd = np.array([(151, 1)], np.int64), 12
    level = SharedLevel(reader, 0, [(at, 2), (odd, 2)])
    held = level.fetch(at)
    assert [list(chunk.parts) for chunk in held.values()] == [[(2, 0, 0)]]
    assert level.kept_bytes == level.chunk_bytes == (6 * TILE) ** 2 * 3 // 4
    level.done(held)
    assert level.kept_bytes == 0


def test_squares_that_lie_wholly_beyond_the_level_are_white(reader: HostTileReader) -> None:
    squares = np.array([(WIDTH + 5, 0), (-40, 4), (4, 4 * HEIGHT)], np.int64), 20
    found = tiles_of(SharedLevel(reader, 0, [(squares, 1)]), squares)
    assert all((tile == 255).all() for tile in found)


def test_tiles_that_the_file_leaves_out_are_white_in_memory_that_is_used_again(tmp_path: Path) -> None:
    reads = [(np.array([(x, 0)], np.int64), 16) for x in (0, 3 * TILE)]
    with open_slide(as_slide(write(tmp_path / "a.tif", left_out=3)), "tiff") as reader:
        assert isinstance(reader, HostTileReader)
        level = SharedLevel(reader, 0, [(squares, 1) for squares in reads])
        assert not (tiles_of(level, reads[0])[0] == 255).all() and len(level._free) == 1
        assert (tiles_of(level, reads[1])[0] == 255).all() and len(level._free) == 1


def test_what_is_kept_has_an_end_and_is_decoded_again(
    reader: HostTileReader, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = blocks(16) * 2
    level, most = SharedLevel(reader, 0, [(squares, 1) for squares in reads]), 0
    monkeypatch.setattr(shared_level, "KEPT_FOR_OTHERS_BYTES", 4 * level.chunk_bytes)
    for corners, side in reads:
        for corner, tile in zip(corners, tiles_of(level, (corners, side)), strict=True):
            np.testing.assert_array_equal(tile, expected(corner, side))
        most = max(most, level.kept_bytes)
    assert most == 4 * level.chunk_bytes
    assert len(decoded) > sum(len(corners) for corners, _ in reads[: len(reads) // 2])


def test_who_waits_for_what_another_thread_fails_at_fails_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares = np.array([(0, 0), (50, 0)], np.int64), 40
    with open_slide(as_slide(write(tmp_path / "a.tif", damage=1)), "tiff") as reader:
        assert isinstance(reader, HostTileReader)
        level = SharedLevel(reader, 0, [(squares, 1)] * 3)
        filling, started, go = HostTileReader.fill, threading.Event(), threading.Event()

        def slow(*args: Any) -> None:
            if not started.is_set():
                started.set()
                go.wait(10)
            filling(*args)

        monkeypatch.setattr(HostTileReader, "fill", slow)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(level.fetch, squares)
            started.wait(10)
            second = pool.submit(level.fetch, squares)
            go.set()
            for failing in (first, second):
                with pytest.raises(SlideReadError, match="damaged"):
                    failing.result(10)
        with pytest.raises(SlideReadError, match="damaged"):
            level.fetch(squares)
        assert level.kept_bytes == 0
