"""Tile archives: <sample_id>.tiles.tar, a JPEG per tile, and <sample_id>.tiles.manifest.csv.

Written as HS2P 6.1 writes them. Read without trusting them: only headers are read
before everything is known to be a plain file named after a tile, of a size that a tile can have.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ExtraMissingError, SlideReadError, TilingError
from slide2vec.files import atomic_path, plain_stat, remove
from slide2vec.tiling.types import Tiling
from slide2vec.tiling.untrusted_headers import jpeg_fault, tar_members

__all__ = ["Block", "TileArchive", "archive_paths", "find_archive", "tile_number", "write_archive"]

#: Tiles with their pixels: (n,) int64 tile indices, (n, S, S, 3) uint8 RGB.
Block: TypeAlias = tuple[NDArray[np.int64], NDArray[np.uint8]]

_REMEDY = "make the archive anew, or read the slide itself"
_TILE_NAME = re.compile(r"(?:\./)?([0-9]{1,12})\.jpe?g")


def archive_paths(directory: Path, sample_id: str) -> tuple[Path, Path]:
    """Where a slide's tiles (.tar) and their manifest (.csv) are in a directory of archives."""
    return directory / f"{sample_id}.tiles.tar", directory / f"{sample_id}.tiles.manifest.csv"


def find_archive(directory: Path, sample_id: str) -> Path:
    """The tile archive of a slide in `directory` or its folder `tiles`.

    Raises:
        TilingError: it is in neither.
    """
    places = [archive_paths(folder, sample_id)[0] for folder in (directory, directory / "tiles")]
    reason = f"there is no tile archive {places[0]} or {places[1]}"
    for path in places:
        try:
            plain_stat(path)
            return path
        except FileNotFoundError:
            continue
        except OSError as error:
            reason = f"its tile archive cannot be read: {error}"
    raise TilingError(
        f"slide {sample_id}: {reason}: correct read_tiles_from, or leave it out to read the slide itself"
    )


def tile_number(name: str) -> int | None:
    """The index of the tile in a member of that name ("000123.jpg"); None for other names."""
    found = _TILE_NAME.fullmatch(name)
    return int(found[1]) if found else None


# writing ------------------------------------------------------------------------------------------


def write_archive(directory: Path, tiling: Tiling, blocks: Iterable[Block]) -> Path:
    """Write a slide's tiles and, last, their manifest, so that a manifest means a complete archive.

    Args:
        blocks: in any order, together every tile of `tiling` once, at the requested size.

    Returns:
        The path of the .tar.

    Raises:
        TilingError: tiles are missing, come twice or have another size.
        OutputError: the files cannot be written.
    """
    archive, manifest = archive_paths(directory, tiling.sample_id)
    with atomic_path(archive) as temporary:
        with temporary.open("wb") as file:
            _write_members(file, tiling, blocks)
        remove(manifest)
    with atomic_path(manifest) as temporary, temporary.open("w") as text:
        text.write("tile_index,x,y\n")
        rows = zip(tiling.x.tolist(), tiling.y.tolist(), strict=True)
        text.writelines(f"{tile},{x},{y}\n" for tile, (x, y) in enumerate(rows))
    return archive


def _write_members(file: IO[bytes], tiling: Tiling, blocks: Iterable[Block]) -> None:
    side = tiling.geometry.requested_tile_size_px
    missing = np.ones(len(tiling), bool)
    for tiles, pixels in blocks:
        if pixels.shape != (len(tiles), side, side, 3) or pixels.dtype != np.uint8:
            raise TilingError(
                f"slide {tiling.sample_id}: tiles for its archive have shape {pixels.shape} {pixels.dtype}, "
                f"not {(len(tiles), side, side, 3)} uint8"
            )
        for tile, image in zip(tiles.tolist(), pixels, strict=True):
            if not 0 <= tile < len(tiling) or not missing[tile]:
                raise TilingError(f"slide {tiling.sample_id}: tile {tile} is unknown or came twice")
            missing[tile] = False
            file.write(_member(tile, _encode(image)))
    if missing.any():
        raise TilingError(
            f"slide {tiling.sample_id}: {missing.sum()} of {len(tiling)} tiles are missing in its archive, "
            f"the first is {missing.argmax()}"
        )
    file.write(bytes(2 * tarfile.BLOCKSIZE))
    file.write(bytes(-file.tell() % tarfile.RECORDSIZE))


def _member(tile: int, data: bytes) -> bytes:
    info = tarfile.TarInfo(f"{tile:06d}.jpg")  # belongs to root, mode 644, of 1970: the same bytes always
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _encode(image: NDArray[np.uint8]) -> bytes:
    """JPEG, quality 90, 4:2:0. The same bytes as Pillow's, at 1.4 times its speed on one thread and
    2.9 times on two (10,300 tiles/s of 256 px: Pillow holds the GIL while it encodes)."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    options = [cv2.IMWRITE_JPEG_QUALITY, 90, *sampling]
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


# reading ------------------------------------------------------------------------------------------


class TileArchive:
    """The tiles of a slide out of its archive; a `TileSource`, safe to use from several threads.

    Args:
        path: of the .tar; its manifest, if there is one, lies beside it.
        tiling: of the slide whose tiles they are.
        block: tiles that are read at once.

    Attributes:
        blocks: (n,) int64 tile indices of each block, in the order of the file.
        members: (N, 2) int64, offset and size in bytes of each tile's JPEG in the file.

    Raises:
        TilingError: it cannot be read, has anything in it but every tile once, or belongs to other
            coordinates.
        ExtraMissingError: simplejpeg is not installed.
    """

    backend = "archive"

    def __init__(self, path: Path, tiling: Tiling, *, block: int = 16) -> None:
        if find_spec("simplejpeg") is None:
            raise ExtraMissingError(
                f"slide {tiling.sample_id}: tile archives are decoded by simplejpeg, which is not installed: "
                "pip install simplejpeg, or read the slide itself"
            )
        self._decode_jpeg = import_module("simplejpeg").decode_jpeg
        self.path, self._tiling = path, tiling
        self._file: int | None = None
        try:
            self._file = _open(path)
            # No JPEG of a tile is larger than twice its pixels, a thumbnail and a colour profile.
            largest = 2 * 3 * tiling.geometry.requested_tile_size_px**2 + (1 << 20)
            self.members = _scan(self._file, len(tiling), largest)
            _check_manifest(path, tiling)
        except (OSError, ValueError) as error:
            self.close()
            raise TilingError(f"slide {tiling.sample_id}: tile archive {path}: {error}; {_REMEDY}") from error
        order = np.argsort(self.members[:, 0]).astype(np.int64)
        self.blocks = tuple(order[start : start + block] for start in range(0, len(order), block))

    def fetch(self, number: int) -> list[bytes]:
        """The JPEGs of a block. They are whole and have the size of a tile.

        Raises:
            SlideReadError: one is not, or the file cannot be read.
        """
        return self._read(self.blocks[number])

    def check(self, number: int, data: Sequence[bytes]) -> None:
        """Look at the JPEGs of a block before a decoder gets them that notices less than `place` does: only
        their brightness is decoded, reduced to an eighth a side (see `slide2vec.readers.codecs.check_jpeg`).

        Raises:
            SlideReadError: one cannot be decoded.
        """
        for tile, jpeg in zip(self.blocks[number].tolist(), data, strict=True):
            try:
                self._decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1, strict=True)
            except ValueError as error:
                raise self._error(tile, f"it is a damaged JPEG ({error})") from error

    def place(self, number: int, data: Sequence[bytes], targets: Sequence[NDArray[np.uint8]]) -> None:
        """Decode the JPEGs of a block into targets, (S, S, 3) uint8 RGB each.

        Raises:
            SlideReadError: one cannot be decoded.
        """
        for tile, jpeg, target in zip(self.blocks[number].tolist(), data, targets, strict=True):
            self._decode(tile, jpeg, target)

    def read_tile(self, tile: int, target: NDArray[np.uint8]) -> None:
        """Fetch and place a single tile.

        Raises:
            SlideReadError: it cannot be decoded.
        """
        self._decode(tile, self._read(np.array([tile]))[0], target)

    def close(self) -> None:
        """Release the file. May be called twice."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, tiles: NDArray[np.int64]) -> list[bytes]:
        """JPEGs of tiles that lie one after the other in the file, in one read."""
        if self._file is None:
            raise SlideReadError(f"slide {self._tiling.sample_id}: its tile archive {self.path} was closed")
        spans = self.members[tiles].tolist()
        start, end = spans[0][0], sum(spans[-1])
        try:
            data = os.pread(self._file, end - start, start)
        except OSError as error:
            raise self._error(int(tiles[0]), error) from error
        jpegs = [data[offset - start : offset - start + size] for offset, size in spans]
        for tile, jpeg in zip(tiles.tolist(), jpegs, strict=True):
            wrong = jpeg_fault(jpeg, self._tiling.geometry.requested_tile_size_px)
            if wrong:
                raise self._error(tile, wrong)
        return jpegs

    def _decode(self, tile: int, jpeg: bytes, target: NDArray[np.uint8]) -> None:
        # Strict: libjpeg warns of damage inside the entropy data and makes pixels up; OpenCV says nothing of
        # it. The pixels are those of OpenCV and Pillow (all are libjpeg-turbo), in 0.6 of OpenCV's time.
        try:
            target[:] = self._decode_jpeg(jpeg, strict=True)
        except ValueError as error:
            raise self._error(tile, f"it is a damaged JPEG ({error})") from error

    def _error(self, tile: int, wrong: object) -> SlideReadError:
        x, y = self._tiling.x[tile], self._tiling.y[tile]
        return SlideReadError(
            f"slide {self._tiling.sample_id}: tile {tile} at level-0 px ({x}, {y}) in {self.path} cannot be "
            f"read: {wrong}; {_REMEDY}"
        )


def _open(path: Path) -> int:
    if not path.is_file():  # a pipe would never answer
        raise ValueError("there is no such file")
    return os.open(path, os.O_RDONLY)


def _scan(file: int, count: int, largest: int) -> NDArray[np.int64]:
    """(count, 2) offset and size in bytes of each tile's member, by tile index.

    Raises:
        ValueError: naming the member that should not be there, or is not.
    """
    members = np.full((count, 2), -1, np.int64)
    for name, offset, size in tar_members(file, largest):
        tile = tile_number(name)
        if tile is None:
            raise ValueError(f"member {name[:64]!r} is not named after a tile (000123.jpg)")
        if tile >= count:
            raise ValueError(f"member {name[:64]!r} is none of the slide's {count} tiles")
        if members[tile, 0] >= 0:
            raise ValueError(f"member {name[:64]!r} is tile {tile} for the second time")
        members[tile] = offset, size
    missing = members[:, 0] < 0
    if missing.any():
        raise ValueError(
            f"{missing.sum()} of {count} tiles are missing, the first is tile {missing.argmax()}"
        )
    return members


def _check_manifest(path: Path, tiling: Tiling) -> None:
    """Refuse an archive whose manifest, if it has one, has other coordinates."""
    manifest = path.with_name(path.name.removesuffix(".tar") + ".manifest.csv")
    if not manifest.is_file():
        return
    if manifest.stat().st_size > 128 * (len(tiling) + 1):
        raise ValueError(f"{manifest.name} has more rows than there are tiles ({len(tiling)})")
    head, *rows = manifest.read_text("utf-8-sig").split() or [""]
    if head != "tile_index,x,y":
        raise ValueError(f"{manifest.name} begins with {head[:64]!r}, not with tile_index,x,y")
    table = np.loadtxt(rows, np.int64, comments=None, delimiter=",", ndmin=2) if rows else np.empty((0, 3))
    if table.shape != (len(tiling), 3):
        raise ValueError(f"{manifest.name} has {len(table)} rows; the slide has {len(tiling)} tiles")
    table = table[np.argsort(table[:, 0], kind="stable")]
    expected = np.column_stack([np.arange(len(tiling)), tiling.x, tiling.y])
    differs = (table != expected).any(1)
    if differs.any():
        row = differs.argmax()
        raise ValueError(
            f"it belongs to other coordinates: {manifest.name} has tile_index,x,y "
            f"{','.join(map(str, table[row]))} where the slide has {','.join(map(str, expected[row]))}"
        )
