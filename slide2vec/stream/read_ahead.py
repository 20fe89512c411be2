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
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from slide2vec.errors import SlideReadError, as_slide_error
from slide2vec.slides import Slide
from slide2vec.stream.batches import Batches, Stopped
from slide2vec.stream.jobs import EndOfSlides, Item, JobFailed, JobPlanned, ReadTask, SlideJob, StreamBroken
from slide2vec.stream.plan import SlidePlan
from slide2vec.stream.plan_ahead import PlanAhead, SlideQueue
from slide2vec.stream.planner import Planner
from slide2vec.stream.station_timers import StationTimers
from slide2vec.stream.tile_sources import place_singly
from slide2vec.stream.transfer import TileTransfer

__all__ = ["ReadAhead"]


class ReadAhead:
    """Plans and reads the slides of one run, in threads.

    Args:
        inbox: where what becomes of them is put; full batches are put there by `batches`.
        transfer: brings the pixels of a plan to the device.
        readers, planners: threads.
    """

    def __init__(
        self,
        slides: Iterable[Slide] | SlideQueue,
        planner: Planner,
        batches: Batches[SlideJob],
        inbox: queue.SimpleQueue[Item],
        transfer: TileTransfer,
        timers: StationTimers,
        *,
        readers: int,
        planners: int,
    ) -> None:
        self._planner, self._batches, self._inbox = planner, batches, inbox
        self._transfer, self._timers, self._readers = transfer, timers, readers
        self._planning = PlanAhead(slides, planner, self._plan, planners)
        self._tasks: queue.SimpleQueue[ReadTask | None] = queue.SimpleQueue()
        self._stopping = False
        work: list[tuple[str, Callable[[], None]]] = [("dispatch", self._dispatch_all)]
        work += [(f"read-{number}", self._read_all) for number in range(readers)]
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

    # plan -------------------------------------------------------------------------------------

    def _plan(self, slide: Slide) -> SlidePlan:
        with self._timers.waiting("plan"):
            self._planner.wait(slide)
        with self._timers.busy("plan"):
            planned = self._planner.plan(slide)
            try:
                return self._transfer.bind(planned)
            except BaseException:
                planned.source.close()
                raise

    def _dispatch_all(self) -> None:
        count = 0
        try:
            with self._planning as planned:
                for slide, plan in planned:
                    count += 1
                    self._dispatch(SlideJob(slide), plan)
            self._batches.finish()
        except Stopped:
            if not self._stopping:
                self._inbox.put(
                    StreamBroken(RuntimeError("the thread that iterated over the outcomes has ended"))
                )
        except Exception as error:
            self._inbox.put(StreamBroken(error))
        finally:
            for _ in range(self._readers):
                self._tasks.put(None)
            self._inbox.put(EndOfSlides(count))

    def _dispatch(self, job: SlideJob, planned: Future[SlidePlan]) -> None:
        """Give every supertile of a slide its slots, as room allows."""
        error = planned.exception()
        if error is not None:
            self._inbox.put(JobFailed(job, as_slide_error(error, job.slide.sample_id, "finding its tiles")))
            return
        job.plan = planned.result()
        job.missing = len(job.plan.tiling.x)
        self._inbox.put(JobPlanned(job))
        try:
            for block, tiles in enumerate(job.plan.source.blocks):
                if job.failed:
                    return
                with self._timers.waiting("plan"):
                    pieces = self._batches.reserve(job, tiles)
                job.begin_read()
                self._tasks.put(ReadTask(job, block, pieces))
        finally:
            job.end_read()

    # read and prepare -------------------------------------------------------------------------

    def _read_all(self) -> None:
        while True:
            with self._timers.waiting("read"):
                task = self._tasks.get()
            if task is None:
                return
            try:
                if not (task.job.failed or self._stopping):
                    self._read(task)
            except Exception as error:  # the boundary of one slide: its error, not the run's
                task.job.failed = True
                slide_error = as_slide_error(error, task.job.slide.sample_id, "reading its tiles")
                self._inbox.put(JobFailed(task.job, slide_error))
            finally:
                task.job.end_read()
                written = self._transfer.stream.record()
                for piece in task.pieces:
                    self._batches.fill(piece, written)

    def _read(self, task: ReadTask) -> None:
        assert task.job.plan is not None
        source = task.job.plan.source
        targets: list[Any] = [target for piece in task.pieces for target in piece.targets()]
        self._transfer.stream.wait(piece.batch.free for piece in task.pieces if piece.batch.free is not None)
        try:
            with self._timers.busy("read"):
                data = source.fetch(task.block)
            with self._timers.busy("prepare"):
                source.place(task.block, data, targets)
        except SlideReadError:
            with self._timers.busy("read"):
                task.job.reject(place_singly(source, task.block, targets))
