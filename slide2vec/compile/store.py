"""Engines on disk: one folder each, found by their keys, published whole."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from slide2vec.errors import EngineError, OutputError
from slide2vec.files import open_locked
from slide2vec.files.locks import try_lock, wait_for_lock
from slide2vec.files.user_cache import user_cache
from slide2vec.runtime.record import RECORD_NAME, EngineRecord, read_record

__all__ = ["EngineStore", "StoredEngine", "default_root", "engine_name"]

logger = logging.getLogger(__name__)

#: The variable that names another folder than the user's cache.
VARIABLE = "SLIDE2VEC_ENGINES"
LICENCE_NAME = "LICENCE.txt"
#: The folder of the notes that users of this store have seen, a file each.
NOTES = ".notes"
_LICENCE = """\
{preset}: {licence}
This folder holds a compiled copy of that encoder, made on and for this machine. What its licence says
of the weights holds for the copy too: do not pass it on unless the licence allows that.
"""


def default_root() -> Path:
    """$SLIDE2VEC_ENGINES, else slide2vec/engines in the user's cache.

    Raises:
        EngineError: there is neither; some containers have users without a home.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    try:
        return user_cache() / "engines"
    except RuntimeError as error:
        raise EngineError(f"no place for engines: set {VARIABLE} to a folder ({error})") from error


@dataclass(frozen=True)
class StoredEngine:
    """A published engine and the folder it is in."""

    directory: Path
    record: EngineRecord

    @property
    def name(self) -> str:
        """Of its folder: what `slide2vec engines` calls it."""
        return self.directory.name

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.directory.iterdir() if path.is_file())

    def damage(self) -> str | None:
        """What is wrong with its files, None when they are as published. Reads them all."""
        for name, expected in self.record.checksums.items():
            path = self.directory / name
            if not path.is_file():
                return f"{name} is missing"
            if _sha256(path) != expected:
                return f"{name} has changed since it was built"
        return None


class EngineStore:
    """The engines below a folder.

    Args:
        root: None = `default_root()`. It need not exist.

    Raises:
        EngineError: as `default_root`.
    """

    #: Records that were warned of already, by any store of the process.
    _reported: ClassVar[set[Path]] = set()

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def __iter__(self) -> Iterator[StoredEngine]:
        """Every engine that this version can read, by name; others are passed over (and logged)."""
        for path in sorted(self.root.glob(f"*/{RECORD_NAME}")):
            if path.parent.name.startswith("."):
                continue
            try:
                yield StoredEngine(path.parent, read_record(path.parent))
            except EngineError as error:
                logger.log(logging.INFO if path in self._reported else logging.WARNING, "%s", error)
                self._reported.add(path)

    def named(self, name: str) -> StoredEngine:
        """An engine by its name, or by the beginning of it that no other has.

        Raises:
            EngineError: there is none, or there are several.
        """
        found = [engine for engine in self if engine.name.startswith(name)]
        exact = [engine for engine in found if engine.name == name]
        if len(exact or found) == 1:
            return (exact or found)[0]
        if not found:
            raise EngineError(f"no engine {name!r} in {self.root}: `slide2vec engines list` shows them")
        raise EngineError(f"{name!r} may be any of {', '.join(engine.name for engine in found)}")

    def takes_note(self, what: str) -> bool:
        """Whether nobody has noted this here before; it then is, unless the folder cannot be written to."""
        note = self._note(what)
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            with note.open("x") as file:
                file.write(f"{what}\n")
        except FileExistsError:
            return False
        except OSError as error:
            logger.debug("%s cannot be written: %s", note, error)
        return True

    def has_note(self, what: str) -> bool:
        """Whether somebody has noted this here."""
        return self._note(what).is_file()

    def _note(self, what: str) -> Path:
        return self.root / NOTES / hashlib.sha256(what.encode()).hexdigest()[:16]

    def remove(self, engine: StoredEngine) -> None:
        """Delete an engine; it disappears at once, also to those who look meanwhile."""
        with _as_output_error(engine.directory):
            gone = Path(tempfile.mkdtemp(dir=self.root, prefix=".removed.", suffix=".partial"))
            engine.directory.replace(gone / engine.name)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def building(self, name: str, needs: int = 0) -> Iterator[Path]:
        """An empty folder to build an engine in, deleted when the block ends. Only one process builds
        an engine of a name: others wait, and may then find it built.

        Args:
            needs: bytes that a build takes there.

        Raises:
            OutputError: the store cannot be written to, or its disk has no room.
        """
        with _as_output_error(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        with _lock(self.root / f".{name}.lock"), _as_output_error(self.root):
            for left in self.root.glob(f".{name}.*.partial"):  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            if not (self.root / name).exists() and (free := shutil.disk_usage(self.root).free) < needs:
                raise OutputError(
                    f"the disk of {self.root} has {free / 1e6:,.0f} MB free, and the build of an engine "
                    f"takes about {needs / 1e6:,.0f} MB there: make room, or name another folder in "
                    "SLIDE2VEC_ENGINES"
                )
            folder = Path(tempfile.mkdtemp(dir=self.root, prefix=f".{name}.", suffix=".partial"))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, record: EngineRecord) -> StoredEngine:
        """Publish what was built in a folder of `building` as an engine of the store; an older one of the
        same name is replaced.

        Raises:
            OutputError: it cannot be written.
        """
        licence = _LICENCE.format(preset=record.preset, licence=record.licence)
        (folder / LICENCE_NAME).write_text(licence, encoding="utf-8")
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != RECORD_NAME)
        files = [path for path in files if path.suffix != ".cache"]  # those change
        record = replace(record, checksums={path.name: _sha256(path) for path in files})
        (folder / RECORD_NAME).write_text(record.as_json(), encoding="utf-8")
        name = engine_name(record.preset, record.variant, record.runtime, record.precision, record.key)
        target = self.root / name
        if target.exists():
            self.remove(StoredEngine(target, record))
        folder.chmod(0o755)  # temporary folders are for their owner only; a store may be shared
        folder.replace(target)
        return StoredEngine(target, record)


def engine_name(preset: str, variant: str, runtime: str, precision: str, key: str) -> str:
    """Of an engine's folder: what it is, and the beginning of its key."""
    parts = (preset, variant, runtime, precision, key[:12])
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError.of(path, error) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file; waits for whoever has it. The operating system releases it when the process ends."""
    with _as_output_error(path):
        descriptor = open_locked(path)
    try:
        if not try_lock(descriptor):
            logger.warning("another process builds this engine: waiting for it (%s)", path)
            wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)
