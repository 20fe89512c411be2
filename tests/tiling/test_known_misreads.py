from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from slide2vec.readers.probe import Probe, probe
from slide2vec.slides import as_slide
from slide2vec.tiling.known_misreads import misread_by_earlier_versions


@pytest.mark.parametrize(
    ("backend", "options", "why"),
    [
        ("vips", {"compression": "zstd"}, "black"),
        ("vips", {"compression": "lzma"}, "black"),
        ("vips", {"compression": "jpeg2000"}, "black"),
        ("vips", {"compression": "webp"}, None),
        ("vips", {"compression": "lzw"}, None),
        ("vips", {"compression": "zlib", "photometric": "ycbcr"}, "takes it for RGB"),
        ("cucim", {"compression": "zlib", "photometric": "ycbcr"}, "takes it for RGB"),
        ("openslide", {"compression": "zlib", "photometric": "ycbcr"}, None),
        ("openslide", {"compression": "zstd"}, None),
        ("openslide", {"compression": "zlib", "photometric": "cielab"}, "CIELAB"),
        ("cucim", {"compression": "zlib"}, None),
    ],
)
def test_what_was_misread(backend: str, options: dict[str, Any], why: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, np.zeros((64, 64, 3), np.uint8), tile=(64, 64), **{"photometric": "rgb", **options}
    )
    found = probe(as_slide(path))
    told = misread_by_earlier_versions(backend, found)
    assert (why in (told or "")) if why else told is None


def test_what_was_misread_of_dicom() -> None:
    found = Probe(path=Path("a.dcm"), origin=Path("a.dcm"), name="a", kind="dicom")
    assert "TIFF directory" in (misread_by_earlier_versions("cucim", found) or "")
    assert misread_by_earlier_versions("openslide", found) is None
