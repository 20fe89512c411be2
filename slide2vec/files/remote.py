"""Files behind URLs: s3://, gs:// and whatever else fsspec opens, through universal-pathlib.

A `upath.UPath` answers the methods of `pathlib.Path` that slide2vec uses, but is none: where both may
come, annotations say Path. Local paths never import fsspec.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast
from uuid import uuid4

from slide2vec.errors import ConfigError, ExtraMissingError, Slide2VecError
from slide2vec.installation import add_extra

if TYPE_CHECKING:
    from upath import UPath

__all__ = [
    "as_os_errors",
    "as_path",
    "create",
    "entries",
    "is_remote",
    "local",
    "make_folder",
    "names_below",
    "upload",
]

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)
#: What pathlib makes of a URL.
_MANGLED = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")
_LOCAL = ("file", "local")
#: Object stores. They publish an object when the whole of it has arrived, have buckets, and no folders.
_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")


def as_path(given: object) -> Path:
    """What a user gives for a path: a path of this machine, or a URL as a UPath, which does as one.

    `file://` URLs become plain paths.

    Raises:
        ConfigError: it is neither, the URL's protocol is unknown, or it names no bucket.
        ExtraMissingError: fsspec, or its package for this protocol, is not installed.
    """
    if is_remote(given):
        return given
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(f"a path or a URL is needed, got {given!r}")
    text = str(os.fspath(given))
    if "::" in text and "://" in text:
        raise ConfigError(f"{text}: chained URLs are not supported; give that of the folder itself")
    url = _URL.fullmatch(text)
    if url is None:
        if _MANGLED.match(text):
            raise ConfigError(f'{text} has lost a slash: write URLs as text, "s3://bucket/folder"')
        return Path(given)
    if url[1] in _LOCAL:
        return _of_this_machine(text, url[2])
    # The one place where a UPath is passed off as a Path: see above.
    return cast(Path, _opened(text, url[1], url[2]))


def _of_this_machine(text: str, path: str) -> Path:
    if not path.startswith("/"):
        raise ConfigError(f"{text} names no absolute path: write file:///folder/…")
    return Path(path)


def _opened(text: str, protocol: str, rest: str) -> UPath:
    if protocol in _STORES and not re.match(r"[^/]", rest):
        raise ConfigError(f"{text} names no bucket: write {protocol}://bucket/folder")
    try:
        from fsspec import get_filesystem_class  # type: ignore[import-untyped]
        from upath import UPath

        get_filesystem_class(protocol)
        # What another run, on another machine, has written since a folder was listed must be seen.
        options: dict[str, Any] = {"use_listings_cache": False} if protocol in _STORES else {}
        made: UPath = UPath(text, **options)
        return made
    except ImportError as error:
        raise ExtraMissingError(
            f"{text} cannot be opened ({error}): s3:// and gs:// need {add_extra('cloud')}; other "
            "protocols the fsspec package of theirs besides"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{text}: fsspec knows no protocol {protocol}://; s3://, gs:// and file:// are common"
        ) from error


def is_remote(path: object) -> TypeGuard[Path]:
    """Whether it is behind a URL."""
    upath = sys.modules.get("upath")  # without it, nobody has made one
    return upath is not None and isinstance(path, upath.UPath) and not isinstance(path, os.PathLike)


@contextmanager
def as_os_errors(path: Path) -> Iterator[None]:
    """What clients of object stores raise (no credentials, no connection) becomes OSError.

    Nothing changes for a path of this machine.
    """
    try:
        yield
    except (OSError, Slide2VecError):
        raise
    # botocore, google-auth, aiohttp and paramiko have no common class, and none of them is imported here.
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def entries(folder: Path) -> list[Path]:
    """What is in a folder, in one listing; nothing where there is none.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        with as_os_errors(folder):
            return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def names_below(folder: Path, ending: str) -> list[str]:
    """Names of files that end so, without that, sorted: in a folder ("a"), and in folders in it ("tumor/a").

    Raises:
        OSError: a folder cannot be listed.
    """
    there = entries(folder)
    own = {path.name.removesuffix(ending) for path in there if path.name.endswith(ending)}
    found = set(own)
    for path in there:
        parts = path.name.split(".")
        beside = any(".".join(parts[:count]) in own for count in range(1, len(parts)))
        if not (path.name.endswith(ending) or beside or path.name.startswith(".")) and path.is_dir():
            below = (each.name for each in entries(path))
            found |= {f"{path.name}/{name.removesuffix(ending)}" for name in below if name.endswith(ending)}
    return sorted(found)


@contextmanager
def local(path: Path) -> Iterator[Path]:
    """The path itself, or a copy of a remote file, removed when the block ends.

    Raises:
        OSError: the remote file is not there, or cannot be had.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="slide2vec-") as folder:
        copy = Path(folder) / path.name
        with as_os_errors(path):
            _fs(path).get_file(_key(path), str(copy))
        yield copy


def upload(file: Path, path: Path) -> None:
    """Publish a local file under a remote name, as a whole.

    Raises:
        OSError: it cannot be written; what was there before still is, or nothing.
    """
    fs, key = _fs(path), _key(path)
    with as_os_errors(path):
        if _is_whole(path):
            fs.put_file(str(file), key)
            return
        make_folder(path.parent)
        beside = f"{key}.{uuid4().hex}.partial"
        try:
            fs.put_file(str(file), beside)
            fs.mv(beside, key)
        except BaseException:
            with suppress(Exception):
                fs.rm_file(beside)
            raise


def create(path: Path, content: bytes) -> bool:
    """Write a small remote file that is not there yet; False where another process was faster.

    Stores and versions of fsspec that know no exclusive creation write it all the same.

    Raises:
        OSError: it cannot be written.
    """
    fs, key = _fs(path), _key(path)
    make_folder(path.parent)
    try:
        fs.pipe_file(key, content, mode="create")
    except FileExistsError:
        return False
    except Exception:  # not known to this store, or no connection: then this fails, too
        with as_os_errors(path):
            fs.pipe_file(key, content)
    return True


def make_folder(path: Path) -> None:
    """Make a remote folder, and those above it, where there are folders."""
    if not _is_whole(path):
        with as_os_errors(path):
            _fs(path).makedirs(_key(path), exist_ok=True)


def _is_whole(path: Any) -> bool:
    """Whether a file appears when all of it is written."""
    return path.protocol in (*_STORES, "memory")


def _fs(path: Any) -> Any:
    return path.fs


def _key(path: Any) -> str:
    return str(path.path)
