"""Headers that claim what the file cannot hold: one error, before any library has seen them."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from slide2vec.errors import SlideOpenError
from slide2vec.readers import open_slide
from slide2vec.readers.tiff_bounds import check_bounds
from slide2vec.slides import as_slide

#: Of a classic TIFF: ImageWidth and so on, each with the value's place in its entry.
COUNT, VALUE = 4, 8


def directory(data: bytearray, number: int = 0) -> int:
    """Where a directory of a classic little-endian TIFF is."""
    at = 4
    for _ in range(number + 1):
        start = struct.unpack_from("<I", data, at)[0]
        at = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    return int(start)


def change(tag: int, value: int, field: int = VALUE) -> Callable[[bytearray], None]:
    """Sets the value (place, count) of a tag of directory 0."""

    def damage(data: bytearray) -> None:
        start = directory(data)
        for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
            if struct.unpack_from("<H", data, entry)[0] == tag:
                if field == VALUE:
                    struct.pack_into("<H", data, entry + 2, 4)  # LONG
                struct.pack_into("<I", data, entry + field, value)
                return
        raise AssertionError(f"no tag {tag}")

    return damage


def first_directory(at: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<I", data, 4, at)


def circle(data: bytearray) -> None:
    start = directory(data, 1)
    after = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    struct.pack_into("<I", data, after, directory(data, 0))


def many_tags(data: bytearray) -> None:
    struct.pack_into("<H", data, directory(data), 0xFFFF)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (first_directory(1 << 31), r"directory 0 lies at byte 2147483648 of \d+"),
        (first_directory(0), "holds no image directory"),
        (circle, "directory 2 is at byte .* form a circle"),
        (many_tags, "directory 0 claims 65535 tags"),
        (change(256, 0), "claims 0x300 px"),
        (change(256, 1 << 31), "claims 2147483648x300 px"),
        (change(256, 1 << 20), "in tiles of 64x64, which are 81920, and lists 35 of them"),
        (change(257, 1 << 16), "400x65536 px in tiles of 64x64, which are 7168, and lists 35 of them"),
        (change(322, 0), "claims tiles of 0x64"),
        (change(323, 1 << 25), "each of which decodes to 6442450944 bytes"),
        (change(322, 32), "in tiles of 32x64, which are 65, and lists 35 of them"),
        (change(324, 1 << 29, COUNT), "claims 2147483648 bytes of tag 324"),
        (change(324, 1 << 31), "bytes of tag 324 at byte 2147483648"),
        (change(325, 20_000, COUNT), "lists 20000 of them"),
        (change(270, 1 << 31, COUNT), "claims 2147483648 bytes of tag 270"),
    ],
)
def test_claims_beyond_the_file(
    damage: Callable[[bytearray], None], message: str, tmp_path: Path, tiffs: Any
) -> None:
    path = tmp_path / "claims.tif"
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 2):
            tiff.write(
                tiffs.picture()[::step, ::step],
                tile=(64, 64),
                photometric="rgb",
                compression="zlib",
                description="some text",
                metadata=None,
                subfiletype=step - 1,
            )
        tiff.filehandle.seek(0, 2)
        tiff.filehandle.write(bytes(100_000))
    assert [found.name for found in check_bounds(path)] == ["directory 0", "directory 1"]
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(SlideOpenError, match=rf"slide claims: .*malformed or truncated TIFF: .*{message}"):
        open_slide(as_slide(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("f1-363-crash-ifd_bytes.tif", "tiles of 256x33554688, each of which decodes to 25770000384 bytes"),
        ("f2-1227-hang-huge_dims.svs", "1048576x1024 px in tiles of 256x256, which are 16384, and lists 16"),
    ],
)
def test_real_claims(name: str, message: str, broken_dir: Path) -> None:
    with pytest.raises(SlideOpenError, match=message):
        open_slide(as_slide(broken_dir / name))


#: ru_maxrss of a process itself begins with what the process that started it had.
_OPEN = """
import re, resource, sys
from pathlib import Path
from slide2vec.errors import SlideOpenError
from slide2vec.readers import open_slide
from slide2vec.slides import as_slide
try:
    open_slide(as_slide(sys.argv[1]))
except SlideOpenError:
    own = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


@pytest.mark.parametrize("name", ["f1-363-crash-ifd_bytes.tif", "f2-1227-hang-huge_dims.svs"])
def test_damaged_headers_take_no_memory(name: str, broken_dir: Path) -> None:
    """Below 1 GB, libraries included; OpenSlide asks for terabytes, and planning for minutes."""
    if not (broken_dir / name).is_file():
        pytest.skip(f"no {broken_dir / name}")
    if not Path("/proc/self/status").is_file():
        pytest.skip("memory is read from /proc, which only Linux has")
    command = [sys.executable, "-c", _OPEN, str(broken_dir / name)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert 0 < int(found) * 1024 < 1_000_000_000


def test_a_strip_that_claims_too_much(tmp_path: Path) -> None:
    """One strip, as in NDPI files: its bytes bound its pixels."""
    path = tmp_path / "strip.tif"
    tifffile.imwrite(
        path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", compression="zlib", metadata=None
    )
    data = bytearray(path.read_bytes())
    change(257, 1 << 21)(data)
    change(278, 1 << 21)(data)
    path.write_bytes(data)
    with pytest.raises(
        SlideOpenError, match="64x2097152 px in strips of 64x2097152, each of which decodes to"
    ):
        open_slide(as_slide(path))


def test_honest_files_pass(slides_dir: Path, dialects_dir: Path) -> None:
    counts = {path.name: len(check_bounds(path)) for path in sorted(slides_dir.glob("*.*if*"))}
    counts |= {path.name: len(check_bounds(path)) for path in sorted(dialects_dir.glob("*.tif*"))}
    assert len(counts) > 15
    assert counts["generic-pyramid.ome.tiff"] == 3  # two of them below the first
    assert counts["generic-jpeg-bigtiff-pyramid.tiff"] == 3
    assert counts["rasterio-cogeo.tif"] == 14
    assert len(check_bounds(slides_dir / "fluorescence-dapi.ndpi")) == 6


def test_a_sparse_slide_passes(tmp_path: Path) -> None:
    """82,000 px a side, of which one tile is stored."""
    path = tmp_path / "sparse.tif"
    side, tile = 82_000, 512
    tiles = (side // tile + 1) ** 2
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter([b"\0"] + [b""] * (tiles - 1)),
            shape=(side, side, 3),
            dtype=np.uint8,
            tile=(tile, tile),
            photometric="rgb",
            compression="zlib",
            metadata=None,
        )
    assert path.stat().st_size < 500_000
    assert len(check_bounds(path)) == 1
