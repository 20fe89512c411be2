"""Streams that share slides: what is done once, who waits for whom, and that nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import SlideOpenError, SlideReadError
from slide2vec.slides import Slide
from slide2vec.stream import shared_slides
from slide2vec.stream.batches import Stopped
from slide2vec.stream.plan import PlanRequest, SlidePlan
from slide2vec.stream.shared_slides import Share, SharedSlides
from slide2vec.stream.staging import InPlace

BLOCK_BYTES = 224 * 224 * 3


@dataclass
class Source:
    """Ten blocks of a tile each; counts what is done with it."""

    name: str
    done: Counter[str] = field(default_factory=Counter)
    backend: str = "fake"
    broken: bool = False
    blocks: list[Any] = field(default_factory=lambda: [np.array([n]) for n in range(10)])

    def fetch(self, number: int) -> Any:
        self.done["fetched"] += 1
        if self.broken:
            raise SlideReadError(f"slide {self.name}: a tile is damaged")
        return number

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        for target in targets:
            target[:] = data

    def read_tile(self, tile: int, target: Any) -> None:
        target[:] = tile

    def close(self) -> None:
        self.done["closed"] += 1


class Planned(dict[str, list[Source]]):
    """Sources by slide, one per plan that was made."""

    def plan(self, slide: Slide, requests: Sequence[PlanRequest], stager: object) -> list[Any]:
        if slide.sample_id == "unreadable":
            return [SlideOpenError("slide unreadable: no")] * len(requests)
        sources = [Source(slide.sample_id, broken=slide.sample_id == "broken") for _ in requests]
        self.setdefault(slide.sample_id, []).extend(sources)
        return [SlidePlan(slide, source, None) for source in sources]  # type: ignore[arg-type]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    made = Planned()
    monkeypatch.setattr(shared_slides, "plan_together", made.plan)
    return made


def slides(*names: str) -> list[Slide]:
    return [Slide(sample_id=name, image_path=Path(f"{name}.svs")) for name in names]


def request(size: int = 224) -> Callable[[Slide], PlanRequest]:
    config = PreprocessingConfig(requested_tile_size_px=size, requested_spacing_um=0.5)
    return lambda slide: PlanRequest(config)


def read_all(
    share: Share, todo: Sequence[Slide], size: int = 224, pause: float = 0.0
) -> list[tuple[str, int]]:
    """What a stream does; returns the slide and the content of every block."""
    found = []
    with share.membership():
        for slide in todo:
            try:
                plan = share.plan(slide, request(size))
            except SlideOpenError:
                continue
            for number in range(len(plan.source.blocks)):
                try:
                    data = plan.source.fetch(number)
                except SlideReadError:
                    continue
                target = np.zeros((size, size, 3), np.uint8)
                plan.source.place(number, data, [target])
                found.append((slide.sample_id, int(target[0, 0, 0])))
                time.sleep(pause)
            plan.source.close()
    return found


def in_threads(*streams: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(streams)) as pool:
        return [future.result(timeout=20) for future in [pool.submit(stream) for stream in streams]]


def test_each_block_is_read_once_for_streams_of_the_same_tiles(planned: Planned) -> None:
    todo = slides("a", "b", "c")
    shared = SharedSlides("xyz")
    found = in_threads(*(lambda name=name: read_all(shared.share(name, todo), todo) for name in "xyz"))
    expected = [(name, number) for name in "abc" for number in range(10)]
    assert found == [expected] * 3
    assert {name: [source.done for source in made] for name, made in planned.items()} == {
        name: [Counter(fetched=10, closed=1)] for name in "abc"
    }
    assert shared._bytes == 0 and not shared._slides and not +shared._blocks_kept and not +shared._plans_kept


def test_tiles_are_cut_once_for_all_streams(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    todo, cut = slides("a"), list[int]()
    placing = Source.place

    def counted(self: Source, number: int, data: Any, targets: Sequence[Any]) -> None:
        cut.append(number)
        placing(self, number, data, targets)

    monkeypatch.setattr(Source, "place", counted)
    shared = SharedSlides("xyz")
    in_threads(*(lambda name=name: read_all(shared.share(name, todo), todo) for name in "xyz"))
    assert sorted(cut) == list(range(10))


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
    sizes = zip("uvwxyz", (64, 96, 128, 160, 192, 224), strict=True)
    in_threads(*(lambda n=name, s=size: read_all(shared.share(n, todo), todo, s) for name, size in sizes))
    assert most[0] == 3  # one more than readers: it may wait for another's tile


def test_streams_of_other_tiles_have_plans_of_their_own(planned: Planned) -> None:
    todo = slides("a")
    shared = SharedSlides("xy")
    in_threads(
        lambda: read_all(shared.share("x", todo), todo, 224),
        lambda: read_all(shared.share("y", todo), todo, 512),
    )
    assert [source.done for source in planned["a"]] == [Counter(fetched=10, closed=1)] * 2


def test_streams_may_have_other_slides(planned: Planned) -> None:
    """As after a resume: what one of them has is read for it alone."""
    both, first, second = slides("both"), slides("first"), slides("second")
    shared = SharedSlides("xy")
    found = in_threads(
        lambda: read_all(shared.share("x", first + both), first + both),
        lambda: read_all(shared.share("y", both + second), both + second),
    )
    assert [len(each) for each in found] == [20, 20]
    assert {name: made[0].done["fetched"] for name, made in planned.items()} == dict.fromkeys(planned, 10)


def test_memory_is_bounded_by_the_slowest(planned: Planned) -> None:
    todo, most = slides("a", "b"), [0]
    shared = SharedSlides("xy", kept_bytes=3 * BLOCK_BYTES)
    placing = Source.place

    def watched(self: Source, *args: Any) -> None:
        most[0] = max(most[0], shared._bytes)
        placing(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "place", watched)
        in_threads(
            lambda: read_all(shared.share("x", todo), todo),
            lambda: read_all(shared.share("y", todo), todo, pause=0.002),
        )
    assert BLOCK_BYTES <= most[0] <= 4 * BLOCK_BYTES
    assert planned["a"][0].done["fetched"] == 10


def test_no_slide_is_planned_far_ahead_of_the_slowest(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_slides, "KEPT_SLIDES", 2)
    todo = slides(*(f"s{n}" for n in range(8)))
    shared = SharedSlides("xy")
    ahead = shared.share("x", todo)

    def plan_only() -> None:
        with ahead.membership():
            for slide in todo:
                ahead.plan(slide, request()).source.close()

    begun = threading.Thread(target=plan_only)
    begun.start()
    behind = shared.share("y", todo)
    for number, slide in enumerate(todo):
        plan = behind.plan(slide, request())
        time.sleep(0.01)
        assert len(planned) <= number + 3
        plan.source.close()
    behind.leave()
    begun.join(timeout=20)
    assert not begun.is_alive() and len(planned) == 8


def test_who_leaves_holds_up_nobody(planned: Planned) -> None:
    """An encoder that breaks off, in the middle of a slide or before its first one."""
    todo = slides("a", "b")
    shared = SharedSlides("xyz", kept_bytes=BLOCK_BYTES)

    def breaks_off() -> None:
        share = shared.share("y", todo)
        with share.membership():
            source = share.plan(todo[0], request()).source
            source.place(0, source.fetch(0), [np.zeros((224, 224, 3), np.uint8)])

    found = in_threads(
        lambda: read_all(shared.share("x", todo), todo), breaks_off, shared.share("z", todo).leave
    )
    assert len(found[0]) == 20 and shared._bytes == 0
    assert [made[0].done for made in planned.values()] == [Counter(fetched=10, closed=1)] * 2


def test_who_has_left_is_told_so(planned: Planned) -> None:
    todo = slides("a")
    shared = SharedSlides("xy")
    share = shared.share("x", todo)
    waiting = threading.Timer(0.05, share.leave)
    waiting.start()
    with pytest.raises(Stopped):
        share.plan(todo[0], request())  # y has not begun


def test_errors_are_those_of_every_stream(planned: Planned) -> None:
    todo = slides("unreadable", "broken", "a")
    shared = SharedSlides("xy")
    found = in_threads(*(lambda name=name: read_all(shared.share(name, todo), todo) for name in "xy"))
    assert found == [[("a", number) for number in range(10)]] * 2
    assert planned["broken"][0].done == Counter(fetched=10, closed=1) and shared._bytes == 0
    assert not shared._slides


def test_who_is_behind_never_waits_for_room(planned: Planned) -> None:
    """Threads take blocks in any order: what is kept may lie beyond what the other stream needs next."""
    todo = slides("a")
    shared = SharedSlides("xy", kept_bytes=1)
    shares = [shared.share(name, todo) for name in "xy"]
    ahead, behind = in_threads(*(lambda share=share: share.plan(todo[0], request()) for share in shares))
    ahead.source.fetch(5)
    (data,) = in_threads(lambda: behind.source.fetch(4))
    behind.source.place(4, data, [target := np.zeros((224, 224, 3), np.uint8)])
    assert (target == 4).all()
    for share in shares:
        share.leave()
    assert planned["a"][0].done["closed"] == 1


def test_slides_are_taken_up_in_order_whichever_thread_comes_first(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning threads start in any order: later slides must not fill the room that an earlier one needs."""
    monkeypatch.setattr(shared_slides, "KEPT_SLIDES", 1)
    first, second = slides("a", "b")
    shared = SharedSlides("xy")
    shares = [shared.share(name, [first, second]) for name in "xy"]
    with ThreadPoolExecutor(4) as pool:
        try:
            later = [pool.submit(share.plan, second, request()) for share in shares]
            time.sleep(0.05)
            for done in [pool.submit(share.plan, first, request()) for share in shares]:
                done.result(timeout=20).source.close()
            for done in later:
                done.result(timeout=20).source.close()
        finally:
            for share in shares:
                share.leave()
    assert list(planned) == ["a", "b"] and not shared._slides


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

    def stream(name: str, theirs: Sequence[Slide], pause: float) -> None:
        share = shared.share(name, theirs)
        with share.membership():
            for slide in share.ahead(theirs, request()):
                time.sleep(pause)
                share.plan(slide, request()).source.close()

    in_threads(lambda: stream("x", todo[2:], 0.0), lambda: stream("y", todo, 0.01))
    assert begun == ["a", "b", "c", "d"]
    assert [len(made) for made in planned.values()] == [1] * 4


def test_who_is_behind_within_its_group_does_not_wait_for_other_tiles(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for it may be what those of the other tiles have no room for."""
    todo = slides("a")
    shared = SharedSlides("wxyz", kept_bytes=1)
    shares = {name: shared.share(name, todo) for name in "wxyz"}
    plans = in_threads(
        *(
            lambda name=name, size=size: shares[name].plan(todo[0], request(size))
            for name, size in zip("wxyz", (224, 224, 512, 512), strict=True)
        )
    )
    plans[0].source.fetch(1)
    monkeypatch.setattr(shared_slides._Blocks, "leads", lambda blocks: blocks is plans[0].source.common)
    waiting = threading.Timer(20, shares["x"].leave)
    waiting.start()
    assert plans[1].source.fetch(0)[0]
    waiting.cancel()
    for share in shares.values():
        share.leave()
