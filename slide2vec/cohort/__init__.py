"""A cohort on disk: what is done, what is left, and every file whole or not at all."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slide2vec.cohort.results import FailedSlide, RunResult
    from slide2vec.cohort.run import embed_cohort, embed_tiles, tile_cohort

__all__ = ["FailedSlide", "RunResult", "embed_cohort", "embed_tiles", "tile_cohort"]

#: Loaded on first use: `slide2vec status` reads a process list and does without PyTorch.
_HOMES = {
    "FailedSlide": "results",
    "RunResult": "results",
    "embed_cohort": "run",
    "embed_tiles": "run",
    "tile_cohort": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
