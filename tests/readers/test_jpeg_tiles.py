"""JPEG tiles decoded by nvImageCodec on the CPU, against OpenSlide; what is damaged is noticed."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slide2vec.errors import BackendError, ExtraMissingError, SlideReadError
from slide2vec.readers import decoders, open_slide
from slide2vec.readers.decoders import NvimgcodecDecoder
from slide2vec.readers.jpeg_tiles import JpegTileReader
from slide2vec.readers.probe import probe
from slide2vec.slides import as_slide

CPU = torch.device("cpu")
TILE, ACROSS = 64, 7  # of the files that `tiffs` writes
DAMAGED = 2 * ACROSS + 3

SLIDES = [
    "CMU-1-Small-Region.svs",  # RGB components, shared tables, no marker
    "aperio-jpeg-pyramid.svs",
    "generic-jpeg-bigtiff-pyramid.tiff",
    "aperio-nompp-appmag40.svs",
]
NVIMGCODEC = pytest.mark.skipif(
    decoders.nvimgcodec_unavailable() is not None, reason="nvImageCodec is not installed"
)


@pytest.fixture(scope="module")
def decoder() -> NvimgcodecDecoder:
    return NvimgcodecDecoder(CPU)


def opened(path: Path, decoder: Any = None) -> JpegTileReader:
    return JpegTileReader(probe(as_slide(path)), decoder)


@NVIMGCODEC
@pytest.mark.parametrize("name", SLIDES)
def test_pixels_are_openslides(
    name: str, decoder: NvimgcodecDecoder, real_slide: Callable[[str], Path]
) -> None:
    """Bit by bit: on the CPU nvImageCodec is libjpeg-turbo, as OpenSlide is."""
    path = real_slide(name)
    rng = np.random.default_rng(0)
    with open_slide(as_slide(path), "openslide") as expected, opened(path, decoder) as reader:
        assert reader.level_dimensions == expected.level_dimensions
        width, height = reader.dimensions
        for _ in range(12):
            level = int(rng.integers(len(reader.level_dimensions)))
            corner = int(rng.integers(-200, width)), int(rng.integers(-200, height))
            size = int(rng.integers(1, 900)), int(rng.integers(1, 900))
            found = np.asarray(reader.read_region(corner, level, size))
            np.testing.assert_array_equal(found, expected.read_region(corner, level, size))


@NVIMGCODEC
def test_boxes_of_one_size_anywhere(decoder: NvimgcodecDecoder, jpeg_pyramid: Path) -> None:
    """Only what lies under one of them is decoded, in the order of the file; outside of the slide is none."""
    with opened(jpeg_pyramid, decoder) as reader:
        corners = np.array([[130, 70], [-40, 290], [500, 500], [390, 0]])
        decoded = reader.decode(0, corners, (30, 30))
        assert (decoded.left, decoded.top, decoded.level_size) == (2 * TILE, 0, (400, 300))
        assert decoded.slots.tolist() == [[-1, -1, -1, -1, 0], [1, -1, -1, -1, -1]]
        reader.release(decoded)
        outside = reader.decode(0, np.array([[-30, 0], [400, 10]]), (30, 30))
        assert outside.slots.tolist() == [[-1]]


@NVIMGCODEC
def test_memory_is_used_again(decoder: NvimgcodecDecoder, jpeg_pyramid: Path) -> None:
    with opened(jpeg_pyramid, decoder) as reader:
        found = [reader.decode(0, np.array([[0, 0]]), (400, 300)) for _ in range(2)]
        assert found[0].memory is not found[1].memory  # both are needed
        reader.release(found[0])
        again = reader.decode(0, np.array([[64, 64]]), (10, 10))
        assert again.memory is found[0].memory
        whole = reader.read_region((0, 0), 0, (400, 300))
        assert torch.equal(again.memory.pixels[0], whole[64:128, 64:128])


@NVIMGCODEC
def test_memory_that_is_kept_is_bounded(
    decoder: NvimgcodecDecoder, jpeg_pyramid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(jpeg_pyramid, decoder) as reader:
        found = [reader.decode(0, np.array([[0, 0]]), (400, 300)) for _ in range(3)]
        monkeypatch.setattr(decoders, "POOL_BYTES", 2 * found[0].memory.pixels.nbytes)
        for each in found:
            reader.release(each)
        assert [memory is each.memory for memory, each in zip(decoder._free, found[:0:-1], strict=True)]


@NVIMGCODEC
def test_who_gives_memory_back_waits_for_no_batch(decoder: NvimgcodecDecoder, jpeg_pyramid: Path) -> None:
    """Which other threads decode meanwhile."""
    busy, mine = NvimgcodecDecoder(CPU), SimpleNamespace(decode=decoder._decoder.decode)
    with opened(jpeg_pyramid, busy) as reader:
        corners, side = np.array([[0, 0]]), (200, 200)
        before = reader.decode(0, corners, side)

        def decode(*args: Any, **options: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(reader.release, before).result(timeout=10)
            return mine.decode(*args, **options)

        busy._decoder = SimpleNamespace(decode=decode)
        assert reader.decode(0, corners, side).memory is not before.memory
        assert busy._free == [before.memory]


class Elsewhere:
    """nvImageCodec's decoder, were it to write only into memory of its own.

    Args:
        error: that it raises where it is given memory.
    """

    def __init__(self, decoder: Any, error: Exception | None) -> None:
        self._decoder, self._error = decoder, error

    def decode(self, streams: Any, *, images: Any = None, **options: Any) -> Any:
        if images is not None and self._error is not None:
            raise self._error
        return self._decoder.decode(streams, **options)


@NVIMGCODEC
@pytest.mark.parametrize(
    "error",
    [None, ValueError("only internally managed buffers"), TypeError("images")],
)
def test_a_decoder_that_writes_elsewhere(
    error: Exception | None, jpeg_pyramid: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decoder, good = NvimgcodecDecoder(CPU), NvimgcodecDecoder(CPU)
    decoder._decoder = Elsewhere(decoder._decoder, error)
    with opened(jpeg_pyramid, decoder) as reader, opened(jpeg_pyramid, good) as expected:
        for _ in range(2):
            found = reader.read_region((0, 0), 0, (400, 300))
            assert torch.equal(found, expected.read_region((0, 0), 0, (400, 300)))
    (warning,) = caplog.messages
    assert "nvImageCodec does not decode into memory of cpu that it is given" in warning
    assert str(error or "it wrote elsewhere") in warning


def zeros(tiles: list[bytes]) -> None:
    tiles[DAMAGED] = bytes(len(tiles[DAMAGED]))


def cut_short(tiles: list[bytes]) -> None:
    half = len(tiles[DAMAGED]) * 3 // 4
    tiles[DAMAGED] = tiles[DAMAGED][:half] + bytes(len(tiles[DAMAGED]) - half)


def other_size(tiles: list[bytes]) -> None:
    start = tiles[DAMAGED].index(b"\xff\xc0")
    tiles[DAMAGED] = tiles[DAMAGED][: start + 6] + b"\x20" + tiles[DAMAGED][start + 7 :]


def no_beginning(tiles: list[bytes]) -> None:
    tiles[DAMAGED] = b"\0" + tiles[DAMAGED][1:]


def too_large(tiles: list[bytes]) -> None:
    start = tiles[DAMAGED].index(b"\xff\xc0")
    tiles[DAMAGED] = tiles[DAMAGED][: start + 6] + b"\x80" + tiles[DAMAGED][start + 7 :]


def narrow(tiles: list[bytes]) -> None:
    """What the level's edge holds is no less than it has, anywhere else it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (400 % TILE, TILE), (200, 150, 160)).save(buffer, "JPEG")
    tiles[ACROSS - 1] = tiles[DAMAGED] = buffer.getvalue()


@NVIMGCODEC
@pytest.mark.parametrize("damage", [zeros, cut_short, other_size, no_beginning, too_large, narrow])
def test_a_damaged_tile_is_an_error_and_spoils_no_other(
    damage: Callable[[list[bytes]], None], decoder: NvimgcodecDecoder, tmp_path: Path, tiffs: Any
) -> None:
    path = tiffs.write_jpeg(tmp_path / "damaged.tif", [tiffs.picture()], damage)
    with opened(path, decoder) as reader:
        for location, size in [((0, 0), (400, 300)), ((200, 140), (1, 1))]:
            with pytest.raises(SlideReadError, match=r"slide damaged: raw .* level 0 at \(192, 128\)"):
                reader.read_region(location, 0, size)
        assert np.asarray(reader.read_region((0, 0), 0, (400, 2 * TILE))).mean() > 60


@NVIMGCODEC
def test_a_file_that_was_cut_short(decoder: NvimgcodecDecoder, jpeg_pyramid: Path) -> None:
    spec = probe(as_slide(jpeg_pyramid)).levels[0]
    with opened(jpeg_pyramid, decoder) as reader:
        reader.read_region((0, 0), 0, (400, 300))  # which thread's memory holds the tiles now
        with jpeg_pyramid.open("r+b") as file:
            file.truncate(int(spec.offsets[20]) + 50)
        with pytest.raises(SlideReadError, match="damaged JPEG tile"):
            reader.read_region((0, 0), 0, (400, 300))
        assert np.asarray(reader.read_region((0, 0), 0, (400, 2 * TILE))).mean() > 60


@NVIMGCODEC
def test_tiles_left_out_are_white(tmp_path: Path, tiffs: Any) -> None:
    def leave_out(tiles: list[bytes]) -> None:
        tiles[DAMAGED] = b""

    path = tiffs.write_jpeg(tmp_path / "sparse.tif", [tiffs.picture()], leave_out)
    with opened(path, NvimgcodecDecoder(CPU)) as reader:
        assert (reader.read_region((192, 128), 0, (TILE, TILE)) == 255).all()


def test_what_it_does_not_read(real_slide: Callable[[str], Path]) -> None:
    for name, message in [
        ("generic-lzw-pyramid.tiff", "stored in LZW tiles"),
        ("CMU-1-Small-Region.webp.tiff", "stored in"),
        ("fluorescence-dapi.ndpi", "hamamatsu"),
        ("XYC-jpeg.ome.tiff", "JFIF"),  # tagged RGB, with JPEGs that say YCbCr
    ]:
        with pytest.raises(BackendError, match=message):
            opened(real_slide(name))


def test_closed_reader_says_so(jpeg_pyramid: Path) -> None:
    reader = opened(jpeg_pyramid)
    reader.close()
    reader.close()
    with pytest.raises(SlideReadError, match="was closed"):
        reader.read_region((0, 0), 0, (10, 10))


def test_without_nvimgcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match=r"\[cuda\]"):
        NvimgcodecDecoder(CPU)
