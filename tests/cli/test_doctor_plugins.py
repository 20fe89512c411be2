"""What `slide2vec doctor` says of plug-ins: those that work, and why others do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from slide2vec import plugins
from slide2vec.cli import doctor_plugins

ENTRY_POINTS = """
[slide2vec.encoders]
good-encoders = brought_here:register
bad-encoders = brought_here:fail

[slide2vec.readers]
ppm = brought_here:Reader
tiff = brought_here:Reader
gone = not_there_at_all:Reader
busy = brought_here:busy

[slide2vec.segmenters]
half = brought_here:HALF

[slide2vec.formats]
npy = brought_here
"""
MODULE = """
class Reader:
    def _read_box(self): ...
    def close(self): ...

class HALF:
    names = ("tissue",)

def unavailable():
    return None
def register(): ...
def fail():
    raise KeyError("no  licence\\nserver")
def write(file, content): ...
def read(path, names, most): ...
def __getattr__(name):
    raise SystemExit(f"{name} is closed today")
"""


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "brought_here.py").write_text(MODULE)
    info = tmp_path / "brought-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.providers.cache_clear()
    registry: plugins.Registry[object] = plugins.Registry(doctor_plugins.ENCODERS)
    monkeypatch.setattr("slide2vec.recipes.list_encoder_provider_diagnostics", registry.diagnostics)
    yield
    plugins.providers.cache_clear()


@pytest.mark.usefixtures("_installed")
def test_each_is_listed_with_its_problem(run) -> None:
    found = {
        (each["kind"], each["name"]): each
        for each in json.loads(run("doctor", "--json").stdout)["plugins"]
        if each["package"] == "brought 1.5"
    }
    problems = {name: each["problem"] for name, each in found.items()}
    assert problems == {
        ("encoder", "bad-encoders"): "KeyError: 'no licence\\nserver'",
        ("encoder", "good-encoders"): None,
        ("reader", "busy"): "SystemExit: busy is closed today",
        ("reader", "gone"): "ModuleNotFoundError: No module named 'not_there_at_all'",
        ("reader", "ppm"): None,
        ("reader", "tiff"): "tiff is a name of slide2vec's own, which is used",
        ("segmenter", "half"): "it has no spacing_um, segment",
        ("format", "npy"): None,
    }
    assert found["reader", "gone"]["provider"] == "not_there_at_all:Reader"


@pytest.mark.usefixtures("_installed")
def test_people_read_it(run) -> None:
    text = " ".join(run("doctor").stdout.split())
    assert "Plug-ins of installed packages" in text and "ready, of brought 1.5" in text
    assert "reader gone left out: ModuleNotFoundError" in text
