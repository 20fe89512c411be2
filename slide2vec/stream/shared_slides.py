"""Slides that several streams read together. Streams whose tiles are the same take them from one `ReadAhead`,
packed into the same batches; those of other tiles, or of other slides, have one each, and share the opened
slide, its tissue, and what is decoded of it.

Each batch is what its stream would pack alone. Nobody takes up a slide that comes after one which another has
yet to take up, and of those that read a slide only who is behind never waits: so that waiting always ends.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from slide2vec.cpus import job_cpus
from slide2vec.readers.tile_assembly import HostTileReader
from slide2vec.slides import Slide
from slide2vec.stream.batches import Stopped
from slide2vec.stream.plan import PlanRequest, SlidePlan, plan_together
from slide2vec.stream.plan_ahead import SlideQueue, Stream
from slide2vec.stream.read_ahead import Outlet, ReadAhead, Wanted
from slide2vec.stream.staging import IN_PLACE, InPlace
from slide2vec.stream.tile_sources import SlideSource, TileSource
from slide2vec.stream.transfer import TileTransfer
from slide2vec.tiling.shared_level import KEPT_FOR_OTHERS_BYTES, MOST_CHUNK_BYTES, SharedLevel

__all__ = ["Share", "SharedSlides"]

#: Slides that are planned and open for streams that are behind.
KEPT_SLIDES = 16


class PlansForOne(Protocol):
    """What one stream wants planned, and does with its plans: what that raises is its own error."""

    @property
    def key(self) -> Hashable: ...

    def request(self, slide: Slide) -> PlanRequest: ...

    def announced(self, plan: SlidePlan) -> SlidePlan: ...


class SharedSlides:
    """What streams share that run side by side over the same slides, or some of them.

    Args:
        members: names of the streams, whose slides are in an order that fits those of the others. Nothing is
            read before each has come, or has left.
        stager: brings slides to where they are read.
        readers: threads, whosever tiles they are, that decode and cut at once: more would take the CPUs, and
            Python's lock, from one another. One waits now and then for a tile that another decodes.
        over: gives what brings tiles to where a stream keeps them, by what the stream has for it.
    """

    def __init__(
        self,
        members: Collection[str],
        stager: InPlace = IN_PLACE,
        *,
        readers: int | None = None,
        over: Callable[[TileTransfer], TileTransfer] = lambda transfer: transfer,
    ) -> None:
        self.stager, self.over = stager, over
        self._changed = threading.Condition()
        self._reading = threading.Semaphore((readers or job_cpus()) + 1)
        self._to_come, self._here = set(members), list[Share]()
        #: Slides that come one by one, and for whom; None: the end of them.
        self._coming: list[tuple[Slide | None, Collection[str]]] = []
        #: Slides of each reading that nobody has taken up, the first of which is found at once.
        self._todo: dict[_Together, OrderedDict[str, None]] = {}
        self._slides: dict[str, _SharedSlide] = {}

    def share(self, member: str, slides: Sequence[Slide] | None = None) -> Share:
        """The part of the stream that will read these slides; None: those that it is to `expect`."""
        return Share(self, member, slides)

    def expect(self, slide: Slide, members: Collection[str]) -> None:
        """One slide more comes, for these streams, after all that any stream has."""
        with self._changed:
            self._coming.append((slide, members))
            self._give_out()

    def end(self) -> None:
        """No more slides come."""
        with self._changed:
            self._coming.append((None, ()))
            self._give_out()

    def _give_out(self) -> None:
        """Once all are here: the slides that have come. Under the lock."""
        while self._coming and not self._to_come:
            slide, members = self._coming.pop(0)
            for reads in self._todo:
                reads.take(slide, members)

    # joining and leaving ------------------------------------------------------------------------

    def _join(self, member: Share) -> ReadAhead:
        with self._changed:
            self._here.append(member)
            self._to_come.discard(member.name)
            self._begin()
            self._changed.wait_for(lambda: member.read_ahead or member.error)
        if member.error is not None:
            raise member.error
        assert member.read_ahead is not None
        return member.read_ahead

    def _begin(self) -> None:
        """Once all are here: who reads together with whom. Under the lock."""
        if self._to_come:
            return
        here, self._here = self._here, []
        try:
            begun = [_Together(self, each) for each in _grouped(here)]
            for each in begun:
                self._todo[each] = OrderedDict.fromkeys(slide.sample_id for slide in each.slides or ())
            self._give_out()
            for each in begun:
                each.read_ahead.start()
        except Exception as error:
            self._todo.clear()  # what has begun ends
            for member in here:
                member.error = error
        self._changed.notify_all()

    def _absent(self, name: str) -> None:
        """A stream does not come, or has left."""
        with self._changed:
            self._to_come.discard(name)
            self._begin()

    def _leave(self, reads: _Together) -> None:
        """If it waits for something, it gets `Stopped`."""
        with self._changed:
            self._todo.pop(reads, None)
            for name in list(self._slides):
                self._forget(name, reads)
            self._changed.notify_all()

    def _wait(self, reads: _Together, ready: Callable[[], bool]) -> None:
        """Under the lock.

        Raises:
            Stopped: it has left.
        """
        self._changed.wait_for(lambda: ready() or reads not in self._todo)
        if reads not in self._todo:
            raise Stopped

    # planning -----------------------------------------------------------------------------------

    def _take_up(self, reads: _Together, slide: Slide) -> _SharedSlide:
        """The slide, entered for all that will plan it, once there is room, and after all slides that come
        before it in any of these. So nobody waits for one while others hold on to later ones, nor for the
        copy of one while those of later ones take all the room.

        Raises:
            Stopped: it has left.
        """
        name = slide.sample_id
        with self._changed:
            self._wait(
                reads, lambda: name in self._slides or (self._is_next(name) and not self._is_ahead(reads))
            )
            if name not in self._slides:
                takers = {each for each, todo in self._todo.items() if name in todo}
                self._slides[name] = _SharedSlide(takers | {reads})
                for todo in self._todo.values():
                    todo.pop(name, None)
                for _ in self.stager.ahead([slide]):  # its copy begins
                    pass
                self._changed.notify_all()
            return self._slides[name]

    def _is_next(self, name: str) -> bool:
        """Whether every slide that comes before it for anybody has been taken up."""
        return all(next(iter(todo)) == name for todo in self._todo.values() if name in todo)

    def _is_ahead(self, reads: _Together) -> bool:
        """Whether much is kept for others, and nothing for it."""
        kept = any(reads in shared.plans for shared in self._slides.values())
        return len(self._slides) >= KEPT_SLIDES and not kept

    def _plan(self, reads: _Together, slide: Slide) -> SlidePlan:
        name, shared = slide.sample_id, self._take_up(reads, slide)
        with self._changed:
            mine, shared.is_begun = not shared.is_begun, True
        if mine:
            self._plan_for_all(name, shared, slide)
        with self._changed:
            self._wait(reads, lambda: reads in shared.plans)
            found = shared.plans.pop(reads)
            if isinstance(found, Exception):
                self._forget(name, reads)
            self._changed.notify_all()
        if isinstance(found, Exception):
            raise found
        return found

    def _plan_for_all(self, name: str, shared: _SharedSlide, slide: Slide) -> None:
        with self._changed:
            asking = [each for each in self._todo if each in shared.readers]
        plans: list[SlidePlan | Exception] = [Stopped()] * len(asking)
        try:
            plans = plan_together(slide, [each.request(slide) for each in asking], self.stager)
            _share_decoded([plan for plan in plans if isinstance(plan, SlidePlan)])
        except Exception as error:
            plans = [error] * len(asking)
        finally:
            self._planned(name, shared, dict(zip(asking, plans, strict=True)))

    def _planned(
        self, name: str, shared: _SharedSlide, plans: dict[_Together, SlidePlan | Exception]
    ) -> None:
        with self._changed:
            for reads in plans.keys() & shared.readers:
                plan = plans.pop(reads)
                shared.plans[reads] = plan
                if isinstance(plan, SlidePlan):
                    shared.plans[reads] = self._bound(name, shared, reads, plan)
            self._changed.notify_all()
        for plan in plans.values():  # of those that have left
            if isinstance(plan, SlidePlan):
                plan.close()

    def _bound(self, name: str, shared: _SharedSlide, reads: _Together, plan: SlidePlan) -> SlidePlan:
        shared.blocks[reads] = len(plan.source.blocks)
        plan = replace(plan, ended=lambda: self._closed(name, reads))
        if len(shared.readers) == 1:
            return plan
        return replace(plan, turn=lambda: self._turn(shared, reads, plan.source))

    # reading ------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, shared: _SharedSlide, reads: _Together, source: TileSource) -> Iterator[None]:
        """While a block is read that others read, too, in tiles of theirs.

        Raises:
            Stopped: it has left.
        """
        with self._changed:
            self._wait(reads, lambda: not shared.is_led_by(reads, source))
        try:
            with self._reading:
                yield
        finally:
            with self._changed:
                shared.blocks_read[reads] += 1
                self._changed.notify_all()

    def _closed(self, name: str, reads: _Together) -> None:
        """A slide is read."""
        with self._changed:
            self._forget(name, reads)
            self._changed.notify_all()

    def _forget(self, name: str, reads: _Together) -> None:
        """Under the lock."""
        if (shared := self._slides.get(name)) is not None:
            shared.readers.discard(reads)
            if isinstance(plan := shared.plans.pop(reads, None), SlidePlan):
                plan.source.close()
            if not shared.readers:
                del self._slides[name]


class Share:
    """The part of one stream in `SharedSlides`."""

    planner: PlansForOne
    wanted: Wanted
    outlet: Outlet

    def __init__(self, shared: SharedSlides, name: str, slides: Sequence[Slide] | None) -> None:
        self._shared, self.name, self.slides, self.stager = shared, name, slides, shared.stager
        #: Slides that came one by one.
        self.expected: set[str] = set()
        self.read_ahead: ReadAhead | None = None
        #: Why nothing can be read.
        self.error: Exception | None = None

    def join(self, planner: PlansForOne, wanted: Wanted, outlet: Outlet) -> ReadAhead:
        """What reads the slides for the stream, and maybe for others, too. Waits until all streams have come,
        or left.

        Args:
            planner: says what the stream wants planned of each slide, and is told of each plan.
            outlet: where the stream takes its batches.
        """
        self.planner, self.wanted, self.outlet = planner, wanted, outlet
        return self._shared._join(self)

    @contextmanager
    def membership(self) -> Iterator[None]:
        """At the end of the block, however it ends, nobody waits for the stream any more."""
        try:
            yield
        finally:
            self._shared._absent(self.name)

    def key(self) -> Hashable:
        """Equal for streams whose tiles are the same, apart from how many of them make a batch."""
        wanted = self.wanted
        slides = [(slide.sample_id, id(self.planner.request(slide).given)) for slide in self.slides or ()]
        threads = wanted.readers, wanted.planners
        return tuple(slides), self.planner.key, wanted.tile_size_px, threads, wanted.transfer.kind


def _grouped(members: Sequence[Share]) -> Iterator[list[Share]]:
    """Streams whose batches are parts of those of the first of them, which are the largest."""
    by_key: dict[Hashable, list[Share]] = {}
    for member in sorted(members, key=lambda each: -each.wanted.batch_size):
        by_key.setdefault(member.key(), []).append(member)
    for left in by_key.values():
        while left:
            size = left[0].wanted.batch_size
            yield [each for each in left if size % each.wanted.batch_size == 0]
            left = [each for each in left if size % each.wanted.batch_size]


class _Together:
    """Plans for streams that take the same batches. See `PlansSlides`."""

    def __init__(self, shared: SharedSlides, streams: Sequence[Share]) -> None:
        self._shared, self._streams, self.stager = shared, streams, shared.stager
        self.slides, self._coming = streams[0].slides, SlideQueue()
        wanted, most = streams[0].wanted, max(each.wanted.ahead for each in streams)
        wanted = replace(wanted, ahead=most, transfer=shared.over(wanted.transfer))
        slides = self._coming if self.slides is None else self.slides
        self.read_ahead = ReadAhead(slides, self, wanted, [each.outlet for each in streams])
        for each in streams:
            each.read_ahead = self.read_ahead

    def take(self, slide: Slide | None, members: Collection[str]) -> None:
        """A slide that has come, if it is for one of the streams; None: the end of them. Under the lock."""
        if slide is None:
            self._coming.end()
        elif takers := [each for each in self._streams if each.name in members]:
            for each in takers:
                each.expected.add(slide.sample_id)
            self._shared._todo[self][slide.sample_id] = None
            self._coming.put(slide)

    def ahead(self, slides: Iterable[Slide]) -> Iterator[Slide]:
        for slide in slides:
            self._shared._take_up(self, slide)
            yield slide

    def wait(self, slide: Slide) -> None:
        self.stager.wait(slide)

    def request(self, slide: Slide) -> PlanRequest:
        return (self._here(slide) or self._streams)[0].planner.request(slide)

    def plan(self, slide: Slide) -> SlidePlan:
        """With what the streams make of it, each by itself."""
        plan, refused = self._shared._plan(self, slide), dict[Hashable, Exception]()
        for each in self._here(slide):
            try:
                each.planner.announced(plan)
            except Exception as error:
                refused[each.outlet] = error
        return replace(plan, refused=refused)

    def takers(self, slide: Slide, streams: Sequence[Stream]) -> Sequence[Stream]:
        wanted = [each.outlet for each in self._here(slide)]
        return [each for each in streams if each in wanted]

    def _here(self, slide: Slide) -> list[Share]:
        """Streams that want the slide, and have not left."""
        return [
            each
            for each in self._streams
            if each.outlet in self.read_ahead.outlets
            and (self.slides is not None or slide.sample_id in each.expected)
        ]

    def stop(self) -> None:
        self._shared._leave(self)


@dataclass(eq=False)
class _SharedSlide:
    """A slide, for those that have not closed it."""

    readers: set[_Together]
    #: That were not taken yet.
    plans: dict[_Together, SlidePlan | Exception] = field(default_factory=dict)
    blocks: dict[_Together, int] = field(default_factory=dict)
    blocks_read: Counter[_Together] = field(default_factory=Counter)
    is_begun: bool = False

    def is_led_by(self, reads: _Together, source: TileSource) -> bool:
        """Whether much is kept for those that are behind it."""
        level = source.shared if isinstance(source, SlideSource) else None
        if level is None or level.kept_bytes <= KEPT_FOR_OTHERS_BYTES // 2:
            return False
        return self.progress(reads) > min(map(self.progress, self.readers), default=1.0)

    def progress(self, reads: _Together) -> float:
        """The share of its blocks that were read."""
        blocks = self.blocks.get(reads, 0)
        return self.blocks_read[reads] / blocks if blocks else 1.0


def _share_decoded(plans: Sequence[SlidePlan]) -> None:
    """Have compressed tiles that several plans of one reader need decoded once."""
    by_level: dict[tuple[HostTileReader, int], list[SlideSource]] = {}
    for source in (plan.source for plan in plans):
        if isinstance(source, SlideSource) and isinstance(source.reader, HostTileReader) and source.blocks:
            by_level.setdefault((source.reader, source.tiling.geometry.read_level), []).append(source)
    for (reader, level), sharing in by_level.items():
        if len(sharing) > 1:
            numbered = ((source, n) for source in sharing for n in range(len(source.blocks)))
            shared = SharedLevel(reader, level, [(source.squares(n), source.ratio) for source, n in numbered])
            for source in sharing if shared.chunk_bytes <= MOST_CHUNK_BYTES else ():
                source.shared = shared
