"""What becomes of tiles that the GPU fails at: other decoders, smaller pieces, the CPU; and it is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stream_helpers import StandInDecoder

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import ConfigError, SlideReadError
from slide2vec.prepare.gather_tiles import gather_by_torch
from slide2vec.slides import Slide
from slide2vec.stream import SlidePlan, decode_paths, device_sources, plan_slide
from slide2vec.stream.cuda_streams import HostStream
from slide2vec.stream.decode_paths import DecodePath, DeviceTransfer, jpeg_path
from slide2vec.stream.device_sources import MOST_FAILED, TURNS, Uploaded, is_out_of_memory
from slide2vec.stream.tile_sources import damaged

CPU = torch.device("cpu")
ON_DEVICE, UPLOADED = "fake on the device", "tiff, uploaded"


class Device(StandInDecoder):
    """A device's decoder.

    Attributes:
        works: False: it raises `error` whenever it is to decode more than `most` tiles.
        refuses: so many tiles of the next block, which is not their fault.
    """

    works, most, error = True, 0, RuntimeError("CUDA error: unspecified launch failure")

    def __init__(self) -> None:
        self.refuses = 0
        self.calls: list[int] = []

    def decode(self, jpegs: Any, form: Any) -> Any:
        self.calls.append(len(jpegs))
        if not self.works and len(jpegs) > self.most:
            raise self.error
        memory, _ = super().decode(jpegs, form)
        memory.pixels[: self.refuses] = 0
        refused, self.refuses = list(range(self.refuses)), 0
        return memory, refused


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The decoder of the only decode path that there is."""
    decoder = Device()
    path = jpeg_path(decoder, gather_by_torch)
    monkeypatch.setattr(decode_paths, "DECODE_PATHS", {"fake": lambda where: path})
    return decoder


def planned(path: Path, **options: Any) -> SlidePlan:
    config = PreprocessingConfig(
        **{"requested_spacing_um": 0.5, "requested_tile_size_px": 112, "tissue_threshold": 0.1, **options}
    )
    return plan_slide(Slide(sample_id="s", image_path=path), config)


def bound(path: Path, **options: Any) -> SlidePlan:
    plan = DeviceTransfer(CPU, "auto", ["fake"]).bind(planned(path, **options))
    assert plan.decode_path == ON_DEVICE and len(plan.source.blocks) > MOST_FAILED + 2
    return plan


def pixels(plan: SlidePlan) -> np.ndarray:
    side = plan.tiling.geometry.requested_tile_size_px
    tiles = np.zeros((len(plan.tiling), side, side, 3), np.uint8)
    for number, block in enumerate(plan.source.blocks):
        plan.source.place(number, plan.source.fetch(number), [tiles[tile] for tile in block])
    return tiles


def test_all_is_well(device: Device, small_blocks: Path) -> None:
    plan = bound(small_blocks)
    np.testing.assert_array_equal(pixels(plan), pixels(planned(small_blocks)))
    assert plan.decoded_by() == {ON_DEVICE: len(plan.tiling)}


@pytest.fixture
def small_blocks(reference_slide: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slide whose supertiles are small, so that it has several of a few tiles each."""
    monkeypatch.setattr("slide2vec.tiling.supertiles.MAX_SIDE_TILES", 4)
    return reference_slide


def test_a_device_that_keeps_failing_is_given_up(
    device: Device, small_blocks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, expected = bound(small_blocks), pixels(planned(small_blocks))
    device.works, device.calls = False, []
    with caplog.at_level(logging.WARNING, logger=device_sources.__name__):
        np.testing.assert_array_equal(pixels(plan), expected)
    assert len(device.calls) == MOST_FAILED + 1  # and it was asked no more
    assert plan.decoded_by() == {UPLOADED: len(plan.tiling)}
    (warning,) = caplog.messages
    assert "slide s: the rest of it is decoded on the CPU" in warning and "unspecified launch" in warning


def test_a_device_that_fails_once_is_asked_again(device: Device, small_blocks: Path) -> None:
    plan, expected = bound(small_blocks), pixels(planned(small_blocks))
    side = plan.tiling.geometry.requested_tile_size_px
    found = np.zeros((len(plan.tiling), side, side, 3), np.uint8)
    for number, block in enumerate(plan.source.blocks):
        device.works = number != 1
        plan.source.place(number, plan.source.fetch(number), [found[tile] for tile in block])
    np.testing.assert_array_equal(found, expected)
    once = len(plan.source.blocks[1])
    assert plan.decoded_by() == {ON_DEVICE: len(found) - once, UPLOADED: once}


def test_a_decoder_that_refuses_is_given_up(
    device: Device, small_blocks: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_sources, "MOST_REFUSED", 3)
    plan = bound(small_blocks)
    first, second, *_ = plan.source.blocks
    device.refuses = 3  # so many are nothing
    side = plan.tiling.geometry.requested_tile_size_px
    memory = np.zeros((len(plan.tiling), side, side, 3), np.uint8)
    with caplog.at_level(logging.WARNING, logger=device_sources.__name__):
        plan.source.place(0, plan.source.fetch(0), [memory[tile] for tile in first])
        assert not caplog.messages
        device.refuses = 1
        plan.source.place(1, plan.source.fetch(1), [memory[tile] for tile in second])
        assert "(4 had to be decoded on the CPU)" in caplog.text
    np.testing.assert_array_equal(pixels(plan), pixels(planned(small_blocks)))
    assert plan.decoded_by() == {ON_DEVICE: len(first) + len(second), UPLOADED: len(plan.tiling)}


@pytest.mark.parametrize(
    ("error", "most"),  # of the file's tiles: not even one tile fits, half a block does
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 5),
        (RuntimeError("nvImageCodec failure: 'CUDA Runtime failure: #2 cudaErrorMemoryAllocation'"), 0),
    ],
)
def test_memory_that_does_not_suffice(
    error: Exception, most: int, device: Device, small_blocks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, expected = bound(small_blocks), pixels(planned(small_blocks))
    device.works, device.most, device.error = False, most, error  # type: ignore[misc]
    with caplog.at_level(logging.WARNING, logger=device_sources.__name__):
        np.testing.assert_array_equal(pixels(plan), expected)
    by = plan.decoded_by()
    assert sum(by.values()) == len(plan.tiling)
    assert by[ON_DEVICE if most else UPLOADED] > len(plan.tiling) // 2
    warning, *more = caplog.messages  # once per slide
    assert "do not fit into the memory of cpu" in warning
    assert len(more) == (most == 0) and all("not even one tile" in given_up for given_up in more)


def test_the_cpu_decodes_what_the_device_is_too_busy_for(device: Device, small_blocks: Path) -> None:
    plan = DeviceTransfer(CPU, "shared", ["fake"]).bind(planned(small_blocks))
    expected = pixels(planned(small_blocks))
    found = np.zeros_like(expected)
    blocks = list(enumerate(plan.source.blocks))

    def place(number: int, data: Any) -> None:
        plan.source.place(number, data, [found[tile] for tile in plan.source.blocks[number]])

    waiting = [(number, plan.source.fetch(number)) for number, _ in blocks[: TURNS + 1]]
    for number, data in waiting:
        place(number, data)
    by_cpu = len(blocks[TURNS][1])
    assert plan.decoded_by()[UPLOADED] == by_cpu
    for number, _ in blocks[TURNS + 1 :]:  # one after the other: the device is free each time
        device.works = number != TURNS + 1  # where it fails, its turn is over, too
        place(number, plan.source.fetch(number))
    by_cpu += len(blocks[TURNS + 1][1])
    np.testing.assert_array_equal(found, expected)
    assert plan.decoded_by() == {UPLOADED: by_cpu, ON_DEVICE: len(found) - by_cpu}


def test_what_counts_as_memory_that_does_not_suffice() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            raise SlideReadError("slide s: raw cannot decode level 0") from error
    except SlideReadError as error:
        assert is_out_of_memory(error)
    assert is_out_of_memory(RuntimeError("[Error] NVJPEG_STATUS_ALLOCATOR_FAILURE"))
    assert not is_out_of_memory(SlideReadError("slide s: damaged tile (out of memory)"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_damage_is_the_slides_not_the_devices(device: Device, small_blocks: Path, tmp_path: Path) -> None:
    """The CPU has the last word, and its error stands."""
    plan = bound(small_blocks)
    device.works = False

    def broken(number: int) -> Any:
        raise SlideReadError("slide s: tiff cannot decode level 0")

    plan.source._uploaded.fetch = broken  # type: ignore[attr-defined]
    for number in range(len(plan.source.blocks)):
        with pytest.raises(SlideReadError, match="tiff cannot decode"):
            plan.source.fetch(number)
    assert not plan.source._given_up  # type: ignore[attr-defined]
    assert "tiff" in str(damaged(plan.tiling, {0: SlideReadError("slide s: tiff cannot decode level 0")}))


@pytest.mark.parametrize(
    "error", [RuntimeError("nvImageCodec failure: no driver"), OSError("libnvjpeg.so.13: no")]
)
def test_a_decoder_that_cannot_be_created_is_a_reason(
    error: Exception,
    small_blocks: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(device: torch.device) -> DecodePath:
        raise error

    monkeypatch.setattr(decode_paths, "DECODE_PATHS", {"fake": fail})
    transfer = DeviceTransfer(CPU, "auto", ["fake"])
    with caplog.at_level(logging.INFO, logger=decode_paths.__name__):
        for _ in range(3):
            plan = transfer.bind(planned(small_blocks))
            assert plan.decode_path == UPLOADED and plan.decoded_by() == {UPLOADED: len(plan.tiling)}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]  # one per reason
    assert str(error) in caplog.text
    with pytest.raises(ConfigError, match=f"gpu_decode=True: {error}"):
        DeviceTransfer(CPU, True, ["fake"])


class Copies(torch.overrides.TorchFunctionMode):
    """Counts `copy_`."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.copy_:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def test_uploading_copies_neighbouring_slots_at_once() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3)).astype(np.uint8)

    class Source:
        backend, blocks = "fake", (np.arange(7),)

        def place(self, number: int, data: Any, targets: Any) -> None:
            for tile, target in zip(tiles, targets, strict=True):
                target[:] = tile

    first, second = torch.zeros((9, 4, 4, 3), dtype=torch.uint8), torch.zeros((5, 4, 4, 3), dtype=torch.uint8)
    targets = [*first[6:9], *second[0:3], second[4]]  # the end of a batch, the next one, and past a hole
    with Copies() as copies:
        Uploaded(Source(), HostStream(CPU)).place(0, None, targets)  # type: ignore[arg-type]
    assert copies.shapes == [(3, 4, 4, 3), (3, 4, 4, 3), (1, 4, 4, 3)]
    np.testing.assert_array_equal(torch.cat([first[6:], second[:3], second[4:]]).numpy(), tiles)
    assert not first[:6].any() and not second[3].any()
