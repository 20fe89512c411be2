"""A whole-slide DICOM series, in the transfer syntaxes that differ in their codec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

__all__ = ["write_dicom"]

Pixels = NDArray[np.uint8]


def _rle(frame: Pixels) -> bytes:
    planes = [bytes(imagecodecs.packbits_encode(frame[..., each].tobytes())) for each in range(3)]
    planes = [plane + b"\0" * (len(plane) % 2) for plane in planes]
    starts = [64, 64 + len(planes[0]), 64 + len(planes[0]) + len(planes[1])]
    return np.array([3, *starts, *[0] * 12], "<u4").tobytes() + b"".join(planes)


def _jpeg2000(frame: Pixels) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(frame, codecformat="j2k", reversible=True, mct=True))


#: Codec -> (transfer syntax, photometric interpretation, encoder of a frame).
_SYNTAXES: Mapping[str, tuple[uid.UID, str, Callable[[Pixels], bytes] | None]] = {
    "native": (uid.ExplicitVRLittleEndian, "RGB", None),
    "JPEG": (uid.JPEGBaseline8Bit, "YBR_FULL_422", lambda f: simplejpeg.encode_jpeg(f, 90, "RGB", "422")),
    "JPEG 2000": (uid.JPEG2000Lossless, "YBR_RCT", _jpeg2000),
    "JPEG-LS": (uid.JPEGLSLossless, "RGB", lambda f: bytes(imagecodecs.jpegls_encode(f))),
    "RLE": (uid.RLELossless, "RGB", _rle),
}


def write_dicom(folder: Path, levels: Iterable[Pixels], tile_px: int, spacing_um: float, codec: str) -> Path:
    """Write a file per level, in TILED_FULL order, each a quarter of the side of the one before."""
    series = str(uid.generate_uid(entropy_srcs=["slide2vec", codec]))[:40]
    for number, pixels in enumerate(levels):
        path = folder / f"level-{number}.dcm"
        _write_level(path, pixels, tile_px, spacing_um * 4**number, f"{series}.{number + 1}", series, codec)
    return folder / "level-0.dcm"


def _write_level(
    path: Path, pixels: Pixels, tile_px: int, spacing_um: float, instance: str, series: str, codec: str
) -> None:
    transfer, photometric, encode = _SYNTAXES[codec]
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % tile_px), (0, -width % tile_px), (0, 0)), mode="edge")
    corners = [(y, x) for y in range(0, height, tile_px) for x in range(0, width, tile_px)]
    frames = [np.ascontiguousarray(padded[y : y + tile_px, x : x + tile_px]) for y, x in corners]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = uid.UID(instance), transfer
    file = FileDataset(path, {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, instance
    file.Modality, file.SeriesInstanceUID, file.StudyInstanceUID = "SM", series, f"{series}.9"
    file.FrameOfReferenceUID = f"{series}.8"
    file.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE" if instance.endswith(".1") else "RESAMPLED"]
    file.Rows = file.Columns = tile_px
    file.TotalPixelMatrixColumns, file.TotalPixelMatrixRows = width, height
    file.ImagedVolumeWidth, file.ImagedVolumeHeight = (side * spacing_um / 1000 for side in (width, height))
    file.ImagedVolumeDepth = 0.001
    file.NumberOfFrames, file.SamplesPerPixel, file.PlanarConfiguration = len(frames), 3, 0
    file.PhotometricInterpretation = photometric
    file.BitsAllocated = file.BitsStored = 8
    file.HighBit, file.PixelRepresentation = 7, 0
    file.DimensionOrganizationType, file.NumberOfOpticalPaths = "TILED_FULL", 1
    file.TotalPixelMatrixFocalPlanes = 1
    file.LossyImageCompression = "01" if codec == "JPEG" else "00"
    measures, shared, optics, origin = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [spacing_um / 1000] * 2, 0.001
    shared.PixelMeasuresSequence = [measures]
    optics.OpticalPathIdentifier = "0"
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
    file.SharedFunctionalGroupsSequence, file.OpticalPathSequence = [shared], [optics]
    file.TotalPixelMatrixOriginSequence = [origin]
    if encode is None:
        file.PixelData = b"".join(frame.tobytes() for frame in frames)
    else:
        file.PixelData = encapsulate([encode(frame) for frame in frames])
        file["PixelData"].is_undefined_length = True
    file["PixelData"].VR = "OB"
    file.save_as(path, enforce_file_format=True)
