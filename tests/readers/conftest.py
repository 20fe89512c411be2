"""Small TIFFs made for the test at hand: JPEG pyramids with any tile damaged, odd tags."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

TILE, JPEG = 64, 7


class Tiffs:
    """Given to the tests as the fixture `tiffs`."""

    @staticmethod
    def picture(width: int = 400, height: int = 300) -> np.ndarray:
        """A smooth coloured pattern without black, (height, width, 3) uint8."""
        y, x = np.mgrid[:height, :width]
        return np.stack([60 + x % 180, 60 + y % 180, 60 + (x + y) % 180], axis=-1).astype(np.uint8)

    @staticmethod
    def set_tags(path: Path, **tags: int) -> None:
        """Overwrite tags of every directory, whatever the pixels are."""
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for page in tiff.pages:
                for name, value in tags.items():
                    page.tags[name].overwrite(value)

    @classmethod
    def write_plain(
        cls, path: Path, description: str = "", mpp: float | None = None, **options: object
    ) -> Path:
        """The picture in 64 px tiles, uncompressed unless `options` (of tifffile) say otherwise."""
        if mpp is not None:
            options |= {"resolution": (10_000 / mpp, 10_000 / mpp), "resolutionunit": "CENTIMETER"}
        options = {"photometric": "rgb"} | options
        tifffile.imwrite(
            path,
            cls.picture(),
            tile=(TILE, TILE),
            description=description,
            metadata=None,
            **options,
        )
        return path

    @classmethod
    def write_jpeg(
        cls, path: Path, levels: Sequence[np.ndarray], damage: Callable[[list[bytes]], None] | None = None
    ) -> Path:
        """A JPEG pyramid of 64 px tiles, 0.5 µm/px. `damage` may change the compressed tiles of level 0."""
        with tifffile.TiffWriter(path) as tiff:
            for number, pixels in enumerate(levels):
                tiles = jpeg_tiles(pixels)
                if damage and number == 0:
                    damage(tiles)
                tiff.write(
                    iter(tiles),
                    shape=pixels.shape,
                    dtype=np.uint8,
                    tile=(TILE, TILE),
                    compression="zlib",  # tifffile has no JPEG encoder of its own: the tags are set below
                    photometric="rgb",
                    subfiletype=1 if number else 0,
                    resolution=(20_000, 20_000),
                    resolutionunit="CENTIMETER",
                    metadata=None,
                )
        cls.set_tags(path, Compression=JPEG, PhotometricInterpretation=6)
        return path


def jpeg_tiles(pixels: np.ndarray) -> list[bytes]:
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % TILE), (0, -width % TILE), (0, 0)), mode="edge")
    tiles = []
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            buffer = io.BytesIO()
            Image.fromarray(padded[y : y + TILE, x : x + TILE]).save(buffer, "JPEG", quality=90)
            tiles.append(buffer.getvalue())
    return tiles


@pytest.fixture(scope="session")
def tiffs() -> type[Tiffs]:
    return Tiffs


@pytest.fixture
def jpeg_pyramid(tmp_path: Path) -> Path:
    """Three levels, the downsamples 4.04… and 16.7 no whole numbers."""
    full = Tiffs.picture()
    levels = [full, full[::4, ::4][:, :99], full[::16, ::16][:, :24]]
    return Tiffs.write_jpeg(tmp_path / "pyramid.tif", levels)
