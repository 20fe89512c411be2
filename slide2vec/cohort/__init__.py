"""A cohort on disk: what is done, what is left, and every file whole or not at all."""

from slide2vec.cohort.results import FailedSlide, RunResult
from slide2vec.cohort.run import embed_cohort, tile_cohort

__all__ = ["FailedSlide", "RunResult", "embed_cohort", "tile_cohort"]
