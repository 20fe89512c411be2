"""What the decoders of back end `tiff` notice of damage: the table in docs/formats.md.

    python tools/codec_damage.py SLIDE [--tiles 200]

A tile of tissue is compressed by every codec, damaged in several ways, and decoded as the back end does.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from slide2vec.readers import open_slide
from slide2vec.readers.codecs import TileError, decode_tile
from slide2vec.readers.probe import probe
from slide2vec.readers.tiff_tiles import spliced, tile_format
from slide2vec.slides import as_slide

SIDE = 256
LOSSLESS = {"compressionargs": {"lossless": True}}
CODECS: dict[str, dict[str, Any]] = {
    "Deflate": {"compression": "zlib"},
    "LZMA": {"compression": "lzma"},
    "PNG": {"compression": "png"},
    "LERC": {"compression": "lerc", "compressionargs": {"level": 0}},
    "JPEG XL": {"compression": "jpegxl"},
    "JPEG": {"compression": "jpeg", "compressionargs": {"level": 85}},
    "LZW": {"compression": "lzw"},
    "ZSTD": {"compression": "zstd"},
    "PackBits": {"compression": "packbits"},
    "WebP": {"compression": "webp", "compressionargs": {"level": 85}},
    "WebP, lossless": {"compression": "webp", **LOSSLESS},
    "JPEG 2000": {"compression": "jpeg2000", "compressionargs": {"level": 80}},
    "JPEG XR": {"compression": "jpegxr"},
    "none": {},
}
Damage = Callable[[bytearray, np.random.Generator], None]


def cut_short(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(len(data) // 10, len(data) - 8)) :]


def zero_end(data: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(data) // 10, len(data) - 8))
    data[start:] = bytes(len(data) - start)


def zero_some(data: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(data) // 20, len(data) - 64))
    data[start : start + 64] = bytes(64)


def flip_one(data: bytearray, rng: np.random.Generator) -> None:
    data[int(rng.integers(len(data) // 20, len(data)))] ^= 1 << int(rng.integers(8))


def all_zero(data: bytearray, rng: np.random.Generator) -> None:
    data[:] = bytes(len(data))


DAMAGES: dict[str, Damage] = {
    "all zeros": all_zero,
    "cut short": cut_short,
    "end zeroed": zero_end,
    "64 bytes zeroed": zero_some,
    "one bit": flip_one,
}


def noticed(pixels: NDArray[np.uint8], options: dict[str, Any], damage: Damage, count: int) -> str:
    """Share of the damaged tiles that are refused, of those that do not decode to the same pixels."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", tile=(SIDE, SIDE), metadata=None, **options)
    path = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path()
    path = path / "codec_damage.tif"
    path.write_bytes(file.getvalue())
    level = probe(as_slide(path)).levels[0]
    path.unlink()
    form, start = tile_format(level, "generic"), int(level.offsets[0])
    stored = file.getvalue()[start : start + int(level.counts[0])]

    def decoded(data: bytes) -> NDArray[np.uint8]:
        tile = spliced(level, data, b"") if form.compression == "JPEG" else data
        return decode_tile([tile], form, (SIDE, SIDE), None)

    right, rng = decoded(stored), np.random.default_rng(0)
    refused = wrong = 0
    for _ in range(count):
        data = bytearray(stored)
        damage(data, rng)
        try:
            wrong += not np.array_equal(decoded(bytes(data)), right)
        except TileError:
            refused += 1
    return f"{refused / max(1, refused + wrong):.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--tiles", type=int, default=200)
    args = parser.parse_args()
    with open_slide(as_slide(args.slide)) as reader:
        middle = tuple(side // 2 for side in reader.dimensions)
        pixels = reader.read_region((middle[0], middle[1]), 0, (SIDE, SIDE))
    print("| codec | " + " | ".join(DAMAGES) + " |")
    print("|---|" + "---|" * len(DAMAGES))
    for name, options in CODECS.items():
        shares = [noticed(pixels, options, damage, args.tiles) for damage in DAMAGES.values()]
        print(f"| {name} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
