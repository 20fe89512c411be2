"""Regions assembled from compressed tiles, each decoded once, on the host."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slide2vec.errors import SlideReadError
from slide2vec.readers.decoders import HostDecoder
from slide2vec.readers.probe import probe
from slide2vec.readers.tiff import TiffReader
from slide2vec.readers.tiff_tiles import TiffTiles
from slide2vec.readers.tile_assembly import HostTileReader, TileAssembler
from slide2vec.slides import as_slide

TILE, ACROSS = 64, 7  # of the files that `tiffs` writes
DAMAGED = 2 * ACROSS + 3


class Counting(HostDecoder):
    """Counts what it decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.decoded = 0

    def decode(self, tiles: Sequence[Any], *more: Any) -> Iterator[Any]:
        self.decoded += len(tiles)
        return super().decode(tiles, *more)


def opened(path: Path, decoder: HostDecoder | None = None) -> HostTileReader:
    reader = TiffReader(probe(as_slide(path)))
    if decoder is not None:
        reader._boxes = TileAssembler(TiffTiles(reader.probe, reader._read_error), decoder)
    return reader


def test_every_tile_is_decoded_once(jpeg_pyramid: Path) -> None:
    """Boxes that cut tiles, read column by column as supertiles are, by several threads at once."""
    boxes = [(x, y) for x in range(0, 400, 100) for y in range(0, 300, 100)]
    for threads in (1, 4):
        decoder = Counting()
        with opened(jpeg_pyramid, decoder) as reader, ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda at: reader.read_region(at, 0, (100, 100)), boxes))
            whole = reader.read_region((0, 0), 0, (400, 300))
        for (x, y), pixels in zip(boxes, found, strict=True):
            np.testing.assert_array_equal(pixels, whole[y : y + 100, x : x + 100])
        of_whole = sum(1 for at in range(35) if _is_inside(at))
        assert decoder.decoded == 35 + of_whole


def _is_inside(tile: int) -> bool:
    """Of the tiles that one of the boxes above holds whole, and that are not kept for a neighbour."""
    left, top = tile % ACROSS * TILE, tile // ACROSS * TILE
    right, bottom = min(left + TILE, 400), min(top + TILE, 300)
    return left // 100 == (right - 1) // 100 and top // 100 == (bottom - 1) // 100


def test_kept_tiles_are_bounded(jpeg_pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slide2vec.readers.tile_assembly.KEPT_BYTES", 4 * TILE * TILE * 3)
    decoder = Counting()
    with opened(jpeg_pyramid, decoder) as reader:
        for x in range(0, 400, 50):
            reader.read_region((x, 0), 0, (50, 300))
        assert len(reader._boxes._kept) == 4 and reader._boxes._kept_bytes == 4 * TILE * TILE * 3
    assert len(reader._boxes._kept) == reader._boxes._kept_bytes == 0


def zeros(tiles: list[bytes]) -> None:
    tiles[DAMAGED] = bytes(len(tiles[DAMAGED]))


def test_who_waits_for_another_threads_failure_decodes_by_itself(tmp_path: Path, tiffs: Any) -> None:
    path = tiffs.write_jpeg(tmp_path / "damaged.tif", [tiffs.picture()], zeros)
    started, go = threading.Event(), threading.Event()

    with opened(path) as reader:
        tiles = reader._boxes._tiles
        read = tiles.read

        def slow(level: int, places: Sequence[Any]) -> list[Any]:
            if len(places) > 1 and not started.is_set():
                started.set()
                go.wait(10)
            return read(level, places)

        tiles.read = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            failing = pool.submit(reader.read_region, (0, 0), 0, (400, 300))
            started.wait(10)
            waiting = pool.submit(reader.read_region, (0, 0), 0, (10, 10))
            go.set()
            assert isinstance(failing.exception(10), SlideReadError)
            assert waiting.result(10).shape == (10, 10, 3)


def test_who_holds_a_tile_whole_leaves_anothers_reservation(tmp_path: Path, tiffs: Any) -> None:
    """The box that holds it whole reserves nothing, and must not publish what another thread reserved."""
    path = tiffs.write_jpeg(tmp_path / "slide.tif", [tiffs.picture()])
    whole_reads, part_reads, whole_done = threading.Event(), threading.Event(), threading.Event()

    with opened(path) as reader:
        tiles = reader._boxes._tiles
        read = tiles.read

        def in_turn(level: int, places: Sequence[Any]) -> list[Any]:
            if places[0].is_whole:
                whole_reads.set()
                part_reads.wait(10)
            else:
                part_reads.set()
                whole_done.wait(10)
            return read(level, places)

        expected = reader.read_region((0, 0), 0, (10, 10))
        reader._boxes._kept.clear()
        tiles.read = in_turn  # type: ignore[method-assign]
        form = tiles.format(0)
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(reader.read_region, (0, 0), 0, (form.width, form.height))
            whole_reads.wait(10)
            part = pool.submit(reader.read_region, (0, 0), 0, (10, 10))
            whole.result(10)
            whole_done.set()
            np.testing.assert_array_equal(part.result(10), expected)
