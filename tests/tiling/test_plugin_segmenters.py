"""Segmenters of installed packages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slide2vec.choices import SEGMENTATION_METHODS, Home
from slide2vec.config import PreprocessingConfig, SegmentationConfig
from slide2vec.errors import ConfigError, SlideError
from slide2vec.readers import open_slide
from slide2vec.slides import as_slide
from slide2vec.tiling import tile_slide


class Half:
    """The left half is tissue, with the number 2; what lies in the right half is a mark."""

    names: tuple[str, ...] = ("glass", "mark", "tissue")
    spacing_um = 4.0

    def segment(self, thumbnail: Any, spacing_um: float) -> Any:
        labels = np.ones(thumbnail.shape[:2], np.uint8)
        labels[:, : labels.shape[1] // 2] = 2
        self.seen = thumbnail.shape, spacing_um
        return labels


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> Half:
    made = Half()
    monkeypatch.setitem(sys.modules, "package_of_half", SimpleNamespace(HALF=made))  # type: ignore[misc]
    home = Home("package_of_half", "HALF", brought_by="package of half")
    monkeypatch.setitem(vars(SEGMENTATION_METHODS), "theirs", {"half": home})
    return made


def tiled(slide: Path) -> Any:
    config = PreprocessingConfig(segmentation={"method": "half"}, tissue_threshold=0.9)  # type: ignore[arg-type]
    with open_slide(as_slide(slide)) as reader:
        return tile_slide(reader, as_slide(slide), 0.499, config.resolved(0.499, 224))[0]


def test_only_what_it_names_tissue_makes_tiles(half: Half, reference_slide: Path) -> None:
    tiling = tiled(reference_slide)
    width, height = tiling.dimensions
    # nine tenths of a tile lie on tissue, whose edge is that of a pixel of the thumbnail (8 px here)
    assert tiling.x.max() + 0.9 * 224 <= width / 2 + 8 < tiling.x.max() + 2 * 224
    assert tiling.y.max() + 224 > height - 224 and tiling.segmentation.method == "half"
    (rows, columns, _), spacing = half.seen
    assert spacing == pytest.approx(4.0, rel=0.02)
    assert (columns, rows) == pytest.approx((width / 8.016, height / 8.016), abs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("glass", "mark")}, "half has no label 'tissue', only glass, mark"),
        ({"segment": lambda picture, spacing: picture[..., 0] > 3}, "gives labels bool of shape"),
        ({"segment": lambda picture, spacing: picture}, r"of shape \(\d+, \d+, 3\), not uint8 of"),
        ({"names": ("glass", "tissue")}, "gives label 2, and has names for 0 to 1"),
    ],
)
def test_what_is_no_labels_is_told(
    half: Half, reference_slide: Path, change: dict[str, Any], message: str
) -> None:
    vars(half).update(change)
    with pytest.raises(SlideError, match=f"slide CMU-1-Small-Region: .*{message}"):
        tiled(reference_slide)


def test_it_takes_no_options_of_other_methods(half: Half) -> None:
    with pytest.raises(ConfigError, match="sthresh=20 is for another method than half"):
        SegmentationConfig(method="half", sthresh=20)  # type: ignore[arg-type]
