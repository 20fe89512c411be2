"""The stream over stand-in slides whose pixels are known: order, failures, bounds, clean-up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from late_streams import LateStream
from stream_helpers import PlanBy

from slide2vec.config import FilterConfig
from slide2vec.errors import BackendError, SlideReadError, SpacingError
from slide2vec.geometry import tile_geometry
from slide2vec.progress import (
    RunFinished,
    SlideFailed,
    SlideFinished,
    SlidePlanned,
    TilesEncoded,
)
from slide2vec.runtime.base import Layout
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome, SlidePlan, SlideQueue, Stream, batch_encoder, shared_slides
from slide2vec.stream.batches import Batches
from slide2vec.stream.cuda_streams import HostStream
from slide2vec.stream.tile_sources import SlideSource
from slide2vec.stream.transfer import HostTransfer
from slide2vec.tiling import Segmentation, Tiling

SIDE = 8
GEOMETRY = tile_geometry(
    requested_tile_size_px=SIDE, requested_spacing_um=0.5, base_spacing_um=0.5, downsamples=[1.0]
)


class Reader:
    """Pixels that tell slide and place: red = slide number, green and blue = x and y of their tile."""

    backend = "made up"
    downsamples = (1.0,)
    tile_shapes = (None,)
    open_now = 0
    most_open = 0
    lock = threading.Lock()

    def __init__(self, number: int, corrupt_at: tuple[int, int] | None = None) -> None:
        self.number, self.corrupt_at, self.closed = number, corrupt_at, 0
        with Reader.lock:
            Reader.open_now += 1
            Reader.most_open = max(Reader.most_open, Reader.open_now)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        assert not self.closed, "read after close"
        (left, top), (width, height) = location, size
        if self.corrupt_at:
            x, y = self.corrupt_at
            if left <= x < left + width and top <= y < top + height:
                raise SlideReadError(f"slide {self.number}: corrupt tile at {x}, {y}")
        y, x = np.mgrid[top : top + height, left : left + width] // SIDE
        return np.stack([np.full_like(x, self.number), x, y], axis=-1).astype(np.uint8)

    def close(self) -> None:
        self.closed += 1
        with Reader.lock:
            Reader.open_now -= 1


class Engine:
    """Features are the mean colour: slide, x and y."""

    runtime, device, precision, feature_dim = "test", torch.device("cpu"), "fp32", 3
    layout: Layout = "float32_nchw"

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(pixels.clone())
        return pixels.float().mean(dim=(1, 2))

    def close(self) -> None:
        pass


class Reporter:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def emit(self, event: Any) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def slide(number: int) -> Slide:
    return Slide(sample_id=f"s{number}", image_path=Path(f"{number}.svs"))


def plan_of(shapes: dict[int, tuple[int, int]], skip: bool = False, **corrupt: tuple[int, int]) -> PlanBy:
    """A planner: slide number -> columns and rows of its grid of tiles; slide name -> a bad pixel."""

    def plan(given: Slide) -> SlidePlan:
        number = int(given.sample_id[1:])
        if number not in shapes:
            raise SpacingError(f"slide {given.sample_id} has no spacing")
        x, y = np.meshgrid(*(np.arange(n) * SIDE for n in shapes[number]), indexing="ij")
        x, y = x.ravel(), y.ravel()
        tiling = tiling_of(given, x, y)
        reader: Any = Reader(number, corrupt.get(given.sample_id))
        return SlidePlan(given, SlideSource(reader, tiling), tiling, skips_bad_tiles=skip)

    return PlanBy(plan)


def tiling_of(slide: Slide, x: np.ndarray, y: np.ndarray) -> Tiling:
    return Tiling(
        sample_id=slide.sample_id,
        image_path=slide.image_path,
        mask_path=None,
        spacing_at_level_0=None,
        backend="made up",
        requested_backend="auto",
        dimensions=(10_000, 10_000),
        downsamples=(1.0,),
        geometry=GEOMETRY,
        x=x,
        y=y,
        tissue_fractions=np.ones(len(x), np.float32),
        tissue_threshold=0.01,
        segmentation=Segmentation(
            method="hsv", requested_downsample=64, downsample=64, level=0, spacing_um=32
        ),
        filtering=FilterConfig(ref_tile_size=SIDE),
    )


def stream(engine: Engine, reporter: Reporter | None = None, batch_size: int = 7, **options: Any) -> Stream:
    options = {"readers": 3, "planners": 2, "ahead": 2, **options}
    preparer: Any = SimpleNamespace(prepare=lambda tiles: tiles)
    return Stream(
        engine, preparer, batch_size=batch_size, tile_size_px=SIDE, reporter=reporter or Reporter(), **options
    )


def by_number(outcomes: Iterator[SlideOutcome]) -> dict[int, SlideOutcome]:
    return {int(outcome.slide.sample_id[1:]): outcome for outcome in outcomes}


def check(outcome: SlideOutcome, number: int, shape: tuple[int, int]) -> None:
    """Every embedding is that of its own tile."""
    found = outcome.embedded
    assert found is not None and outcome.error is None
    assert found.num_tiles == shape[0] * shape[1] == len(found.tile_embeddings)
    expected = np.stack([np.full(found.num_tiles, number), found.x // SIDE, found.y // SIDE], axis=1)
    assert np.array_equal(found.tile_embeddings.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_every_embedding_is_that_of_its_tile(batch_size: int) -> None:
    shapes = {0: (5, 4), 1: (1, 1), 2: (40, 33), 3: (2, 9)}
    engine = Engine()
    outcomes = by_number(stream(engine, batch_size=batch_size).run(map(slide, shapes), plan_of(shapes)))
    assert outcomes.keys() == shapes.keys()
    for number, shape in shapes.items():
        check(outcomes[number], number, shape)
    sizes = [len(batch) for batch in engine.batches]
    assert sum(sizes) == 20 + 1 + 1320 + 18
    assert sum(size != batch_size for size in sizes) <= 1  # the last of the run


def test_batches_hold_the_same_tiles_every_time() -> None:
    shapes = {n: (3 + n, 5) for n in range(8)}
    runs = []
    for _ in range(3):
        engine = Engine()
        list(stream(engine).run(map(slide, shapes), plan_of(shapes)))
        runs.append(sorted(batch.numpy().tobytes() for batch in engine.batches))
    assert runs[0] == runs[1] == runs[2]


def test_a_bad_slide_fails_alone() -> None:
    shapes = {0: (6, 6), 2: (30, 30), 3: (6, 6), 5: (0, 0)}
    reporter = Reporter()
    outcomes = by_number(
        stream(Engine(), reporter).run(map(slide, range(6)), plan_of(shapes, s2=(20 * SIDE, 20 * SIDE)))
    )
    assert sorted(outcomes) == [0, 1, 2, 3, 4, 5]
    for number in (0, 3):
        check(outcomes[number], number, shapes[number])
    assert isinstance(outcomes[1].error, SpacingError)
    assert isinstance(outcomes[2].error, SlideReadError) and outcomes[2].embedded is None
    assert isinstance(outcomes[4].error, SpacingError)
    empty = outcomes[5].embedded
    assert empty is not None and empty.tile_embeddings.shape == (0, 3)
    failed = {event.sample_id for event in reporter.events if isinstance(event, SlideFailed)}
    assert failed == {"s1", "s2", "s4"}
    assert Reader.open_now == 0


def test_bad_tiles_are_left_out_and_recorded() -> None:
    bad = (20 * SIDE, 20 * SIDE)
    plan = plan_of({0: (6, 6), 2: (30, 30), 3: (1, 1)}, skip=True, s2=bad, s3=(0, 0))
    outcomes = by_number(stream(Engine()).run(map(slide, (0, 2, 3)), plan))
    check(outcomes[0], 0, (6, 6))
    assert outcomes[0].skipped == ()
    (skipped,) = outcomes[2].skipped
    assert (skipped.x, skipped.y) == bad and "corrupt" in skipped.error
    found, tiling = outcomes[2].embedded, outcomes[2].tiling
    assert found is not None and tiling is not None
    assert found.num_tiles == len(tiling) == len(tiling.tissue_fractions) == 899
    assert bad not in set(zip(found.x.tolist(), found.y.tolist(), strict=True))
    expected = np.stack([np.full(899, 2), found.x // SIDE, found.y // SIDE], axis=1)
    assert np.array_equal(found.tile_embeddings.numpy(), expected.astype(np.float32))
    assert isinstance(outcomes[3].error, SlideReadError)  # a slide without a good tile fails all the same


def test_the_error_of_bad_tiles_names_places_and_remedy() -> None:
    plan = plan_of({1: (4, 4)}, s1=(2 * SIDE, 3 * SIDE))
    (outcome,) = stream(Engine()).run([slide(1)], plan)
    assert str(outcome.error) == (
        "slide s1: a tile cannot be decoded, at level-0 px (16, 24): slide 1: corrupt tile at 16, 24; "
        'on_bad_tile="skip" (--on-bad-tile skip) leaves such tiles out'
    )


def test_damage_between_tiles_harms_nothing() -> None:
    def plan(given: Slide) -> SlidePlan:
        x, y = np.array([0, 0, 2 * SIDE]), np.array([0, SIDE, 0])
        tiling = tiling_of(given, x, y)
        reader: Any = Reader(1, (SIDE, SIDE))  # in the block's box, in none of its tiles
        return SlidePlan(given, SlideSource(reader, tiling), tiling)

    (outcome,) = stream(Engine()).run([slide(1)], PlanBy(plan))
    assert outcome.error is None and outcome.embedded is not None and outcome.embedded.num_tiles == 3


def test_events_and_summary() -> None:
    shapes = {0: (9, 9), 1: (2, 2)}
    reporter = Reporter()
    list(stream(Engine(), reporter).run(map(slide, range(3)), plan_of(shapes)))
    planned = {e.sample_id: e.tiles for e in reporter.events if isinstance(e, SlidePlanned)}
    assert planned == {"s0": 81, "s1": 4}
    assert sum(e.count for e in reporter.events if isinstance(e, TilesEncoded)) == 85
    assert sum(isinstance(e, SlideFinished) for e in reporter.events) == 2
    summary = reporter.events[-1].summary
    assert isinstance(reporter.events[-1], RunFinished)
    assert (summary.slides, summary.failed, summary.tiles) == (2, 1, 85)
    assert [s.name for s in summary.stations] == ["plan", "read", "prepare", "encode", "collect"]
    assert all(s.busy_s >= 0 and s.waiting_s >= 0 for s in summary.stations)


def test_slow_encoder_is_the_bottleneck_and_slow_reader_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {n: (10, 10) for n in range(3)}

    def bottleneck() -> str:
        reporter = Reporter()
        list(stream(Engine(), reporter).run(map(slide, shapes), plan_of(shapes)))
        return str(reporter.events[-1].summary.bottleneck)

    def slowed(method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*args: Any) -> Any:
            time.sleep(seconds)
            return method(*args)

        return slow

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", slowed(Engine.run, 0.005))
        assert bottleneck() == "encode"
    monkeypatch.setattr(Reader, "read_region", slowed(Reader.read_region, 0.2))
    assert bottleneck() == "read"


def test_open_slides_do_not_grow_with_the_cohort() -> None:
    shapes = {n: (4, 4) for n in range(200)}
    Reader.most_open = 0
    assert len(list(stream(Engine()).run(map(slide, shapes), plan_of(shapes)))) == 200
    # two supertiles' worth of slots per reader are 384 tiles, 24 slides; the rest is planned ahead
    assert Reader.most_open <= 40
    assert Reader.open_now == 0


def test_closing_early_stops_threads_and_closes_slides() -> None:
    shapes = {n: (20, 20) for n in range(50)}
    run = stream(Engine()).run(map(slide, shapes), plan_of(shapes))
    next(run)
    run.close()
    assert Reader.open_now == 0
    assert not [t for t in threading.enumerate() if t.name.startswith(("read-", "dispatch", "plan"))]


def test_failing_engine_raises_and_cleans_up() -> None:
    class Broken(Engine):
        def run(self, pixels: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory")

    shapes = {n: (20, 20) for n in range(5)}
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(Broken()).run(map(slide, shapes), plan_of(shapes)))
    assert Reader.open_now == 0


def test_a_slide_that_the_feed_refuses_is_closed() -> None:
    class Refusing(HostTransfer):
        def bind(self, plan: SlidePlan) -> SlidePlan:
            if plan.slide.sample_id == "s1":
                raise BackendError("slide s1: gpu_decode=True, but the GPU cannot decode it")
            return plan

    shapes = {n: (3, 3) for n in range(3)}
    outcomes = by_number(stream(Engine(), transfer=Refusing()).run(map(slide, shapes), plan_of(shapes)))
    assert isinstance(outcomes[1].error, BackendError)
    check(outcomes[0], 0, (3, 3))
    check(outcomes[2], 2, (3, 3))
    assert Reader.open_now == 0


def test_features_that_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device they are collected a batch or two later; on this CPU a stand-in device stream does the
    same."""
    monkeypatch.setattr(batch_encoder, "device_stream", LateStream)
    shapes = {0: (5, 4), 1: (1, 1), 2: (20, 13), 3: (2, 9)}
    flights: list[int] = []
    run = stream(Engine())
    submit = run._submit

    def counted(batch: Any) -> None:
        submit(batch)
        flights.append(len(run._flight))

    monkeypatch.setattr(run, "_submit", counted)
    outcomes = by_number(run.run(map(slide, range(5)), plan_of(shapes, s2=(19 * SIDE, 12 * SIDE))))
    for number in (0, 1, 3):
        check(outcomes[number], number, shapes[number])
    assert isinstance(outcomes[2].error, SlideReadError) and isinstance(outcomes[4].error, SpacingError)
    assert max(flights) == batch_encoder.IN_FLIGHT
    assert Reader.open_now == 0


def test_memory_is_written_again_only_after_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers wait for the event of the batch that had their slots before."""
    waited: list[Any] = []
    read: list[Any] = []

    class DeviceStream(HostStream):
        def wait(self, events: Any) -> None:
            waited.extend(events)

    transfer = HostTransfer()
    transfer.stream = DeviceStream(transfer.device)
    release = Batches.release

    def noted(batches: Any, batch: Any, event: Any = None) -> None:
        read.append(event)
        release(batches, batch, event)

    monkeypatch.setattr(Batches, "release", noted)
    run = stream(Engine(), transfer=transfer)
    list(run.run(map(slide, range(2)), plan_of({0: (30, 20), 1: (30, 20)})))
    assert waited and set(map(id, waited)) <= set(map(id, read))


def test_memory_that_runs_out_loses_nothing() -> None:
    class Small(Engine):
        def run(self, pixels: torch.Tensor) -> torch.Tensor:
            if len(pixels) > 3:
                raise torch.OutOfMemoryError("out of memory")
            return super().run(pixels)

    shapes = {0: (5, 4), 1: (1, 1), 2: (10, 3)}
    outcomes = by_number(stream(Small(), batch_size=16).run(map(slide, shapes), plan_of(shapes)))
    for number, shape in shapes.items():
        check(outcomes[number], number, shape)


def test_failing_input_raises() -> None:
    def slides() -> Iterator[Slide]:
        yield slide(0)
        raise OSError("manifest vanished")

    with pytest.raises(OSError, match="vanished"):
        list(stream(Engine()).run(slides(), plan_of({0: (3, 3)})))
    assert Reader.open_now == 0


def test_half_precision_embeddings() -> None:
    outcomes = by_number(stream(Engine(), dtype=torch.float16).run([slide(4)], plan_of({4: (3, 3)})))
    embedded = outcomes[4].embedded
    assert embedded is not None and embedded.tile_embeddings.dtype == torch.float16


def test_script_that_dies_over_an_open_iterator_ends(
    tmp_path: Path, generated_slide: Callable[..., Path]
) -> None:
    """The stream is then suspended with its dispatcher waiting for room; the process must end."""
    path = generated_slide(tmp_path / "slide.svs", size_px=2048, seed=1, levels=1)
    script = f"""
from slide2vec import Model, PreprocessingConfig

model = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
slides = [{{"sample_id": str(number), "image_path": {str(path)!r}}} for number in range(30)]
config = PreprocessingConfig(requested_tile_size_px=112, requested_spacing_um=0.25)
outcomes = model.iter_slides(slides, config)
assert next(outcomes).embedded.num_tiles > 100
raise RuntimeError("the user's own")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert ended.stderr.endswith("the user's own\n")
    assert ended.returncode == 1


class ThreadsSeen(Engine):
    """Notes how many threads PyTorch has while it encodes; breaks at a batch."""

    def __init__(self, breaks_at: int | None = None) -> None:
        super().__init__()
        self.threads: list[int] = []
        self.breaks_at = breaks_at

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        self.threads.append(torch.get_num_threads())
        if len(self.threads) == self.breaks_at:
            raise MemoryError("the engine breaks")
        return super().run(pixels)


@pytest.fixture
def three_threads() -> Iterator[int]:
    """What somebody has set PyTorch to before the run."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_the_encoder_has_its_threads_while_it_encodes_and_only_then(three_threads: int) -> None:
    engine = ThreadsSeen()
    between = [
        torch.get_num_threads()
        for _ in stream(engine, encoder_threads=2).run(map(slide, (0, 1)), plan_of({0: (5, 5), 1: (5, 5)}))
    ]
    assert set(engine.threads) == {2} and len(engine.threads) == 8
    assert between == [three_threads, three_threads]
    assert torch.get_num_threads() == three_threads


def test_threads_of_a_new_thread_that_runs_the_stream(three_threads: int) -> None:
    engine = ThreadsSeen()
    running = stream(engine, encoder_threads=1).run([slide(0)], plan_of({0: (5, 5)}))
    thread = threading.Thread(target=lambda: list(running))
    thread.start()
    thread.join()
    assert set(engine.threads) == {1} and torch.get_num_threads() == three_threads


def test_threads_are_put_back_when_a_run_breaks_or_is_closed(three_threads: int) -> None:
    engine = ThreadsSeen(breaks_at=2)
    with pytest.raises(MemoryError):
        list(stream(engine, encoder_threads=2).run([slide(0)], plan_of({0: (5, 5)})))
    assert engine.threads == [2, 2] and torch.get_num_threads() == three_threads
    running = stream(ThreadsSeen(), encoder_threads=2).run(
        map(slide, (0, 1)), plan_of({0: (1, 1), 1: (30, 30)})
    )
    next(running)
    running.close()
    assert torch.get_num_threads() == three_threads


def test_threads_stay_as_they_are_unless_told(three_threads: int) -> None:
    engine = ThreadsSeen()
    list(stream(engine).run([slide(0)], plan_of({0: (2, 2)})))
    assert engine.threads == [three_threads]


def test_slides_that_come_one_by_one_are_through_before_the_next_comes() -> None:
    """Nobody waits for the slide after the present one; the last batch only for the end."""
    shapes = {0: (7, 2), 1: (7, 3), 2: (1, 1)}
    slide_queue = SlideQueue()
    slide_queue.put(slide(0))
    outcomes = stream(Engine(), batch_size=7).run(slide_queue, plan_of(shapes))
    for number in (0, 1):
        check(next(outcomes), number, shapes[number])
        slide_queue.put(slide(number + 1))
    slide_queue.end()
    check(next(outcomes), 2, shapes[2])
    assert next(outcomes, None) is None
    slide_queue.put(slide(0))
    slide_queue.end()
    again = by_number(stream(Engine(), batch_size=7).run(slide_queue, plan_of(shapes)))
    assert again.keys() == {0}, "what comes after an end is the next stream's"


def test_a_stream_that_is_closed_does_not_wait_for_slides_that_might_come() -> None:
    slide_queue = SlideQueue()
    slide_queue.put(slide(0))
    outcomes = stream(Engine(), batch_size=7).run(slide_queue, plan_of({0: (7, 2)}))
    next(outcomes)
    outcomes.close()


def test_streams_that_share_batches_encode_what_they_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes of 12, 6 and 4 tiles out of batches of 12, around a slide that cannot be planned and one
    without tiles; the feeding is told by the last stream only."""
    shapes = {0: (5, 4), 1: (1, 1), 2: (20, 13), 3: (0, 0), 5: (7, 9)}
    todo = [slide(number) for number in range(6)]
    plan = plan_of(shapes)
    sizes = {"x": 6, "y": 12, "z": 4}
    alone, together = ({name: Engine() for name in sizes} for _ in range(2))
    expected = {}
    for name, size in sizes.items():
        expected[name] = by_number(stream(alone[name], batch_size=size).run(todo, plan))

    def plans(given: Slide, requests: list[Any], stager: object) -> list[SlidePlan]:
        assert len(requests) == 1
        return [plan.plan(given)]

    monkeypatch.setattr(shared_slides, "plan_together", plans)
    shared, reporters = shared_slides.SharedSlides(sizes), {name: Reporter() for name in sizes}

    def run(name: str) -> dict[int, SlideOutcome]:
        share = shared.share(name, todo)
        planner = plan_of(shapes)
        planner.share = share
        with share.membership():
            made = stream(together[name], reporters[name], batch_size=sizes[name])
            return by_number(made.run(todo, planner))

    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(sizes, pool.map(run, sizes), strict=True))
    for name in sizes:
        ours, theirs = together[name].batches, alone[name].batches
        assert sorted(map(len, ours)) == sorted(map(len, theirs))
        assert {batch.numpy().tobytes() for batch in ours} == {batch.numpy().tobytes() for batch in theirs}
        assert found[name].keys() == expected[name].keys()
        for number, shape in shapes.items():
            check(found[name][number], number, shape)
        assert isinstance(found[name][4].error, SpacingError)
    fed = [
        sum(station.workers for station in event.summary.stations if station.name in ("plan", "read"))
        for reporter in reporters.values()
        for event in reporter.events
        if isinstance(event, RunFinished)
    ]
    assert sorted(fed) == [0, 0, 5] and Reader.open_now == 0
