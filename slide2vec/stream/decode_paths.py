"""By which decode path the pixels of each slide get into the memory that the stream keeps its tiles in.

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
from slide2vec.readers.jpeg_tiles import JpegTileReader
from slide2vec.stream.cuda_streams import DeviceStream, HostStream, device_stream
from slide2vec.stream.plan import SlidePlan
from slide2vec.stream.tile_sources import SlideSource, TileSource
from slide2vec.tiling import Tiling

__all__ = ["HOST_TRANSFER", "DeviceTransfer", "HostTransfer", "TileTransfer", "tile_transfer"]

logger = logging.getLogger(__name__)

#: Mean difference in grey levels that decoders may have on a tile: an inverse DCT or a chroma upsampling
#: that rounds otherwise stays far below, a wrong colour space is tens off.
MAX_MEAN_DIFFERENCE = 1.0

#: A decode path: its name, and what opens a slide for it.
_DecodePath = tuple[str, Callable[[Probe], SlideReader]]


class TileTransfer(Protocol):
    """Where tiles are kept, and how they get there: host memory, or that of a GPU.

    Attributes:
        device: that keeps batches of tiles.
        stream: the device stream that writes them.
    """

    device: torch.device
    stream: DeviceStream

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of the device for tiles, uint8, in the order of the device stream."""
        ...

    def bind(self, plan: SlidePlan) -> SlidePlan:
        """The plan with a source whose tiles can be placed there, and its decode path. Called in planning
        threads.

        Raises:
            BackendError: gpu_decode=True, and the slide cannot be decoded on the GPU.
        """
        ...


class HostTransfer:
    """Tiles in host memory, written by the sources themselves. See `TileTransfer`."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.stream: DeviceStream = HostStream(self.device)

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """See `TileTransfer.allocate`."""
        return torch.zeros(shape, dtype=torch.uint8)

    def bind(self, plan: SlidePlan) -> SlidePlan:
        """The plan as it is."""
        return plan


HOST_TRANSFER = HostTransfer()


class DeviceTransfer:
    """Tiles in a device's memory. See `TileTransfer`.

    Args:
        device: a GPU; the CPU in tests, where everything but cuCIM's CUDA decoder runs as well.
        gpu_decode: "auto": where it gives the right pixels; True: or else the slide fails; False: never.

    Raises:
        ConfigError: gpu_decode=True, and nothing is installed that decodes on a GPU.
    """

    def __init__(self, device: torch.device, gpu_decode: bool | Literal["auto"] = "auto") -> None:
        self.device, self.stream, self._gpu_decode = device, device_stream(device), gpu_decode
        self._decode_paths: list[_DecodePath] = []
        self._missing: list[str] = []
        if device.type == "cuda":
            load_on(device)  # before a planning thread imports cuCIM with another device current
        if gpu_decode is not False:
            self._find_paths()
        if gpu_decode is True and not self._decode_paths:
            raise ConfigError(f"gpu_decode=True: {'; '.join(self._missing)}; gpu_decode='auto' does without")

    def _find_paths(self) -> None:
        """The faster first."""
        try:
            decoder: TileDecoder = NvimgcodecDecoder(self.device)
            self._decode_paths.append(("raw + nvimgcodec", lambda probe: JpegTileReader(probe, decoder)))
        except ExtraMissingError as error:
            self._missing.append(str(error))
        if self.device.type == "cuda":
            self._decode_paths.append(("cucim", lambda probe: CucimCudaReader(probe, self.device)))

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """See `TileTransfer.allocate`: filled on the device stream, or the filling could overtake the
        tiles."""
        with self.stream.current():
            return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def bind(self, plan: SlidePlan) -> SlidePlan:
        """See `TileTransfer.bind`."""
        source, decode_path = plan.source, f"{plan.source.backend}, uploaded"
        if len(plan.tiling) and self._gpu_decode is not False:
            if isinstance(source, SlideSource):
                return self._decoded_on_device(plan, source, decode_path)
            if isinstance(source, DaliArchive):
                with self.stream.current():
                    decodes = source.use_device(self.device)
                if decodes:
                    on_device = _OnDevice(source, self.stream)
                    return replace(plan, source=on_device, decode_path="archive, dali on the device")
        return replace(plan, source=_Uploaded(source, self.stream), decode_path=decode_path)

    def _decoded_on_device(self, plan: SlidePlan, source: SlideSource, otherwise: str) -> SlidePlan:
        reasons = list(self._missing)
        for name, reader in self._opened(source.reader, reasons):
            wrong = self._difference(reader, source.reader, plan.tiling)
            if wrong is None:
                on_device = _OnDevice(source.with_reader(reader, cut_tiles_on_device), self.stream)
                return replace(plan, source=on_device, decode_path=f"{name} on the device")
            reader.close()
            reasons.append(f"{name}: {wrong}")
        why = "; ".join(reasons)
        if self._gpu_decode is True:
            raise BackendError(
                f"slide {plan.slide.sample_id}: gpu_decode=True, but the GPU cannot decode it ({why}); "
                "gpu_decode='auto' has the CPU decode such slides"
            )
        logger.info("slide %s: decoded on the CPU (%s)", plan.slide.sample_id, why)
        return replace(plan, source=_Uploaded(source, self.stream), decode_path=otherwise)

    def _opened(self, host: SlideReader, reasons: list[str]) -> Iterator[tuple[str, SlideReader]]:
        """The decode paths that take the file."""
        if not isinstance(host, PyramidReader):
            reasons.append(f"{host.backend} does not say what the file is")
            return
        for name, open_slide in self._decode_paths:
            try:
                reader = open_slide(host.probe)
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
        """What is wrong with a decode path's pixels of the middle tile, None when nothing is."""
        middle, geometry = len(tiling) // 2, tiling.geometry
        corner = int(tiling.x[middle]), int(tiling.y[middle])
        size = geometry.read_tile_size_px, geometry.read_tile_size_px
        try:
            with self.stream.current():
                found = torch.as_tensor(reader.read_region(corner, geometry.read_level, size)).cpu()
            expected = host.read_region(corner, geometry.read_level, size)
        except (SlideReadError, RuntimeError) as error:  # RuntimeError: of the GPU's libraries
            return f"a tile cannot be compared ({error})"
        mean = float(np.abs(found.numpy().astype(np.int16) - expected).mean())
        return None if mean <= MAX_MEAN_DIFFERENCE else f"its pixels differ by {mean:.1f} grey levels"


def tile_transfer(device: torch.device, gpu_decode: bool | Literal["auto"]) -> TileTransfer:
    """How tiles get to an engine's device.

    Raises:
        ConfigError: gpu_decode=True, and there is no GPU or nothing that decodes on it.
    """
    if device.type == "cuda":
        return DeviceTransfer(device, gpu_decode)
    if gpu_decode is True:
        raise ConfigError(f"gpu_decode=True needs an NVIDIA GPU, and the model is on {device}; leave it out")
    return HOST_TRANSFER


class _OnDevice:
    """A source that works on a device. See `TileSource`."""

    def __init__(self, source: TileSource, stream: DeviceStream) -> None:
        self._source, self._stream = source, stream
        self.backend, self.blocks = source.backend, source.blocks

    def fetch(self, number: int) -> Any:
        with self._stream.current():
            return self._source.fetch(number)

    def place(self, number: int, data: Any, targets: Sequence[Any]) -> None:
        with self._stream.current():
            self._source.place(number, data, targets)

    def read_tile(self, tile: int, target: Any) -> None:
        with self._stream.current():
            self._source.read_tile(tile, target)

    def close(self) -> None:
        self._source.close()


class _Uploaded:
    """A source that works in host memory, with one asynchronous copy per block. See `TileSource`."""

    def __init__(self, source: TileSource, stream: DeviceStream) -> None:
        self._source, self._stream = source, stream
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
        cuda = self._stream.device.type == "cuda"
        return torch.empty((count, *target.shape), dtype=torch.uint8, pin_memory=cuda)

    def _upload(self, staged: Tensor, targets: Sequence[Any]) -> None:
        with self._stream.current():
            on_device = staged.to(self._stream.device, non_blocking=True)
            for tile, target in zip(on_device, targets, strict=True):
                torch.as_tensor(target).copy_(tile, non_blocking=True)

    def close(self) -> None:
        self._source.close()
