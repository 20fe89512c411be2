"""Regions assembled from compressed tiles against OpenSlide, with every decoder that runs here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slide2vec.errors import BackendError, ExtraMissingError, SlideReadError
from slide2vec.readers import decoders, open_slide
from slide2vec.readers.decoders import HostDecoder, NvimgcodecDecoder, TileDecoder
from slide2vec.readers.probe import probe
from slide2vec.readers.tile_assembly import JpegTileReader
from slide2vec.slides import as_slide

TILE, ACROSS = 64, 7  # of the files that `tiffs` writes
DAMAGED = 2 * ACROSS + 3

SLIDES = [
    "CMU-1-Small-Region.svs",  # RGB components, shared tables, no marker
    "aperio-jpeg-pyramid.svs",
    "generic-jpeg-bigtiff-pyramid.tiff",
    "aperio-nompp-appmag40.svs",
]


class Counting(HostDecoder):
    """Counts what it decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.decoded = 0

    def decode(self, tiles: Sequence[Any], *more: Any) -> Iterator[Any]:
        self.decoded += len(tiles)
        return super().decode(tiles, *more)


def nvimgcodec() -> TileDecoder:
    torch = pytest.importorskip("torch")
    pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    return NvimgcodecDecoder(torch.device("cpu"))


def raw(path: Path, decoder: TileDecoder | None = None) -> JpegTileReader:
    return JpegTileReader(probe(as_slide(path)), decoder or HostDecoder())


@pytest.mark.parametrize("name", SLIDES)
@pytest.mark.parametrize("decoder", [HostDecoder, nvimgcodec])
def test_pixels_are_openslides(
    name: str, decoder: Callable[[], TileDecoder], real_slide: Callable[[str], Path]
) -> None:
    """Bit by bit: both decoders are libjpeg-turbo, as OpenSlide's is."""
    path = real_slide(name)
    rng = np.random.default_rng(0)
    with open_slide(as_slide(path), "openslide") as expected, raw(path, decoder()) as reader:
        assert reader.level_dimensions == expected.level_dimensions
        width, height = reader.dimensions
        for _ in range(12):
            level = int(rng.integers(len(reader.level_dimensions)))
            corner = int(rng.integers(-200, width)), int(rng.integers(-200, height))
            size = int(rng.integers(1, 900)), int(rng.integers(1, 900))
            found = np.asarray(reader.read_region(corner, level, size))
            np.testing.assert_array_equal(found, expected.read_region(corner, level, size))


def test_every_tile_is_decoded_once(jpeg_pyramid: Path) -> None:
    """Boxes that cut tiles, read column by column as supertiles are, by several threads at once."""
    boxes = [(x, y) for x in range(0, 400, 100) for y in range(0, 300, 100)]
    for threads in (1, 4):
        decoder = Counting()
        with raw(jpeg_pyramid, decoder) as reader, ThreadPoolExecutor(threads) as pool:
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
    with raw(jpeg_pyramid, decoder) as reader:
        for x in range(0, 400, 50):
            reader.read_region((x, 0), 0, (50, 300))
        assert len(reader._boxes._kept) == 4
    assert len(reader._boxes._kept) == 0


def zeros(tiles: list[bytes]) -> None:
    tiles[DAMAGED] = bytes(len(tiles[DAMAGED]))


def cut_short(tiles: list[bytes]) -> None:
    half = len(tiles[DAMAGED]) * 3 // 4
    tiles[DAMAGED] = tiles[DAMAGED][:half] + bytes(len(tiles[DAMAGED]) - half)


def other_size(tiles: list[bytes]) -> None:
    start = tiles[DAMAGED].index(b"\xff\xc0")
    tiles[DAMAGED] = tiles[DAMAGED][: start + 6] + b"\x20" + tiles[DAMAGED][start + 7 :]


@pytest.mark.parametrize("decoder", [HostDecoder, nvimgcodec])
@pytest.mark.parametrize("damage", [zeros, cut_short, other_size])
def test_a_damaged_tile_is_an_error_and_spoils_no_other(
    damage: Callable[[list[bytes]], None],
    decoder: Callable[[], TileDecoder],
    tmp_path: Path,
    tiffs: Any,
) -> None:
    path = tiffs.write_jpeg(tmp_path / "damaged.tif", [tiffs.picture()], damage)
    with raw(path, decoder()) as reader:
        for location, size in [((0, 0), (400, 300)), ((200, 140), (1, 1))]:
            with pytest.raises(SlideReadError, match=r"slide damaged: raw .* level 0 at \(192, 128\)"):
                reader.read_region(location, 0, size)
        assert np.asarray(reader.read_region((0, 0), 0, (400, 2 * TILE))).mean() > 60


def test_who_waits_for_another_threads_failure_decodes_by_itself(tmp_path: Path, tiffs: Any) -> None:
    path = tiffs.write_jpeg(tmp_path / "damaged.tif", [tiffs.picture()], zeros)
    started, go = threading.Event(), threading.Event()

    with raw(path) as reader:
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


def test_tiles_left_out_are_white(tmp_path: Path, tiffs: Any) -> None:
    def leave_out(tiles: list[bytes]) -> None:
        tiles[DAMAGED] = b""

    path = tiffs.write_jpeg(tmp_path / "sparse.tif", [tiffs.picture()], leave_out)
    with raw(path) as reader:
        assert (reader.read_region((192, 128), 0, (TILE, TILE)) == 255).all()


def test_what_it_does_not_read(real_slide: Callable[[str], Path]) -> None:
    for name, message in [
        ("generic-lzw-pyramid.tiff", "stored in LZW tiles"),
        ("CMU-1-Small-Region.webp.tiff", "stored in"),
        ("fluorescence-dapi.ndpi", "hamamatsu"),
        ("XYC-jpeg.ome.tiff", "JFIF"),  # tagged RGB, with JPEGs that say YCbCr
    ]:
        with pytest.raises(BackendError, match=message):
            raw(real_slide(name))


def test_closed_reader_says_so(jpeg_pyramid: Path) -> None:
    reader = raw(jpeg_pyramid)
    reader.close()
    reader.close()
    with pytest.raises(SlideReadError, match="was closed"):
        reader.read_region((0, 0), 0, (10, 10))


def test_without_nvimgcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(decoders, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match=r"slide2vec\[cuda\]"):
        NvimgcodecDecoder(torch.device("cpu"))
