"""A few tiles of every slide are compared with what an independent decoder makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from slide2vec.choices import BACKENDS
from slide2vec.config import PreprocessingConfig
from slide2vec.errors import BackendError, Contradiction, SlideReadError
from slide2vec.readers import backends, cross_check, open_slide
from slide2vec.readers.cross_check import compare_with_second_decoder
from slide2vec.slides import as_slide
from slide2vec.stream import plan_slide

CENTRES = np.array([[100.0, 100.0], [300.0, 100.0], [350.0, 250.0]])


def compared(reader: Any, level: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many tiles were decoded by the witness without a contradiction."""
    found: list[Any] = []
    decode = cross_check._decoded
    monkeypatch.setattr(cross_check, "_decoded", lambda *args: found.append(decode(*args)) or found[-1])
    compare_with_second_decoder(reader, level, np.empty((0, 2)))
    monkeypatch.undo()
    return sum(pixels is not None for pixels in found)


@pytest.mark.parametrize(
    "name",
    [
        "CMU-1-Small-Region.svs",
        "CMU-1-Small-Region.webp.tiff",
        "XYC-jpeg.ome.tiff",
        "aperio-jpeg-pyramid.svs",
        "generic-jpeg-bigtiff-pyramid.tiff",
        "generic-lzw-pyramid.tiff",
        "generic-pyramid.ome.tiff",
        "rationai-CMU-1-small.tiff",
    ],
)
def test_right_pixels_are_confirmed(
    name: str, real_slide: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every back end that reads the slide, at every level."""
    readers = 0
    for backend, missing in backends().items():
        if missing:
            continue
        try:
            reader = open_slide(as_slide(real_slide(name)), backend)
        except BackendError:
            continue
        with reader:
            readers += 1
            for level in range(len(reader.level_dimensions)):
                assert compared(reader, level, monkeypatch) == cross_check.COUNT
    assert readers


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zlib", "predictor": True},
        {"compression": "zstd"},
        {"compression": "lzw", "planarconfig": "separate"},
        {"compression": "webp"},
    ],
    ids=str,
)
def test_right_pixels_of_other_codings(
    options: dict[str, Any], tmp_path: Path, tiffs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = tiffs.picture()
    if "planarconfig" in options:
        pixels = np.moveaxis(pixels, 2, 0)
    tiled = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **tiled, **options)
    with open_slide(as_slide(tmp_path / "a.tif")) as reader:
        assert compared(reader, 0, monkeypatch) == cross_check.COUNT


def lying(read: Callable[..., Any]) -> Callable[..., Any]:
    """The pixels of a reader, one of them a grey level off."""

    def read_box(*args: int) -> Any:
        pixels = read(*args).copy()
        pixels[5, 7, 1] ^= 1
        return pixels

    return read_box


def test_one_grey_level_is_a_contradiction(jpeg_pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(as_slide(jpeg_pyramid)) as reader:
        compare_with_second_decoder(reader, 0, CENTRES)
        monkeypatch.setattr(reader, "_read_box", lying(reader._read_box))  # type: ignore[attr-defined]
        with pytest.raises(Contradiction, match=r"JPEG tile, level 0 at \(64, 64\) .* 1 grey levels apart"):
            compare_with_second_decoder(reader, 0, CENTRES)


def test_damage_is_no_contradiction(tmp_path: Path, tiffs: Any) -> None:
    def damage(tiles: list[bytes]) -> None:
        tiles[8] = bytes(len(tiles[8]))

    path = tiffs.write_jpeg(tmp_path / "damaged.tif", [tiffs.picture()], damage)
    with open_slide(as_slide(path)) as reader:
        with pytest.raises(SlideReadError):
            reader.read_region((64, 64), 0, (64, 64))
        compare_with_second_decoder(reader, 0, CENTRES)


def test_jpegs_whose_marker_contradicts_the_tags(real_slide: Callable[[str], Path]) -> None:
    """cuCIM and libvips take these for RGB: they are not given them, and would be contradicted."""
    for backend in ("cucim", "vips"):
        if backends()[backend] is None:
            with pytest.raises(BackendError, match="JFIF"):
                open_slide(as_slide(real_slide("XYC-jpeg.ome.tiff")), backend)


def test_auto_passes_on_and_plans_again(
    jpeg_pyramid: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=64)
    slide = as_slide(jpeg_pyramid)
    with open_slide(slide) as reader:
        first = reader.backend
    kind = BACKENDS[first].imported()
    read = kind._read_box
    monkeypatch.setattr(kind, "_read_box", lambda self, *args: lying(lambda *a: read(self, *a))(*args))
    plan = plan_slide(slide, config)
    plan.source.close()
    assert plan.source.backend == plan.tiling.backend != first
    assert f"not read with {first}: it gives other pixels than tifffile" in caplog.text
    with pytest.raises(BackendError, match=f'backend "{first}" cannot be used: it gives other pixels'):
        plan_slide(slide, config.updated(backend=first))
