"""Paths and URLs as users give them; files published as a whole behind URLs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from slide2vec.errors import ConfigError, ExtraMissingError, OutputError
from slide2vec.files import as_path, atomic_path, is_remote, local, remove, remove_partial


@pytest.fixture(autouse=True)
def memory() -> MemoryFileSystem:
    """An empty memory://."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return MemoryFileSystem()


@pytest.mark.parametrize("given", ["runs/a", Path("runs/a"), "/runs/a", "a:b/c", "C:/runs", "run s3://x"])
def test_paths_stay_paths(given: str | Path) -> None:
    path = as_path(given)
    assert type(path) is type(Path()) and path == Path(given) and not is_remote(path)


@pytest.mark.parametrize("url", ["file:///data/run", "local:///data/run"])
def test_file_urls_are_paths(url: str) -> None:
    assert as_path(url) == Path("/data/run")


@pytest.mark.parametrize("url", ["s3://bucket/a/b", "gs://bucket/a/b", "memory://bucket/a/b"])
def test_urls_answer_as_paths_do(url: str) -> None:
    path = as_path(url)
    assert is_remote(path) and as_path(path) is path
    assert str(path / "s.pt") == f"{url}/s.pt"
    assert (path.name, path.parent.name, (path / "s.pt").suffix) == ("b", "a", ".pt")
    assert pickle.loads(pickle.dumps(path)) == path  # workers are given it


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("s3://", "names no bucket: write s3://bucket/folder"),
        ("gs:///folder", "names no bucket"),
        ("nowhere://bucket/a", "no protocol nowhere://"),
        ("s3:/bucket/a", "has lost a slash"),
        (Path("s3://bucket/a"), "has lost a slash"),
        ("file://folder/a", "no absolute path"),
        ("simplecache::s3://bucket/a", "chained"),
        (3, "a path or a URL is needed, got 3"),
    ],
)
def test_wrong_urls_are_told(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        as_path(given)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(ExtraMissingError, match=r"\[cloud\]"):
        as_path("s3://bucket/a")


def test_local_paths_load_no_fsspec(tmp_path: Path) -> None:
    code = f"""
import sys
from slide2vec.config import ExecutionOptions
from slide2vec.cohort.lock import output_lock
from slide2vec.files import atomic_path
execution = ExecutionOptions(output_dir={str(tmp_path)!r})
with output_lock(execution.output_dir), atomic_path(execution.output_dir / "a") as temporary:
    temporary.write_text("a")
print(*[name for name in ("fsspec", "upath", "s3fs", "tempfile") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tempfile"]


def test_a_file_appears_when_the_block_ends(memory: MemoryFileSystem) -> None:
    path = as_path("memory://bucket/run/a.txt")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.name == "a.txt" and not memory.exists("/bucket/run/a.txt")
    assert path.read_text() == "new" and memory.find("/bucket") == ["/bucket/run/a.txt"]
    assert not temporary.exists() and not temporary.parent.exists()


def test_a_failed_block_publishes_nothing(memory: MemoryFileSystem) -> None:
    with pytest.raises(ValueError, match="stop"), atomic_path(as_path("memory://bucket/a")) as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert not memory.find("/bucket") and not temporary.parent.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("NoCredentialsError, say")])
def test_failed_uploads_are_output_errors(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def put_file(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    with (
        pytest.raises(OutputError, match=r"memory://bucket/a cannot be written: .*(No space|NoCredentials)"),
        atomic_path(as_path("memory://bucket/a")) as temporary,
    ):
        temporary.write_text("a")


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """memory:// does as sftp does: it shows files while they are written, and makes no folders by itself."""
    about = SimpleNamespace(uploads=[], fails=False)

    def put_file(fs: MemoryFileSystem, lpath: str, rpath: str, **options: Any) -> None:
        assert fs.isdir(fs._parent(rpath))
        about.uploads.append(rpath)
        content = Path(lpath).read_bytes()
        fs.pipe_file(rpath, content[:1])
        if about.fails:
            raise OSError("the connection is gone")
        fs.pipe_file(rpath, content)

    monkeypatch.setattr("slide2vec.files.remote._is_whole", lambda path: False)
    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    return about


def test_file_systems_get_a_temporary_name_and_a_move(
    folders: SimpleNamespace, memory: MemoryFileSystem
) -> None:
    path = as_path("memory://bucket/run/a.txt")
    for text in ("old", "new"):
        with atomic_path(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text and memory.find("/bucket") == ["/bucket/run/a.txt"]
    assert len(folders.uploads) == 2
    assert all(name.startswith("/bucket/run/a.txt.") for name in folders.uploads)


def test_a_broken_connection_leaves_the_old_file(folders: SimpleNamespace, memory: MemoryFileSystem) -> None:
    path = as_path("memory://bucket/run/a.txt")
    with atomic_path(path) as temporary:
        temporary.write_text("old")
    folders.fails = True
    with pytest.raises(OutputError, match="connection is gone"), atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old" and memory.find("/bucket") == ["/bucket/run/a.txt"]


def test_local_copies_are_removed(tmp_path: Path) -> None:
    path = as_path("memory://bucket/a.pt")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"abc")
    with local(path) as copy:
        assert copy.read_bytes() == b"abc" and copy.suffix == ".pt"
    assert not copy.exists()
    with local(tmp_path / "b") as same:
        assert same == tmp_path / "b"
    with pytest.raises(FileNotFoundError), local(path.with_name("c.pt")):
        raise AssertionError("not reached")


def test_remove(memory: MemoryFileSystem) -> None:
    path = as_path("memory://bucket/run/a")
    remove(path)
    with atomic_path(path) as temporary:
        temporary.write_text("a")
    remove(path)
    remove_partial(path.parent)
    assert not memory.find("/bucket")
