"""Where a stream keeps its tiles, and on which road the pixels of each slide get there.

On a CPU tiles are written into host memory as their source gives them. On a GPU they are decoded there
where that gives the right pixels, which is looked at on one tile of every slide; else on the CPU, and
uploaded in one asynchronous copy per block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from slide2vec.errors import BackendError, ConfigError, ExtraMissingError, SlideReadError
from slide2vec.prepare.dali_archive import DaliArchive
from slide2vec.prepare.device_cut import cut_tiles_on_device
from slide2vec.readers import SlideReader
from slide2vec.readers.cucim import CucimCudaReader, load_on
from slide2vec.readers.decoders import NvimgcodecDecoder, TileDecoder
from slide2vec.readers.probe import Probe
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.raw import RawReader
from slide2vec.stream.lanes import HostLane, Lane, lane_for
from slide2vec.stream.plan import SlidePlan
from slide2vec.stream.sources import SlideSource, TileSource
from slide2vec.tiling import Tiling

__all__ = ["HOST_FEED", "DeviceFeed", "Feed", "HostFeed", "feed_for"]

logger = logging.getLogger(__name__)

#: Mean difference in grey levels that decoders may have on a tile: an inverse DCT or a chroma upsampling
#: that rounds otherwise stays far below, a wrong colour space is tens off.
MAX_MEAN_DIFFERENCE = 1.0

#: A road's name and what opens it.
_Road = tuple[str, Callable[[Probe], SlideReader]]


class Feed(Protocol):
    """Where tiles are kept, and how they get there.

    Attributes:
        device: that keeps batches of tiles.
        lane: of the work that writes them.
    """

    device: torch.device
    lane: Lane

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of the device for tiles, uint8, in the order of the lane."""
        ...

    def adopt(self, plan: SlidePlan) -> SlidePlan:
        """The plan with a source whose tiles can be placed there, and its road. Called in planning threads.

        Raises:
            BackendError: gpu_decode=True, and the slide cannot be decoded on the GPU.
        """
        ...


class HostFeed:
    """Tiles in host memory, written by the sources themselves. See `Feed`."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.lane: Lane = HostLane(self.device)

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """See `Feed.allocate`."""
        return torch.zeros(shape, dtype=torch.uint8)

    def adopt(self, plan: SlidePlan) -> SlidePlan:
        """The plan as it is."""
        return plan


HOST_FEED = HostFeed()


class DeviceFeed:
    """Tiles in a device's memory. See `Feed`.

    Args:
        device: a GPU; the CPU in tests, where everything but cuCIM's road runs as well.
        gpu_decode: "auto": where it gives the right pixels; True: or else the slide fails; False: never.

    Raises:
        ConfigError: gpu_decode=True, and nothing is installed that decodes on a GPU.
    """

    def __init__(self, device: torch.device, gpu_decode: bool | Literal["auto"] = "auto") -> None:
        self.device, self.lane, self._gpu_decode = device, lane_for(device), gpu_decode
        self._roads: list[_Road] = []
        self._missing: list[str] = []
        if device.type == "cuda":
            load_on(device)  # before a planning thread imports cuCIM with another device current
        if gpu_decode is not False:
            self._find_roads()
        if gpu_decode is True and not self._roads:
            raise ConfigError(f"gpu_decode=True: {'; '.join(self._missing)}; gpu_decode='auto' does without")

    def _find_roads(self) -> None:
        """The faster first."""
        try:
            decoder: TileDecoder = NvimgcodecDecoder(self.device)
            self._roads.append(("raw + nvimgcodec", lambda probe: RawReader(probe, decoder)))
        except ExtraMissingError as error:
            self._missing.append(str(error))
        if self.device.type == "cuda":
            self._roads.append(("cucim", lambda probe: CucimCudaReader(probe, self.device)))

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """See `Feed.allocate`: filled on the lane, or the filling could overtake the tiles."""
        with self.lane.current():
            return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def adopt(self, plan: SlidePlan) -> SlidePlan:
        """See `Feed.adopt`."""
        source, road = plan.source, f"{plan.source.backend}, uploaded"
        if len(plan.tiling) and self._gpu_decode is not False:
            if isinstance(source, SlideSource):
                return self._on_a_road(plan, source, road)
            if isinstance(source, DaliArchive):
                with self.lane.current():
                    decodes = source.use_device(self.device)
                if decodes:
                    on_lane = _OnLane(source, self.lane)
                    return replace(plan, source=on_lane, road="archive, dali on the device")
        return replace(plan, source=_Uploaded(source, self.lane), road=road)

    def _on_a_road(self, plan: SlidePlan, source: SlideSource, otherwise: str) -> SlidePlan:
        reasons = list(self._missing)
        for name, reader in self._opened(source.reader, reasons):
            wrong = self._difference(reader, source.reader, plan.tiling)
            if wrong is None:
                on_road = _OnLane(source.through(reader, cut_tiles_on_device), self.lane)
                return replace(plan, source=on_road, road=f"{name} on the device")
            reader.close()
            reasons.append(f"{name}: {wrong}")
        why = "; ".join(reasons)
        if self._gpu_decode is True:
            raise BackendError(
                f"slide {plan.slide.sample_id}: gpu_decode=True, but the GPU cannot decode it ({why}); "
                "gpu_decode='auto' has the CPU decode such slides"
            )
        logger.info("slide %s: decoded on the CPU (%s)", plan.slide.sample_id, why)
        return replace(plan, source=_Uploaded(source, self.lane), road=otherwise)

    def _opened(self, host: SlideReader, reasons: list[str]) -> Iterator[tuple[str, SlideReader]]:
        """The roads that take the file."""
        if not isinstance(host, PyramidReader):
            reasons.append(f"{host.backend} does not tell what the file is")
            return
        for name, open_road in self._roads:
            try:
                reader = open_road(host.probe)
            except (BackendError, ExtraMissingError) as error:
                reasons.append(f"{name}: {error}")
                continue
            planned = slice(host.planning_levels)
            if reader.level_dimensions[planned] == host.level_dimensions[planned]:
                yield name, reader
            else:
                reader.close()
                reasons.append(f"{name}: sees other levels {reader.level_dimensions}")

    def _difference(self, reader: SlideReader, host: SlideReader, tiling: Tiling) -> str | None:
        """What is wrong with a road's pixels of the middle tile, None when nothing is."""
        middle, geometry = len(tiling) // 2, tiling.geometry
        corner = int(tiling.x[middle]), int(tiling.y[middle])
        size = geometry.read_tile_size_px, geometry.read_tile_size_px
        try:
            with self.lane.current():
                found = torch.as_tensor(reader.read_region(corner, geometry.read_level, size)).cpu()
            expected = host.read_region(corner, geometry.read_level, size)
        except (SlideReadError, RuntimeError) as error:  # RuntimeError: of the GPU's libraries
            return f"a tile cannot be compared ({error})"
        mean = float(np.abs(found.numpy().astype(np.int16) - expected).mean())
        return None if mean <= MAX_MEAN_DIFFERENCE else f"its pixels differ by {mean:.1f} grey levels"


def feed_for(device: torch.device, gpu_decode: bool | Literal["auto"]) -> Feed:
    """The feed of an engine's device.

    Raises:
        ConfigError: gpu_decode=True, and there is no GPU or nothing that decodes on it.
    """
    if device.type == "cuda":
        return DeviceFeed(device, gpu_decode)
    if gpu_decode is True:
        raise ConfigError(f"gpu_decode=True needs an NVIDIA GPU, and the model is on {device}; leave it out")
    return HOST_FEED


class _OnLane:
    """A source that works on a device. See `TileSource`."""

    def __init__(self, source: TileSource, lane: Lane) -> None:
        self._source, self._lane = source, lane
        self.backend, self.blocks = source.backend, source.blocks

    def fetch(self, number: int) -> Any:
        with self._lane.current():
            return self._source.fetch(number)

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        with self._lane.current():
            self._source.place(number, data, targets)

    def read_tile(self, tile: int, target: Any) -> None:
        with self._lane.current():
            self._source.read_tile(tile, target)

    def close(self) -> None:
        self._source.close()


class _Uploaded:
    """A source that works in host memory, with one asynchronous copy per block. See `TileSource`."""

    def __init__(self, source: TileSource, lane: Lane) -> None:
        self._source, self._lane = source, lane
        self.backend, self.blocks = source.backend, source.blocks

    def fetch(self, number: int) -> Any:
        return self._source.fetch(number)

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        staged = self._staging(len(targets), targets[0])
        self._source.place(number, data, list(staged.numpy()))
        self._upload(staged, targets)

    def read_tile(self, tile: int, target: Any) -> None:
        staged = self._staging(1, target)
        self._source.read_tile(tile, staged.numpy()[0])
        self._upload(staged, [target])

    def _staging(self, count: int, target: Any) -> Tensor:
        """Page-locked where the device is a GPU: PyTorch hands such memory out again after the copy."""
        cuda = self._lane.device.type == "cuda"
        return torch.empty((count, *target.shape), dtype=torch.uint8, pin_memory=cuda)

    def _upload(self, staged: Tensor, targets: Sequence[Any]) -> None:
        with self._lane.current():
            on_device = staged.to(self._lane.device, non_blocking=True)
            for tile, target in zip(on_device, targets, strict=True):
                torch.as_tensor(target).copy_(tile, non_blocking=True)

    def close(self) -> None:
        self._source.close()
