"""Whether what one of the other files holds tells that it is damaged: checksums, keys, types, row lengths."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from typing import Any

import numpy as np

__all__ = ["file_evidence"]


def file_evidence(file_format: str, before: bytes, data: bytes) -> str | None:
    """What in a file tells that it is damaged."""
    if file_format in ("npz", "pt"):
        return _zip_evidence(data)
    if file_format == "tar":
        return _tar_evidence(data)
    if file_format in ("json", "index") and data[:1] == b"{" and before[:1] == b"{":
        return _same_structure(json.loads(before), json.loads(data))
    if file_format == "csv":
        return _csv_evidence(data)
    return None


def _zip_evidence(data: bytes) -> str | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            bad = archive.testzip()
            return None if bad is None else f"the checksum of {bad} differs"
    except Exception as error:
        return f"no sound ZIP: {error}"


def _tar_evidence(data: bytes) -> str | None:
    import tarfile

    from tools.fuzz.strict import fault

    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                wrong = fault("JPEG", archive.extractfile(member).read(), (64, 64, 3))  # type: ignore[union-attr]
                if wrong:
                    return f"{member.name}: {wrong}"
    except Exception as error:
        return f"no sound tar: {error}"
    return None


def _csv_evidence(data: bytes) -> str | None:
    try:
        header, *rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    except (ValueError, csv.Error) as error:
        return str(error)
    return next((f"a row of {len(row)} cells" for row in rows if row and len(row) != len(header)), None)


def _same_structure(before: Any, after: Any, where: str = "") -> str | None:
    """How two JSON values differ in keys or types; None where only values do."""
    if isinstance(before, dict) and isinstance(after, dict):
        if before.keys() != after.keys():
            return f"{where or 'it'} has other keys: {sorted(before.keys() ^ after.keys())}"
        return next(
            (told for key in before if (told := _same_structure(before[key], after[key], f"{where}.{key}"))),
            None,
        )
    if isinstance(before, list) and isinstance(after, list):
        return (
            f"{where} has another length"
            if len(before) != len(after)
            else next(
                (
                    told
                    for one, two in zip(before, after, strict=True)
                    if (told := _same_structure(one, two, f"{where}[]"))
                ),
                None,
            )
        )
    if isinstance(after, float) and not np.isfinite(after):
        return f"{where} is {after}"
    numbers = [isinstance(each, int | float) and not isinstance(each, bool) for each in (before, after)]
    return None if all(numbers) or type(before) is type(after) else f"{where} is a {type(after).__name__}"
