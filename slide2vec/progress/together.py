"""Progress of several encoders that embed the same slides side by side, reported as one run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from slide2vec.progress.events import (
    ProgressEvent,
    RunFinished,
    RunStarted,
    RunSummary,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    TilesEncoded,
    of_encoders,
)
from slide2vec.progress.reporters import ProgressReporter

__all__ = ["Cancelled", "TogetherReporter"]


class Cancelled(BaseException):
    """The call is being broken off: raised in the thread of each encoder when it next reports something."""


@dataclass
class _OfSlide:
    """What the encoders of one slide have reported of it."""

    planned: dict[str, SlidePlanned] = field(default_factory=dict)
    ended: dict[str, SlideFinished | SlideFailed] = field(default_factory=dict)
    is_planned: bool = False


class TogetherReporter:
    """Passes on the events of several encoders as those of one run: a slide is planned, finished or failed
    when it is so with all of them, and its tiles are those of all.

    Args:
        inner: receives the events, from one thread at a time.
        slides: sample_ids of the slides that each encoder embeds, by its name.
        write: takes a line about a single encoder, for a log.
    """

    def __init__(
        self,
        inner: ProgressReporter,
        slides: Mapping[str, Collection[str]],
        write: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.summaries: dict[str, RunSummary] = {}
        self._inner, self._write, self._lock = inner, write, threading.Lock()
        self._encoders: dict[str, set[str]] = {}
        for encoder, names in slides.items():
            for name in names:
                self._encoders.setdefault(name, set()).add(encoder)
        self._slides = {name: _OfSlide() for name in self._encoders}
        self._finished = self._failed = 0
        self._is_cancelled = False
        self._started = time.perf_counter()

    def start(self, encoders: Collection[str]) -> None:
        """The run begins."""
        self._started = time.perf_counter()
        self._inner.emit(RunStarted(len(self._slides), " + ".join(encoders)))

    def of(self, encoder: str) -> ProgressReporter:
        """The reporter for one encoder's stream."""
        return _OfEncoder(self, encoder)

    def planned(self, encoder: str) -> list[SlidePlanned]:
        """The slides that an encoder has come to."""
        return [each.planned[encoder] for each in self._slides.values() if encoder in each.planned]

    def cancel(self) -> None:
        """Every encoder is stopped when it next reports something."""
        self._is_cancelled = True

    def end(self, found: Mapping[str, object]) -> None:
        """The run is over.

        Args:
            found: what each encoder gave, or its error.
        """
        for encoder, result in found.items():
            if isinstance(result, Exception):
                self._break_off(encoder, result)
        if not self.summaries:
            return
        whole = replace(
            of_encoders(self.summaries, time.perf_counter() - self._started),
            slides=self._finished,
            failed=self._failed,
        )
        self._inner.emit(RunFinished(whole))

    def _break_off(self, encoder: str, error: Exception) -> None:
        """An encoder has stopped early: slides that it has not finished failed with it."""
        for name, encoders in self._encoders.items():
            if encoder in encoders and encoder not in self._slides[name].ended:
                self.take(encoder, SlideFailed(name, error))

    def take(self, encoder: str, event: ProgressEvent) -> None:
        """An event of one encoder. Raises Cancelled."""
        if self._is_cancelled:
            raise Cancelled
        with self._lock:
            match event:
                case RunFinished(summary):
                    self.summaries[encoder] = summary
                    self._write(f"{encoder}: {summary}")
                case TilesEncoded():
                    self._inner.emit(event)
                case SlidePlanned(name, _, _):
                    self._slides[name].planned[encoder] = event
                    self._pass_on(name)
                case SlideFinished(name, tiles):
                    self._write(f"slide {name}: {tiles} tiles done with {encoder}")
                    self._slides[name].ended[encoder] = event
                    self._pass_on(name)
                case SlideFailed(name, error):
                    self._write(f"slide {name} failed with {encoder}: {type(error).__name__}: {error}")
                    self._slides[name].ended.setdefault(encoder, event)
                    self._pass_on(name)

    def _pass_on(self, name: str) -> None:
        """What all encoders of a slide have reported by now."""
        slide, encoders = self._slides[name], self._encoders[name]
        if not slide.is_planned and slide.planned and encoders <= slide.planned.keys() | slide.ended.keys():
            slide.is_planned = True
            plans = list(slide.planned.values())
            self._inner.emit(SlidePlanned(name, sum(plan.tiles for plan in plans), plans[0].backend))
        if encoders <= slide.ended.keys():
            ended = list(slide.ended.values())
            failures = [each for each in ended if isinstance(each, SlideFailed)]
            if failures:
                self._failed += 1
                self._inner.emit(failures[0])
            else:
                self._finished += 1
                tiles = sum(each.tiles for each in ended if isinstance(each, SlideFinished))
                self._inner.emit(SlideFinished(name, tiles))


class _OfEncoder:
    """See `ProgressReporter`."""

    def __init__(self, together: TogetherReporter, encoder: str) -> None:
        self._together, self._encoder = together, encoder

    def emit(self, event: ProgressEvent) -> None:
        self._together.take(self._encoder, event)

    def close(self) -> None:
        pass
