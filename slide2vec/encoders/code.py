"""Which code an encoder of somebody else's runs, for the identity of embeddings."""

from __future__ import annotations

import hashlib
import inspect
import json
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

__all__ = ["code_of"]


def code_of(encoder: type) -> dict[str, str | None]:
    """Where a class is defined, and which version of it that is: that of the installed package whose file it
    is in, else (a file that somebody edits) a digest of the file; None of a class without one, in a notebook.
    """
    path = _file_of(encoder)
    version = None
    if path is not None:
        installed = _installed(encoder.__module__.partition(".")[0], path)
        version = installed.version if installed else hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    return {"object": f"{encoder.__module__}.{encoder.__qualname__}", "version": version}


def _file_of(encoder: type) -> Path | None:
    try:
        path = Path(inspect.getsourcefile(encoder) or "").resolve()
    except (TypeError, OSError):
        return None
    return path if path.is_file() else None


def _installed(package: str, path: Path) -> Distribution | None:
    """The distribution that brought a file, unless it points to files that are edited in place."""
    for name in _distributions().get(package, ()):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        url = json.loads(found.read_text("direct_url.json") or "{}")
        edited = url.get("dir_info", {}).get("editable", False)
        root = Path(str(found.locate_file(""))).resolve()
        if edited or not path.is_relative_to(root):
            continue
        if path.relative_to(root).as_posix() in map(str, found.files or ()):
            return found
    return None


@cache
def _distributions() -> dict[str, list[str]]:
    """Installed distributions by the packages that they bring."""
    return dict(packages_distributions())
