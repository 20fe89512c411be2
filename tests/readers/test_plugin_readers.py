"""Readers of installed packages: what they have to be, and that their pixels are doubted like ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slide2vec.choices import BACKENDS, Home
from slide2vec.config import PreprocessingConfig
from slide2vec.errors import BackendError, ConfigError, SlideOpenError
from slide2vec.readers import Probe, PyramidReader, backends, open_and_use, open_slide
from slide2vec.readers.cross_check import compare_with_second_decoder
from slide2vec.readers.openslide import OpenslideReader
from slide2vec.slides import as_slide


class Greenish(OpenslideReader):
    """Gives other pixels than the file holds."""

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> Any:
        pixels = super()._read_box(level, x, y, width, height)
        pixels[..., 1] //= 2
        return pixels


class Faithful(OpenslideReader):
    """As OpenSlide."""


class Secret(PyramidReader):
    """Reads a vendor's files that slide2vec refuses."""

    def __init__(self, probe: Probe) -> None:
        if probe.path.suffix != ".isyntax":
            raise BackendError("no iSyntax")
        super().__init__(probe, [(64, 32)])

    def _read_box(self, level: int, x: int, y: int, width: int, height: int) -> Any:
        return np.full((height, width, 3), 7, np.uint8)

    def close(self) -> None:
        pass


class Careless(OpenslideReader):
    def __init__(self, probe: Probe) -> None:
        raise ZeroDivisionError("oops")


NO_READER = 3


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has these names of this module be readers of installed packages."""

    def install(**names: str) -> None:
        theirs = {key: Home(__name__, name, brought_by=f"package of {key}") for key, name in names.items()}
        monkeypatch.setitem(vars(BACKENDS), "theirs", theirs)
        monkeypatch.setitem(__import__("sys").modules, __name__, _this())

    return install


def _this() -> Any:
    """This module, under whatever name pytest has imported it."""
    from types import SimpleNamespace

    return SimpleNamespace(**globals())


def test_wrong_pixels_are_contradicted(installed: Callable[..., None], reference_slide: Path) -> None:
    installed(greenish="Greenish", faithful="Faithful")
    slide = as_slide(reference_slide)

    def use(reader: Any) -> None:
        compare_with_second_decoder(reader, 0, np.empty((0, 2)))

    with pytest.raises(BackendError, match='backend "greenish" cannot be used: it gives other pixels than'):
        open_and_use(slide, "greenish", None, use)
    reader, _ = open_and_use(slide, "faithful", None, use)
    with reader:
        assert reader.backend == "faithful"


def test_auto_takes_ours_before_theirs(installed: Callable[..., None], reference_slide: Path) -> None:
    installed(greenish="Greenish")
    with open_slide(as_slide(reference_slide)) as reader:
        assert reader.backend in BACKENDS.ours
    assert list(backends()) == [*BACKENDS.ours, "greenish"] and backends()["greenish"] is None


def test_a_file_that_ours_refuse_is_theirs(installed: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "a.isyntax"
    path.write_bytes(b"anything")
    with pytest.raises(SlideOpenError, match=r"a\.isyntax is a Philips iSyntax file, which no back end"):
        open_slide(as_slide(path))
    installed(secret="Secret")
    with open_slide(as_slide(path)) as reader:
        assert reader.backend == "secret"
        assert (reader.read_region((60, 0), 0, (8, 4))[0, :, 0] == [7, 7, 7, 7, 255, 255, 255, 255]).all()
    with pytest.raises(BackendError, match='"openslide" cannot be used: it is a Philips iSyntax file'):
        open_slide(as_slide(path), "openslide")
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG....")
    with pytest.raises(SlideOpenError, match="is a PNG image, not a slide"):
        open_slide(as_slide(picture))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Careless", "package of broken: ZeroDivisionError: oops"),
        ("NO_READER", "package of broken is no subclass of slide2vec.readers.PyramidReader"),
        ("Missing", "package of broken cannot be loaded: AttributeError"),
    ],
)
def test_a_broken_one_stops_no_slide(
    installed: Callable[..., None], reference_slide: Path, tmp_path: Path, name: str, message: str
) -> None:
    installed(broken=name)
    with open_slide(as_slide(reference_slide)) as reader:
        assert reader.backend in BACKENDS.ours
    with pytest.raises((BackendError, ImportError), match=message):
        open_slide(as_slide(reference_slide), "broken")
    unknown = tmp_path / "unknown.bin"
    unknown.write_bytes(b"nothing that anybody reads")
    with pytest.raises(SlideOpenError, match="no back end reads"):
        open_slide(as_slide(unknown))


def test_names_are_checked(installed: Callable[..., None], reference_slide: Path) -> None:
    installed(secret="Secret")
    assert PreprocessingConfig(backend="secret").backend == "secret"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'asap' or 'secret', got 'secre'\. Did you mean secret"):
        PreprocessingConfig(backend="secre")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got 'secre'"):
        open_slide(as_slide(reference_slide), "secre")
