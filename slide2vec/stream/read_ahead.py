"""The stations before the encoder: slides in, full batches of tiles out.

    planners   ── plan slides ahead ────────────────────────────────▶ plans, in input order
    dispatcher ── gives every block of tiles its slots in batches ──▶ tasks
    readers    ── read a block of tiles, cut and resize them into their slots ─▶ inbox

Slots are given out in input order, so that batches hold the same tiles whatever the threads do.
A slide that fails keeps its slots, and their features are dropped.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from slide2vec.errors import SlideReadError, as_slide_error
from slide2vec.slides import Slide
from slide2vec.stream.batches import Batch, Batches, Stopped
from slide2vec.stream.cuda_streams import Event
from slide2vec.stream.jobs import EndOfSlides, Item, JobFailed, JobPlanned, ReadTask, SlideJob, StreamBroken
from slide2vec.stream.plan import SlidePlan
from slide2vec.stream.plan_ahead import PlanAhead, PlansSlides, SlideQueue
from slide2vec.stream.station_timers import StationTimers
from slide2vec.stream.tile_sources import place_singly
from slide2vec.stream.transfer import TileTransfer

__all__ = ["Outlet", "ReadAhead", "Wanted"]

#: Tiles of a typical supertile: readers need slots for about two each to stay busy.
TILES_PER_READ = 64


@dataclass(frozen=True)
class Wanted:
    """How a stream wants tiles read.

    Attributes:
        batch_size: tiles of a batch.
        tile_size_px: side of the tiles as planned.
        readers, planners: threads of those stations.
        ahead: batches that readers may be ahead of the encoder.
        transfer: where tiles are kept, and how they get there.
    """

    batch_size: int
    tile_size_px: int
    readers: int
    planners: int
    ahead: int
    transfer: TileTransfer


class Outlet:
    """Where one stream takes what a `ReadAhead` gives: all of it, whatever other streams take.

    Attributes:
        consumer: the thread that takes it.
        taken: batches that were handed to it, and that it has not released.
        slides: that it was told of.
    """

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self.consumer = threading.current_thread()
        self.taken: set[Batch[SlideJob]] = set()
        self.slides = 0


class ReadAhead:
    """Plans and reads the slides of one stream, or of several that take the same batches, in threads.

    Args:
        wanted: the largest batches that one of them takes; the others take theirs out of these.
        outlets: of the streams. After the last of them has left nothing more is read.

    Attributes:
        timers: of its stations.
    """

    def __init__(
        self,
        slides: Iterable[Slide] | SlideQueue,
        planner: PlansSlides,
        wanted: Wanted,
        outlets: Sequence[Outlet],
    ) -> None:
        self._planner, self._transfer, self._readers = planner, wanted.transfer, wanted.readers
        self.timers = StationTimers()
        self.outlets, self._lock = tuple(outlets), threading.Lock()
        self._batches: Batches[SlideJob] = Batches(
            wanted.batch_size,
            wanted.tile_size_px,
            ahead=max(wanted.ahead, 2 * wanted.readers * TILES_PER_READ // wanted.batch_size),
            ready=self._hand_out,
            abandoned=lambda: not any(each.consumer.is_alive() for each in self.outlets),
            allocate=wanted.transfer.allocate,
        )
        self._planning = PlanAhead(slides, planner, self._plan, wanted.planners)
        self._tasks: queue.SimpleQueue[ReadTask | None] = queue.SimpleQueue()
        self._stopping = False
        work: list[tuple[str, Callable[[], None]]] = [("dispatch", self._dispatch_all)]
        work += [(f"read-{number}", self._read_all) for number in range(wanted.readers)]
        self._threads = [threading.Thread(name=name, target=target) for name, target in work]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, wherever they are."""
        self._stopping = True
        self._planning.stop()
        self._batches.stop()
        self._planner.stop()
        for thread in self._threads:
            thread.join()
        self._batches.close()

    # give -------------------------------------------------------------------------------------

    def _tell(self, item: JobFailed | StreamBroken) -> None:
        for outlet in self.outlets:
            outlet.inbox.put(item)

    def _hand_out(self, batch: Batch[SlideJob]) -> None:
        with self._lock:
            batch.takers = len(self.outlets)
            for outlet in self.outlets:
                outlet.taken.add(batch)
                outlet.inbox.put(batch)

    def release(self, outlet: Outlet, batch: Batch[SlideJob], read: Event | None = None) -> None:
        """A stream has read a batch, once the event comes."""
        with self._lock:
            outlet.taken.discard(batch)
        self._batches.release(batch, read)

    def leave(self, outlet: Outlet) -> bool:
        """A stream takes nothing more, and reads none of its batches any more. Whether it was the last: then
        the threads have ended."""
        with self._lock:
            self.outlets = tuple(each for each in self.outlets if each is not outlet)
            is_last, taken = not self.outlets, list(outlet.taken)
            outlet.taken.clear()
        for batch in taken:
            self._batches.release(batch)
        if is_last:
            self.stop()
        return is_last

    # plan -------------------------------------------------------------------------------------

    def _plan(self, slide: Slide) -> SlidePlan:
        with self.timers.waiting("plan"):
            self._planner.wait(slide)
        with self.timers.busy("plan"):
            planned = self._planner.plan(slide)
            try:
                return self._transfer.bind(planned)
            except BaseException:
                planned.close()
                raise

    def _dispatch_all(self) -> None:
        try:
            with self._planning as planned:
                for slide, plan in planned:
                    self._dispatch(SlideJob(slide), plan)
            self._batches.finish()
        except Stopped:
            if not self._stopping:
                self._tell(StreamBroken(RuntimeError("the thread that iterated over the outcomes has ended")))
        except Exception as error:
            self._tell(StreamBroken(error))
        finally:
            for _ in range(self._readers):
                self._tasks.put(None)
            for outlet in self.outlets:
                outlet.inbox.put(EndOfSlides(outlet.slides))

    def _dispatch(self, job: SlideJob, planned: Future[SlidePlan]) -> None:
        """Give every supertile of a slide its slots, as room allows."""
        takers = self._planner.takers(job.slide, self.outlets)
        if (error := planned.exception()) is None:
            job.plan = planned.result()
        for outlet in takers:
            outlet.slides += 1
            refused = error if job.plan is None else job.plan.refused.get(outlet)
            if refused is None:
                outlet.inbox.put(JobPlanned(job))
            else:  # maybe of this stream alone; the tiles keep their slots if others take them
                slide_error = as_slide_error(refused, job.slide.sample_id, "finding its tiles")
                outlet.inbox.put(JobFailed(SlideJob(job.slide), slide_error))
        if job.plan is None:
            return
        job.failed = all(outlet in job.plan.refused for outlet in takers)
        try:
            for block, tiles in enumerate(job.plan.source.blocks):
                if job.failed:
                    return
                with self.timers.waiting("plan"):
                    pieces = self._batches.reserve(job, tiles)
                job.begin_read()
                self._tasks.put(ReadTask(job, block, pieces))
        finally:
            job.end_read()

    # read and prepare -------------------------------------------------------------------------

    def _read_all(self) -> None:
        while True:
            with self.timers.waiting("read"):
                task = self._tasks.get()
            if task is None:
                return
            try:
                if not (task.job.failed or self._stopping):
                    self._read(task)
            except Exception as error:  # the boundary of one slide: its error, not the run's
                task.job.failed = True
                slide_error = as_slide_error(error, task.job.slide.sample_id, "reading its tiles")
                self._tell(JobFailed(task.job, slide_error))
            finally:
                task.job.end_read()
                written = self._transfer.stream.record()
                for piece in task.pieces:
                    self._batches.fill(piece, written)

    def _read(self, task: ReadTask) -> None:
        assert task.job.plan is not None
        source = task.job.plan.source
        targets: list[Any] = [target for piece in task.pieces for target in piece.targets()]
        self._transfer.stream.wait(event for piece in task.pieces for event in piece.batch.free)
        try:
            with task.job.plan.turn():
                with self.timers.busy("read"):
                    data = source.fetch(task.block)
                with self.timers.busy("prepare"):
                    source.place(task.block, data, targets)
        except SlideReadError:
            with self.timers.busy("read"):
                task.job.reject(place_singly(source, task.block, targets))
