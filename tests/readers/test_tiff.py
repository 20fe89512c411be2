"""Our own back end: every codec, channels and colours as they are stored, and damage in each."""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile

from slide2vec.errors import BackendError, ExtraMissingError, SlideReadError
from slide2vec.readers import backends, open_slide
from slide2vec.readers import codecs as codecs_module
from slide2vec.readers.reader import BufferedReader
from slide2vec.readers.tiff_tiles import _MOST_BYTES
from slide2vec.slides import as_slide

TILE, ACROSS = 64, 7
DAMAGED = 2 * ACROSS + 3  # at (192, 128)
#: Bits of alpha that libtiff and we round otherwise: it multiplies colours and OpenSlide divides them again.
ALPHA_ROUNDING = 2

#: TIFF compression -> what tifffile takes to write it; all but those below lossless.
CODECS: dict[str, dict[str, Any]] = {
    "none": {},
    "packbits": {"compression": "packbits"},
    "lzw": {"compression": "lzw"},
    "deflate": {"compression": "deflate"},
    "adobe-deflate": {"compression": "zlib"},
    "zstd": {"compression": "zstd"},
    "lzma": {"compression": "lzma"},
    "jpeg": {"compression": "jpeg"},
    "jpeg2000-34712": {"compression": "jpeg2000", "compressionargs": {"reversible": True, "level": 0}},
    "jpeg2000-33003": {"compression": 33003, "compressionargs": {"reversible": True, "level": 0}},
    "jpeg2000-33005": {"compression": 33005, "compressionargs": {"reversible": True, "level": 0}},
    "webp": {"compression": "webp", "compressionargs": {"lossless": True}},
    "png": {"compression": "png"},
    "jpegxl": {"compression": "jpegxl", "compressionargs": {"lossless": True}},
    "jpegxl-dng": {"compression": 52546, "compressionargs": {"lossless": True}},
    "jpegxr": {"compression": "jpegxr"},
    "lerc": {"compression": "lerc", "compressionargs": {"level": 0}},
}
LOSSY = {"jpeg"}
#: What notices that the second half of a tile is zeros.
NOTICE_ZEROS = set(CODECS) - {"none", "webp", "jpegxr"}
#: What notices any flipped bit, by a checksum or by its structure.
NOTICE_BITS = {"deflate", "adobe-deflate", "lzma", "png", "lerc"}


def write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    options = {"photometric": "rgb", "tile": (TILE, TILE), "metadata": None} | options
    tifffile.imwrite(path, pixels, **{name: value for name, value in options.items() if value is not None})
    return path


def read(path: Path) -> np.ndarray:
    with open_slide(as_slide(path), "tiff") as reader:
        return np.asarray(reader.read_region((0, 0), 0, reader.dimensions))


def place_of(path: Path, tile: int) -> tuple[int, int]:
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        return page.dataoffsets[tile], page.databytecounts[tile]


def change(path: Path, tile: int, damage: Callable[[bytearray], None]) -> None:
    start, size = place_of(path, tile)
    data = bytearray(path.read_bytes())
    part = data[start : start + size]
    damage(part)
    assert len(part) == size
    path.write_bytes(data[:start] + part + data[start + size :])


def all_zeros(part: bytearray) -> None:
    part[:] = bytes(len(part))


def half_zeros(part: bytearray) -> None:
    part[len(part) // 2 :] = bytes(len(part) - len(part) // 2)


def one_bit(part: bytearray) -> None:
    part[len(part) * 3 // 5] ^= 4


def raises_there_alone(path: Path, expected: np.ndarray) -> None:
    with open_slide(as_slide(path), "tiff") as reader:
        for location, size in [((0, 0), (400, 300)), ((200, 140), (1, 1))]:
            with pytest.raises(
                SlideReadError, match=r"slide a: tiff .* level 0 at \(192, 128\).*damaged .*a\.tif"
            ):
                reader.read_region(location, 0, size)
        top = reader.read_region((0, 0), 0, (400, 2 * TILE))
        np.testing.assert_array_equal(top, expected[: 2 * TILE])


@pytest.mark.parametrize("codec", CODECS)
def test_pixels_of_every_codec(codec: str, tmp_path: Path, tiffs: Any) -> None:
    path = write(tmp_path / "a.tif", tiffs.picture(), **CODECS[codec])
    found = read(path)
    np.testing.assert_array_equal(found, tifffile.imread(path))
    if codec not in LOSSY:
        np.testing.assert_array_equal(found, tiffs.picture())


@pytest.mark.parametrize("codec", CODECS)
def test_damage_that_a_codec_notices(codec: str, tmp_path: Path, tiffs: Any) -> None:
    """What each does not is in docs/formats.md."""
    path = write(tmp_path / "a.tif", tiffs.picture(), **CODECS[codec])
    sound, whole = path.read_bytes(), read(path)
    damages = [all_zeros] if codec != "none" else []
    damages += [half_zeros] if codec in NOTICE_ZEROS else []
    damages += [one_bit] if codec in NOTICE_BITS else []
    for damage in damages:
        path.write_bytes(sound)
        change(path, DAMAGED, damage)
        raises_there_alone(path, whole)


@pytest.mark.parametrize("codec", sorted(set(CODECS) - {"jpegxr"}))
def test_too_few_bytes(codec: str, tmp_path: Path, tiffs: Any) -> None:
    path = write(tmp_path / "a.tif", tiffs.picture(), **CODECS[codec])
    whole = read(path)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        tag.overwrite([n * 3 // 5 if i == DAMAGED else n for i, n in enumerate(tag.value)])
    raises_there_alone(path, whole)


@pytest.mark.parametrize("codec", ["lzw", "adobe-deflate", "zstd", "lzma", "packbits"])
def test_pixels_of_another_size(codec: str, tmp_path: Path, tiffs: Any) -> None:
    """A row more or less is damage, too; a length that a tile claims is not believed."""
    path = write(tmp_path / "a.tif", tiffs.picture(), **CODECS[codec])
    whole, (start, size) = read(path), place_of(path, DAMAGED)
    name = {"adobe-deflate": "zlib"}.get(codec, codec)
    for rows in (1, TILE - 1, 2 * TILE):
        other = getattr(imagecodecs, f"{name}_encode")(np.zeros((rows, TILE, 3), np.uint8))
        if len(other) <= size:
            data = path.read_bytes()
            path.write_bytes(data[:start] + other + bytes(size - len(other)) + data[start + size :])
            raises_there_alone(path, whole)


def test_pieces_of_jpeg_that_are_damaged_by_the_byte(tmp_path: Path, tiffs: Any) -> None:
    """Nothing of what libjpeg warns of becomes pixels; of what it does not, no more can be said."""
    path = write(tmp_path / "a.tif", tiffs.picture(), compression="jpeg")
    sound, (start, size) = path.read_bytes(), place_of(path, DAMAGED)
    with tifffile.TiffFile(path) as tiff:
        tables = tiff.pages[0].jpegtables
    rng, raised = np.random.default_rng(0), 0
    for at in rng.integers(4, size, 60).tolist():
        data = bytearray(sound)
        data[start + at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        tile = bytes(data[start : start + size])
        try:
            expected = simplejpeg.decode_jpeg(tables[:-2] + tile[2:] if tables else tile, strict=True)
        except ValueError:
            expected, raised = None, raised + 1
        with open_slide(as_slide(path), "tiff") as reader:
            if expected is None or expected.shape != (TILE, TILE, 3):
                with pytest.raises(SlideReadError):
                    reader.read_region((192, 128), 0, (TILE, TILE))
            else:
                np.testing.assert_array_equal(reader.read_region((192, 128), 0, (TILE, TILE)), expected)
    assert raised > 5


@pytest.mark.parametrize("codec", ["none", "lzw", "adobe-deflate", "zstd", "lzma"])
@pytest.mark.parametrize("planar", [False, True])
def test_predictors(planar: bool, codec: str, tmp_path: Path, tiffs: Any) -> None:
    """2 by differences; 1 written out, which crashes cuCIM."""
    pixels = tiffs.picture()
    shape = {"planarconfig": "separate" if planar else "contig"}
    stored = np.moveaxis(pixels, 2, 0) if planar else pixels
    if codec != "none":
        path = write(tmp_path / "two.tif", stored, predictor=True, **shape, **CODECS[codec])
        np.testing.assert_array_equal(read(path), pixels)
    path = write(tmp_path / "one.tif", stored, extratags=[(317, 3, 1, 1, True)], **shape, **CODECS[codec])
    np.testing.assert_array_equal(read(path), pixels)


@pytest.mark.parametrize("codec", ["none", "lzw", "jpeg", "jpeg2000-34712", "webp", "png"])
def test_planar_and_sparse(codec: str, tmp_path: Path, tiffs: Any) -> None:
    pixels = tiffs.picture()
    if codec != "webp":  # which has no image of one channel
        path = write(tmp_path / "a.tif", np.moveaxis(pixels, 2, 0), planarconfig="separate", **CODECS[codec])
        found = read(path)
        np.testing.assert_array_equal(found, np.moveaxis(tifffile.imread(path), 0, 2))
        change(path, 35 + DAMAGED, all_zeros if codec != "none" else lambda part: None)
        if codec != "none":
            raises_there_alone(path, found)
    path = write(tmp_path / "b.tif", pixels, **CODECS[codec])
    whole = read(path)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        tag.overwrite([0 if i == DAMAGED else n for i, n in enumerate(tag.value)])
    whole[128:192, 192:256] = 255
    np.testing.assert_array_equal(read(path), whole)


@pytest.mark.parametrize("codec", ["none", "lzw", "adobe-deflate", "jpeg", "zstd"])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_strips(rows: int, codec: str, tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many or one; raw ones are read by their rows, others in steps of bounded memory."""
    monkeypatch.setattr("slide2vec.readers.tiff_tiles._RAW_STRIP", 10_000)
    monkeypatch.setattr("slide2vec.readers.tile_assembly.STEP_BYTES", 50_000)
    if codec == "jpeg":
        rows = -(-rows // 8) * 8  # as the format asks for
    path = write(tmp_path / "a.tif", tiffs.picture(), tile=None, rowsperstrip=rows, **CODECS[codec])
    found = read(path)
    np.testing.assert_array_equal(found, tifffile.imread(path))
    with open_slide(as_slide(path), "tiff") as reader:
        np.testing.assert_array_equal(reader.read_region((33, 41), 0, (200, 100)), found[41:141, 33:233])


def test_raw_strips_are_cut_into_pieces_of_one_height(
    tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two strips of 150 rows 80, 70, 80 and 70 would be as many pieces as 300 rows have of 80."""
    monkeypatch.setattr("slide2vec.readers.tiff_tiles._RAW_STRIP", 80 * 400 * 3)
    path = write(tmp_path / "a.tif", tiffs.picture(), tile=None, rowsperstrip=150)
    np.testing.assert_array_equal(read(path), tifffile.imread(path))


def test_raw_strips_that_are_short_or_left_out(
    tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies behind a strip is not taken for its rows."""
    monkeypatch.setattr("slide2vec.readers.tiff_tiles._RAW_STRIP", 50 * 400 * 3)
    path = write(tmp_path / "a.tif", tiffs.picture(), tile=None, rowsperstrip=100)
    whole = tifffile.imread(path)
    for size in (0, 100 * 400 * 3 - 5000):
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tag = tiff.pages[0].tags["StripByteCounts"]
            tag.overwrite([tag.value[0], size, tag.value[2]])
        with open_slide(as_slide(path), "tiff") as reader:
            np.testing.assert_array_equal(reader.read_region((0, 200), 0, (400, 100)), whole[200:])
            if size:
                with pytest.raises(SlideReadError, match="damaged NONE tile"):
                    reader.read_region((0, 100), 0, (400, 100))
            else:
                assert (reader.read_region((0, 100), 0, (400, 100)) == 255).all()


def test_a_strip_that_would_fill_the_memory_is_refused(
    tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", tiffs.picture(), tile=None, rowsperstrip=300, compression="zlib")
    monkeypatch.setattr("slide2vec.readers.tiff_tiles._MOST_BYTES", 300 * 400 * 3 - 1)
    with pytest.raises(BackendError, match="strips of 0 MB"):
        open_slide(as_slide(path), "tiff")
    assert _MOST_BYTES <= 256 << 20


@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("codec", ["zlib", "webp", "png"])
def test_opacity_over_white(codec: str, extra: str, tmp_path: Path, tiffs: Any) -> None:
    pixels = tiffs.picture()
    alpha = np.broadcast_to(np.linspace(0, 255, 400).astype(np.uint8), (300, 400))
    if extra != "unassalpha":
        pixels = (pixels.astype(int) * alpha[..., None] // 255).astype(np.uint8)
    stored = np.dstack([pixels, alpha])
    args = {"compressionargs": {"lossless": True}} if codec == "webp" else {}
    path = write(tmp_path / "a.tif", stored, extrasamples=[extra], compression=codec, **args)
    kept = tifffile.imread(path).astype(int)
    colours, opacity = kept[..., :3], kept[..., 3:] / 255
    expected = colours * opacity if extra == "unassalpha" else colours
    expected = np.minimum(expected + 255 * (1 - opacity), 255)
    assert np.abs(read(path) - expected).max() <= 1
    if codec == "zlib":
        with openslide.OpenSlide(path) as slide:
            rgba = np.asarray(slide.read_region((0, 0), 0, slide.dimensions)).astype(float)
        theirs = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
        assert np.abs(read(path) - theirs).max() <= ALPHA_ROUNDING


@pytest.mark.parametrize("codec", ["none", "jpeg", "png", "jpeg2000-34712"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey(photometric: str, codec: str, tmp_path: Path, tiffs: Any) -> None:
    path = write(tmp_path / "a.tif", tiffs.picture()[..., 0], photometric=photometric, **CODECS[codec])
    stored = tifffile.imread(path)
    expected = stored if photometric == "minisblack" else 255 - stored
    np.testing.assert_array_equal(read(path), np.repeat(expected[..., None], 3, axis=2))


def test_palette(tmp_path: Path, tiffs: Any) -> None:
    table = np.random.default_rng(0).integers(0, 2**16, (3, 256)).astype(np.uint16)
    index = tiffs.picture()[..., 0]
    path = write(tmp_path / "a.tif", index, photometric="palette", colormap=table, compression="zlib")
    np.testing.assert_array_equal(read(path), np.moveaxis(table[:, index] >> 8, 0, 2))


def test_ycbcr_without_jpeg(tmp_path: Path, tiffs: Any) -> None:
    """Without subsampling; against libtiff, which rounds otherwise by a grey level."""
    path = write(tmp_path / "a.tif", tiffs.picture(), compression="zlib")
    tiffs.set_tags(path, PhotometricInterpretation=6)
    with pytest.raises(BackendError, match="fewer pixels"):  # the tag's default
        open_slide(as_slide(path), "tiff")
    path = write(
        tmp_path / "b.tif", tiffs.picture(), compression="zlib", extratags=[(530, 3, 2, (1, 1), True)]
    )
    tiffs.set_tags(path, PhotometricInterpretation=6)
    with openslide.OpenSlide(path) as slide:
        theirs = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3].astype(int)
    assert np.abs(read(path) - theirs).max() <= 1


def test_bits_in_reverse(tmp_path: Path, tiffs: Any) -> None:
    path = write(tmp_path / "a.tif", tiffs.picture(), extratags=[(65000, 3, 1, 2, True)])
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<HHI", 65000, 3, 1), struct.pack("<HHI", 266, 3, 1)))
    expected = imagecodecs.bitorder_decode(np.ascontiguousarray(tiffs.picture()))
    np.testing.assert_array_equal(read(path), expected)


def test_a_huge_claim_of_a_jpeg_header_takes_no_memory(tmp_path: Path, tiffs: Any) -> None:
    def claims(part: bytearray) -> None:
        start = part.index(b"\xff\xc0")
        part[start + 5 : start + 9] = struct.pack(">HH", 65_000, 65_000)

    path = write(tmp_path / "a.tif", tiffs.picture(), compression="jpeg")
    whole = read(path)
    change(path, DAMAGED, claims)
    raises_there_alone(path, whole)


@pytest.mark.parametrize("name", ["jpeg_entropy_cucim.svs", "jpeg_strip_vips.tiff", "webp_black_vips.tiff"])
def test_damaged_files(name: str, broken_dir: Path) -> None:
    with open_slide(as_slide(broken_dir / name), "tiff") as reader:
        with pytest.raises(SlideReadError, match=r"tiff cannot decode level 0 at \(\d+, \d+\).*damaged"):
            reader.read_region((0, 0), 0, reader.dimensions)
        assert reader.read_region((0, 0), 0, (200, 200)).min() > 100  # glass, of tiles that are sound


@pytest.mark.parametrize(
    "name", ["gdal-deflate.tif", "gdal-zstd.tif", "cmu-tifffile-jpeg2000-34712.tif", "yb10kx5k.zstd.tiff"]
)
def test_real_dialects(name: str, dialects_dir: Path) -> None:
    with open_slide(as_slide(dialects_dir / name)) as reader:
        assert reader.backend == "tiff"
        for level, size in list(enumerate(reader.level_dimensions))[-2:]:
            expected = tifffile.imread(dialects_dir / name, series=0, level=level)
            if size[0] < 4000:
                np.testing.assert_array_equal(reader.read_region((0, 0), level, size), expected)


@pytest.mark.parametrize("missing", ["simplejpeg", "imagecodecs"])
def test_without_its_libraries(
    missing: str, tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", tiffs.picture(), compression="lzw")
    find = codecs_module.find_spec
    monkeypatch.setattr(codecs_module, "find_spec", lambda name: None if name == missing else find(name))
    assert f"{missing} not installed: pip install" in str(backends()["tiff"])
    with pytest.raises(ExtraMissingError, match=f"{missing} not installed: pip install"):
        open_slide(as_slide(path), "tiff")
    with open_slide(as_slide(path)) as reader:
        assert reader.backend != "tiff"


def test_a_codec_that_imagecodecs_was_built_without(
    tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", tiffs.picture(), compression="zstd")

    class Without(ModuleType):
        class ZSTD:
            available = False

    real = import_module
    monkeypatch.setattr(
        codecs_module,
        "import_module",
        lambda name: Without(name) if name == "imagecodecs" else real(name),
    )
    with pytest.raises(BackendError, match="ZSTD tiles, for which imagecodecs has no decoder here"):
        open_slide(as_slide(path), "tiff")


@pytest.mark.parametrize("start", [(0, 0), (1, 3), (-7, 2), (61, -5)])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 7])
def test_averaged_while_decoding(ratio: int, start: tuple[int, int], tmp_path: Path, tiffs: Any) -> None:
    """The pixels of the whole region averaged afterwards, whoever decoded tiles that boxes share, where
    cells reach over the edges of compressed tiles and of the level."""
    pixels = np.random.default_rng(0).integers(0, 256, (299, 401, 3), np.uint8)
    path = write(tmp_path / "a.tif", pixels, compression="zlib")
    side, beyond = 84, 100
    white = np.pad(pixels, ((beyond, beyond), (beyond, beyond), (0, 0)), constant_values=255)
    boxes = [(x, y) for x in range(start[0], 401, side) for y in range(start[1], 299, side)]
    for threads in (1, 4):
        with open_slide(as_slide(path), "tiff") as reader, ThreadPoolExecutor(threads) as pool:
            assert isinstance(reader, BufferedReader)

            def read_into(at: tuple[int, int], reader: BufferedReader = reader) -> np.ndarray | None:
                memory = np.zeros(31_000, np.uint8)
                found = reader.read_into(memory, at, 0, (side, side), ratio)
                assert found is not None and np.shares_memory(found, memory)
                return found

            for (x, y), found in zip(boxes, pool.map(read_into, boxes), strict=True):
                expected = white[y + beyond : y + beyond + side, x + beyond : x + beyond + side]
                if ratio > 1:
                    size = side // ratio, side // ratio
                    expected = cv2.resize(expected, size, interpolation=cv2.INTER_AREA)
                np.testing.assert_array_equal(found, expected)
            assert reader.read_into(np.zeros(31_000, np.uint8), (401, 0), 0, (side, side), ratio) is None


@pytest.mark.parametrize("ratio", [1, 2])
def test_tiles_under_none_of_the_squares_are_not_decoded(ratio: int, tmp_path: Path, tiffs: Any) -> None:
    """Neither paid for nor judged; squares have their pixels all the same, at the edge, too."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    path = write(tmp_path / "a.tif", pixels, compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        where = tiff.pages[0].dataoffsets[DAMAGED]
        tiff.filehandle.seek(where)
        tiff.filehandle.write(bytes(64))
    corner, size = (100, 100), (330, 220)
    corners = np.array(
        [[0, 0], [156, 0], [250, 140], [2, 140]]
    )  # the damaged tile has x 92 to 156, y 28 to 92
    with open_slide(as_slide(path), "tiff") as reader:
        assert isinstance(reader, BufferedReader)
        memory = np.zeros(220 * 330 * 3, np.uint8)
        found = reader.read_into(memory, corner, 0, size, ratio, (corners, 80))
        assert found is not None
        for x, y in corners.tolist():
            expected = reader.read_region((100 + x, 100 + y), 0, (80, 80))
            side = 80 // ratio
            if ratio > 1:
                expected = cv2.resize(expected, (side, side), interpolation=cv2.INTER_AREA)
            x, y = x // ratio, y // ratio
            np.testing.assert_array_equal(found[y : y + side, x : x + side], expected)
        for touching in ([13, 0], [155, 0], [100, 91]):
            with pytest.raises(SlideReadError, match="damaged"):
                reader.read_into(memory, corner, 0, size, ratio, (np.array([touching]), 80))


def test_memory_of_tiles_is_one_that_decoders_write_through_the_cache() -> None:
    """At a multiple of 16 or 32 bytes libjpeg-turbo writes past it."""
    for shape in ((256, 256), (240, 240, 3), (64, 64, 1)):
        memory = codecs_module.tile_memory(*shape)
        assert memory.shape == (*shape, 3)[:3] and memory.flags.c_contiguous
        assert memory.ctypes.data % 16


def test_memory_of_supertiles_holds_nothing_of_the_one_before(tmp_path: Path, tiffs: Any) -> None:
    """Sparse tiles are white in memory that is used again, too."""
    pixels = np.zeros((300, 400, 3), np.uint8)
    path = write(tmp_path / "a.tif", pixels, compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        tag.overwrite([0 if i == DAMAGED else n for i, n in enumerate(tag.value)])
    with open_slide(as_slide(path), "tiff") as reader:
        assert isinstance(reader, BufferedReader)
        memory = np.full(31_000, 77, np.uint8)
        found = reader.read_into(memory, (150, 100), 0, (100, 100), 1)
    expected = pixels[100:200, 150:250].copy()
    expected[28:92, 42:100] = 255
    np.testing.assert_array_equal(found, expected)


def test_whatever_a_library_raises_is_an_error_of_the_slide(
    tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the pixels are asked for: a tile can be left out, and the message names slide and place."""
    path = write(tmp_path / "a.tif", np.zeros((300, 400, 3), np.uint8), compression="zlib")

    def broken(*_: Any) -> Any:
        raise IndexError("list index out of range")

    with open_slide(as_slide(path), "tiff") as reader:
        assert isinstance(reader, BufferedReader)
        monkeypatch.setattr("slide2vec.readers.decoders.decode_tile", broken)
        message = r"slide a: tiff cannot decode level 0 at \(0, 0\).*out of range"
        with pytest.raises(SlideReadError, match=message):
            reader.read_region((0, 0), 0, (100, 100))
        with pytest.raises(SlideReadError, match=message):
            reader.read_into(np.zeros(31_000, np.uint8), (0, 0), 0, (100, 100), 1)
