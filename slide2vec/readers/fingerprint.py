"""Fingerprints of a slide's files: taken before they are read, and compared with them afterwards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from slide2vec.files import as_os_errors, is_remote, open_plain, plain_stat
from slide2vec.readers.slide_files import slide_files

__all__ = ["FileIdentity", "Fingerprint", "Stamp", "fingerprint", "same_content", "stamps_of"]

Fingerprint: TypeAlias = Literal["ends", "whole"]
#: Size in bytes, times in ns of the last change of the content and of the inode, inode; of a remote file the
#: second time is 0 and the inode its store's version. (A file that was removed and written again may have the
#: inode, and by rsync or cp -p the time of its content, of the one before.)
Stamp: TypeAlias = tuple[int, int, int, int | str]

#: Read of each end of a file: slides are too large to be read whole, and a changed one differs there
#: (header, index, length).
_END_BYTES = 65_536
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class FileIdentity:
    """A slide, a mask or an archive as it was when it was looked at.

    Attributes:
        path: of the file that is named.
        content: what sidecars record, JSON-ready, see `fingerprint`.
        stamps: of all its files.
    """

    path: Path
    content: Mapping[str, Any]
    stamps: Mapping[Path, Stamp]

    @classmethod
    def of(
        cls,
        path: Path,
        how: Fingerprint = "ends",
        *,
        copy: Path | None = None,
        stamps: Mapping[Path, Stamp] | None = None,
    ) -> FileIdentity:
        """Take the fingerprint of a file and of those that belong to it.

        Args:
            how: digest the ends of each file, or the whole of it as well.
            copy: of the file, which is what is read; then `stamps` are those of the files themselves, from
                before they were copied.

        Raises:
            OSError: one cannot be read, or is no plain file.
        """
        if copy is not None and stamps is not None:
            return cls(path, fingerprint(copy, how), stamps)
        others = _companions(path)
        before = {each: _stamp(each) for each in (path, *others)}
        return cls(path, _fingerprint(path, others, how), before)

    def is_as_it_was(self) -> bool:
        """Whether no file of it looks changed (size, times, inode). Reads nothing."""
        try:
            return all(_stamp(path) == stamp for path, stamp in self.stamps.items())
        except OSError:
            return False

    def change(self) -> str | None:
        """How it has changed, in words; None where its content is the same, even if its files were touched.

        Reads its files only where they look changed.
        """
        if self.is_as_it_was():
            return None
        try:
            now = fingerprint(self.path, "whole" if "whole" in self.content else "ends")
        except FileNotFoundError as error:
            return f"{error.filename or self.path} is gone"
        except OSError as error:
            return f"it cannot be read any more ({error})"
        return None if same_content(self.content, now) else "it holds something else now"


def fingerprint(path: Path, how: Fingerprint = "ends") -> dict[str, Any]:
    """Size and digest of the ends of a file: the same file elsewhere has the same one.

    "whole" adds a digest of all of it. Of a slide in several files (MRXS, a DICOM series) `companions` has
    the number and the digest of the others, whatever their names.

    Raises:
        OSError: a file cannot be read, or is no plain one.
    """
    return _fingerprint(path, _companions(path), how)


def _fingerprint(path: Path, companions: Iterable[Path], how: Fingerprint) -> dict[str, Any]:
    made = _of_file(path, how)
    others = sorted((_of_file(other, how) for other in companions), key=str)
    if not others:
        return made
    about: dict[str, Any] = {"files": len(others), "digest": _joined(each["digest"] for each in others)}
    about["size_bytes"] = sum(each["size_bytes"] for each in others)
    if how == "whole":
        about["whole"] = _joined(sorted(each["whole"] for each in others))
    return {**made, "companions": about}


def _of_file(path: Path, how: Fingerprint) -> dict[str, Any]:
    with open_plain(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.blake2b(file.read(_END_BYTES), digest_size=16)
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
        made = {"size_bytes": size, "digest": digest.hexdigest()}
        return {**made, "whole": _whole(file)} if how == "whole" else made


def _whole(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.blake2b(digest_size=16)
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _joined(digests: Iterable[str]) -> str:
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def same_content(one: Any, other: Any) -> bool:
    """Whether two fingerprints are of the same content; the whole counts where both have it."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return bool(one == other)
    names = (one.keys() | other.keys()) - {"whole"}
    whole = "whole" not in one or "whole" not in other or one["whole"] == other["whole"]
    return whole and all(same_content(one.get(name), other.get(name)) for name in names)


def stamps_of(path: Path) -> dict[Path, Stamp]:
    """The stamp of a slide's every file.

    Raises:
        OSError: one is not there, or no plain file.
    """
    return {each: _stamp(each) for each in (path, *_companions(path))}


def _companions(path: Path) -> list[Path]:
    """The files that belong to the one that is named, as far as they are known."""
    plain_stat(path)  # before anything is opened: a pipe would never answer
    try:
        found = slide_files(path)
    except (
        FileNotFoundError,
        NotADirectoryError,
    ):  # of a folder that should be there: whoever opens the slide says it better
        found = None
    return [] if found is None else [each for each, _ in found if each != path]


def _stamp(path: Path) -> Stamp:
    found = plain_stat(path)
    if is_remote(path):
        return found.st_size, found.st_mtime_ns, 0, _version(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _version(path: Any) -> str:
    """What a store calls the content of an object; "" where it does not say."""
    with as_os_errors(path):
        info = path.fs.info(path.path)
    return str(info.get("ETag") or info.get("etag") or info.get("md5Hash") or "")
