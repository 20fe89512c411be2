"""Only plain files are opened, and nothing is waited for; locks follow no links."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slide2vec.cohort.lock import LOCK_NAME, holder, output_lock
from slide2vec.compile.store import EngineStore
from slide2vec.errors import OutputError
from slide2vec.files import open_plain, plain_stat
from slide2vec.files.scratch import private_folder


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


SPECIAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "directory": (Path.mkdir, "is a directory, not a file"),
    "socket": (bound_socket, "is a socket, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "loop": (lambda path: path.symlink_to(path), "Too many levels"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "missing": (lambda path: None, "No such file"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_plain_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    make, said = SPECIAL[kind]
    make(path := Path("a"))
    with pytest.raises(OSError, match=said), open_plain(path):
        pass
    with pytest.raises(OSError, match=said):
        plain_stat(path)


def test_nul_in_a_path() -> None:
    with pytest.raises(OSError, match="is no path"), open_plain(Path("a\0b")):
        pass


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    with open_plain(tmp_path / "b") as file:
        assert file.read() == b"content"


def test_the_lock_of_an_output_directory_follows_no_link(tmp_path: Path) -> None:
    (victim := tmp_path / "victim").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_NAME).symlink_to(victim)
    with pytest.raises(OutputError, match="is a link, which is not followed"), output_lock(tmp_path / "out"):
        pass
    assert holder(tmp_path / "out") is None and victim.read_text() == "mine"


def test_the_lock_of_an_output_directory_is_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK_NAME)
    with pytest.raises(OutputError, match="is a named pipe"), output_lock(tmp_path):
        pass


def test_the_locks_of_engines_and_of_staged_slides_follow_no_link(tmp_path: Path) -> None:
    (victim := tmp_path / "victim").write_text("mine")
    (tmp_path / ".engine.lock").symlink_to(victim)
    with pytest.raises(OutputError, match="is a link"), EngineStore(tmp_path).building("engine"):
        pass
    host = "".join(c if c.isalnum() or c in "._" else "_" for c in socket.gethostname())
    (planted := tmp_path / f"slide2vec-stage-{host}-0.lock").symlink_to(victim)
    with private_folder(tmp_path) as folder:
        assert folder.is_dir()
    assert planted.is_symlink() and victim.read_text() == "mine"
