"""Tiles prepared, cut, decoded and uploaded on the GPU, against the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import ConfigError, ExtraMissingError
from slide2vec.prepare import choose_preparer, cut_tiles
from slide2vec.prepare.device_cut import cut_tiles_on_device
from slide2vec.prepare.gather_tiles import Gather, gather_by_kernel, gather_by_torch
from slide2vec.prepare.pixel_difference import DECODED
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.prepare.triton_preparer import triton_unavailable
from slide2vec.readers.jpeg_tiles import DecodedTiles
from slide2vec.recipes import Transform
from slide2vec.slides import Slide
from slide2vec.stream import SlidePlan, plan_slide
from slide2vec.stream.decode_paths import DeviceTransfer
from slide2vec.stream.tile_sources import open_archive
from slide2vec.tiling.archives import write_archive

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
#: A uint8 resize in fixed point (CPU) and in float (GPU) round differently by one grey level, twice at most.
GREY_LEVELS = 2.01
#: Of normalised pixels, at the smallest standard deviation.
GREY_LEVEL = 1 / 255 / 0.224


def recipe(resize: int, crop: int) -> Transform:
    return Transform(resize=resize, crop=crop, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def smooth(side: int, count: int = 5) -> torch.Tensor:
    place = torch.arange(side) / 11
    waves = torch.sin(place[:, None] + torch.arange(count * 3)[:, None, None]) * torch.cos(place)
    return (128 + 127 * waves).reshape(count, 3, side, side).permute(0, 2, 3, 1).contiguous().to(torch.uint8)


@pytest.mark.parametrize("layout", ["float32_nchw", "uint8_nhwc"])
@pytest.mark.parametrize(("side", "resize", "crop"), [(224, 224, 224), (256, 224, 224), (256, 256, 224)])
@pytest.mark.parametrize("name", ["torch", "dali", "triton"])
def test_preparing(name: str, side: int, resize: int, crop: int, layout: Any, device: torch.device) -> None:
    tiles = smooth(side)
    try:
        preparer = choose_preparer(name, recipe(resize, crop), device, layout, side)
    except (ExtraMissingError, ConfigError) as error:
        pytest.skip(f"not run: {error}")
    expected = TorchPreparer(recipe(resize, crop), CPU, layout).prepare(tiles)
    found = preparer.prepare(tiles.to(device))
    assert found.device.type == device.type and found.dtype == expected.dtype
    level = 1.0 if layout == "uint8_nhwc" else GREY_LEVEL
    difference = (found.cpu().float() - expected.float()).abs()
    assert difference.max() <= GREY_LEVELS * level and difference.mean() <= 0.33 * level


@pytest.mark.parametrize("read", [224, 448, 672, 301, 500])
def test_cutting(read: int, device: torch.device) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1600, 1400, 3)).astype(np.uint8)
    offsets = np.array([(0, 0), (336, 672), (333, 77)])
    expected = np.zeros((3, 224, 224, 3), np.uint8)
    cut_tiles(pixels, offsets, read, list(expected))
    found = torch.zeros((3, 224, 224, 3), dtype=torch.uint8, device=device)
    cut_tiles_on_device(torch.from_numpy(pixels).to(device), offsets, read, list(found))
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


class Memory:
    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels


@pytest.mark.parametrize("side", [64, 128, 192, 256, 73, 150])
@pytest.mark.parametrize("gather", [gather_by_kernel, gather_by_torch])
def test_cutting_out_of_decoded_tiles(gather: Gather, side: int, device: torch.device) -> None:
    if gather is gather_by_kernel and (reason := triton_unavailable()):
        pytest.skip(f"not run: {reason}")
    rng = np.random.default_rng(0)
    tiles = torch.from_numpy(rng.integers(0, 256, (12, 96, 80, 3)).astype(np.uint8))
    slots, level = rng.permutation(12).reshape(3, 4), (300, 280)
    corners = np.array([[0, 0], [-20, 31], [150, 120], [290, 270]])
    found = [torch.zeros((4, 64, 64, 3), dtype=torch.uint8, device=where) for where in (device, CPU)]
    gather(DecodedTiles(Memory(tiles.to(device)), slots, 0, 0, level), corners, side, list(found[0]))
    gather_by_torch(DecodedTiles(Memory(tiles), slots, 0, 0, level), corners, side, list(found[1]))
    assert torch.equal(found[0].cpu(), found[1])


def planned(slide: Path) -> SlidePlan:
    config = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=224)
    return plan_slide(Slide(sample_id="s", image_path=slide), config)


def placed(plan: SlidePlan, device: torch.device) -> torch.Tensor:
    tiles = torch.zeros((len(plan.tiling), 224, 224, 3), dtype=torch.uint8, device=device)
    for number, block in enumerate(plan.source.blocks):
        plan.source.place(number, plan.source.fetch(number), [tiles[tile] for tile in block])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return tiles.cpu()


def on_host(plan: SlidePlan) -> torch.Tensor:
    tiles = np.zeros((len(plan.tiling), 224, 224, 3), np.uint8)
    for number, block in enumerate(plan.source.blocks):
        plan.source.place(number, plan.source.fetch(number), [tiles[tile] for tile in block])
    return torch.from_numpy(tiles)


@pytest.mark.parametrize("decode_path", ["raw + nvimgcodec", "raw + dali", "cucim"])
def test_decoding(decode_path: str, slide: Path, device: torch.device) -> None:
    plan = DeviceTransfer(device, "auto", (decode_path,)).bind(planned(slide))
    if plan.decode_path != f"{decode_path} on the device":
        pytest.skip(f"not run: {decode_path} was left for {plan.decode_path}; the reason is in the log")
    expected = on_host(planned(slide))
    difference = (placed(plan, device).int() - expected.int()).abs().float()
    assert difference.mean(dim=(1, 2, 3)).max() <= DECODED.mean  # of every tile


def test_uploading(slide: Path, device: torch.device) -> None:
    plan = DeviceTransfer(device, False).bind(planned(slide))
    assert plan.decode_path is not None and plan.decode_path.endswith(", uploaded")
    assert torch.equal(placed(plan, device), on_host(planned(slide)))


def test_archives(slide: Path, device: torch.device, cuda: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="not run: NVIDIA DALI is not installed")
    plan = planned(slide)
    tiles = on_host(plan).numpy()
    path = write_archive(tmp_path, plan.tiling, ((block, tiles[block]) for block in plan.source.blocks))
    expected = on_host(SlidePlan(plan.slide, open_archive(path, plan.tiling), plan.tiling))
    adopted = DeviceTransfer(device).bind(SlidePlan(plan.slide, open_archive(path, plan.tiling), plan.tiling))
    assert adopted.decode_path == "archive, dali on the device"
    difference = (placed(adopted, device).int() - expected.int()).abs().float()
    assert difference.mean(dim=(1, 2, 3)).max() <= DECODED.mean
