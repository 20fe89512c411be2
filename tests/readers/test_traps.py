"""Files that make libraries crash, lie or fall silent; each of these has been seen."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from slide2vec.errors import BackendError, ExtraMissingError, SlideOpenError, SlideReadError
from slide2vec.readers import backends, codecs, open_slide, recheck
from slide2vec.slides import as_slide

TILE = 64  # of the files that `tiffs` writes
JPEG_READERS = ["auto", "tiff", "cucim", "vips", "openslide"]
ACROSS = 7  # tiles in a row of its picture
DAMAGED = 2 * ACROSS + 3  # in the middle of it, at (192, 128)


def need(backend: str) -> None:
    if missing := backends().get(backend):
        pytest.skip(missing)


def zeros(tiles: list[bytes]) -> None:
    tiles[DAMAGED] = bytes(len(tiles[DAMAGED]))


def no_header(tiles: list[bytes]) -> None:
    tiles[DAMAGED] = b"\xff" * 16 + tiles[DAMAGED][16:]


def bad_table(tiles: list[bytes]) -> None:
    """A frame header of an impossible precision."""
    start = tiles[DAMAGED].index(b"\xff\xc0")
    tiles[DAMAGED] = tiles[DAMAGED][: start + 4] + b"\x63" + tiles[DAMAGED][start + 5 :]


def cut_short(tiles: list[bytes]) -> None:
    half = len(tiles[DAMAGED]) * 3 // 4
    tiles[DAMAGED] = tiles[DAMAGED][:half] + bytes(len(tiles[DAMAGED]) - half)


def smaller(tiles: list[bytes]) -> None:
    """A sound JPEG of half the width."""
    buffer = io.BytesIO()
    Image.new("RGB", (TILE // 2, TILE)).save(buffer, "JPEG", quality=90)
    tiles[DAMAGED] = buffer.getvalue()


@pytest.mark.parametrize("backend", JPEG_READERS)
@pytest.mark.parametrize("damage", [zeros, no_header, bad_table, cut_short, smaller])
def test_a_damaged_jpeg_tile_is_an_error(
    damage: Callable[[list[bytes]], None], backend: str, tmp_path: Path, tiffs: Any
) -> None:
    need(backend)
    path = tiffs.write_jpeg(tmp_path / "damaged.tif", [tiffs.picture()], damage)
    with open_slide(as_slide(path), backend) as reader:
        before = reader.read_region((0, 0), 0, (400, 2 * TILE))
        for location, size in [((0, 0), (400, 300)), ((3 * TILE, 2 * TILE), (10, 10)), ((200, 140), (1, 1))]:
            with pytest.raises(SlideReadError, match=r"slide damaged: .* level 0 at \(\d+, \d+\)"):
                reader.read_region(location, 0, size)
        np.testing.assert_array_equal(reader.read_region((0, 0), 0, (400, 2 * TILE)), before)


@pytest.mark.parametrize("backend", JPEG_READERS)
def test_errors_of_one_thread_are_not_those_of_another(backend: str, tmp_path: Path, tiffs: Any) -> None:
    need(backend)
    path = tiffs.write_jpeg(tmp_path / "damaged.tif", [tiffs.picture()], zeros)
    with open_slide(as_slide(path), backend) as reader, ThreadPoolExecutor(4) as pool:
        good = reader.read_region((0, 0), 0, (100, 100))

        def read(number: int) -> bool:
            if number % 3 == 0:
                with pytest.raises(SlideReadError):
                    reader.read_region((200, 140), 0, (20, 20))
                return True
            return np.array_equal(reader.read_region((0, 0), 0, (100, 100)), good)

        assert all(pool.map(read, range(60)))


@pytest.mark.parametrize("backend", JPEG_READERS)
def test_black_pixels_of_a_sound_file_are_read(backend: str, tmp_path: Path, tiffs: Any) -> None:
    need(backend)
    pixels = tiffs.picture()
    pixels[TILE : 3 * TILE, TILE : 4 * TILE] = 0
    path = tiffs.write_jpeg(tmp_path / "black.tif", [pixels])
    with open_slide(as_slide(path), backend) as reader:
        assert (reader.read_region((TILE, TILE), 0, (3 * TILE, 2 * TILE)) == 0).all()


@pytest.mark.parametrize("backend", ["auto", "tiff", "cucim", "openslide"])
def test_tiles_left_out_are_white(backend: str, tmp_path: Path, tiffs: Any) -> None:
    need(backend)

    def leave_out(tiles: list[bytes]) -> None:
        tiles[DAMAGED] = b""

    whole = tiffs.write_jpeg(tmp_path / "whole.tif", [tiffs.picture()])
    path = tiffs.write_jpeg(tmp_path / "sparse.tif", [tiffs.picture()], leave_out)
    with open_slide(as_slide(path), backend) as reader, open_slide(as_slide(whole), backend) as full:
        expected = full.read_region((100, 100), 0, (200, 150))
        expected[28 : 28 + TILE, 92 : 92 + TILE] = 255
        np.testing.assert_array_equal(reader.read_region((100, 100), 0, (200, 150)), expected)


@pytest.mark.parametrize("compression", [8, 32946, 50000, 5])
def test_predictors_never_reach_cucim(compression: int, tmp_path: Path, tiffs: Any) -> None:
    need("cucim")
    path = tmp_path / "predicted.tif"
    tiffs.write_plain(path, compression="zlib", predictor=True)
    tiffs.set_tags(path, Compression=compression)
    with pytest.raises(BackendError, match=r"[Pp]redictor"):
        open_slide(as_slide(path), "cucim")


@pytest.mark.parametrize("name", ["gdal-deflate.tif", "gdal-zstd.tif", "rasterio-cogeo.tif"])
def test_predictor_tags_in_any_directory_never_reach_cucim(name: str, dialects_dir: Path) -> None:
    """Of value 1, as GDAL writes them, and of masks: cuCIM crashes as it opens such a file."""
    need("cucim")
    with pytest.raises(BackendError, match="crashes on files with a Predictor tag"):
        open_slide(as_slide(dialects_dir / name), "cucim")


def test_predictor_tags_that_cucim_bears(reference_slide: Path) -> None:
    """Beside the LZW of Aperio's labels."""
    need("cucim")
    with open_slide(as_slide(reference_slide), "cucim") as reader:
        assert any(317 in directory.tags for directory in reader.probe.directories)  # type: ignore[attr-defined]


def entropy(tiles: list[bytes]) -> None:
    """Damage that libjpeg warns of and makes pixels up for."""
    middle = len(tiles[DAMAGED]) * 2 // 3
    tiles[DAMAGED] = tiles[DAMAGED][:middle] + b"\xff\xd9" + tiles[DAMAGED][middle + 2 :]


@pytest.mark.parametrize("backend", JPEG_READERS)
@pytest.mark.parametrize("file", ["written", "jpeg_entropy_cucim.svs"])
def test_damage_inside_entropy_data_is_an_error(
    file: str, backend: str, tmp_path: Path, tiffs: Any, request: pytest.FixtureRequest
) -> None:
    need(backend)
    if file == "written":
        path = tiffs.write_jpeg(tmp_path / "damaged.tif", [tiffs.picture()], entropy)
    else:
        path = request.getfixturevalue("broken_dir") / file
    with open_slide(as_slide(path), backend) as reader:
        with pytest.raises(SlideReadError, match="level 0 at"):
            reader.read_region((0, 0), 0, reader.dimensions)
        assert reader.read_region((0, 0), 0, (100, 100)).any()  # the rest is read


@pytest.mark.parametrize("compression", ["zstd", "lzma", "lerc", "jpeg2000", "jpegxl", "png"])
def test_what_vips_gives_as_black_is_not_its(compression: str, tmp_path: Path, tiffs: Any) -> None:
    need("vips")
    path = tiffs.write_plain(tmp_path / "a.tif", compression=compression)
    with pytest.raises(BackendError, match="not measured to read"):
        open_slide(as_slide(path), "vips")


@pytest.mark.parametrize("backend", ["vips", "openslide"])
def test_a_wrong_checksum_is_an_error(backend: str, tmp_path: Path, tiffs: Any) -> None:
    """Of Deflate. Neither library looks at it."""
    need(backend)
    path = tiffs.write_plain(tmp_path / "a.tif", compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[2], tiff.pages[0].databytecounts[2]
    data = bytearray(path.read_bytes())
    data[offset + count - 1] ^= 255
    path.write_bytes(data)
    with open_slide(as_slide(path), backend) as reader:
        with pytest.raises(SlideReadError, match=r"level 0 at .*damaged ADOBE_DEFLATE tile"):
            reader.read_region((0, 0), 0, reader.dimensions)
        assert reader.read_region((0, 0), 0, (100, 60)).any()  # the rest is read


@pytest.mark.parametrize("compression", ["zlib", "webp", "packbits"])
def test_tiles_that_vips_cannot_decode_are_an_error(compression: str, tmp_path: Path, tiffs: Any) -> None:
    """With fail_on="error" they are black."""
    need("vips")
    path = tiffs.write_plain(tmp_path / "a.tif", compression=compression)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[DAMAGED], tiff.pages[0].databytecounts[DAMAGED]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes([128]) * count
    path.write_bytes(data)
    with open_slide(as_slide(path), "vips") as reader, pytest.raises(SlideReadError, match="level 0 at"):
        reader.read_region((0, 0), 0, reader.dimensions)


def test_vips_reads_a_file_that_replaced_another(tmp_path: Path, tiffs: Any) -> None:
    """Its cache knows files by their names."""
    need("vips")
    path = tiffs.write_plain(tmp_path / "a.tif", compression="zlib")
    for value in (None, 7):
        if value is not None:
            tifffile.imwrite(
                path, np.full((300, 400, 3), value, np.uint8), tile=(64, 64), photometric="rgb", metadata=None
            )
        with open_slide(as_slide(path), "vips") as reader:
            pixels = reader.read_region((0, 0), 0, (64, 64))
    assert (pixels == 7).all()


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("vips", {"photometric": "ycbcr"}, "takes YCbCr"),
        ("vips", {"photometric": "cielab"}, "other colours"),
        ("openslide", {"photometric": "cielab"}, "other colours"),
        ("openslide", {"dtype": np.uint16}, "16 bits"),
        ("vips", {"dtype": np.uint16}, "16 bits"),
    ],
)
def test_pixels_that_a_library_changes_are_not_its(
    backend: str, options: dict[str, Any], message: str, tmp_path: Path, tiffs: Any
) -> None:
    need(backend)
    path = tmp_path / "a.tif"
    tiles = {"tile": (TILE, TILE), "compression": "zlib", "metadata": None}
    kind = options.get("dtype", np.uint8)
    photometric = options.get("photometric", "rgb")
    tifffile.imwrite(path, tiffs.picture().astype(kind), photometric=photometric, **tiles)
    with pytest.raises((BackendError, SlideOpenError), match=message):
        open_slide(as_slide(path), backend)


def test_auto_reads_deflate_with_a_predictor(tmp_path: Path, tiffs: Any) -> None:
    path = tmp_path / "predicted.tif"
    tiffs.write_plain(path, compression="zlib", predictor=True)
    with open_slide(as_slide(path)) as reader:
        assert reader.backend != "cucim"
        np.testing.assert_array_equal(reader.read_region((0, 0), 0, (400, 300)), tiffs.picture())


@pytest.mark.parametrize("backend", ["tiff", "cucim", "vips", "openslide"])
@pytest.mark.parametrize("compression", ["zlib", None])
def test_lossless_pixels(compression: str | None, backend: str, tmp_path: Path, tiffs: Any) -> None:
    need(backend)
    path = tmp_path / "plain.tif"
    tiffs.write_plain(path, compression=compression)
    with open_slide(as_slide(path), backend) as reader:
        np.testing.assert_array_equal(reader.read_region((0, 0), 0, (400, 300)), tiffs.picture())


@pytest.mark.parametrize("backend", ["tiff", "cucim", "vips", "openslide"])
def test_one_pixel_is_the_same_in_every_region(backend: str, jpeg_pyramid: Path) -> None:
    """Downsamples that are no whole number; OpenSlide alone would interpolate."""
    need(backend)
    with open_slide(as_slide(jpeg_pyramid), backend) as reader:
        assert [round(ds, 2) for ds in reader.downsamples] == [1.0, 4.04, 16.67]
        for level, (width, height) in enumerate(reader.level_dimensions):
            whole = reader.read_region((0, 0), level, (width, height))
            for start in range(0, 280, 13):
                x, y = (int(np.floor(at / reader.downsamples[level])) for at in (start, start // 2))
                region = reader.read_region((start, start // 2), level, (9, 7))
                clipped = whole[y : y + 7, x : x + 9]
                np.testing.assert_array_equal(region[: clipped.shape[0], : clipped.shape[1]], clipped)


@pytest.mark.parametrize("backend", JPEG_READERS)
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_truncated_files_are_refused(share: float, backend: str, jpeg_pyramid: Path, tmp_path: Path) -> None:
    need(backend)
    path = tmp_path / "cut.tif"
    whole = jpeg_pyramid.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SlideOpenError, match="truncated"):
        open_slide(as_slide(path), backend)


def test_what_is_no_slide(tmp_path: Path) -> None:
    empty, text, picture_file = tmp_path / "empty.svs", tmp_path / "text.svs", tmp_path / "a.png"
    empty.write_bytes(b"")
    text.write_text("this is no slide")
    picture_file.write_bytes(b"\x89PNG\r\n\x1a\n")
    for path, message in [
        (tmp_path / "missing.svs", "no file .*missing.svs"),
        (tmp_path, "is a directory"),
        (empty, "is empty"),
        (text, "no back end reads .*text.svs"),
        (picture_file, "PNG image, not a slide"),
    ]:
        with pytest.raises(SlideOpenError, match=message):
            open_slide(as_slide({"sample_id": "s", "image_path": path}))


def test_openslide_recovers_once_from_an_error(
    tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handles stay in error: reading on with one would open the file anew for every region."""
    path = tiffs.write_jpeg(tmp_path / "damaged.tif", [tiffs.picture()], zeros)
    opened: list[Path] = []
    open_handle = openslide.OpenSlide

    def counted(path: Path) -> openslide.OpenSlide:
        opened.append(path)
        return open_handle(path)

    with open_slide(as_slide(path), "openslide") as reader:
        with pytest.raises(SlideReadError):
            reader.read_region((200, 140), 0, (20, 20))
        monkeypatch.setattr(openslide, "OpenSlide", counted)
        for _ in range(5):
            reader.read_region((0, 0), 0, (100, 100))
    assert opened == []


OPEN_AT_ONCE = """
import sys, threading
from slide2vec.readers import open_slide
from slide2vec.slides import Slide
barrier = threading.Barrier(8)

def work():
    barrier.wait()
    open_slide(Slide(sample_id="s", image_path=sys.argv[1]), "cucim").close()

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_first_slides_opened_at_once(reference_slide: Path) -> None:
    """Without our lock cuCIM crashes one process in eight."""
    pytest.importorskip("cucim")
    for _ in range(10):
        ended = subprocess.run([sys.executable, "-c", OPEN_AT_ONCE, str(reference_slide)], timeout=60)
        assert ended.returncode == 0


@pytest.mark.parametrize("backend", ["auto", "tiff", "cucim", "vips", "openslide"])
@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"ImageLength": 128}, "400x128 px in tiles of 64x64, which are 14, and lists 35"),
        ({"TileWidth": 128}, "400x300 px in tiles of 128x64, which are 20, and lists 35"),
        ({"PhotometricInterpretation": 1}, "3 channels, and its colours are MINISBLACK, which is 1"),
        ({"SamplesPerPixel": 1}, "1 channels, and its colours are RGB, which are 3"),
    ],
)
def test_tags_that_contradict_each_other(
    tags: dict[str, int], message: str, backend: str, tmp_path: Path, tiffs: Any
) -> None:
    """Libraries take their pick of them, and most give other pixels without a word."""
    path = tiffs.write_plain(tmp_path / "contradictory.tif", mpp=0.5, compression="lzw")
    tiffs.set_tags(path, **tags)
    with pytest.raises(SlideOpenError, match=message):
        open_slide(as_slide(path), backend)


@pytest.mark.parametrize(
    "wrong", [np.zeros((64, 64, 4), np.uint8), ValueError("cannot reshape"), IndexError()]
)
def test_whatever_a_library_does_is_an_error_of_the_slide(
    wrong: Any, tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def library(*box: int) -> Any:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    with open_slide(as_slide(tiffs.write_plain(tmp_path / "plain.tif", mpp=0.5))) as reader:
        monkeypatch.setattr(reader, "_read_box", library)
        for place in ((0, 0), (-8, 200)):
            with pytest.raises(SlideReadError, match=r"slide plain: tiff cannot decode level 0"):
                reader.read_region(place, 0, (64, 64))


def test_without_the_decoder_that_notices_damage(
    tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """cuCIM, which gives wrong pixels for damage, is passed over; another one reads, and it is said."""
    path = tiffs.write_jpeg(tmp_path / "a.tif", [tiffs.picture()])
    with open_slide(as_slide(path), "openslide") as reader:
        expected = reader.read_region((0, 0), 0, (200, 200))
    for module in (recheck, codecs):
        find = module.find_spec
        monkeypatch.setattr(
            module, "find_spec", lambda name, f=find: None if name == "simplejpeg" else f(name)
        )
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with open_slide(as_slide(path)) as reader:
        assert reader.backend in ("vips", "openslide")
        if reader.backend == "openslide":
            np.testing.assert_array_equal(reader.read_region((0, 0), 0, (200, 200)), expected)
    assert "simplejpeg is not installed: pip install simplejpeg" in caplog.text
    if backends()["cucim"] is None:
        with pytest.raises(ExtraMissingError, match=r"cannot be checked for damage.*pip install simplejpeg"):
            open_slide(as_slide(path), "cucim")


def test_nothing_imports_the_decoder_before_it_is_used() -> None:
    hidden = "import sys; sys.modules['simplejpeg'] = None; "
    code = hidden + "import slide2vec.tiling.archives, slide2vec.readers.cucim"
    subprocess.run([sys.executable, "-c", code], check=True)
