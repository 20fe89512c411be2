"""Whole-slide DICOM files made for the test at hand, in any transfer syntax and with anything wrong."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image
from pydicom import Dataset, FileDataset, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended

__all__ = ["JPEG", "SERIES", "SYNTAXES", "TILE", "Syntax"]
__all__ += ["fields", "frames_of", "jpeg", "picture", "rle", "write"]

TILE = 64
SERIES = "1.2.826.0.1.3680043.8.498.1"
JPEG = uid.JPEGBaseline8Bit

#: How a frame becomes bytes, (TILE, TILE, 3) uint8 -> bytes.
Encode = Callable[[np.ndarray], bytes]


class Syntax:
    """A transfer syntax: its UID, photometric interpretation, and how to encode a frame (None: native)."""

    def __init__(self, uid: str, photometric: str, encode: Encode | None) -> None:
        self.uid, self.photometric, self.encode = uid, photometric, encode


def jpeg(frame: np.ndarray, subsampling: str = "444") -> bytes:
    """JPEG with a JFIF marker, YCbCr."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(frame), 95, "RGB", subsampling)


def jpeg_rgb(frame: np.ndarray) -> bytes:
    """JPEG whose components are RGB, said by an Adobe marker."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=95, keep_rgb=True)
    return buffer.getvalue()


def rle(frame: np.ndarray) -> bytes:
    """Three segments of PackBits after their positions (PS3.5, G.5)."""
    planes = [bytes(imagecodecs.packbits_encode(frame[..., channel].tobytes())) for channel in range(3)]
    planes = [plane + b"\0" * (len(plane) % 2) for plane in planes]
    starts = np.cumsum([64, *map(len, planes[:2])])
    return np.array([3, *starts, *[0] * 12], "<u4").tobytes() + b"".join(planes)


SYNTAXES: Mapping[str, Syntax] = {
    "explicit": Syntax(uid.ExplicitVRLittleEndian, "RGB", None),
    "implicit": Syntax(uid.ImplicitVRLittleEndian, "RGB", None),
    "jpeg": Syntax(JPEG, "YBR_FULL_422", lambda frame: jpeg(frame, "422")),
    "jpeg-ybr-full": Syntax(JPEG, "YBR_FULL", jpeg),
    "jpeg-rgb": Syntax(JPEG, "RGB", jpeg_rgb),
    "jpeg-extended": Syntax(uid.JPEGExtended12Bit, "YBR_FULL_422", lambda frame: jpeg(frame, "422")),
    "jpeg-ls": Syntax(uid.JPEGLSLossless, "RGB", lambda f: bytes(imagecodecs.jpegls_encode(f))),
    "jpeg-ls-near": Syntax(
        uid.JPEGLSNearLossless, "RGB", lambda f: bytes(imagecodecs.jpegls_encode(f, level=2))
    ),
    "jpeg2000": Syntax(
        uid.JPEG2000Lossless,
        "YBR_RCT",
        lambda f: bytes(imagecodecs.jpeg2k_encode(f, codecformat="j2k", reversible=True, mct=True)),
    ),
    "jpeg2000-lossy": Syntax(
        uid.JPEG2000,
        "YBR_ICT",
        lambda f: bytes(imagecodecs.jpeg2k_encode(f, level=50, codecformat="j2k", mct=True)),
    ),
    "htj2k": Syntax(uid.HTJ2KLossless, "YBR_RCT", lambda f: bytes(imagecodecs.htj2k_encode(f))),
    "jpeg-lossless": Syntax(
        uid.JPEGLosslessSV1, "RGB", lambda f: bytes(imagecodecs.jpeg8_encode(f, lossless=True))
    ),
    "rle": Syntax(uid.RLELossless, "RGB", rle),
}


def picture(width: int = 300, height: int = 200) -> np.ndarray:
    """A coloured pattern with some noise, (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([60 + x % 180, 60 + y % 180, 60 + (x + y) % 180], axis=-1)
    return (smooth + np.random.default_rng(0).integers(0, 9, smooth.shape)).astype(np.uint8)


def frames_of(pixels: np.ndarray, tile: int = TILE) -> list[np.ndarray]:
    """The frames of a tiled picture, row by row, padded with its edge."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % tile), (0, -width % tile), (0, 0)), mode="edge")
    return [
        np.ascontiguousarray(padded[y : y + tile, x : x + tile])
        for y in range(0, height, tile)
        for x in range(0, width, tile)
    ]


def write(
    path: Path,
    pixels: np.ndarray,
    syntax: str | Syntax = "explicit",
    *,
    tile: int = TILE,
    spacing_um: tuple[float, float] = (0.5, 0.5),
    flavour: str = "VOLUME",
    series: str = SERIES,
    sparse: Sequence[int] | None = None,
    part: tuple[int, int] | None = None,
    offsets: str = "basic",
    fragments: int = 1,
    damage: Callable[[list[bytes]], None] | None = None,
    change: Callable[[Dataset], None] | None = None,
    preamble: bytes = bytes(128),
) -> Path:
    """A picture as a whole-slide DICOM file.

    Args:
        spacing_um: (row, column).
        sparse: TILED_SPARSE with these frames, in this order.
        part: (number, frames before it) of a concatenation; `pixels` are cut accordingly by `sparse`.
        offsets: basic, extended or none.
        damage: may change the frames' bytes.
        change: may change the data set.
    """
    how = SYNTAXES[syntax] if isinstance(syntax, str) else syntax
    frames = frames_of(pixels, tile)
    chosen = list(range(len(frames))) if sparse is None else list(sparse)
    ds = _dataset(how, pixels, tile, spacing_um, flavour, series, len(chosen))
    if part is not None:
        ds.ConcatenationUID, ds.InConcatenationNumber, ds.ConcatenationFrameOffsetNumber = (
            SERIES + ".9",
            *part,
        )
    elif sparse is not None:
        across = -(-pixels.shape[1] // tile)
        ds.DimensionOrganizationType = "TILED_SPARSE"
        ds.PerFrameFunctionalGroupsSequence = [
            _position(n % across * tile, n // across * tile) for n in chosen
        ]
    encoded = [how.encode(frames[n]) if how.encode else frames[n].tobytes() for n in chosen]
    if damage:
        damage(encoded)
    _put_pixels(ds, how, encoded, offsets, fragments)
    if change:
        change(ds)
    ds.preamble = preamble
    ds.save_as(path, enforce_file_format=True)
    return path


def _dataset(
    how: Syntax,
    pixels: np.ndarray,
    tile: int,
    spacing: tuple[float, float],
    flavour: str,
    series: str,
    frames: int,
) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    meta.TransferSyntaxUID = uid.UID(how.uid)
    little = meta.TransferSyntaxUID.is_little_endian
    ds = FileDataset("", {}, file_meta=meta, is_little_endian=little, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.ImageType = ["ORIGINAL", "PRIMARY", flavour, "NONE"]
    ds.Modality, ds.SeriesInstanceUID, ds.StudyInstanceUID = "SM", series, SERIES + ".1"
    ds.FrameOfReferenceUID, ds.InstanceNumber = SERIES + ".2", 1
    ds.DimensionOrganizationType = "TILED_FULL"
    ds.NumberOfFrames, ds.SamplesPerPixel, ds.PlanarConfiguration = frames, 3, 0
    ds.PhotometricInterpretation = how.photometric
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.Rows = ds.Columns = tile
    ds.TotalPixelMatrixRows, ds.TotalPixelMatrixColumns = pixels.shape[:2]
    ds.TotalPixelMatrixFocalPlanes = ds.NumberOfOpticalPaths = 1
    ds.ImagedVolumeHeight = pixels.shape[0] * spacing[0] / 1000
    ds.ImagedVolumeWidth = pixels.shape[1] * spacing[1] / 1000
    ds.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    measures, groups, path = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [um / 1000 for um in spacing], 0.001
    groups.PixelMeasuresSequence = [measures]
    path.OpticalPathIdentifier = "1"
    ds.SharedFunctionalGroupsSequence, ds.OpticalPathSequence = [groups], [path]
    return ds


def _position(x: int, y: int) -> Dataset:
    place, path, frame = Dataset(), Dataset(), Dataset()
    place.ColumnPositionInTotalImagePixelMatrix, place.RowPositionInTotalImagePixelMatrix = x + 1, y + 1
    path.OpticalPathIdentifier = "1"
    frame.PlanePositionSlideSequence, frame.OpticalPathIdentificationSequence = [place], [path]
    return frame


def _put_pixels(ds: FileDataset, how: Syntax, encoded: list[bytes], offsets: str, fragments: int) -> None:
    if how.encode is None:
        data = b"".join(encoded)
        ds.PixelData = data + b"\0" * (len(data) % 2)
    elif offsets == "extended":
        ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(encoded)
    else:
        ds.PixelData = encapsulate(encoded, fragments_per_frame=fragments, has_bot=offsets == "basic")
    ds["PixelData"].VR = "OB"


def fields(**values: Any) -> Callable[[Dataset], None]:
    """A change of elements by keyword; None deletes."""

    def change(ds: Dataset) -> None:
        for name, value in values.items():
            if value is None:
                delattr(ds, name)
            else:
                setattr(ds, name, value)

    return change
