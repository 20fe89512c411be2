"""Streams that share slides: what is done once, who waits for whom, and that nobody waits for ever."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import OutputError, SlideOpenError, SlideReadError
from slide2vec.slides import Slide
from slide2vec.stream import shared_slides
from slide2vec.stream.jobs import EndOfSlides, JobFailed, JobPlanned, SlideJob, StreamBroken
from slide2vec.stream.plan import PlanRequest, SlidePlan
from slide2vec.stream.read_ahead import Outlet, Wanted
from slide2vec.stream.shared_slides import Share, SharedSlides
from slide2vec.stream.staging import InPlace
from slide2vec.stream.transfer import HostTransfer

BLOCKS, TILES = 10, 3


@dataclass
class Source:
    """Ten blocks of three tiles each, in the colour of their number; counts what is done with it."""

    name: str
    done: Counter[str] = field(default_factory=Counter)
    backend: str = "fake"
    blocks: list[Any] = field(
        default_factory=lambda: [np.arange(TILES) + TILES * number for number in range(BLOCKS)]
    )

    def fetch(self, number: int) -> Any:
        self.done["fetched"] += 1
        if self.name == "broken":
            raise SlideReadError(f"slide {self.name}: a tile is damaged")
        return number

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        self.done["placed"] += 1
        for tile, target in zip(self.blocks[number].tolist(), targets, strict=True):
            target[:] = tile

    def read_tile(self, tile: int, target: Any) -> None:
        raise SlideReadError(f"slide {self.name}: tile {tile} is damaged")

    def close(self) -> None:
        self.done["closed"] += 1


class Planned(dict[str, list[Source]]):
    """Sources by slide, one per plan that was made."""

    def plan(self, slide: Slide, requests: Sequence[PlanRequest], stager: object) -> list[Any]:
        if slide.sample_id == "unreadable":
            return [SlideOpenError("slide unreadable: no")] * len(requests)
        sources = [Source(slide.sample_id) for _ in requests]
        self.setdefault(slide.sample_id, []).extend(sources)
        where = np.arange(BLOCKS * TILES)
        tiling: Any = SimpleNamespace(sample_id=slide.sample_id, x=where, y=where)
        return [SlidePlan(slide, source, tiling) for source in sources]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    made = Planned()
    monkeypatch.setattr(shared_slides, "plan_together", made.plan)
    return made


class PlansFor:
    """What a stream with tiles of a size wants planned; it refuses some of the slides."""

    def __init__(self, size: int, refuses: str = "") -> None:
        self._config = PreprocessingConfig(requested_tile_size_px=size, requested_spacing_um=0.5)
        self._refuses, self.told = refuses, list[str]()

    @property
    def key(self) -> Any:
        return self._config.requested_tile_size_px

    def request(self, slide: Slide) -> PlanRequest:
        return PlanRequest(self._config)

    def announced(self, plan: SlidePlan) -> SlidePlan:
        if plan.slide.sample_id == self._refuses:
            raise OutputError("its coordinates cannot be written")
        self.told.append(plan.slide.sample_id)
        return plan


def slides(*names: str) -> list[Slide]:
    return [Slide(sample_id=name, image_path=Path(f"{name}.svs")) for name in names]


def wanted(size: int, batch: int, **options: Any) -> Wanted:
    asked = {"readers": 2, "planners": 2, "ahead": 2, "transfer": HostTransfer(), **options}
    return Wanted(batch, size, **asked)


class BreaksOff(Exception):
    pass


@dataclass
class Taken:
    """What a stream has got: slide and tiles of every batch, and the slides that failed."""

    batches: list[list[tuple[str, int]]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def tiles(self) -> list[tuple[str, int]]:
        return [tile for batch in self.batches for tile in batch]


def read_all(
    share: Share,
    todo: Sequence[Slide],
    size: int = 8,
    batch: int = 4,
    *,
    pause: float = 0.0,
    refuses: str = "",
    breaks_off_after: int | None = None,
    **options: Any,
) -> Taken:
    """What a stream does, up to its encoder."""
    found, outlet, count = Taken(), Outlet(), 0
    left: dict[SlideJob, int] = {}
    is_end = False
    with share.membership():
        reads = share.join(PlansFor(size, refuses), wanted(size, batch, **options), outlet)
        try:
            while left or not is_end:
                match outlet.inbox.get(timeout=20):
                    case EndOfSlides(count_of_slides):
                        assert count_of_slides == len(todo)
                        is_end = True
                    case StreamBroken(error):
                        raise error
                    case JobPlanned(job):
                        left[job] = BLOCKS * TILES
                    case JobFailed(job, _):
                        if job.plan is None or left.pop(job, None):
                            found.failed.append(job.slide.sample_id)
                    case taken:
                        count += 1
                        if count == breaks_off_after:
                            raise BreaksOff
                        found.batches.append(list(tiles_of(taken, left)))
                        time.sleep(pause)
                        reads.release(outlet, taken)
        finally:
            reads.leave(outlet)
    # batches come in the order in which they are full
    found.batches.sort(key=lambda each: [(names.index(name), tile) for name, tile in each])
    return found


names = [*"abcdefghijklmnop", "broken", "first", "both", "second"]


def tiles_of(batch: Any, left: dict[SlideJob, int]) -> Iterator[tuple[str, int]]:
    """Those of slides of which tiles are left to be taken."""
    for piece in batch.pieces:
        if piece.owner in left and not piece.owner.failed:
            left[piece.owner] -= len(piece.tiles)
            if not left[piece.owner]:
                del left[piece.owner]
            for tile, pixels in zip(piece.tiles.tolist(), batch.pixels[piece.slots], strict=True):
                assert (pixels == tile).all()
                yield piece.owner.slide.sample_id, tile


def all_of(*slides: str) -> list[tuple[str, int]]:
    return [(name, tile) for name in slides for tile in range(BLOCKS * TILES)]


def in_threads(*streams: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(streams)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(stream) for stream in streams]]


def is_over(shared: SharedSlides) -> bool:
    return not shared._slides and not shared._todo


ONCE = Counter(fetched=BLOCKS, placed=BLOCKS, closed=1)


def test_tiles_are_read_cut_and_packed_once_for_streams_of_the_same_tiles(planned: Planned) -> None:
    todo, memory = slides("a", "b", "c"), list[tuple[int, ...]]()

    class Counted(HostTransfer):
        def allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
            memory.append(shape)
            return super().allocate(shape)

    shared = SharedSlides("xyz")
    one = {"transfer": Counted()}
    found = in_threads(
        *(lambda name=name: read_all(shared.share(name, todo), todo, ahead=3, **one) for name in "xyz")
    )
    assert [each.tiles for each in found] == [all_of("a", "b", "c")] * 3
    assert found[0].batches == found[1].batches and len(found[0].batches) == 23
    assert {name: [source.done for source in made] for name, made in planned.items()} == {
        name: [ONCE] for name in "abc"
    }
    assert set(memory) == {(4, 8, 8, 3)} and len(memory) < 2 * 2 * 64 // 4 + 3
    assert is_over(shared)


def test_smaller_batches_are_parts_of_larger_ones_where_they_are_whole_parts(planned: Planned) -> None:
    """12, 6 and 4 tiles go with 12; 5 and 7 have readings of their own, by the same reader."""
    todo = slides("a", "b")
    shared = SharedSlides("uvwxyz")
    sizes = dict(zip("uvwxyz", (4, 12, 5, 6, 12, 7), strict=True))
    found = in_threads(
        *(
            lambda n=name, b=size: read_all(shared.share(n, todo), todo, batch=b)
            for name, size in sizes.items()
        )
    )
    assert [each.tiles for each in found] == [all_of("a", "b")] * 6
    assert [len(each.batches[0]) for each in found] == [12, 12, 5, 12, 12, 7]
    assert [source.done for source in planned["a"]] == [ONCE] * 3


def test_few_threads_read_at_once_however_many_streams_there_are(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of tiles of their own, which have nothing to wait for but each other's reading."""
    todo, now, most, lock = slides("a"), [0], [0], threading.Lock()
    fetching = Source.fetch

    def counted(self: Source, number: int) -> Any:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1
        return fetching(self, number)

    monkeypatch.setattr(Source, "fetch", counted)
    shared = SharedSlides("uvwxyz", readers=2)
    sizes = zip("uvwxyz", (2, 4, 6, 8, 10, 12), strict=True)
    in_threads(*(lambda n=name, s=size: read_all(shared.share(n, todo), todo, s) for name, size in sizes))
    assert most[0] == 3  # one more than readers: it may wait for another's tile


def test_streams_of_other_tiles_have_plans_of_their_own(planned: Planned) -> None:
    todo = slides("a")
    shared = SharedSlides("xy")
    found = in_threads(
        lambda: read_all(shared.share("x", todo), todo, 8),
        lambda: read_all(shared.share("y", todo), todo, 16),
    )
    assert [each.tiles for each in found] == [all_of("a")] * 2
    assert [source.done for source in planned["a"]] == [ONCE] * 2 and is_over(shared)


def test_streams_may_have_other_slides(planned: Planned) -> None:
    """As after a resume: each packs what it would pack alone, and shares the opened slides."""
    both, first, second = slides("both"), slides("first"), slides("second")
    shared = SharedSlides("xy")
    found = in_threads(
        lambda: read_all(shared.share("x", first + both), first + both),
        lambda: read_all(shared.share("y", both + second), both + second),
    )
    assert [each.tiles for each in found] == [all_of("first", "both"), all_of("both", "second")]
    assert {name: len(made) for name, made in planned.items()} == {"first": 1, "both": 2, "second": 1}


def test_memory_is_bounded_by_the_slowest(planned: Planned) -> None:
    """However fast the other is, no more batches are packed than the slow one lets."""
    todo, packed = slides("a", "b", "c", "d"), [0]

    class Counted(HostTransfer):
        def allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
            packed[0] += 1
            return super().allocate(shape)

    shared, asked = SharedSlides("xy"), {"transfer": Counted(), "readers": 1, "batch": 64}
    found = in_threads(
        lambda: read_all(shared.share("x", todo), todo, **asked),
        lambda: read_all(shared.share("y", todo), todo, pause=0.02, **asked),
    )
    assert [each.tiles for each in found] == [all_of("a", "b", "c", "d")] * 2
    assert packed[0] <= 3  # two ahead, and the one that is being filled


def test_no_slide_is_planned_far_ahead_of_the_slowest(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_slides, "KEPT_SLIDES", 2)
    todo = slides(*"abcdefghijklmnop")
    shared, most = SharedSlides("xy"), [0]
    placing = Source.place

    def noted(self: Source, *args: Any) -> None:
        most[0] = max(most[0], len(shared._slides))
        placing(self, *args)

    monkeypatch.setattr(Source, "place", noted)
    slow = {"readers": 1, "planners": 1, "batch": 32, "pause": 0.01}
    found = in_threads(
        lambda: read_all(shared.share("x", todo), todo),
        lambda: read_all(shared.share("y", todo), todo, 16, **slow),
    )
    assert [each.tiles for each in found] == [all_of(*"abcdefghijklmnop")] * 2
    assert most[0] <= 2 + 8 and is_over(shared)  # those that the slow one itself is ahead


def test_who_leaves_holds_up_nobody(planned: Planned) -> None:
    """A stream that breaks off in the middle of a slide, with batches in its hands, or before it comes."""
    todo = slides("a", "b")
    shared = SharedSlides("wxyz")

    def breaks_off() -> None:
        with pytest.raises(BreaksOff):
            read_all(shared.share("y", todo), todo, breaks_off_after=3, pause=0.01)

    def never_comes() -> None:
        with shared.share("z", todo).membership():
            pass

    found = in_threads(
        lambda: read_all(shared.share("x", todo), todo),
        breaks_off,
        never_comes,
        lambda: read_all(shared.share("w", todo), todo, 16),
    )
    assert [found[0].tiles, found[3].tiles] == [all_of("a", "b")] * 2
    assert [source.done for made in planned.values() for source in made] == [ONCE] * 4 and is_over(shared)


def test_when_all_have_left_nothing_is_read_any_more(planned: Planned) -> None:
    todo = slides("a", "b", "c", "d")
    shared = SharedSlides("xyz")

    def breaks_off(name: str, size: int) -> None:
        with pytest.raises(BreaksOff):
            read_all(shared.share(name, todo), todo, size, breaks_off_after=2, readers=1, batch=32)

    in_threads(*(lambda n=name, s=size: breaks_off(n, s) for name, size in (("x", 8), ("y", 8), ("z", 16))))
    assert is_over(shared)
    assert all(source.done["closed"] == 1 for made in planned.values() for source in made)
    assert not [each for each in threading.enumerate() if each.name.startswith(("read-", "dispatch"))]


def test_errors_are_those_of_every_stream(planned: Planned) -> None:
    todo = slides("unreadable", "broken", "a")
    shared = SharedSlides("xyz")
    sizes = zip("xyz", (8, 8, 16), strict=True)
    found = in_threads(
        *(lambda n=name, s=size: read_all(shared.share(n, todo), todo, s) for name, size in sizes)
    )
    assert [each.tiles for each in found] == [all_of("a")] * 3
    assert [sorted(each.failed) for each in found] == [["broken", "unreadable"]] * 3
    assert [source.done["closed"] for source in planned["broken"]] == [1, 1] and is_over(shared)


def test_what_a_stream_makes_of_a_plan_is_its_own_error(planned: Planned) -> None:
    todo = slides("a", "b", "c")
    shared = SharedSlides("xy")
    found = in_threads(
        lambda: read_all(shared.share("x", todo), todo, refuses="b"),
        lambda: read_all(shared.share("y", todo), todo),
    )
    assert [each.failed for each in found] == [["b"], []]
    assert found[1].tiles == all_of("a", "b", "c")
    assert found[0].tiles == all_of("a", "c")
    alone = read_all(SharedSlides("x").share("x", todo), todo, refuses="b")
    assert alone.failed == ["b"] and alone.tiles == all_of("a", "c")  # nor has it slots


def test_nobody_waits_where_nothing_can_be_read(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no thread can be started any more."""

    def fails(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shared_slides.ReadAhead, "start", fails)
    todo, shared, raised = slides("a"), SharedSlides("xyz"), []

    def stream(name: str) -> None:
        with pytest.raises(RuntimeError, match="new thread"):
            read_all(shared.share(name, todo), todo)
        raised.append(name)

    in_threads(*(lambda name=name: stream(name) for name in "xyz"))
    assert sorted(raised) == ["x", "y", "z"]


def test_readings_that_have_begun_end_where_another_cannot(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else their threads wait for ever, and so does the process for its end."""
    start, begun = shared_slides.ReadAhead.start, list[Any]()

    def fails_second(self: Any) -> None:
        begun.append(self)
        if len(begun) > 1:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(shared_slides.ReadAhead, "start", fails_second)
    todo, shared = slides(*(f"s{number}" for number in range(100))), SharedSlides("xy")

    def stream(name: str, size: int) -> None:
        with pytest.raises(RuntimeError, match="new thread"):
            read_all(shared.share(name, todo), todo, size)
        for thread in begun[0]._threads:  # while whoever asked for it is alive
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in begun[0]._threads)

    in_threads(lambda: stream("x", 8), lambda: stream("y", 16))
    assert len(begun) == 2 and is_over(shared)


def test_copies_begin_in_an_order_that_is_that_of_every_stream(planned: Planned) -> None:
    """Else those of later slides may take the room of one that another stream waits for."""

    begun = []

    class Stager(InPlace):
        def ahead(self, slides: Iterable[Slide]) -> Iterator[Slide]:
            for slide in slides:
                begun.append(slide.sample_id)
                yield slide

    todo = slides("a", "b", "c", "d")
    shared = SharedSlides("xy", Stager())
    in_threads(
        lambda: read_all(shared.share("x", todo[2:]), todo[2:]),
        lambda: read_all(shared.share("y", todo), todo, pause=0.01),
    )
    assert begun == ["a", "b", "c", "d"]


def test_who_is_behind_does_not_wait_and_who_leads_does(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if much of what is decoded were kept for those that are behind."""
    gaps, led = list[float](), shared_slides._SharedSlide.is_led_by

    def leads(self: Any, reads: Any, source: Any) -> bool:
        progress = [self.progress(each) for each in self.readers]
        gaps.append(max(progress) - min(progress))
        assert not led(self, reads, source)  # nothing is kept by these readers
        return bool(self.progress(reads) > min(progress))

    monkeypatch.setattr(shared_slides._SharedSlide, "is_led_by", leads)
    todo = slides("a", "b")
    shared = SharedSlides("xyz")
    given = zip("xyz", (8, 16, 24), (0.0, 0.01, 0.002), strict=True)
    found = in_threads(
        *(lambda n=n, s=size, p=p: read_all(shared.share(n, todo), todo, s, pause=p) for n, size, p in given)
    )
    assert [each.tiles for each in found] == [all_of("a", "b")] * 3
    assert max(gaps) <= 0.4  # two threads each, which may have begun a block more


@pytest.mark.parametrize("seed", range(6))
def test_streams_that_break_off_at_any_moment(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whoever goes on gets all of its tiles, in the batches of a separate run, and nothing stays open."""
    chance = random.Random(seed)
    fetching, todo = Source.fetch, slides("a", "unreadable", "b", "broken", "c")

    def delayed(self: Source, number: int) -> Any:
        time.sleep(chance.random() * 0.003)
        return fetching(self, number)

    monkeypatch.setattr(Source, "fetch", delayed)
    shared, streams = SharedSlides("uvwxyz"), []

    def stream(name: str, size: int, batch: int, pause: float, end: int | None) -> Taken | None:
        try:
            return read_all(
                shared.share(name, todo), todo, size, batch, pause=pause, breaks_off_after=end, readers=2
            )
        except BreaksOff:
            return None

    for name in "uvwxyz":
        given = chance.choice((8, 16)), chance.choice((4, 8, 12)), chance.random() * 0.004
        streams.append((name, *given, chance.choice((None, None, 1, 2, 5))))
    found = in_threads(*(lambda given=given: stream(*given) for given in streams))
    for taken, given in zip(found, streams, strict=True):
        assert (taken is None) == (given[-1] is not None)
        if taken is not None:
            assert taken.tiles == all_of("a", "b", "c") and sorted(taken.failed) == ["broken", "unreadable"]
    assert is_over(shared)
    assert all(source.done["closed"] == 1 for made in planned.values() for source in made)


def test_slides_that_come_one_by_one_go_to_those_they_are_for(planned: Planned) -> None:
    """As in workers, where nobody knows beforehand what will come."""
    a, b, c, d = slides("a", "b", "c", "d")
    shared = SharedSlides("xyz")
    shares = {name: shared.share(name) for name in "xyz"}
    given = {"x": [a, b, d], "y": [a, c, d], "z": [a, b, c, d]}

    def come() -> None:
        for slide in (a, b, c, d):
            shared.expect(slide, [name for name, theirs in given.items() if slide in theirs])
            time.sleep(0.01)
        shared.end()

    found = in_threads(
        come, *(lambda n=n: read_all(shares[n], given[n], 16 if n == "z" else 8) for n in given)
    )
    assert [each.tiles for each in found[1:]] == [
        all_of("a", "b", "d"),
        all_of("a", "c", "d"),
        all_of(*"abcd"),
    ]
    assert {name: [source.done for source in made] for name, made in planned.items()} == {
        name: [ONCE, ONCE] for name in "abcd"
    }
    assert is_over(shared)
