"""Plans slides ahead: so many before they are read."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self, TypeVar

from slide2vec.slides import Slide
from slide2vec.stream.plan import SlidePlan
from slide2vec.stream.staging import InPlace

__all__ = ["PlanAhead", "PlansSlides", "SlideQueue", "Stream"]


Stream = TypeVar("Stream")


class PlansSlides(Protocol):
    """What plans the slides of a stream, or of several; see `Planner`."""

    stager: InPlace

    def ahead(self, slides: Iterable[Slide]) -> Iterator[Slide]: ...

    def wait(self, slide: Slide) -> None: ...

    def plan(self, slide: Slide) -> SlidePlan: ...

    def takers(self, slide: Slide, streams: Sequence[Stream]) -> Sequence[Stream]: ...

    def stop(self) -> None: ...


class _Mark:
    """A mark in the queue of slides."""


_END, _LOOK = _Mark(), _Mark()


class SlideQueue:
    """A queue of slides that another thread puts in one by one.

    Those up to an end are for one stream, those after it for the next.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Slide | _Mark] = queue.SimpleQueue()

    def put(self, slide: Slide) -> None:
        """One more slide."""
        self._queue.put(slide)

    def end(self) -> None:
        """No more slides come, for this stream."""
        self._queue.put(_END)

    def look_up(self) -> None:
        """Wake whoever waits for a slide, to check whether to go on."""
        self._queue.put(_LOOK)

    def until(self, stopping: Callable[[], bool]) -> Iterator[Slide]:
        """The slides, waiting for each, until the end."""
        while (slide := self._queue.get()) is not _END and not stopping():
            if isinstance(slide, Slide):
                yield slide


class PlanAhead:
    """The plans of slides, in their order, made in threads.

    Slides are taken from where they come as early as there is room, so that the next are planned while
    their reader is busy with the present one, and this one does not wait for the next to come.

    Args:
        planner: is notified of each slide as it is taken.
        plan: what is done with each, in threads.
        threads: that plan; one slide more than these is planned ahead.
    """

    def __init__(
        self,
        slides: Iterable[Slide] | SlideQueue,
        planner: PlansSlides,
        plan: Callable[[Slide], SlidePlan],
        threads: int,
    ) -> None:
        self._slides, self._planner, self._plan = slides, planner, plan
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="plan")
        self._room = threading.Semaphore(threads + 1)
        self._waiting: queue.SimpleQueue[tuple[Slide, Future[SlidePlan]] | Exception | None] = (
            queue.SimpleQueue()
        )
        self._stopping = False
        self._thread = threading.Thread(target=self._take_all, name="arrive")

    def stop(self) -> None:
        """Take no more slides. From any thread."""
        self._stopping = True
        self._room.release()
        if isinstance(self._slides, SlideQueue):
            self._slides.look_up()

    def _source(self) -> Iterable[Slide]:
        if isinstance(self._slides, SlideQueue):
            return self._slides.until(lambda: self._stopping)
        return self._slides

    def _take_all(self) -> None:
        try:
            for slide in self._planner.ahead(self._source()):
                self._room.acquire()
                if self._stopping:
                    return
                self._waiting.put((slide, self._pool.submit(self._plan, slide)))
        except Exception as error:  # of where the slides come from
            self._waiting.put(error)
        finally:
            self._waiting.put(None)

    def __iter__(self) -> Iterator[tuple[Slide, Future[SlidePlan]]]:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, Exception):
                raise item
            self._room.release()
            yield item

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close what was planned and not taken."""
        self.stop()
        if kind is not None:  # it may be waiting for what comes of slides that nobody reads any more
            self._planner.stop()
        self._thread.join()
        while not self._waiting.empty():
            match self._waiting.get():
                case (_, planned) if not planned.cancel() and planned.exception() is None:
                    planned.result().close()
        self._pool.shutdown()
