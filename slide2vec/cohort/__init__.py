"""A cohort on disk: what is done, what is left, and every file whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slide2vec.lazy import lazy_attributes

if TYPE_CHECKING:
    from slide2vec.cohort.results import FailedSlide, RunResult
    from slide2vec.cohort.run import embed_cohort, embed_tiles, tile_cohort
    from slide2vec.cohort.side_by_side import EncoderRun, embed_cohort_together

__all__ = [
    "EncoderRun",
    "FailedSlide",
    "RunResult",
    "embed_cohort",
    "embed_cohort_together",
    "embed_tiles",
    "tile_cohort",
]

#: Loaded on first use: `slide2vec status` reads a process list and does without PyTorch.
_HOMES = {
    "EncoderRun": "side_by_side",
    "FailedSlide": "results",
    "RunResult": "results",
    "embed_cohort": "run",
    "embed_cohort_together": "side_by_side",
    "embed_tiles": "run",
    "tile_cohort": "run",
}

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
