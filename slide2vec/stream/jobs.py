"""Slides in the stream, and the messages between its threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from slide2vec.artifacts.finite import rows_not_finite
from slide2vec.embedded import EmbeddedSlide
from slide2vec.errors import SlideReadError
from slide2vec.runtime import Engine
from slide2vec.slides import Slide
from slide2vec.stream.batches import Batch, BatchSlice
from slide2vec.stream.plan import SlidePlan
from slide2vec.stream.tile_sources import bad_tiles, damaged, not_finite
from slide2vec.tiling import BadTile, Tiling

__all__ = [
    "Collected",
    "EndOfSlides",
    "Item",
    "JobFailed",
    "JobPlanned",
    "ReadTask",
    "SlideJob",
    "SlideOutcome",
    "StreamBroken",
]


@dataclass(frozen=True)
class SlideOutcome:
    """A slide that is complete (`embedded` and `tiling` are there) or has failed (`error`).

    Attributes:
        backend: what read its tiles: a reader's name, or "archive".
        skipped: tiles that could not be decoded, and are in neither `embedded` nor `tiling`.
        tiles_tar_path: the archive of its tiles, where there is one.
    """

    slide: Slide
    embedded: EmbeddedSlide | None = None
    tiling: Tiling | None = None
    backend: str | None = None
    skipped: tuple[BadTile, ...] = ()
    tiles_tar_path: Path | None = None
    error: Exception | None = None


class SlideJob:
    """One slide on its way to the encoder, or to all that encode its tiles.

    Attributes:
        plan: None until it is planned, or where that failed.
        failed: an error of it is under way: its tiles need not be read any more.
        bad: tiles that cannot be decoded, with why.
    """

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self.plan: SlidePlan | None = None
        self.failed = False
        self.bad: dict[int, SlideReadError] = {}
        self._reads = 1  # one for the dispatcher, so that the reader stays open while it works
        self._lock = threading.Lock()

    def begin_read(self) -> None:
        """A block is to be read."""
        with self._lock:
            self._reads += 1

    def end_read(self) -> None:
        """Close the slide after its last read."""
        with self._lock:
            self._reads -= 1
            done = self._reads == 0
        if done and self.plan is not None:
            self.plan.close()

    def reject(self, bad: dict[int, SlideReadError]) -> None:
        """Leave tiles out, or fail the slide, as its plan says."""
        assert self.plan is not None
        if bad and not self.plan.skips_bad_tiles:
            raise damaged(self.plan.tiling, bad)
        with self._lock:
            self.bad.update(bad)


class Collected:
    """What one stream has collected of a slide that is planned.

    Attributes:
        missing: tiles whose features have not been collected.
    """

    def __init__(self, job: SlideJob, engine: Engine, dtype: torch.dtype) -> None:
        assert job.plan is not None
        self.job, self.plan, self._engine = job, job.plan, engine
        self.missing = len(self.plan.tiling.x)
        self._dtype = dtype
        self._embeddings: Tensor | None = None
        #: Tiles whose embeddings hold NaN or infinities -> whether they were finite before the cast.
        self._overflowed: dict[int, bool] = {}

    def collect(self, tiles: Tensor, features: Tensor) -> None:
        """Keep the features of tiles, (n, D)."""
        if self._embeddings is None:
            self._embeddings = torch.empty((len(self.plan.tiling.x), features.shape[1]), dtype=self._dtype)
        values = features.to(self._dtype)
        self._embeddings[tiles] = values
        self.missing -= len(tiles)
        for row in rows_not_finite(values).tolist():
            self._overflowed[int(tiles[row])] = bool(features[row].isfinite().all())

    def problem(self) -> Exception | None:
        """Why a slide is of no use though all its features are there: no tile of it could be decoded, or
        embeddings of tiles that could hold NaN or infinities."""
        tiling, bad = self.plan.tiling, self.job.bad
        if bad and not tiling.kept(bad).any():
            return damaged(tiling, bad)
        wrong = {tile: fits for tile, fits in self._overflowed.items() if tile not in bad}
        return not_finite(tiling, wrong, self._engine) if wrong else None

    def outcome(self) -> SlideOutcome:
        """What there is of the slide, without its bad tiles."""
        plan, slide, embeddings, bad = self.plan, self.job.slide, self._embeddings, self.job.bad
        if embeddings is None:
            embeddings = torch.empty((0, self._engine.feature_dim), dtype=self._dtype)
        tiling, skipped = plan.tiling, plan.skipped
        if bad:
            skipped += tuple(bad_tiles(tiling, bad))
            embeddings = embeddings[torch.from_numpy(tiling.kept(bad))]
            tiling = tiling.without(bad)
        embedded = EmbeddedSlide(
            sample_id=slide.sample_id,
            tile_embeddings=embeddings,
            slide_embedding=None,
            x=tiling.x,
            y=tiling.y,
            tile_size_lv0=tiling.geometry.tile_size_lv0,
            image_path=slide.image_path,
            mask_path=slide.mask_path,
            num_tiles=len(embeddings),
            mask_preview_path=plan.mask_preview_path,
            tiling_preview_path=plan.tiling_preview_path,
        )
        return SlideOutcome(
            slide,
            embedded=embedded,
            tiling=tiling,
            backend=plan.source.backend,
            skipped=skipped,
            tiles_tar_path=plan.tiles_tar_path,
        )


@dataclass(frozen=True)
class ReadTask:
    """A block of a slide's tiles, to be read into its slots."""

    job: SlideJob
    block: int
    pieces: list[BatchSlice[SlideJob]]


@dataclass(frozen=True)
class JobPlanned:
    """The tiles of a slide are known."""

    job: SlideJob


@dataclass(frozen=True)
class JobFailed:
    """A slide cannot be planned (then its job has no plan) or read."""

    job: SlideJob
    error: Exception


@dataclass(frozen=True)
class EndOfSlides:
    """So many slides have come, and no more do."""

    slides: int


@dataclass(frozen=True)
class StreamBroken:
    """The run cannot go on."""

    error: Exception


#: What the readers send to the encoder.
Item: TypeAlias = Batch[SlideJob] | JobPlanned | JobFailed | StreamBroken | EndOfSlides
