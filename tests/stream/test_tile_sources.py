"""Tiles of a slide in memory: cut out of supertiles as when read one by one, by either kind of reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from slide2vec.config import FilterConfig
from slide2vec.errors import SlideReadError
from slide2vec.geometry import tile_geometry
from slide2vec.readers import open_slide
from slide2vec.slides import as_slide
from slide2vec.stream import shared_slides, tile_sources
from slide2vec.stream.tile_sources import (
    SlideSource,
    bad_tiles,
    damaged,
    not_finite,
    open_archive,
    place_singly,
)
from slide2vec.tiling import BadTile, Tiling, shared_level
from slide2vec.tiling.types import Segmentation

Pixels = NDArray[np.uint8]
SLIDE: Pixels = np.random.default_rng(0).integers(0, 256, (200, 240, 3), np.uint8)


class PlainReader:
    """Two levels of the same pixels, the second as if it were coarser by 2."""

    backend, downsamples, tile_shapes = "plain", (1.0, 2.0), (None, (64, 32))

    def __init__(self) -> None:
        self.closed = 0
        self.reads: list[tuple[Any, ...]] = []

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        self.reads.append((location, level, size))
        x, y = (int(start / self.downsamples[level]) for start in location)
        return SLIDE[y : y + size[1], x : x + size[0]]

    def close(self) -> None:
        self.closed += 1


class Buffered(PlainReader):
    """Reduces as it reads, into memory that it is given; not where `refuses`."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__()
        self.refuses = refuses
        self.given: list[tuple[Pixels, int]] = []
        self.asked: list[tuple[Any, ...]] = []

    def read_into(
        self,
        memory: Pixels,
        location: tuple[int, int],
        level: int,
        size: tuple[int, int],
        ratio: int,
        squares: Any = None,
    ) -> Pixels | None:
        self.given.append((memory, ratio))
        self.asked.append((location, level, size, ratio, squares[0].tolist(), squares[1]))
        if self.refuses:
            return None
        width, height = size[0] // ratio, size[1] // ratio
        pixels = memory[: height * width * 3].reshape(height, width, 3)
        region = self.read_region(location, level, (width * ratio, height * ratio))
        pixels[:] = cv2.resize(region, (width, height), interpolation=cv2.INTER_AREA)
        return pixels


def a_tiling(x: Any, y: Any, *, spacing: float = 0.5, size_px: int = 10) -> Tiling:
    """Tiles of 10 px at 0.5 µm/px of a slide of 0.25: 20 px of level 0, reduced by 2."""
    return Tiling(
        sample_id="s",
        image_path=Path("s.svs"),
        mask_path=None,
        spacing_at_level_0=None,
        backend="plain",
        requested_backend="auto",
        dimensions=(240, 200),
        downsamples=(1.0, 2.0),
        geometry=tile_geometry(
            requested_tile_size_px=size_px,
            requested_spacing_um=spacing,
            base_spacing_um=0.25,
            downsamples=[1.0] if spacing == 0.5 else [1.0, 2.0],
        ),
        x=np.array(x, np.int64),
        y=np.array(y, np.int64),
        tissue_fractions=np.ones(len(x), np.float32),
        tissue_threshold=0.0,
        segmentation=Segmentation(
            method="hsv", requested_downsample=64, downsample=64, level=0, spacing_um=1.0
        ),
        filtering=FilterConfig(),
    )


EVEN = a_tiling([3, 3, 23, 43, 103, 183], [5, 25, 25, 45, 105, 5])
ODD = a_tiling([3, 3, 24, 43], [5, 25, 25, 46])
#: 10 px at 0.625 µm/px: 25 px of level 0, no whole ratio.
FRACTIONAL = a_tiling([3, 28, 53], [5, 5, 30], spacing=0.625)
TILINGS = {"even": EVEN, "odd": ODD, "fractional": FRACTIONAL}


def tile_of(tiling: Tiling, tile: int) -> Pixels:
    """Cut out of the slide itself, and averaged by OpenCV."""
    side = tiling.geometry.read_tile_size_px
    x, y = int(tiling.x[tile]), int(tiling.y[tile])
    if tiling.geometry.read_level:
        x, y = x // 2, y // 2
    size = tiling.geometry.requested_tile_size_px
    cut = SLIDE[y : y + side, x : x + side]
    return np.asarray(cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA), np.uint8)


def blank(count: int) -> list[Pixels]:
    return [np.zeros((10, 10, 3), np.uint8) for _ in range(count)]


@pytest.mark.parametrize(
    "reader", [PlainReader(), Buffered(), Buffered(refuses=True)], ids=["plain", "buffered", "refuses"]
)
@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize("grouped", [True, False])
def test_tiles_are_those_of_the_slide(reader: PlainReader, name: str, grouped: bool) -> None:
    tiling = TILINGS[name]
    source = SlideSource(reader, tiling, grouped=grouped)  # type: ignore[arg-type]
    assert source.backend == "plain"
    assert sorted(np.concatenate(source.blocks).tolist()) == list(range(len(tiling)))
    assert grouped or [len(block) for block in source.blocks] == [1] * len(tiling)
    for number, block in enumerate(source.blocks):
        targets = blank(len(block))
        source.place(number, source.fetch(number), targets)
        for tile, target in zip(block.tolist(), targets, strict=True):
            assert np.array_equal(target, tile_of(tiling, tile)), tile
            (alone,) = blank(1)
            source.read_tile(tile, alone)
            assert np.array_equal(alone, target)


@pytest.mark.parametrize(
    "names",
    [("aligned", "aligned"), ("even", "aligned"), ("aligned", "fractional"), ("odd", "fractional", "even")],
)
def test_tiles_that_are_cut_from_a_shared_level_are_those_of_the_slide(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all reduce it alike or not; where its compressed tiles are too large nothing is shared."""
    fine = tile_geometry(
        requested_tile_size_px=10, requested_spacing_um=0.625, base_spacing_um=0.25, downsamples=[1.0]
    )
    aligned = replace(EVEN, x=EVEN.x + 1, y=EVEN.y + 1)
    tilings = {**TILINGS, "aligned": aligned, "fractional": replace(FRACTIONAL, geometry=fine)}
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, SLIDE, tile=(16, 16), photometric="rgb", compression="zlib", metadata=None)
    monkeypatch.setattr(shared_level, "CHUNK_PX", 32)
    with open_slide(as_slide(path), "tiff") as reader:
        for is_shared in (True, False):
            plans: list[Any] = [SimpleNamespace(source=SlideSource(reader, tilings[name])) for name in names]
            if not is_shared:
                monkeypatch.setattr(shared_slides, "MOST_CHUNK_BYTES", 10)
            shared_slides._share_decoded(plans)
            for name, source in zip(names, (plan.source for plan in plans), strict=True):
                assert (source.shared is not None) == is_shared
                for number, block in enumerate(source.blocks):
                    targets = blank(len(block))
                    source.place(number, source.fetch(number), targets)
                    for tile, target in zip(block.tolist(), targets, strict=True):
                        assert np.array_equal(target, tile_of(tilings[name], tile)), (name, tile)
        source.shared = level = shared_level.SharedLevel(reader, 0, [(source.squares(0), source.ratio)])
        with pytest.raises(ValueError, match="shorter"):
            source.place(0, source.fetch(0), blank(len(source.blocks[0]) - 1))
        assert not level.kept_bytes  # nobody holds anything
        source.close()
        assert source.shared is None


def test_tiles_of_a_coarser_level() -> None:
    """At 0.52 µm/px the level of 0.5 is read: 10 px of it, 20 of level 0."""
    tiling = a_tiling([6, 26], [10, 10], spacing=0.52)
    reader = PlainReader()
    source = SlideSource(reader, tiling)  # type: ignore[arg-type]
    targets = blank(2)
    source.place(0, source.fetch(0), targets)
    assert reader.reads == [((6, 10), 1, (20, 10))]
    assert all(np.array_equal(targets[tile], tile_of(tiling, tile)) for tile in (0, 1))
    source.read_tile(1, targets[0])
    assert np.array_equal(targets[0], targets[1]) and reader.reads[1:] == [((26, 10), 1, (10, 10))]


@pytest.mark.parametrize(("name", "ratio"), [("even", 2), ("odd", 1), ("fractional", 1)])
def test_a_reader_reduces_whole_cells_of_all_tiles_only(name: str, ratio: int) -> None:
    reader = Buffered()
    source = SlideSource(reader, TILINGS[name])  # type: ignore[arg-type]
    sizes = [source.fetch(number)[0].size for number in range(len(source.blocks))]
    assert {asked for _, asked in reader.given} == {ratio}
    assert [memory.size for memory, _ in reader.given] == sizes  # no more than is needed


@pytest.mark.parametrize(
    ("tiling", "reads"),
    [
        (a_tiling([3, 3], [5, 25]), [((3, 5), 0, (20, 40), 2, [[0, 0], [0, 20]], 20)]),
        (a_tiling([3, 24], [5, 6]), [((3, 5), 0, (41, 21), 1, [[0, 0], [21, 1]], 20)]),
        (a_tiling([6, 26], [10, 10], spacing=0.52), [((6, 10), 1, (20, 10), 1, [[0, 0], [10, 0]], 10)]),
        (
            a_tiling([6, 206], [10, 190], spacing=0.52),
            [((x, y), 1, (10, 10), 1, [[0, 0]], 10) for x, y in ((6, 10), (206, 190))],
        ),
    ],
    ids=["reduced", "cells of none", "coarser level", "two"],
)
def test_what_is_read_is_known_before(tiling: Tiling, reads: list[Any]) -> None:
    """Where, level, size, by how much reduced, and the tiles; of a shared level these in its px."""
    reader = Buffered()
    source = SlideSource(reader, tiling)  # type: ignore[arg-type]
    for number in range(len(source.blocks)):
        source.fetch(number)
    assert reader.asked == reads
    squares = [source.squares(number) for number in range(len(source.blocks))]
    assert [(corners.tolist(), side) for corners, side in squares] == [
        ([[x // 2**level + dx, y // 2**level + dy] for dx, dy in offsets], side)
        for (x, y), level, _, _, offsets, side in reads
    ]


def test_memory_is_used_again_where_it_is_large_enough() -> None:
    reader = Buffered()
    source = SlideSource(reader, EVEN, grouped=False)  # type: ignore[arg-type]
    first = source.fetch(0)
    source.place(0, first, blank(1))
    source.fetch(1)
    source.fetch(2)
    memories = [memory for memory, _ in reader.given]
    assert memories[1] is memories[0] is not memories[2]
    pieces = SlideSource(reader, a_tiling([3, 3], [5, 25]))  # type: ignore[arg-type]
    for kept, given in ((599, 600), (600, 600), (601, 601)):  # 10 x 20 px in three colours need 600 bytes
        pieces._free.append(np.empty(kept, np.uint8))
        pieces.fetch(0)
        assert reader.given[-1][0].size == given
    refusing = Buffered(refuses=True)
    source = SlideSource(refusing, EVEN, grouped=False)  # type: ignore[arg-type]
    for number in (0, 1):
        source.place(number, source.fetch(number), blank(1))
    assert refusing.given[0][0] is refusing.given[1][0]


def test_another_reader_and_other_tiles_are_closed_with_the_slide() -> None:
    closed: list[str] = []
    own, other = PlainReader(), PlainReader()

    def close() -> None:
        own.close()
        closed.append("closed")

    source = SlideSource(own, EVEN, closed=close)  # type: ignore[arg-type]
    cuts: list[int] = []
    twin = source.with_reader(other, lambda pixels, offsets, side, targets: cuts.append(side))  # type: ignore[arg-type]
    twin.place(0, twin.fetch(0), blank(len(twin.blocks[0])))
    assert cuts == [20] and other.reads and not own.reads
    twin.close()
    assert (own.closed, other.closed, closed) == (1, 1, ["closed"])
    few = source.over(ODD, grouped=False)
    assert (few.tiling, few.reader, len(few.blocks)) == (ODD, own, 4)
    few.close()
    assert own.closed == 2 and closed == ["closed"] * 2


# what cannot be decoded -------------------------------------------------------------------------------


def test_tiles_of_a_block_are_tried_one_by_one() -> None:
    class Damaged(PlainReader):
        def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
            if location == (3, 25):
                raise SlideReadError("slide s: broken")
            return super().read_region(location, level, size)

    tiling = a_tiling([3, 3, 23], [5, 25, 25])
    source = SlideSource(Damaged(), tiling)  # type: ignore[arg-type]
    targets = blank(3)
    bad = place_singly(source, 0, targets)
    assert list(bad) == [1] and not targets[1].any()
    assert np.array_equal(targets[0], tile_of(tiling, 0)) and np.array_equal(targets[2], tile_of(tiling, 2))
    assert list(bad_tiles(tiling, bad)) == [BadTile(3, 25, "broken")]
    with pytest.raises(ValueError, match="shorter"):
        place_singly(source, 0, targets[:2])


def test_the_error_of_a_damaged_slide_lists_ten_places() -> None:
    tiling = a_tiling(range(21), range(100, 121))
    error = SlideReadError("slide s: broken")
    listed = ", ".join(f"({n}, {100 + n})" for n in range(10))
    for count, told in (
        (1, "a tile cannot be decoded, at level-0 px (0, 100): broken;"),
        (2, "2 tiles cannot be decoded, at level-0 px (0, 100), (1, 101): broken;"),
        (10, f"10 tiles cannot be decoded, at level-0 px {listed}: broken;"),
        (11, f"11 tiles cannot be decoded, at level-0 px {listed} and 1 more: broken;"),
        (12, f"12 tiles cannot be decoded, at level-0 px {listed} and 2 more: broken;"),
        (21, f"21 tiles cannot be decoded, at level-0 px {listed} and 11 more: broken;"),
    ):
        assert str(damaged(tiling, dict.fromkeys(range(count), error))).startswith(f"slide s: {told}")


@pytest.mark.parametrize(
    ("wrong", "runtime", "told"),
    [
        ({2: True, 1: True}, "torch", "as float16 they overflow"),
        ({2: True, 1: False}, "torch", "PyTorch computed them in fp16"),
        ({2: False, 1: False}, "tensorrt", "tensorrt computed them in fp16"),
    ],
)
def test_the_error_of_embeddings_that_are_not_finite(wrong: Any, runtime: str, told: str) -> None:
    engine: Any = SimpleNamespace(runtime=runtime, precision="fp16")
    text = str(not_finite(EVEN, wrong, engine))
    assert (
        "embeddings of 2 of 6 tiles hold NaN or infinities, the first that of tile 1 at level-0 px (3, 25)"
        in (text)
    )
    assert told in text


# archives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "why_not", "cpus", "opened"),
    [
        (False, None, 16, "archive"),
        (True, "no DALI", 16, "archive"),
        (True, None, 16, ("dali", 10, 4)),
        (True, None, 2, ("dali", 10, 2)),
    ],
)
def test_archives_are_read_by_dali_where_it_and_a_gpu_are_there(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, why_not: str | None, cpus: int, opened: Any
) -> None:
    monkeypatch.setattr(tile_sources.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(tile_sources, "job_cpus", lambda: cpus)
    monkeypatch.setattr(tile_sources, "TileArchive", lambda path, tiling: "archive")
    dali = SimpleNamespace(
        unavailable=lambda: why_not,
        DaliArchive=lambda archive, tile_size_px, threads: ("dali", tile_size_px, threads),
    )
    monkeypatch.setattr(tile_sources, "dali_archive", dali)
    assert open_archive(Path("a.tar"), EVEN) == opened
