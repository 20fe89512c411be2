"""The folder of this package in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """`slide2vec` in $XDG_CACHE_HOME, else in ~/.cache. It need not exist.

    Raises:
        RuntimeError: there is neither; some containers have users without a home.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "slide2vec"
