"""What earlier versions read wrongly without an error, so that embeddings which they wrote can be replaced.

Measured with slide2vec as of commit 2652951 (libvips 8.18.7 as pyvips-binary brings it, OpenSlide
4.0.1, cuCIM 26.10) on files of every compression, bit depth and photometric interpretation that
tifffile writes. Tiles whose damage a back end did not notice cannot be told from the tags.
"""

from __future__ import annotations

from slide2vec.readers.probe import Probe, TiffLevel

__all__ = ["READING", "misread_by_earlier_versions"]

#: Of the code that reads pixels, kept with the identity of embeddings: those without it are of versions that
#: read some slides wrongly.
READING = 1

#: Of tiles compressed otherwise libvips gave black pixels (white of old-style JPEG): what it cannot decode
#: is no error to it unless fail_on="warning".
_VIPS_TILES = frozenset({"NONE", "JPEG", "LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "WEBP"})


def misread_by_earlier_versions(backend: str, probe: Probe) -> str | None:
    """Why what an earlier version read of a slide was wrong; None when it was right, as far as one knows.

    Args:
        backend: that it read with, as its sidecar says: "cucim", "vips", "openslide" or "asap".
        probe: what the slide is.

    Returns:
        A clause for a sentence that begins with "earlier versions", without a full stop.
    """
    if probe.kind == "dicom" and backend in {"cucim", "vips"}:
        return "took the TIFF directory in this DICOM file for the slide"
    return next((why for level in probe.levels if (why := _misread_level(backend, level))), None)


def _misread_level(backend: str, level: TiffLevel) -> str | None:
    if backend == "vips" and level.tile is not None and level.compression not in _VIPS_TILES:
        return f"read {level.compression} tiles with vips, which gives black or white for them"
    if backend == "openslide" and level.bits > 8:
        return f"read {level.bits} bits per channel with openslide, which keeps the highest 8 only"
    if backend == "openslide" and level.photometric in {"SEPARATED", "CIELAB"}:
        return f"read {level.photometric} colours with openslide, which gives black or other colours for them"
    if backend in {"vips", "cucim"} and level.photometric == "YCBCR" and level.compression != "JPEG":
        return f"read YCbCr in {level.compression} tiles with {backend}, which takes it for RGB"
    return None
