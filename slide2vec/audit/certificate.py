"""The certificate of an audit: what was compared, with digests of all files that it is about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slide2vec.errors import ArtifactError
from slide2vec.files import atomic_path

__all__ = ["SCHEMA", "digest_of", "verify_certificate", "write_certificate"]

#: Of the certificate.
SCHEMA = 1
_CHUNK = 1 << 20
#: More than certificates of 100,000 slides have.
_MOST_BYTES = 1 << 30


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            found.update(part)
    return found.hexdigest()


def write_certificate(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write a certificate, sealed with its own digest.

    Raises:
        OutputError: it cannot be written.
    """
    sealed = {**content, "digest": _seal(content)}
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(json.dumps(sealed, indent=1) + "\n")


def verify_certificate(path: Path | str, run: Path | str | None = None) -> list[str]:
    """What differs from when it was written: in itself, and in the files that it is about; none if it holds.

    No slide is read, and nothing but the certificate and the run is needed: with coordinates that were given
    to the run (`read_coordinates_from`), these too, where they were.

    Args:
        run: directory of the run; None = that of the certificate.

    Raises:
        ArtifactError: it is no certificate.
    """
    path = Path(path)
    content = _read(path)
    problems = []
    sealed = content.pop("digest", None)
    if sealed != _seal(content):
        problems.append(f"{path}: it was changed after it was written (its own digest differs)")
    folder = path.parent if run is None else Path(run)
    try:
        files = list(_files(content))
    except (KeyError, TypeError, AttributeError):
        return [*problems, f"{path}: it does not say what it is about"]
    for name, expected in files:
        file = folder / name
        if not file.is_file():
            problems.append(f"{file}: it is missing")
        elif digest_of(file) != expected:
            problems.append(f"{file}: it is not the file that was audited (SHA-256 differs)")
    return problems


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"certificate {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} is no certificate that `slide2vec audit` of this version wrote")
    return content


def _files(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for encoder in content["encoders"]:
        for slide in encoder["slides"]:
            yield from slide["files"].items()


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
