"""Tile archives: round trips against Pillow and tarfile, HS2P's files, and archives nobody should trust."""

from __future__ import annotations

import csv
import gzip
import io
import os
import shutil
import struct
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin
from tiling_helpers import ArrayReader, a_slide, blank, settings

from slide2vec.errors import ExtraMissingError, OutputError, SlideReadError, TilingError
from slide2vec.tiling import Tiling, archives, tile_slide
from slide2vec.tiling.archives import TileArchive, archive_paths, find_archive, tile_number, write_archive

Pixels = NDArray[np.uint8]

SIDE = 40
#: Of the generated tiles: smooth, but 4:2:0 halves their colours, and quality 90 quantises.
MEAN_JPEG_ERROR = 3.0
#: What opening an archive may allocate, whatever its headers say.
MOST_BYTES = 1 << 20


@pytest.fixture(scope="module")
def tiling() -> Tiling:
    """24 tiles of 40 px."""
    slide = ArrayReader([blank(400, 300, (40, 40, 240, 160))])
    config = settings(requested_tile_size_px=SIDE)
    return tile_slide(slide, a_slide(spacing_at_level_0=0.5), 0.5, config)[0]


@pytest.fixture(scope="module")
def tiles(tiling: Tiling) -> Pixels:
    """(N, S, S, 3) uint8, smooth and all different."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (len(tiling), 4, 4, 3), np.uint8)
    large = [cv2.resize(tile, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for tile in coarse]
    return np.stack(large).astype(np.uint8)


def first(tiling: Tiling, count: int) -> Tiling:
    arrays = ("x", "y", "tissue_fractions")
    return replace(tiling, **{name: getattr(tiling, name)[:count] for name in arrays})


def shuffled(pixels: Pixels, sizes: int = 5) -> Iterator[archives.Block]:
    order = np.random.default_rng(1).permutation(len(pixels))
    for start in range(0, len(order), sizes):
        chosen = order[start : start + sizes]
        yield chosen, pixels[chosen]


def jpeg_of(image: Pixels | Image.Image, **options: Any) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def decoded(jpeg: bytes) -> Pixels:
    """By Pillow, the reference."""
    with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB"))


def read_all(archive: TileArchive) -> Pixels:
    """(N, S, S, 3) uint8 tiles by tile index."""
    pixels = np.zeros((len(archive.members), SIDE, SIDE, 3), np.uint8)
    for number, block in enumerate(archive.blocks):
        archive.place(number, archive.fetch(number), [pixels[tile] for tile in block])
    return pixels


def make_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT, **headers: Any) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in headers.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def jpegs(tiles: Pixels, name: str = "{:06d}.jpg") -> dict[str, bytes]:
    return {name.format(number): jpeg_of(tile) for number, tile in enumerate(tiles)}


# writing ------------------------------------------------------------------------------------------


def test_round_trip(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    path = write_archive(tmp_path, tiling, shuffled(tiles))
    assert path == archive_paths(tmp_path, "s")[0] == find_archive(tmp_path, "s")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tiles.manifest.csv", "s.tiles.tar"]
    with tarfile.open(path, "r:") as tar:
        stored = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        meta = {(i.type, i.mtime, i.uid, i.gid, i.mode, i.uname) for i in tar.getmembers()}
    assert meta == {(tarfile.REGTYPE, 0, 0, 0, 0o644, "")}
    assert sorted(stored) == [f"{number:06d}.jpg" for number in range(len(tiling))]
    with TileArchive(path, tiling, block=7) as archive:
        pixels = read_all(archive)
        again = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
        archive.read_tile(5, again[:, SIDE:])  # not contiguous
    np.testing.assert_array_equal(pixels, [decoded(stored[name]) for name in sorted(stored)])
    np.testing.assert_array_equal(again[:, SIDE:], pixels[5])
    assert not again[:, :SIDE].any()
    assert np.abs(pixels.astype(int) - tiles).mean() < MEAN_JPEG_ERROR


def test_tiles_are_jpegs_as_pillow_writes_them(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    with tarfile.open(write_archive(tmp_path, tiling, shuffled(tiles))) as tar:
        file = tar.extractfile("000003.jpg")
        assert file is not None
        ours, theirs = Image.open(file), Image.open(io.BytesIO(jpeg_of(tiles[3])))
        assert ours.quantization == theirs.quantization  # type: ignore[attr-defined]
        assert JpegImagePlugin.get_sampling(ours) == JpegImagePlugin.get_sampling(theirs) == 2  # 4:2:0


def test_the_same_tiles_give_the_same_bytes(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    first = write_archive(tmp_path / "a", tiling, shuffled(tiles))
    second = write_archive(tmp_path / "b", tiling, shuffled(tiles))
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size % tarfile.RECORDSIZE == 0


def test_manifest(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    write_archive(tmp_path, tiling, shuffled(tiles))
    with archive_paths(tmp_path, "s")[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["tile_index"]) for row in rows] == list(range(len(tiling)))
    assert [(int(row["x"]), int(row["y"])) for row in rows] == list(
        zip(tiling.x.tolist(), tiling.y.tolist(), strict=True)
    )


def test_a_slide_without_tiles(tiling: Tiling, tmp_path: Path) -> None:
    none = first(tiling, 0)
    path = write_archive(tmp_path, none, [])
    assert archive_paths(tmp_path, "s")[1].read_text() == "tile_index,x,y\n"
    with tarfile.open(path) as tar:
        assert tar.getmembers() == []
    with TileArchive(path, none) as archive:
        assert archive.blocks == ()


@pytest.mark.parametrize("blocks", ["missing", "twice", "unknown", "small", "float"])
def test_wrong_blocks_leave_the_old_archive(
    blocks: str, tiling: Tiling, tiles: Pixels, tmp_path: Path
) -> None:
    path = write_archive(tmp_path, tiling, shuffled(tiles))
    before = path.read_bytes()
    everything = np.arange(len(tiles))
    wrong: dict[str, list[Any]] = {
        "missing": [(everything[1:], tiles[1:])],
        "twice": [(everything, tiles), (everything[:1], tiles[:1])],
        "unknown": [(everything + 1, tiles)],
        "small": [(everything, tiles[:, 1:])],
        "float": [(everything, tiles.astype(np.float32))],
    }
    with pytest.raises(TilingError, match=r"^slide s: "):
        write_archive(tmp_path, tiling, wrong[blocks])
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tiles.manifest.csv", "s.tiles.tar"]


def test_a_manifest_means_a_complete_archive(
    tiling: Tiling, tiles: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path, tiling, shuffled(tiles))
    real = archives.atomic_path

    @contextmanager
    def full_disk(path: Path) -> Iterator[Path]:
        if path.suffix == ".csv":
            raise OutputError("the disk is full")
        with real(path) as temporary:
            yield temporary

    monkeypatch.setattr(archives, "atomic_path", full_disk)
    with pytest.raises(OutputError):
        write_archive(tmp_path, tiling, shuffled(255 - tiles))
    assert [file.name for file in tmp_path.iterdir()] == ["s.tiles.tar"]


# reading ------------------------------------------------------------------------------------------


def test_blocks_follow_the_file(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    with TileArchive(write_archive(tmp_path, tiling, shuffled(tiles)), tiling, block=9) as archive:
        assert [len(block) for block in archive.blocks] == [9, 9, 6]
        order = np.concatenate([block for block, _ in shuffled(tiles)])
        np.testing.assert_array_equal(np.concatenate(archive.blocks), order)
        assert archive.backend == "archive"


def test_an_archive_of_hs2p(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    """In supertile order, quality 90 by Pillow, rows of the manifest in the same order, CRLF."""
    path, manifest = archive_paths(tmp_path, "s")
    order = np.random.default_rng(3).permutation(len(tiles)).tolist()
    make_tar(path, {f"{tile:06d}.jpg": jpeg_of(tiles[tile]) for tile in order}, tarfile.DEFAULT_FORMAT)
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["tile_index", "x", "y"])
        writer.writeheader()
        for tile in order:
            writer.writerow({"tile_index": tile, "x": int(tiling.x[tile]), "y": int(tiling.y[tile])})
    with TileArchive(path, tiling) as archive:
        assert np.concatenate(archive.blocks).tolist() == order
        np.testing.assert_array_equal(read_all(archive), [decoded(jpeg_of(tile)) for tile in tiles])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["{:06d}.jpg", "./{:06d}.jpeg", "{}.jpg"])
def test_ordinary_tars(form: int, name: str, tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    records = {"LIBARCHIVE.xattr.user.note": "x" * 300, "mtime": "1700000000.5"}
    extra = {"pax_headers": records} if form == tarfile.PAX_FORMAT else {}
    path = make_tar(
        tmp_path / "a.tar", jpegs(tiles, name), form, mtime=1700000000, uid=1000, uname="müller", **extra
    )
    with TileArchive(path, tiling) as archive:
        np.testing.assert_array_equal(read_all(archive), [decoded(jpeg_of(tile)) for tile in tiles])


@pytest.mark.parametrize("form", ["ustar", "pax"])
def test_the_tar_program(form: str, tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("there is no tar program")
    members = jpegs(tiles)
    for name, data in members.items():
        (tmp_path / name).write_bytes(data)
    subprocess.run(["tar", f"--format={form}", "-cf", "a.tar", *members], cwd=tmp_path, check=True)
    with TileArchive(tmp_path / "a.tar", tiling) as archive:
        np.testing.assert_array_equal(read_all(archive), [decoded(data) for data in members.values()])


def test_a_name_in_a_pax_header_counts(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    """Some programs repeat every name there; it may not smuggle another one in."""
    members = jpegs(tiles)
    for name, fine in (("000000.jpg", True), ("../000000.jpg", False)):
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for number, (stored, data) in enumerate(members.items()):
                info = tarfile.TarInfo(stored)
                info.size = len(data)
                info.pax_headers = {"path": name} if number == 0 else {}
                tar.addfile(info, io.BytesIO(data))
        if fine:
            TileArchive(tmp_path / "a.tar", tiling).close()
        else:
            with pytest.raises(TilingError, match=r"'\.\./000000\.jpg' is not named after a tile"):
                TileArchive(tmp_path / "a.tar", tiling)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("000000.jpg", 0),
        ("999999.jpg", 999_999),
        ("1000000.jpg", 1_000_000),
        ("./000012.jpeg", 12),
        ("../000001.jpg", None),
        ("/000001.jpg", None),
        ("a/000001.jpg", None),
        ("././1.jpg", None),
        ("-1.jpg", None),
        ("+1.jpg", None),
        ("1_0.jpg", None),
        (" 1.jpg", None),
        ("1.jpg\n", None),
        ("\u0663.jpg", None),
        ("1.png", None),
        ("1.jpg/", None),
        ("._000001.jpg", None),
        ("9" * 13 + ".jpg", None),
        ("", None),
    ],
)
def test_names_of_tiles(name: str, number: int | None) -> None:
    assert tile_number(name) == number


def test_a_million_tiles_are_in_order() -> None:
    names = [f"{number:06d}.jpg" for number in (1_000_000, 999_999, 100_001, 99_999)]
    assert sorted(names) != sorted(names, key=tile_number)  # type: ignore[type-var]
    assert [tile_number(name) for name in sorted(names, key=tile_number)] == [  # type: ignore[type-var]
        99_999,
        100_001,
        999_999,
        1_000_000,
    ]


def test_eight_threads(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    path = write_archive(tmp_path, tiling, shuffled(tiles))
    with TileArchive(path, tiling, block=2) as archive:
        alone = read_all(archive)
        rounds = 20
        pixels = np.zeros((rounds, *alone.shape), np.uint8)

        def work(job: tuple[int, int]) -> None:
            turn, number = job
            data = archive.fetch(number)
            archive.place(number, data, [pixels[turn, tile] for tile in archive.blocks[number]])

        jobs = [(turn, number) for turn in range(rounds) for number in range(len(archive.blocks))]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, jobs))
    assert (pixels == alone).all()


def test_closed_twice(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    archive = TileArchive(write_archive(tmp_path, tiling, shuffled(tiles)), tiling)
    archive.close()
    archive.close()
    with pytest.raises(SlideReadError, match=r"slide s: .* was closed"):
        archive.fetch(0)


def test_where_archives_are_looked_for(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    with pytest.raises(TilingError, match=r"slide s: .*s\.tiles\.tar or .*tiles/s\.tiles\.tar"):
        find_archive(tmp_path, "s")
    inner = write_archive(tmp_path / "tiles", tiling, shuffled(tiles))
    assert find_archive(tmp_path, "s") == inner
    outer = write_archive(tmp_path, tiling, shuffled(tiles))
    assert find_archive(tmp_path, "s") == outer


# manifests that do not agree ----------------------------------------------------------------------


def test_an_archive_of_other_coordinates(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    path = write_archive(tmp_path, tiling, shuffled(tiles))
    moved = replace(tiling, x=tiling.x + 1)
    with pytest.raises(TilingError, match=r"slide s: .*other coordinates.*tile_index,x,y 0,"):
        TileArchive(path, moved)
    archive_paths(tmp_path, "s")[1].unlink()
    TileArchive(path, moved).close()  # nothing says otherwise
    with pytest.raises(TilingError, match="none of the slide's 23 tiles"):
        TileArchive(path, first(tiling, 23))


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "\n",
        "tile_index,x,y\n",
        "tile,x,y\n0,1,2\n",
        "tile_index,x,y\n0,1\n",
        "tile_index,x,y\n0,1,two\n",
        "tile_index,x,y\n0,1,99999999999999999999999\n",
        "tile_index,x,y\n" + "0,0,0\n" * 24,
        "tile_index,x,y\n" + "0,0,0\n" * 10_000,
        b"tile_index,x,y\n\xff\xfe\x00\n",
        np.random.default_rng(6).bytes(500),
    ],
)
def test_damaged_manifests(manifest: str | bytes, tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    path = write_archive(tmp_path, tiling, shuffled(tiles))
    archive_paths(tmp_path, "s")[1].write_bytes(manifest.encode() if isinstance(manifest, str) else manifest)
    with pytest.raises(TilingError, match=r"^slide s: tile archive .*s\.tiles\.tar: "):
        TileArchive(path, tiling)


# archives that somebody made to do harm -----------------------------------------------------------


def special(kind: bytes, name: str = "000003.jpg", link: str = "/etc/passwd") -> Callable[[Pixels], bytes]:
    """All tiles, the fourth as a member of another type."""

    def build(tiles: Pixels) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for stored, data in jpegs(tiles).items():
                info = tarfile.TarInfo(stored)
                info.size = len(data)
                if stored == "000003.jpg":
                    info.name, info.type, info.linkname, info.size = name, kind, link, 0
                tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    return build


def named(name: str) -> Callable[[Pixels], bytes]:
    return special(tarfile.REGTYPE, name, "")


def with_size(field: bytes) -> Callable[[Pixels], bytes]:
    """The first member declares a size."""
    return lambda tiles: resigned(plain(tiles), 124, field)


def plain(tiles: Pixels) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in jpegs(tiles).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def resigned(tar: bytes, at: int, field: bytes) -> bytes:
    """Bytes of the header at (the unit of) `at` replaced, its checksum made to fit."""
    changed = bytearray(tar)
    changed[at : at + len(field)] = field
    start = at // 512 * 512
    header = changed[start : start + 512]
    total = sum(header) - sum(header[148:156]) + 256
    changed[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(changed)


def extended(
    kind: bytes, records: bytes, declared: int | None = None, times: int = 1
) -> Callable[[Pixels], bytes]:
    """Pax or GNU headers before the tiles."""

    def build(tiles: Pixels) -> bytes:
        info = tarfile.TarInfo("header")
        info.type, info.size = kind, len(records) if declared is None else declared
        header = info.tobuf(tarfile.GNU_FORMAT) + records + bytes(-len(records) % 512)
        return times * header + plain(tiles)

    return build


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length += 1
    return b"%d" % length + body


HOSTILE: dict[str, Callable[[Pixels], bytes]] = {
    "symbolic link": special(tarfile.SYMTYPE),
    "hard link": special(tarfile.LNKTYPE, link="000002.jpg"),
    "character device": special(tarfile.CHRTYPE),
    "block device": special(tarfile.BLKTYPE),
    "pipe": special(tarfile.FIFOTYPE),
    "folder": special(tarfile.DIRTYPE),
    "sparse file": special(tarfile.GNUTYPE_SPARSE),
    "unknown type": special(b"\xff"),
    "parent": named("../000003.jpg"),
    "absolute": named("/000003.jpg"),
    "inside": named("a/000003.jpg"),
    "name that does not end": named("3" * 90 + ".jpg"),
    "long name": named("3" * 5000 + ".jpg"),
    "other file": named("notes.txt"),
    "no name": lambda tiles: resigned(plain(tiles), 0, bytes(100)),
    "tile twice": lambda tiles: resigned(plain(tiles), 0, b"1.jpg\0".ljust(100, b"\0")),
    "a million": named("1000000.jpg"),
    "one too many": lambda tiles: plain(np.concatenate([tiles, tiles[:1]])),
    "one too few": lambda tiles: plain(tiles[:-1]),
    "size of 2^60": with_size(b"\x80" + bytes(3) + struct.pack(">Q", 1 << 60)),
    "size of 2^80": with_size(b"\x80" + b"\1" + bytes(10)),
    "negative size": with_size(b"\xff" * 12),
    "size of 8 GiB": with_size(b"77777777777\0"),
    "size beyond the end": with_size(b"00003777777\0"),
    "size of letters": with_size(b"12ab\0\0\0\0\0\0\0\0"),
    "long GNU name of 2^60 bytes": lambda tiles: resigned(
        extended(b"L", b"x")(tiles), 124, b"\x80" + bytes(3) + struct.pack(">Q", 1 << 60)
    ),
    "pax header of 1 GiB": extended(b"x", b"", 1 << 30),
    "pax header of 1 MiB": extended(b"x", record(b"comment", b"x" * (1 << 20))),
    "many pax headers": extended(b"x", record(b"comment", b"x" * 5000), times=20),
    "pax size": extended(b"x", record(b"size", b"9" * 30)),
    "pax sparse": extended(b"x", record(b"GNU.sparse.realsize", b"9" * 30)),
    "pax path for all": extended(b"g", record(b"path", b"000001.jpg")),
    "pax garbage": extended(b"x", b"hello"),
    "pax length of zero": extended(b"x", b"0 a=b\n"),
    "pax length too long": extended(b"x", b"99 a=b\n"),
    "pax huge length": extended(b"x", b"9" * 500),
    "pax without =": extended(b"x", b"6 abc\n"),
    "zeros": lambda tiles: bytes(10_240),
    "empty": lambda tiles: b"",
    "short": lambda tiles: b"000000.jpg",
    "noise": lambda tiles: np.random.default_rng(5).bytes(50_000),
    "gzip": lambda tiles: gzip.compress(plain(tiles)),
    "cut in a header": lambda tiles: plain(tiles)[:700],
    "cut in a tile": lambda tiles: plain(tiles[:1])[:900],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives(case: str, tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "s.tiles.tar"
    path.parent.mkdir()
    path.write_bytes(HOSTILE[case](tiles))
    message = r"^slide s: tile archive .*s\.tiles\.tar: .*; make the archive anew"
    tracemalloc.start()
    try:
        with pytest.raises(TilingError, match=message):
            TileArchive(path, tiling)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES
    assert [file.name for file in tmp_path.rglob("*")] == ["folder", "s.tiles.tar"]


def test_what_is_not_a_file(tiling: Tiling, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("pipe.tar", "absent.tar", "."):
        with pytest.raises(TilingError, match=r"slide s: .*there is no such file"):
            TileArchive(tmp_path / name, tiling)


# tiles that cannot be decoded ---------------------------------------------------------------------


def resized(jpeg: bytes, width: int, height: int) -> bytes:
    """With another size in its header."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


def rotated(tile: Pixels) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg_of(tile, exif=exif)


BAD: dict[str, Callable[[Pixels], bytes]] = {
    "empty": lambda tile: b"",
    "text": lambda tile: b"not a picture",
    "PNG": lambda tile: cv2.imencode(".png", tile)[1].tobytes(),
    "start only": lambda tile: b"\xff\xd8",
    "no pixels": lambda tile: b"\xff\xd8\xff\xd9",
    "half": lambda tile: jpeg_of(tile)[: len(jpeg_of(tile)) // 2],
    "no end": lambda tile: jpeg_of(tile)[:-2],
    "half, progressive": lambda tile: jpeg_of(tile, progressive=True)[:-100],
    "CMYK": lambda tile: jpeg_of(Image.fromarray(tile).convert("CMYK")),
    "larger": lambda tile: jpeg_of(cv2.resize(tile, (SIDE + 1, SIDE))),
    "smaller": lambda tile: jpeg_of(tile[:-1]),
    "bomb": lambda tile: resized(jpeg_of(tile), 60_000, 60_000),
    "no height": lambda tile: resized(jpeg_of(tile), SIDE, 0),
    "second frame is a bomb": lambda tile: jpeg_of(tile).replace(
        b"\xff\xda",
        b"\xff\xc0" + struct.pack(">HBHHB9s", 17, 8, 60_000, 60_000, 3, b"\1\x11\0" * 3) + b"\xff\xda",
    ),
    "marker among the pixels": lambda tile: jpeg_of(tile)[:-60] + b"\xff\xe0" + jpeg_of(tile)[-58:],
    "restart without interval": lambda tile: jpeg_of(tile)[:-60] + b"\xff\xd3" + jpeg_of(tile)[-58:],
    "segments without end": lambda tile: b"\xff\xd8" + b"\xff\xe0\0\2" * 100_000,
    "no tables": lambda tile: jpeg_of(tile).replace(b"\xff\xdb", b"\xff\xfe"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tiles(case: str, tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    members = jpegs(tiles)
    members["000010.jpg"] = BAD[case](tiles[10])
    with TileArchive(make_tar(tmp_path / "a.tar", members), tiling, block=8) as archive:
        whole = np.zeros((8, SIDE, SIDE, 3), np.uint8)
        archive.place(0, archive.fetch(0), list(whole))
        archive.read_tile(11, whole[0])
        place = rf"^slide s: tile 10 at level-0 px \({tiling.x[10]}, {tiling.y[10]}\) in .*a\.tar "
        with pytest.raises(SlideReadError, match=place):
            archive.place(1, archive.fetch(1), list(whole))
        with pytest.raises(SlideReadError, match=place):
            archive.read_tile(10, whole[0])


def test_a_bomb_is_not_decoded(
    tiling: Tiling, tiles: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = jpegs(tiles[:1]) | {"000000.jpg": resized(jpeg_of(tiles[0]), 60_000, 60_000)}
    with TileArchive(make_tar(tmp_path / "a.tar", members), first(tiling, 1)) as archive:
        monkeypatch.delattr(cv2, "imdecode")
        with pytest.raises(SlideReadError, match="60000x60000 px, 3 channels of 8 bits; 40x40 px"):
            archive.read_tile(0, np.zeros((SIDE, SIDE, 3), np.uint8))


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": 0},
        {"quality": 100},
        {"restart_marker_blocks": 1},
        {"optimize": True},
        {"comment": b"\xff\xd9" * 40},
        {"icc_profile": bytes(70_000)},
        {"keep_rgb": True},
    ],
    ids=str,
)
def test_other_jpegs_of_tiles(options: dict[str, Any], tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    members = {f"{number}.jpg": jpeg_of(tile, **options) for number, tile in enumerate(tiles)}
    with TileArchive(make_tar(tmp_path / "a.tar", members), tiling) as archive:
        np.testing.assert_array_equal(read_all(archive), [decoded(data) for data in members.values()])


def test_grey_and_rotated_jpegs(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    members = jpegs(tiles)
    members["000000.jpg"] = jpeg_of(np.ascontiguousarray(tiles[0, ..., 0]))
    members["000001.jpg"] = rotated(tiles[1])
    members["000002.jpg"] += bytes(100)  # padding after the end
    with TileArchive(make_tar(tmp_path / "a.tar", members), tiling) as archive:
        np.testing.assert_array_equal(read_all(archive), [decoded(data) for data in members.values()])


def test_a_file_that_shrinks(tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    path = write_archive(tmp_path, tiling, shuffled(tiles))
    with TileArchive(path, tiling) as archive:
        os.truncate(path, 2000)
        with pytest.raises(SlideReadError, match=r"^slide s: tile "):
            archive.fetch(0)


# fuzz ---------------------------------------------------------------------------------------------


def mutated(tar: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(tar)
    kind = rng.integers(6)
    if kind == 0:  # bits
        for at in rng.integers(0, len(changed), rng.integers(1, 4)):
            changed[at] ^= 1 << rng.integers(8)
    elif kind == 1:  # cut short
        del changed[rng.integers(len(changed)) :]
    elif kind == 2:  # a piece goes missing
        at = rng.integers(len(changed))
        del changed[at : at + rng.integers(1, 2000)]
    elif kind == 3:  # a piece is overwritten
        at = rng.integers(len(changed))
        changed[at : at + 40] = rng.bytes(40)
    else:  # a header with a fitting checksum
        start = 512 * int(rng.integers(len(changed) // 512))
        at = start + int(rng.choice([0, 5, 124, 130, 156, 157, 257, 345]))
        return resigned(tar, at, rng.choice([rng.bytes(3), b"7", b"\x80", b"1", b"x"]))
    return bytes(changed)


def reference(tar: bytes) -> dict[int, bytes]:
    """The JPEGs by tile, as tarfile reads them."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:", errorlevel=2) as file:
        for info in file:
            assert info.isreg()
            data = file.extractfile(info)
            assert data is not None
            found[int(Path(info.name).stem)] = data.read()
    return found


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_archives(form: int, tiling: Tiling, tiles: Pixels, tmp_path: Path) -> None:
    """Whatever happens to the file: tarfile's and Pillow's pixels, or one of our errors."""
    count = 6
    few = first(tiling, count)
    records = {"mtime": "1.5"} if form == tarfile.PAX_FORMAT else {}
    tar = make_tar(tmp_path / "a.tar", jpegs(tiles[:count]), form, pax_headers=records).read_bytes()
    tar = tar[: tar.rindex(b"\xff\xd9") + 1024]  # fewer of the zeros at the end
    path = tmp_path / "b.tar"
    rng = np.random.default_rng(form)
    refused = unread = fine = 0
    for _ in range(400):
        changed = mutated(tar, rng)
        path.write_bytes(changed)
        try:
            archive = TileArchive(path, few)
        except TilingError:
            refused += 1
            continue
        with archive:
            try:
                expected = reference(changed)
            except tarfile.ReadError:  # only the zeros after the last tile are gone
                expected = reference(tar)
            assert sorted(expected) == list(range(count))
            for tile, jpeg in expected.items():
                pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
                try:
                    archive.read_tile(tile, pixels)
                except SlideReadError:
                    unread += 1
                    continue
                fine += 1
                np.testing.assert_array_equal(pixels, decoded(jpeg))
    assert refused > 50 and unread > 10 and fine > 200
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("options", "least"),
    [({}, 100), ({"progressive": True}, 300), ({"restart_marker_blocks": 2}, 130)],
    ids=str,
)
def test_damaged_jpegs(
    options: dict[str, Any], least: int, tiling: Tiling, tiles: Pixels, tmp_path: Path
) -> None:
    """A flipped bit: Pillow's pixels, or an error; and an error always where libjpeg so much as warns."""
    jpeg = jpeg_of(tiles[0], **options)
    rng = np.random.default_rng(7)
    refused = 0
    one = first(tiling, 1)
    for _ in range(600):
        changed = bytearray(jpeg)
        changed[rng.integers(len(jpeg))] ^= 1 << rng.integers(8)
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        with TileArchive(make_tar(tmp_path / "a.tar", {"0.jpg": bytes(changed)}), one) as archive:
            try:
                archive.read_tile(0, pixels)
            except SlideReadError:
                refused += 1
                continue
        np.testing.assert_array_equal(pixels, decoded(bytes(changed)))
    assert least < refused < 400  # without strict decoding 74, 186 and 79


def test_without_the_decoder(
    tiling: Tiling, tiles: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_archive(tmp_path, tiling, shuffled(tiles))
    monkeypatch.setattr(archives, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match="simplejpeg, which is not installed: pip install simplejpeg"):
        TileArchive(path, tiling)
