from __future__ import annotations

import re
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openslide
import pytest

from slide2vec.errors import ConfigError, ExtraMissingError, SlideReadError
from slide2vec.readers import SlideReader, asap, backends, cucim, open_slide, vips
from slide2vec.slides import as_slide


def test_importing_readers_loads_no_library() -> None:
    code = (
        "import sys, slide2vec.readers; "
        "print([n for n in ('cucim', 'openslide', 'pyvips', 'cv2', 'torch') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_unknown_backend(jpeg_pyramid: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean openslide"):
        open_slide(as_slide(jpeg_pyramid), "openslides")


@pytest.mark.parametrize(
    ("module", "name", "remedy"),
    [
        (cucim, "cucim", "[cucim]"),
        (vips, "vips", "[vips]"),
        (asap, "asap", "https://github.com/computationalpathologygroup/ASAP/releases"),
    ],
)
def test_a_missing_extra_is_named(
    module: ModuleType,
    name: str,
    remedy: str,
    jpeg_pyramid: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert remedy in str(backends()[name])
    with pytest.raises(ExtraMissingError, match=re.escape(remedy)):
        open_slide(as_slide(jpeg_pyramid), name)
    caplog.set_level("INFO", "slide2vec.readers")
    with open_slide(as_slide(jpeg_pyramid)) as reader:
        assert reader.backend != name


class FakeImage:
    """ASAP's MultiResolutionImage as its documentation describes it, over OpenSlide's pixels."""

    def __init__(self, path: str) -> None:
        self.slide: Any = openslide.OpenSlide(path)
        self.closed = 0

    def getNumberOfLevels(self) -> int:
        return int(self.slide.level_count)

    def getLevelDimensions(self, level: int) -> list[int]:
        return list(self.slide.level_dimensions[level])

    def getLevelDownsample(self, level: int) -> float:
        return float(self.slide.dimensions[0] / self.slide.level_dimensions[level][0])

    def getSpacing(self) -> list[float]:
        return [0.5, 0.5]

    def getUCharPatch(self, x: int, y: int, width: int, height: int, level: int) -> np.ndarray:
        if width > 10_000:
            raise RuntimeError("Bad memory allocation")
        downsample = self.getLevelDownsample(level)
        left, top = int(x / downsample), int(y / downsample)
        whole = np.asarray(self.slide.read_region((0, 0), level, self.slide.level_dimensions[level]))
        return whole[top : top + height, left : left + width, :3]

    def close(self) -> None:
        self.closed += 1


class FakeReader:
    def open(self, path: str) -> FakeImage | None:
        return FakeImage(path) if path.endswith(".tif") else None


@pytest.fixture
def fake_asap(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("multiresolutionimageinterface")
    module.MultiResolutionImageReader = FakeReader  # type: ignore[attr-defined]
    module.__spec__ = util.spec_from_loader(module.__name__, loader=None)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fake_asap")
def test_asap_reads_like_openslide(jpeg_pyramid: Path) -> None:
    slide = as_slide(jpeg_pyramid)
    with open_slide(slide, "asap") as reader, open_slide(slide, "openslide") as other:
        assert isinstance(reader, SlideReader)
        assert (reader.backend, reader.spacing_um) == ("asap", 0.5)
        assert reader.downsamples == other.downsamples
        for level in range(3):
            for location in [(0, 0), (33, 41), (-10, -20), (390, 290)]:
                mine, theirs = (r.read_region(location, level, (30, 20)) for r in (reader, other))
                np.testing.assert_array_equal(mine, theirs)
        reader.close()
        reader.close()
        with pytest.raises(SlideReadError, match="was closed"):
            reader.read_region((0, 0), 0, (8, 8))
