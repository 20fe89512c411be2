"""Slides that several streams read together: each is planned once, each block of tiles decoded once.

Every stream goes on as if it were alone, with batches of its own. The first that wants a slide plans it for
all, the first that wants a block decodes it for all whose tiles are the same, and blocks stay in memory until
the last has cut its tiles out of them. Whoever is ahead waits when much is kept for the others; who is behind
never does, and slides are taken up in an order that is that of every stream, so that waiting always ends.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slide2vec.cpus import job_cpus
from slide2vec.errors import SlideReadError
from slide2vec.readers.tile_assembly import EXPECTED_BYTES, HostTileReader
from slide2vec.slides import Slide
from slide2vec.stream.batches import Stopped
from slide2vec.stream.plan import PlanRequest, SlidePlan, plan_together
from slide2vec.stream.staging import IN_PLACE, InPlace
from slide2vec.stream.tile_sources import SlideSource, TileSource

__all__ = ["Share", "SharedSlides"]

#: Bytes of decoded blocks that are kept for streams that are behind.
KEPT_BYTES = 512 << 20
#: Slides that are planned and open for streams that are behind.
KEPT_SLIDES = 16

#: What a stream is called among those that share.
_Member: TypeAlias = str
#: Streams of equal keys have the same tiles, and write them to the same place.
_Key: TypeAlias = Hashable


class SharedSlides:
    """What streams share that run side by side over the same slides, or some of them.

    Args:
        members: names of the streams, whose slides are in an order that fits those of the others. The first
            slide is planned when each has asked for one, or has left.
        stager: brings slides to where they are read.
        kept_bytes: of tiles that wait for streams that are behind.
        readers: threads, of whichever stream, that decode and cut at once: more would take the CPUs, and
            Python's lock, from one another. One waits now and then for a tile that another decodes.
    """

    def __init__(
        self,
        members: Collection[_Member],
        stager: InPlace = IN_PLACE,
        *,
        kept_bytes: int = KEPT_BYTES,
        readers: int | None = None,
    ) -> None:
        self.stager = stager
        self._lock = threading.RLock()
        #: Notified of slides, and of room for blocks. A block has one of its own: few are woken by each.
        self._changed, self._room = threading.Condition(self._lock), threading.Condition(self._lock)
        self.reading = threading.Semaphore((readers or job_cpus()) + 1)
        self._to_begin = set(members)
        self._kept_bytes = kept_bytes
        #: Of each stream, slides that nobody has taken up (first found at once); how each begun one plans.
        self._todo: dict[_Member, OrderedDict[str, None]] = {}
        self._planning: dict[_Member, Callable[[Slide], PlanRequest]] = {}
        self._slides: dict[str, _SharedSlide] = {}
        #: Blocks, and planned slides, that are there and not yet taken, by the stream that will.
        self._blocks_kept: Counter[_Member] = Counter()
        self._plans_kept: Counter[_Member] = Counter()
        self._bytes = 0

    def share(self, member: _Member, slides: Iterable[Slide] = ()) -> Share:
        """The part of the stream that will plan these slides, and those that it is to `expect`."""
        self._todo[member] = OrderedDict.fromkeys(slide.sample_id for slide in slides)
        return Share(self, member)

    def expect(self, name: str, members: Iterable[_Member]) -> None:
        """One slide more comes, for these streams, after all that any stream has."""
        with self._lock:
            for member in members:
                self._todo[member][name] = None

    # joining and leaving ------------------------------------------------------------------------

    def _begin(self, member: _Member, request: Callable[[Slide], PlanRequest]) -> None:
        with self._changed:
            if member in self._to_begin:
                self._planning[member] = request
                self._to_begin.discard(member)
                self._changed.notify_all()
            self._wait(member, lambda: not self._to_begin)

    def _leave(self, member: _Member) -> None:
        """Nothing more is kept for it; if it waits for something, it gets `Stopped`."""
        closing: list[TileSource] = []
        with self._changed:
            self._to_begin.discard(member)
            self._planning.pop(member, None)
            for shared in list(self._slides.values()):
                closing += self._forget(shared, member)
            self._changed.notify_all()
            self._room.notify_all()
        for source in closing:
            source.close()

    def _wait(self, member: _Member, ready: Callable[[], bool]) -> None:
        """Under the lock.

        Raises:
            Stopped: the stream has left.
        """
        self._changed.wait_for(lambda: ready() or member not in self._planning)
        if member not in self._planning:
            raise Stopped

    # planning -----------------------------------------------------------------------------------

    def _take_up(self, member: _Member, slide: Slide) -> _SharedSlide:
        """The slide, entered for all streams that will plan it, once there is room, and after all slides that
        come before it in any of these. So nobody waits for one while others hold on to later ones, nor for
        the copy of one while those of later ones take all the room.

        Raises:
            Stopped: the stream has left.
        """
        name = slide.sample_id
        with self._changed:
            self._wait(
                member, lambda: name in self._slides or (self._is_next(name) and not self._is_ahead(member))
            )
            if name not in self._slides:
                takers = {each for each in self._planning if name in self._todo[each]}
                self._slides[name] = _SharedSlide(takers | {member})
                for each in takers:
                    del self._todo[each][name]
                for _ in self.stager.ahead([slide]):  # its copy begins
                    pass
                self._changed.notify_all()
            return self._slides[name]

    def _is_next(self, name: str) -> bool:
        """Whether every slide that comes before it in a stream has been taken up."""
        todo = (self._todo[each] for each in self._planning)
        return all(next(iter(each)) == name for each in todo if name in each)

    def _plan(self, member: _Member, slide: Slide) -> SlidePlan:
        name, shared = slide.sample_id, self._take_up(member, slide)
        with self._changed:
            mine, shared.is_begun = not shared.is_begun, True
        if mine:
            self._plan_for_all(shared, slide)
        with self._changed:
            self._wait(member, lambda: shared.is_planned)
            self._take_plan(shared, member)
            found = shared.plans[member]
        if isinstance(found, Exception):
            self._closed(name, member)
            raise found
        return replace(found.plan, source=_ShareOfBlocks(self, name, member, found))

    def _take_plan(self, shared: _SharedSlide, member: _Member) -> None:
        if member in shared.awaited:
            shared.awaited.discard(member)
            self._plans_kept[member] -= 1
            self._changed.notify_all()

    def _is_ahead(self, member: _Member) -> bool:
        """Whether much is kept for others, and nothing for it."""
        return len(self._slides) >= KEPT_SLIDES and not self._plans_kept[member]

    def _plan_for_all(self, shared: _SharedSlide, slide: Slide) -> None:
        with self._changed:
            asking = {each: self._planning[each] for each in sorted(shared.members & self._planning.keys())}
        requests: dict[_Key, PlanRequest] = {}
        keys: dict[_Member, _Key] = {}
        plans: dict[_Key, _Blocks | Exception] = {}
        try:
            for each, request in asking.items():
                asked = request(slide)
                keys[each] = asked.config.model_dump_json(), asked.output_dir, id(asked.given)
                requests.setdefault(keys[each], asked)
            made = plan_together(slide, list(requests.values()), self.stager)
            for key, plan in zip(requests, made, strict=True):
                side = requests[key].config.requested_tile_size_px
                assert side is not None  # resolved
                plans[key] = plan if isinstance(plan, Exception) else _Blocks(plan, side)
            _share_decoded([each for each in plans.values() if isinstance(each, _Blocks)])
        except BaseException as error:
            failed = error if isinstance(error, Exception) else Stopped()
            plans = dict.fromkeys(keys.values(), failed)
            raise
        finally:
            self._planned(shared, keys, plans)

    def _planned(
        self, shared: _SharedSlide, keys: dict[_Member, _Key], plans: dict[_Key, _Blocks | Exception]
    ) -> None:
        unwanted = []
        with self._changed:
            for member, key in keys.items():
                found = plans.get(key, Stopped())
                shared.plans[member] = found
                if member in shared.members and isinstance(found, _Blocks):
                    found.members.add(member)
            shared.awaited, shared.is_planned = set(shared.members), True
            self._plans_kept.update(shared.awaited)
            unwanted = [each for each in plans.values() if isinstance(each, _Blocks) and not each.members]
            self._drop_unused(shared)
            self._changed.notify_all()
        for blocks in unwanted:
            blocks.plan.source.close()

    # blocks -------------------------------------------------------------------------------------

    def _fetch(self, member: _Member, blocks: _Blocks, number: int) -> tuple[bool, Any]:
        """Whether it is kept for others, too, and the tiles; else what the source gives."""
        with self._lock:
            while (block := blocks.there.get(number)) is None or not block.is_there:
                changed = self._room if block is None else block.changed
                full, awaited = self._is_full, self._blocks_kept[member] > 0
                if block is None and ((full and awaited) or not blocks.leads()):
                    if blocks.members <= {member}:
                        break
                    if awaited or not full:
                        block = blocks.there[number] = _Block(threading.Condition(self._lock))
                        break
                changed.wait()
                if member not in self._planning or member not in blocks.members:
                    raise Stopped
            else:
                return True, self._taken(member, blocks, number)
        try:
            if block is not None:
                return True, self._fetch_for_all(member, blocks, number)
            with self.reading:
                return False, blocks.plan.source.fetch(number)
        finally:
            if blocks.beside:
                with self._lock:
                    blocks.fetched += 1
                    self._room.notify_all()

    @property
    def _is_full(self) -> bool:
        """Whether much is kept: only streams that something is kept for may read on."""
        return self._bytes >= self._kept_bytes

    def _taken(self, member: _Member, blocks: _Blocks, number: int) -> Any:
        block = blocks.there[number]
        if block.error is not None:
            self._drop(member, blocks, number, block)
            raise block.error
        if member in block.awaited:
            block.awaited.discard(member)
            self._blocks_kept[member] -= 1
        return block.data

    def _fetch_for_all(self, member: _Member, blocks: _Blocks, number: int) -> Any:
        block = blocks.there[number]
        try:
            with self.reading:
                block.data = blocks.tiles(number)
        except SlideReadError as error:
            block.error = error
        except BaseException:
            with self._changed:  # whoever waits for it tries by itself
                del blocks.there[number]
                block.changed.notify_all()
            raise
        with self._changed:
            block.is_there = True
            block.size = 0 if block.data is None else block.data.nbytes
            block.using, block.awaited = blocks.members | {member}, blocks.members | {member}
            self._bytes += block.size
            for each in block.awaited:
                self._blocks_kept[each] += 1
            block.changed.notify_all()
            self._room.notify_all()
            return self._taken(member, blocks, number)

    def _used(self, member: _Member, blocks: _Blocks, number: int) -> None:
        """A stream has cut its tiles out of a block."""
        with self._changed:
            if (block := blocks.there.get(number)) is not None:
                self._drop(member, blocks, number, block)

    def _drop(self, member: _Member, blocks: _Blocks, number: int, block: _Block) -> None:
        if not block.is_there or member not in block.using:
            return
        block.using.discard(member)
        if member in block.awaited:
            block.awaited.discard(member)
            self._blocks_kept[member] -= 1
        if not block.using:
            del blocks.there[number]
            self._bytes -= block.size
            self._room.notify_all()
            if block.error is None:
                blocks.free.append(block.data)

    def _closed(self, name: str, member: _Member) -> None:
        """A stream is done with a slide."""
        with self._changed:
            shared = self._slides.get(name)
            closing = [] if shared is None else self._forget(shared, member)
            self._changed.notify_all()
            self._room.notify_all()
        for source in closing:
            source.close()

    def _forget(self, shared: _SharedSlide, member: _Member) -> list[TileSource]:
        """Under the lock; the sources that nobody needs any more."""
        if member not in shared.members:
            return []
        shared.members.discard(member)
        self._take_plan(shared, member)
        found = shared.plans.get(member)
        closing = []
        if isinstance(found, _Blocks):
            found.members.discard(member)
            for number, block in list(found.there.items()):
                block.changed.notify_all()
                self._drop(member, found, number, block)
            if not found.members:
                closing.append(found.plan.source)
        self._drop_unused(shared)
        return closing

    def _drop_unused(self, shared: _SharedSlide) -> None:
        """Forget a slide that nobody needs any more (nor plans at this moment)."""
        if not shared.members and (shared.is_planned or not shared.is_begun):
            self._slides = {name: each for name, each in self._slides.items() if each is not shared}


class Share:
    """The part of one stream in `SharedSlides`. Used from several threads."""

    def __init__(self, shared: SharedSlides, member: _Member) -> None:
        self._shared, self.member = shared, member

    @property
    def stager(self) -> InPlace:
        """Where slides are read, whichever stream takes them first."""
        return self._shared.stager

    def ahead(self, slides: Iterable[Slide], request: Callable[[Slide], PlanRequest]) -> Iterator[Slide]:
        """The slides, each as soon as it may be planned; where slides are staged, its copy has begun.

        The first waits until all other streams have begun, too, or left.

        Args:
            request: what the stream wants planned of a slide.

        Raises:
            Stopped: the stream has left.
        """
        self._shared._begin(self.member, request)
        for slide in slides:
            self._shared._take_up(self.member, slide)
            yield slide

    def plan(self, slide: Slide, request: Callable[[Slide], PlanRequest]) -> SlidePlan:
        """See `plan_slide`; waits as `ahead` does.

        Raises:
            Stopped: the stream has left.
        """
        self._shared._begin(self.member, request)
        return self._shared._plan(self.member, slide)

    @contextmanager
    def announcing(self, plan: SlidePlan) -> Iterator[bool]:
        """Whether another stream with these tiles has announced them: one after the other does."""
        assert isinstance(plan.source, _ShareOfBlocks)
        with plan.source.common.announcing:
            yield plan.source.common.is_announced
            plan.source.common.is_announced = True

    def leave(self) -> None:
        """Nothing is kept for this stream any more, and nothing is waited for. May be called twice."""
        self._shared._leave(self.member)

    @contextmanager
    def membership(self) -> Iterator[None]:
        """Leaves at the end of the block, however it ends."""
        try:
            yield
        finally:
            self.leave()


@dataclass(eq=False)
class _Block:
    """A block of tiles in memory: for streams that have yet to take it, and those that are using it."""

    #: Notified when it is there, or will not be.
    changed: threading.Condition
    data: Any = None
    error: SlideReadError | None = None
    is_there: bool = False
    size: int = 0
    awaited: set[_Member] = field(default_factory=set)
    using: set[_Member] = field(default_factory=set)


@dataclass(eq=False)
class _Blocks:
    """A plan for streams whose tiles are the same."""

    plan: SlidePlan
    tile_size_px: int
    members: set[_Member] = field(default_factory=set)
    there: dict[int, _Block] = field(default_factory=dict)
    #: Plans of other tiles that need the same compressed tiles; and how many blocks of this one were fetched.
    beside: tuple[_Blocks, ...] = ()
    fetched: int = 0
    free: list[NDArray[np.uint8]] = field(default_factory=list)
    announcing: threading.Lock = field(default_factory=threading.Lock)
    is_announced: bool = False

    def tiles(self, number: int) -> NDArray[np.uint8]:
        """(n, S, S, 3) uint8, the tiles of a block first; S is tile_size_px."""
        source, side = self.plan.source, self.tile_size_px
        data, count = source.fetch(number), len(source.blocks[number])
        memory = self.free.pop() if self.free else np.empty((0, side, side, 3), np.uint8)
        if len(memory) < count:
            memory = np.empty((count, side, side, 3), np.uint8)
        source.place(number, data, list(memory[:count]))
        return memory

    def leads(self) -> bool:
        """Whether much is kept for plans that are behind."""
        source = self.plan.source
        if (
            not self.beside
            or not isinstance(source, SlideSource)
            or not isinstance(source.reader, HostTileReader)
        ):
            return False
        behind = min((each.progress for each in self.beside if each.members), default=1.0)
        return self.progress > behind and source.reader.kept_bytes > EXPECTED_BYTES // 2

    @property
    def progress(self) -> float:
        """The share of its blocks that were fetched."""
        return self.fetched / max(1, len(self.plan.source.blocks))


def _share_decoded(plans: Sequence[_Blocks]) -> None:
    """Have compressed tiles that several plans of one reader need decoded once."""
    by_reader: dict[int, list[tuple[_Blocks, SlideSource, HostTileReader]]] = {}
    for each in plans:
        source = each.plan.source
        if isinstance(source, SlideSource) and isinstance(source.reader, HostTileReader):
            by_reader.setdefault(id(source.reader), []).append((each, source, source.reader))
    for sharing in by_reader.values():
        if len(sharing) > 1:
            sharing[0][2].expect(read for _, source, _ in sharing for read in source.reads())
            for each, _, _ in sharing:
                each.beside = tuple(other for other, _, _ in sharing if other is not each)


@dataclass(eq=False)
class _SharedSlide:
    """A slide, for the streams that have not closed it."""

    members: set[_Member]
    awaited: set[_Member] = field(default_factory=set)
    plans: dict[_Member, _Blocks | Exception] = field(default_factory=dict)
    is_begun: bool = False
    is_planned: bool = False


class _ShareOfBlocks:
    """A plan's source, for one of its streams. See `TileSource`."""

    def __init__(self, shared: SharedSlides, name: str, member: _Member, blocks: _Blocks) -> None:
        self._shared, self._name, self._member, self.common = shared, name, member, blocks
        self._source = blocks.plan.source
        self.backend, self.blocks = self._source.backend, self._source.blocks

    def fetch(self, number: int) -> Any:
        return self._shared._fetch(self._member, self.common, number)

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        is_kept, block = data
        try:
            with self._shared.reading:
                if is_kept:
                    for tile, target in zip(block, targets, strict=False):
                        target[:] = tile
                else:
                    self._source.place(number, block, targets)
        finally:
            if is_kept:
                self._shared._used(self._member, self.common, number)

    def read_tile(self, tile: int, target: Any) -> None:
        self._source.read_tile(tile, target)

    def close(self) -> None:
        self._shared._closed(self._name, self._member)
