"""Sound slides of every container and codec: real ones, and generated ones of tissue-like pixels."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BASES", "Base", "picture"]

Pixels = NDArray[np.uint8]
#: Of the generated slides.
SIZE, TILE, SPACING_UM = (700, 500), 128, 0.5


@dataclass(frozen=True)
class Base:
    """A sound slide.

    Attributes:
        container, codec: for the table.
        make: writes its files into an empty folder and returns the one to open; None where it is not here.
        spacing_um: µm/px of level 0, where the file itself gives none.
        sample: whether the short run in CI has it.
    """

    name: str
    container: str
    codec: str
    make: Callable[[Path], Path | None]
    spacing_um: float | None = None
    sample: bool = True


@cache
def picture(width: int = SIZE[0], height: int = SIZE[1]) -> Pixels:
    """Something that the hsv rule takes for tissue, with glass around it, (height, width, 3) uint8."""
    rng = np.random.default_rng(13)
    y, x = np.mgrid[:height, :width]
    waves = np.sin(x / 23) * np.cos(y / 31) + np.sin((x + 2 * y) / 57) + rng.normal(0, 0.25, (height, width))
    stain = np.stack([190 + 22 * waves, 110 + 28 * waves, 170 + 18 * waves], axis=-1)
    tissue = ((x - width / 2) / (0.46 * width)) ** 2 + ((y - height / 2) / (0.45 * height)) ** 2 < 1
    return np.where(tissue[..., None], stain, 243).clip(0, 255).astype(np.uint8)


def _levels() -> Iterator[Pixels]:
    full = picture()
    yield full
    half = full[: SIZE[1] // 4 * 4, : SIZE[0] // 4 * 4].reshape(SIZE[1] // 4, 4, SIZE[0] // 4, 4, 3)
    yield half.mean(axis=(1, 3)).astype(np.uint8)


def _tiff(
    folder: Path,
    *,
    name: str = "slide.tif",
    strips: bool = False,
    bigtiff: bool = False,
    description: str | None = None,
    byteorder: Any = None,
    subifds: bool = False,
    ome: bool = False,
    **options: Any,
) -> Path:
    """A two-level pyramid written by tifffile."""
    import tifffile

    path = folder / name
    planar = options.get("planarconfig") == "separate"
    where: dict[str, Any] = {"rowsperstrip": 64} if strips else {"tile": (TILE, TILE)}
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder, ome=ome) as tiff:
        for number, pixels in enumerate(_levels()):
            if number and strips:
                return path
            tiff.write(
                np.ascontiguousarray(np.moveaxis(pixels, -1, 0)) if planar else pixels,
                description=None if number else description,
                subifds=1 if subifds and not number else 0,
                subfiletype=1 if number else 0,
                resolution=(10_000 / SPACING_UM / 4**number,) * 2,
                resolutionunit="CENTIMETER",
                metadata={"PhysicalSizeX": SPACING_UM, "PhysicalSizeXUnit": "µm"}
                if ome and not number
                else None,
                photometric=options.pop("photometric", "rgb")
                if number
                else options.get("photometric", "rgb"),
                **where,
                **{key: value for key, value in options.items() if key != "photometric"},
            )
    return path


def _svs(folder: Path) -> Path:
    """Aperio's: tiles that share tables, whose components are RGB."""
    import tifffile
    from PIL import Image

    path = folder / "slide.svs"
    size = f"{SIZE[0]}x{SIZE[1]}"
    about = (
        f"Aperio Image Library v12\r\n{size} [0,0 {size}] ({TILE}x{TILE}) JPEG/RGB Q=90"
        f"|AppMag = 20|MPP = {SPACING_UM}"
    )
    with tifffile.TiffWriter(path) as tiff:
        for pixels in _levels():
            height, width = pixels.shape[:2]
            padded = np.pad(pixels, ((0, -height % TILE), (0, -width % TILE), (0, 0)), mode="edge")
            tables, tiles = b"", []
            for y in range(0, height, TILE):
                for x in range(0, width, TILE):
                    buffer = io.BytesIO()
                    Image.fromarray(padded[y : y + TILE, x : x + TILE]).save(
                        buffer, "JPEG", quality=90, keep_rgb=True, subsampling=0
                    )
                    tables, tile = _without_tables(buffer.getvalue())
                    tiles.append(tile)
            tiff.write(
                iter(tiles),
                shape=pixels.shape,
                dtype=np.uint8,
                tile=(TILE, TILE),
                compression="jpeg",
                photometric="rgb",
                jpegtables=tables,
                description=about,
                subfiletype=0,
                metadata=None,
            )
    with tifffile.TiffFile(path, mode="r+") as tiff:  # which writes YCbCr, whatever it is told
        for page in tiff.pages:
            assert isinstance(page, tifffile.TiffPage)
            page.tags["PhotometricInterpretation"].overwrite(2)
    return path


def _without_tables(jpeg: bytes) -> tuple[bytes, bytes]:
    """(Its tables as a stream of their own, the JPEG without them and without application markers)."""
    tables, rest, at = b"\xff\xd8", b"\xff\xd8", 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] in (0xDB, 0xC4):
            tables += jpeg[at:end]
        elif not 0xE0 <= jpeg[at + 1] <= 0xEF:
            rest += jpeg[at:end]
        at = end
    return tables + b"\xff\xd9", rest + jpeg[at:]


def _dicom(folder: Path, syntax: str) -> Path:
    from tools.fuzz.dicommade import write_dicom

    return write_dicom(folder, _levels(), TILE, SPACING_UM, syntax)


def shared_folder() -> Path:
    """Where slides/ and dialects/ lie: beside SLIDE2VEC_TEST_SLIDES, else shared/ beside the checkout."""
    given = os.environ.get("SLIDE2VEC_TEST_SLIDES")
    return Path(given).resolve().parent if given else Path(__file__).resolve().parents[3] / "shared"


def _real(folder: Path, *, place: str) -> Path | None:
    source = shared_folder() / place
    if not source.exists():
        return None
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return folder / max(files, key=lambda file: file.stat().st_size).name


def _generated(key: str, container: str, codec: str, sample: bool = True, **options: Any) -> Base:
    return Base(key, container, codec, partial(_tiff, **options), sample=sample)


def _copied(place: str, container: str, codec: str, spacing_um: float | None = None) -> Base:
    return Base(Path(place).name, container, codec, partial(_real, place=place), spacing_um, sample=False)


_JPEG: dict[str, Any] = {"compression": "jpeg", "photometric": "ycbcr"}
BASES: tuple[Base, ...] = (
    Base("aperio", "Aperio SVS", "JPEG", _svs),
    _generated("jpeg", "TIFF", "JPEG", **_JPEG),
    _generated("jpeg-rgb", "TIFF", "JPEG", compression="jpeg", photometric="rgb", sample=False),
    _generated("jpeg-strips", "TIFF strips", "JPEG", strips=True, **_JPEG),
    _generated("jpeg-big", "BigTIFF", "JPEG", bigtiff=True, **_JPEG),
    _generated("raw", "TIFF", "none"),
    _generated("raw-strips", "TIFF strips", "none", strips=True),
    _generated("lzw", "TIFF", "LZW", compression="lzw"),
    _generated("lzw-predictor", "TIFF", "LZW", compression="lzw", predictor=2, sample=False),
    _generated("deflate", "TIFF", "Deflate", compression="zlib"),
    _generated("deflate-predictor", "TIFF", "Deflate", compression="zlib", predictor=2),
    _generated("deflate-planar", "TIFF planar", "Deflate", compression="zlib", planarconfig="separate"),
    _generated("deflate-big-endian", "BigTIFF", "Deflate", compression="zlib", bigtiff=True, byteorder=">"),
    _generated("zstd", "TIFF", "ZSTD", compression="zstd"),
    _generated("lzma", "TIFF", "LZMA", compression="lzma", sample=False),
    _generated("packbits", "TIFF", "PackBits", compression="packbits"),
    _generated("png", "TIFF", "PNG", compression="png"),
    _generated("webp", "TIFF", "WebP", compression="webp", compressionargs={"level": 80, "lossless": False}),
    _generated(
        "webp-lossless", "TIFF", "WebP", compression="webp", compressionargs={"lossless": True}, sample=False
    ),
    _generated("jpeg2000", "TIFF", "JPEG 2000", compression="jpeg2000"),
    _generated("jpegxl", "TIFF", "JPEG XL", compression="jpegxl"),
    _generated("lerc", "TIFF", "LERC", compression="lerc"),
    _generated(
        "ome-deflate", "OME-TIFF", "Deflate", name="slide.ome.tif", ome=True, subifds=True, compression="zlib"
    ),
    _generated("ome-jpeg", "OME-TIFF", "JPEG", name="slide.ome.tif", ome=True, subifds=True, **_JPEG),
    *(
        Base(
            f"dicom-{syntax.lower()}",
            "DICOM",
            syntax,
            partial(_dicom, syntax=syntax),
            sample=syntax != "JPEG-LS",
        )
        for syntax in ("native", "JPEG", "JPEG 2000", "JPEG-LS", "RLE")
    ),
    _copied("slides/CMU-1-Small-Region.svs", "Aperio SVS", "JPEG"),
    _copied("slides/CMU-1-Small-Region.webp.tiff", "TIFF", "WebP", 0.499),
    _copied("slides/aperio-jpeg-pyramid.svs", "Aperio SVS", "JPEG"),
    _copied("slides/aperio-nompp-appmag40.svs", "Aperio SVS", "JPEG"),
    _copied("slides/generic-jpeg-bigtiff-pyramid.tiff", "BigTIFF", "JPEG"),
    _copied("slides/generic-lzw-pyramid.tiff", "TIFF", "LZW"),
    _copied("slides/generic-pyramid.ome.tiff", "OME-TIFF", "JPEG"),
    _copied("slides/rationai-CMU-1-small.tiff", "TIFF", "JPEG"),
    _copied("slides/XYC-half-mpp.tiff", "TIFF", "none"),
    _copied("slides/XYC-jpeg.ome.tiff", "OME-TIFF", "JPEG", 0.5),
    _copied("slides/fluorescence-dapi.ndpi", "NDPI", "JPEG"),
    _copied("slides/camelyon-jpeg.dcm", "DICOM", "JPEG", 28.969),
    _copied("slides/sm_image.dcm", "DICOM", "native"),
    _copied("dialects/gdal-deflate.tif", "TIFF", "Deflate", 0.499),
    _copied("dialects/gdal-zstd.tif", "TIFF", "ZSTD", 0.499),
    _copied("dialects/rasterio-cogeo.tif", "TIFF", "JPEG", 0.5),
    _copied("dialects/cmu-tifffile-jpeg2000-34712.tif", "TIFF", "JPEG 2000", 0.499),
    _copied("dialects/bioformats-jpeg2000.ome.tiff", "OME-TIFF", "JPEG 2000", 0.5),
    _copied("dialects/dicom-tiff-dual-personality", "DICOM", "JPEG"),
    _copied("dialects/wsidicomizer-ybr-full.dcm", "DICOM", "JPEG"),
    _copied("dialects/rgb-as-3-ifds.ome.tif", "OME-TIFF", "none", 0.499),
)
