"""How the tiles of a slide were decoded, counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

__all__ = ["DecodeTally"]


class DecodeTally:
    """How many tiles of a slide came by which decode path. Used from several threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, decode_path: str, tiles: int) -> None:
        """So many more by this one."""
        with self._lock:
            self._counts[decode_path] += tiles

    def counts(self) -> Mapping[str, int]:
        """Decode path -> tiles, so far."""
        with self._lock:
            return dict(self._counts)
