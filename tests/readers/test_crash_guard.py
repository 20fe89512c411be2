"""Files are first opened in a process that may die of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from slide2vec.errors import BackendError, SlideOpenError
from slide2vec.readers import crash_guard, open_slide
from slide2vec.readers.openslide import OpenslideReader
from slide2vec.readers.probe import Probe
from slide2vec.slides import as_slide

READERS = """
import os, time

class Reader:
    backend = "fake"
    level_dimensions, downsamples = [(100, 100)], [1.0]
    def __init__(self, probe): pass
    def __enter__(self): return self
    def __exit__(self, *args): pass
    def read_region(self, *args): pass

class Aborts(Reader):
    def __init__(self, probe): os.abort()

class DiesReading(Reader):
    def read_region(self, *args): os._exit(3)

class Hangs(Reader):
    def __init__(self, probe): time.sleep(100)

class Grows(Reader):
    def __init__(self, probe):
        self.much = [bytearray(b"x" * (1 << 26)) for _ in range(12)]
        time.sleep(100)

class Raises(Reader):
    def __init__(self, probe): raise RuntimeError("told where it is opened")

class SeesGpus(Reader):
    def __init__(self, probe):
        if os.environ.get("CUDA_VISIBLE_DEVICES", "all"): os._exit(4)

class Prints(Reader):
    def __init__(self, probe): os.write(1, b"noise")
"""


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Readers that do what libraries do."""
    folder = tmp_path_factory.mktemp("readers")
    (folder / "fake_readers.py").write_text(READERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        crash_guard._process.close()  # it is to know the folder
        yield import_module("fake_readers")
        crash_guard._process.close()


@pytest.fixture
def file(tmp_path: Path) -> Probe:
    return Probe(path=tmp_path / "a", origin=tmp_path / "a", name="a", kind="unrecognised")


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        ("Aborts", r"fake crashed \(SIGABRT\) while opening it"),
        ("DiesReading", "fake ended its process with 3"),
        ("Hangs", r"fake hung \(it took more than 2 s\)"),
        ("Grows", "fake took more than 400 MB of memory"),
    ],
)
def test_a_death_is_the_error_of_that_file(
    reader: str, message: str, readers: Any, file: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_guard.check_in_child(readers.Reader, file)  # so that the time limit is not of its start
    monkeypatch.setattr(crash_guard, "SECONDS", 2.0)
    monkeypatch.setattr(crash_guard, "BYTES", 400 << 20)
    with pytest.raises(BackendError, match=message):
        crash_guard.check_in_child(getattr(readers, reader), file)
    monkeypatch.undo()
    crash_guard.check_in_child(readers.Reader, file)  # by a new process


@pytest.mark.parametrize("reader", ["Reader", "Raises", "Prints", "SeesGpus"])
def test_a_process_that_lives_is_kept(reader: str, readers: Any, file: Probe) -> None:
    crash_guard.check_in_child(readers.Reader, file)
    process = crash_guard._process._child
    crash_guard.check_in_child(getattr(readers, reader), file)
    crash_guard.check_in_child(readers.Reader, file)
    assert process is not None and crash_guard._process._child is process


def test_what_ends_openslide_is_an_error(broken_dir: Path) -> None:
    """A file for which it asks for terabytes, had its claims not been looked at."""
    path = broken_dir / "f1-363-crash-ifd_bytes.tif"
    with pytest.raises(BackendError, match="openslide crashed"):
        OpenslideReader(Probe(path=path, origin=path, name="a", kind="unrecognised"))


def test_auto_goes_on_and_names_the_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.scn").write_bytes(b"no slide" * 100)
    monkeypatch.setattr(crash_guard._process, "run", lambda *_: "crashed (SIGSEGV)")
    with pytest.raises(SlideOpenError, match=r"no back end reads .*openslide crashed \(SIGSEGV\)"):
        open_slide(as_slide(tmp_path / "a.scn"))


def test_our_own_readers_need_no_process(jpeg_pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(crash_guard._process, "run", refuse)
    with open_slide(as_slide(jpeg_pyramid)) as reader:
        assert reader.backend == "tiff"


def test_it_ends_with_the_process_that_it_serves(reference_slide: Path) -> None:
    code = (
        "import os, sys\n"
        "from slide2vec.readers import crash_guard, open_slide\n"
        "from slide2vec.slides import as_slide\n"
        "open_slide(as_slide(sys.argv[1]), 'openslide').close()\n"
        "print(crash_guard._process._child.pid, "
        "*[n for n in ('torch', 'cucim') if n in sys.modules], flush=True)\n"
        "os._exit(0)\n"  # as if it had been killed: the other gets no message
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(reference_slide)], capture_output=True, text=True, check=True
    )
    pid = int(ended.stdout)
    for _ in range(200):
        if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
            return
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError(f"process {pid} is still there")
