"""Digests of weights that were loaded before, by their files: kept in the user's cache.

Loading the weights of a large encoder only to know which they are takes seconds. What is kept is taken at its
word until the files have been read in full (`late.py` does that while a run has begun).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from slide2vec.errors import OutputError
from slide2vec.files import atomic_path, open_plain
from slide2vec.files.user_cache import user_cache
from slide2vec.recipes import Recipe, Variant
from slide2vec.version import __version__

__all__ = ["KnownDigest", "WeightsFiles", "forget", "look_up", "made_of", "remember"]

logger = logging.getLogger(__name__)

#: Counted up when the same files give another digest, or entries are written otherwise.
SCHEMA = 1
#: Read of each end of a file.
_END_BYTES = 65_536
_CHUNK_BYTES = 8 * 2**20
#: Size in bytes, times in ns of the last change of the content and of the inode, inode, digest of both ends.
_Stamp: TypeAlias = tuple[int, int, int, int, str]


@dataclass(frozen=True)
class WeightsFiles:
    """Files as they were when they were looked at.

    Attributes:
        stamps: by path.
    """

    stamps: Mapping[str, _Stamp]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> WeightsFiles:
        """Look at them: links are followed.

        Raises:
            OSError: one cannot be read.
        """
        return cls({str(path): _stamp(path) for path in map(Path.resolve, paths)})

    @property
    def size_bytes(self) -> int:
        return sum(stamp[0] for stamp in self.stamps.values())

    def changed(self) -> str | None:
        """A file that does not look as it did; None where all do."""
        for path, stamp in self.stamps.items():
            try:
                if _stamp(Path(path)) != stamp:
                    return path
            except OSError:
                return path
        return None

    def content(self) -> str:
        """A digest of all that is in them; it reads them in full.

        Raises:
            OSError: one cannot be read.
        """
        digest = hashlib.sha256()
        for path, (size, *_) in self.stamps.items():
            digest.update(f"{size};".encode())
            with open_plain(Path(path)) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


def _stamp(path: Path) -> _Stamp:
    with open_plain(path) as file:
        about = os.fstat(file.fileno())
        ends = hashlib.sha256(file.read(_END_BYTES))
        file.seek(max(0, about.st_size - _END_BYTES))
        ends.update(file.read(_END_BYTES))
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, ends.hexdigest()[:32]


@dataclass(frozen=True)
class KnownDigest:
    """What was found out about weights when they were loaded.

    Attributes:
        content: of their files, `WeightsFiles.content`.
        weights: `weights_digest` of the encoder.
    """

    content: str
    weights: str


def made_of(recipe: Recipe, variant: Variant) -> dict[str, Any]:
    """All but the files that decides an encoder's digest; JSON-ready."""
    return {
        "schema": SCHEMA,
        "encoder": recipe.encoder.model_dump(mode="json"),
        "weights": None if recipe.weights is None else recipe.weights.model_dump(mode="json"),
        "output": variant.model_dump(mode="json"),
        "versions": {"slide2vec": __version__, **{name: _version(name) for name in ("torch", "timm")}},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def look_up(files: WeightsFiles, made_of: Mapping[str, Any]) -> KnownDigest | None:
    """What is kept of files that look as they do now; None where nothing is."""
    try:
        kept = json.loads(_entry(files, made_of).read_text(encoding="utf-8"))
        if kept["files"] == _as_json(files) and kept["made_of"] == made_of:
            return KnownDigest(**{name: str(kept["known"][name]) for name in ("content", "weights")})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # none, or half of one by other hands
        pass
    return None


def remember(files: WeightsFiles, made_of: Mapping[str, Any], known: KnownDigest) -> None:
    """Keep it, in place of what was known of these paths; without a cache nothing is kept."""
    kept = {"files": _as_json(files), "made_of": made_of, "known": asdict(known)}
    try:
        with atomic_path(_entry(files, made_of)) as temporary:
            temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    except (OutputError, RuntimeError) as error:
        logger.info("the digest of weights is not kept: %s", error)


def forget(files: WeightsFiles, made_of: Mapping[str, Any]) -> None:
    """Drop what is kept of these paths."""
    try:
        _entry(files, made_of).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        logger.warning("what is known of %s cannot be removed: %s", ", ".join(files.stamps), error)


def _as_json(files: WeightsFiles) -> dict[str, list[Any]]:
    return {path: list(stamp) for path, stamp in files.stamps.items()}


def _entry(files: WeightsFiles, made_of: Mapping[str, Any]) -> Path:
    asked = json.dumps([list(files.stamps), made_of], sort_keys=True)
    return user_cache() / "weights" / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
