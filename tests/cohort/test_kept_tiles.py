"""Decoded tiles that wait for a later turn: the pixels of the slide as it is, or none."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec import ExecutionOptions, PreprocessingConfig
from slide2vec.cohort.kept_tiles import FROM_SCRATCH, TileScratch, tile_scratch
from slide2vec.cohort.scratch_room import scratch_room, scratch_use, tiles_wanted
from slide2vec.errors import ConfigError, SlideReadError
from slide2vec.files import scratch as folders
from slide2vec.slides import Slide
from slide2vec.stream.decode_paths import DeviceTransfer
from slide2vec.stream.plan import SlidePlan, plan_slide
from slide2vec.stream.slide_identity import Identities
from slide2vec.stream.tile_sources import SlideSource
from slide2vec.stream.transfer import HOST_TRANSFER, TileTransfer

SIDE = 64
CONFIG = PreprocessingConfig(requested_tile_size_px=SIDE, requested_spacing_um=0.5)
#: A block for each tile.
SINGLY = CONFIG.updated(use_supertiles=False)
#: Tiles of a slide, in bytes.
ROOM = 200 * 3 * SIDE**2


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Slide]:
    folder = tmp_path_factory.mktemp("kept")
    paths = [generated_slide(folder / f"s{n}.svs", size_px=1024, seed=n, levels=1) for n in range(2)]
    return [Slide(sample_id=path.stem, image_path=path) for path in paths]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The slides of which a supertile is read and decoded."""
    names: list[str] = []
    fetch = SlideSource.fetch

    def noted(self: SlideSource, number: int) -> Any:
        names.append(self.tiling.sample_id)
        return fetch(self, number)

    monkeypatch.setattr(SlideSource, "fetch", noted)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "scratch").mkdir()
    yield tmp_path / "scratch"


def planned(slide: Slide, config: PreprocessingConfig = CONFIG) -> SlidePlan:
    return plan_slide(slide, config, identities=Identities(config))


def read(plan: SlidePlan, transfer: TileTransfer = HOST_TRANSFER, *, blocks: int | None = None) -> np.ndarray:
    """The tiles, (N, S, S, 3), as a stream reads them."""
    tiles = transfer.allocate((len(plan.tiling), SIDE, SIDE, 3))
    on_host = transfer is HOST_TRANSFER or not isinstance(transfer, DeviceTransfer)
    into: Any = tiles.numpy() if on_host else tiles
    for number, block in list(enumerate(plan.source.blocks))[:blocks]:
        plan.source.place(number, plan.source.fetch(number), [into[tile] for tile in block.tolist()])
    plan.close()
    return tiles.numpy().copy()


def is_kept(plan: SlidePlan) -> bool:
    """Whether its tiles come from the scratch."""
    return plan.decode_path == FROM_SCRATCH


def turns(scratch: TileScratch, *slides: Slide) -> Iterator[TileTransfer]:
    """Two turns of encoders of the same tiles."""
    wanted = tiles_wanted(CONFIG, slides)
    scratch.begin_turn(wanted, wanted)
    yield scratch.over(HOST_TRANSFER)
    scratch.begin_turn(wanted, set())
    yield scratch.over(HOST_TRANSFER)


def test_a_later_turn_takes_the_same_pixels_and_decodes_nothing(
    slides: list[Slide], folder: Path, fetched: list[str]
) -> None:
    expected = read(planned(slides[0]))
    assert len(expected) > 10 and expected.std() > 10
    fetched.clear()
    scratch = TileScratch(folder, ROOM)
    both = turns(scratch, slides[0])
    assert np.array_equal(read(next(both).bind(planned(slides[0], SINGLY))), expected)
    assert fetched
    assert sum(path.stat().st_size for path in folder.iterdir()) == expected.size
    fetched.clear()
    plan = next(both).bind(planned(slides[0]))
    single = np.empty((SIDE, SIDE, 3), np.uint8)
    plan.source.read_tile(7, single)
    assert plan.decoded_by() == {"scratch": len(expected)}
    assert plan.source.backend == planned(slides[0]).source.backend
    assert np.array_equal(read(plan), expected) and np.array_equal(single, expected[7])
    assert fetched == []
    scratch.begin_turn(set(), set())
    assert list(folder.iterdir()) == []


def used_again(scratch: TileScratch, slide: Slide, between: Callable[[], object], **again: Any) -> bool:
    """Whether the tiles of a slide come from the scratch the second time, after something has happened."""
    first, second = (None, None)
    for number, transfer in enumerate(turns(scratch, slide)):
        if number:
            between()
        plan = transfer.bind(planned(slide, **(again if number else {})))
        first, second = second, read(plan)
    if not again:
        assert first is not None and second is not None and np.array_equal(first, second)
    scratch.begin_turn(set(), set())  # for the next in this folder
    return is_kept(plan)


def test_pixels_of_a_file_that_was_touched_are_not_used(
    slides: list[Slide], folder: Path, tmp_path: Path, fetched: list[str]
) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes(slides[0].image_path.read_bytes())
    slide = Slide(sample_id="s", image_path=path)
    assert used_again(TileScratch(folder, ROOM), slide, lambda: None)
    assert not used_again(TileScratch(folder, ROOM), slide, lambda: os.utime(path, (1, 1)))

    def other() -> None:
        path.write_bytes(slides[1].image_path.read_bytes())
        fetched.clear()

    scratch = TileScratch(folder, ROOM)
    for number, transfer in enumerate(turns(scratch, slide)):
        if number:
            other()
        plan = transfer.bind(planned(slide))
        pixels = read(plan)
    assert not is_kept(plan) and "s" in fetched
    assert np.array_equal(pixels, read(planned(slides[1])))


def test_other_tiles_are_decoded(slides: list[Slide], folder: Path) -> None:
    other = CONFIG.updated(overlap=0.25)
    assert not used_again(TileScratch(folder, ROOM), slides[0], lambda: None, config=other)
    fewer = CONFIG.updated(tissue_threshold=0.9)
    assert len(planned(slides[0], fewer).tiling) < len(planned(slides[0]).tiling)
    assert not used_again(TileScratch(folder, ROOM), slides[0], lambda: None, config=fewer)


def test_slides_that_do_not_fit_are_decoded_again(slides: list[Slide], folder: Path) -> None:
    sizes = [len(planned(slide).tiling) * 3 * SIDE**2 for slide in slides]
    scratch = TileScratch(folder, sizes[0])
    for transfer in turns(scratch, *slides):
        plans = [transfer.bind(planned(slide)) for slide in slides]
        for plan in plans:
            read(plan)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= sizes[0]
    assert [is_kept(plan) for plan in plans] == [True, False]


@pytest.mark.parametrize("places", [(0,), (1,), (0, 1), ()])
def test_what_turns_have_of_it_can_be_told_beforehand(
    slides: list[Slide], folder: Path, places: tuple[int, ...]
) -> None:
    """Three turns, the second of which leaves a slide out, with room for some of the slides."""
    sizes = {(slide.sample_id, 0.5, SIDE): len(planned(slide).tiling) * 3 * SIDE**2 for slide in slides}
    keys, limit = list(sizes), sum(list(sizes.values())[place] for place in places)
    wanted = [sizes, {keys[0]: sizes[keys[0]]}, sizes]
    told = scratch_use(wanted, limit)
    scratch = TileScratch(folder, limit)
    for number, (now, use) in enumerate(zip(wanted, told, strict=True)):
        scratch.begin_turn(now, set().union(*wanted[number + 1 :]))
        plans = [scratch.over(HOST_TRANSFER).bind(planned(slide)) for slide in slides[: len(now)]]
        for plan in plans:
            read(plan)
        taken = sum(map(is_kept, plans))
        assert (len(use.taken), len(use.again)) == (taken, len(plans) - taken if number else 0)
        assert use.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert told[0].kept and told[-1].taken if places else told[-1].again == set(keys)


def test_workers_keep_tiles_for_one_another(slides: list[Slide], folder: Path) -> None:
    """Each by its copy of the scratch, all within one bound; what one leaves that dies goes in time."""
    sizes = [len(planned(slide).tiling) * 3 * SIDE**2 for slide in slides]
    scratch, wanted = TileScratch(folder, sum(sizes)), tiles_wanted(CONFIG, slides)
    scratch.begin_turn(wanted, wanted)
    one, two, three = (pickle.loads(pickle.dumps(scratch)).over(HOST_TRANSFER) for _ in range(3))
    expected = read(one.bind(planned(slides[0])))
    half = two.bind(planned(slides[1]))
    (whole,) = folder.glob("*.tiles")
    (begun,) = {*folder.iterdir()} - {whole}
    assert begun.stat().st_size == sizes[1]  # from the beginning
    begun.rename(begun.with_suffix(".1"))  # of another process, which dies
    again = three.bind(planned(slides[1]))
    read(again)
    assert list(folder.glob("*.tiles")) == [whole] and not is_kept(again)  # no room
    scratch.begin_turn(wanted, set())
    assert list(folder.iterdir()) == [whole]
    later = pickle.loads(pickle.dumps(scratch)).over(HOST_TRANSFER)
    plan, other = later.bind(planned(slides[0])), later.bind(planned(slides[1]))
    assert is_kept(plan) and np.array_equal(read(plan), expected) and not is_kept(other)
    half.close()
    other.close()


def test_how_much_may_wait(tmp_path: Path) -> None:
    half = shutil.disk_usage(tmp_path).free / 2
    for options, limit in (({"scratch_gb": 2}, 2e9), ({}, half)):
        with scratch_room(ExecutionOptions(scratch_dir=tmp_path / "a" / "b", **options), 2) as room:
            assert room is not None and room.limit_bytes == pytest.approx(limit, rel=0.1)


def test_a_full_disk_means_that_nothing_more_fits(
    slides: list[Slide], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, written = os.pwrite, [0]

    def full(file: int, data: Any, offset: int) -> int:
        written[0] += 1
        if written[0] == 20:
            return write(file, data, offset) // 2
        if written[0] > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    scratch = TileScratch(folder, 2 * ROOM)
    expected = [read(planned(slide)) for slide in slides]
    for transfer in turns(scratch, *slides):
        for slide, pixels in zip(slides, expected, strict=True):
            plan = transfer.bind(planned(slide))
            assert np.array_equal(read(plan), pixels) and not is_kept(plan)
        assert list(folder.iterdir()) == []
    assert written[0] == 20
    assert caplog.text.count("are not kept") == 1 and "No space left" in caplog.text


def test_tiles_that_are_not_all_there_are_not_used(slides: list[Slide], folder: Path) -> None:
    scratch = TileScratch(folder, ROOM)
    for number, transfer in enumerate(turns(scratch, slides[0])):
        plan = transfer.bind(planned(slides[0], SINGLY))
        read(plan, blocks=None if number else 20)
        assert list(folder.iterdir()) == []
    assert not is_kept(plan)


def test_a_file_that_somebody_has_removed_or_cut_short(slides: list[Slide], folder: Path) -> None:
    def remove() -> None:
        for path in folder.iterdir():
            path.unlink()

    def cut() -> None:
        for path in folder.iterdir():
            os.truncate(path, 1000)

    assert not used_again(TileScratch(folder, ROOM), slides[0], remove)
    with pytest.raises(SlideReadError, match=r"slide s0: tile \d+ .* too short"):
        used_again(TileScratch(folder, ROOM), slides[0], cut)


def test_tiles_in_the_memory_of_a_device(slides: list[Slide], folder: Path, fetched: list[str]) -> None:
    """Any device of PyTorch; here the CPU, which has the same code."""
    expected = read(planned(slides[0]))
    fetched.clear()
    scratch = TileScratch(folder, ROOM)
    transfer = DeviceTransfer(torch.device("cpu"), gpu_decode=False)
    for _ in turns(scratch, slides[0]):
        plan = scratch.over(transfer).bind(planned(slides[0]))
        assert np.array_equal(read(plan, transfer), expected)
        read_in_turn = list(fetched)
        fetched.clear()
    assert is_kept(plan) and read_in_turn == []


def test_the_folder_is_there_for_one_run(tmp_path: Path) -> None:
    """After an error, and an interrupt, too; and what a run has left that was killed goes with the next."""
    with tile_scratch(ExecutionOptions(scratch_dir=tmp_path), 2) as scratch:
        assert scratch is not None
        (own,) = tmp_path.glob("*/")
        dead = tmp_path / own.name.replace(own.name.rpartition("-")[2], "0123456789ab")
    assert list(tmp_path.iterdir()) == []
    dead.mkdir()
    (dead / "1.tiles").write_bytes(b"of another run")
    dead.with_name(f"{dead.name}.lock").touch()
    with pytest.raises(KeyboardInterrupt), tile_scratch(ExecutionOptions(stage_dir=tmp_path), 2):
        assert not dead.exists() and len(list(tmp_path.glob("*/"))) == 1
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("more", "turns"), [({"scratch_gb": 0}, 2), ({}, 1), ({"executor": "ray"}, 2)])
def test_nothing_is_written_where_nothing_is_kept(tmp_path: Path, more: dict[str, Any], turns: int) -> None:
    with tile_scratch(ExecutionOptions(scratch_dir=tmp_path, **more), turns) as scratch:
        assert scratch is None and list(tmp_path.iterdir()) == []


def test_by_default_tiles_wait_among_temporary_files_unless_these_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(folders, "_MEMORY", frozenset())
    with tile_scratch(ExecutionOptions(), 2) as scratch:
        assert scratch is not None and len(list(tmp_path.glob("*/"))) == 1
    if Path("/dev/shm").is_dir():
        monkeypatch.undo()
        assert folders.is_in_memory(Path("/dev/shm"))
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
        with tile_scratch(ExecutionOptions(), 2) as scratch:
            assert scratch is None
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(file))
    with tile_scratch(ExecutionOptions(), 2) as scratch:
        assert scratch is None and "are not kept" in caplog.text
    with pytest.raises(ConfigError, match=r"scratch_dir: .*file cannot be written to"):
        tile_scratch(ExecutionOptions(scratch_dir=file), 2).__enter__()
