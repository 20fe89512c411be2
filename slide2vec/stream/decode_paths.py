"""By which decode path the pixels of each slide get into the memory that the stream keeps its tiles in.

On a CPU tiles are written into host memory as their source gives them. On a GPU they are decoded there
where that gives the right pixels, which is looked at on several tiles of every slide; else on the CPU, and
uploaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slide2vec.errors import BackendError, ConfigError, ExtraMissingError
from slide2vec.prepare.dali_archive import DaliArchive
from slide2vec.prepare.dali_tiles import DaliTiles
from slide2vec.prepare.device_cut import cut_tiles_on_device
from slide2vec.prepare.gather_tiles import Gather, choose_gather
from slide2vec.readers import SlideReader
from slide2vec.readers.cucim import CucimCudaReader, load_on
from slide2vec.readers.decoders import NvimgcodecDecoder
from slide2vec.readers.dicom import DicomReader
from slide2vec.readers.jpeg_tiles import JpegTileReader
from slide2vec.readers.probe import Probe
from slide2vec.readers.pyramid import PyramidReader
from slide2vec.readers.tiff import TiffReader
from slide2vec.slides import Slide
from slide2vec.stream.cuda_streams import device_stream
from slide2vec.stream.decode_check import SampleTiles
from slide2vec.stream.decode_tally import DecodeTally
from slide2vec.stream.device_sources import ArchiveOnDevice, DecodedOnDevice, Uploaded
from slide2vec.stream.jpeg_sources import DaliSource, GatheredTiles, open_jpegs
from slide2vec.stream.plan import SlidePlan
from slide2vec.stream.tile_sources import SlideSource, TileSource
from slide2vec.stream.transfer import HOST_TRANSFER, TileTransfer

__all__ = ["AUTO", "DECODE_PATHS", "DecodePath", "DeviceTransfer", "jpeg_path", "tile_transfer"]

logger = logging.getLogger(__name__)


def _cut_there(source: SlideSource, reader: SlideReader) -> TileSource:
    return source.with_reader(reader, cut_tiles_on_device)


class DecodePath(NamedTuple):
    """A way of decoding a slide's tiles on a device.

    Attributes:
        open: a reader of a file. Raises BackendError or ExtraMissingError: not of this one. Its attribute
            `refused`, where it has one, counts compressed tiles that the device's decoder did not take.
        source: tiles of a slide by that reader, placed on the device; it is not closed, its reader is.
    """

    open: Callable[[Probe], SlideReader]
    source: Callable[[SlideSource, SlideReader], TileSource] = _cut_there


def _nvimgcodec(device: torch.device) -> DecodePath:
    return jpeg_path(NvimgcodecDecoder(device), choose_gather(device))


def jpeg_path(decoder: NvimgcodecDecoder, gather: Gather) -> DecodePath:
    """JPEG tiles in the order of the file, and tiles that are cut straight out of them."""

    def source(host: SlideSource, reader: SlideReader) -> TileSource:
        assert isinstance(reader, JpegTileReader)
        return GatheredTiles(host, reader, gather)

    return DecodePath(lambda probe: JpegTileReader(probe, decoder), source)


def _dali(device: torch.device) -> DecodePath:
    decoder = DaliTiles(device)

    def source(tiles: SlideSource, reader: SlideReader) -> TileSource:
        assert isinstance(reader, TiffReader | DicomReader)  # it is what `open` gave
        return DaliSource(tiles, reader, decoder)

    return DecodePath(open_jpegs, source)


def _cucim(device: torch.device) -> DecodePath:
    if device.type != "cuda":
        raise BackendError("cuCIM decodes on NVIDIA GPUs only")
    return DecodePath(lambda probe: CucimCudaReader(probe, device))


#: Name -> what makes it for a device; whatever its libraries raise then is a reason to do without.
DECODE_PATHS: Mapping[str, Callable[[torch.device], DecodePath]] = MappingProxyType(
    {"raw + nvimgcodec": _nvimgcodec, "raw + dali": _dali, "cucim": _cucim}
)
#: What gpu_decode="auto" tries, the fastest first. The others are not among them until benchmarks/gpu.py has
#: shown that they are as fast as the first: they are taken where gpu_decode=True leaves nothing else, and
#: cuCIM where backend="cucim" asks for it.
AUTO = ("raw + nvimgcodec",)


class DeviceTransfer:
    """Tiles in a device's memory. See `TileTransfer`.

    Args:
        device: a GPU; the CPU in tests, where everything but cuCIM's CUDA decoder runs as well.
        gpu_decode: "auto": where it gives the right pixels; "shared": so, and on the CPU what the GPU is too
            busy for; True: or else the slide fails; False: never.
        decode_paths: names of those to try, in that order; None = as `gpu_decode` says.

    Raises:
        ConfigError: gpu_decode=True, and nothing is there that decodes on a GPU.
    """

    def __init__(
        self,
        device: torch.device,
        gpu_decode: bool | Literal["auto", "shared"] = "auto",
        decode_paths: Sequence[str] | None = None,
    ) -> None:
        self.device, self.stream, self._gpu_decode = device, device_stream(device), gpu_decode
        others = [name for name in DECODE_PATHS if name not in AUTO]
        self._order = (
            [*AUTO, *(others if gpu_decode is True else ())] if decode_paths is None else decode_paths
        )
        self.kind: Hashable = (device, gpu_decode, tuple(self._order))
        self._decode_paths: dict[str, DecodePath] = {}
        self._missing: dict[str, str] = {}
        self._told: set[str] = set()
        if device.type == "cuda":
            load_on(device)  # before a planning thread imports cuCIM with another device current
        if gpu_decode is not False:
            for name in dict.fromkeys((*self._order, *(others if decode_paths is None else ()))):
                self._make(name)
        if gpu_decode is True and not self._decode_paths:
            why = "; ".join(self._missing.values())
            raise ConfigError(f"gpu_decode=True: {why}; gpu_decode='auto' does without")

    def _make(self, name: str) -> None:
        try:
            with self.stream.current():  # and the device with it
                self._decode_paths[name] = DECODE_PATHS[name](self.device)
        except Exception as error:  # of libraries and drivers: a reason to do without, not the end of the run
            self._missing[name] = str(error) or type(error).__name__

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """See `TileTransfer.allocate`: filled on the device stream, or the filling could overtake the
        tiles."""
        with self.stream.current():
            return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def bind(self, plan: SlidePlan) -> SlidePlan:
        """See `TileTransfer.bind`."""
        source, otherwise = plan.source, f"{plan.source.backend}, uploaded"
        if len(plan.tiling) and self._gpu_decode is not False:
            if isinstance(source, SlideSource):
                return self._decoded_on_device(plan, source, otherwise)
            if isinstance(source, DaliArchive):
                with self.stream.current():
                    reason = source.use_device(self.device)
                if reason is None:
                    tally = DecodeTally()
                    archive = ArchiveOnDevice(source, self.stream, tally)
                    return replace(plan, source=archive, decode_path=archive.decode_path, tally=tally)
                self._tell(plan.slide, f"its archive, by DALI: {reason}")
        return replace(plan, source=Uploaded(source, self.stream), decode_path=otherwise)

    def _decoded_on_device(self, plan: SlidePlan, source: SlideSource, otherwise: str) -> SlidePlan:
        names = list(self._order)
        if plan.tiling.requested_backend in self._decode_paths:  # cuCIM, where that was asked for by name
            names = list(dict.fromkeys((plan.tiling.requested_backend, *names)))
        reasons = [self._missing[name] for name in names if name in self._missing]
        sample: SampleTiles | None = None
        for name, path, reader in self._opened(names, source.reader, reasons):
            sample = sample or SampleTiles(source)
            wrong = sample.wrong(lambda tiles: path.source(source.of_tiles(tiles), reader), self.stream)  # noqa: B023
            if wrong is None:
                return self._taken(plan, source, f"{name} on the device", path, reader)
            reader.close()
            reasons.append(f"{name}: {wrong}")
        why = "; ".join(reasons)
        if self._gpu_decode is True:
            raise BackendError(
                f"slide {plan.slide.sample_id}: gpu_decode=True, but the GPU cannot decode it ({why}); "
                "gpu_decode='auto' has the CPU decode such slides"
            )
        self._tell(plan.slide, why)
        return replace(plan, source=Uploaded(source, self.stream), decode_path=otherwise)

    def _taken(
        self, plan: SlidePlan, source: SlideSource, decode_path: str, path: DecodePath, reader: SlideReader
    ) -> SlidePlan:
        tally = DecodeTally()
        decoded = DecodedOnDevice(
            plan.slide.sample_id,
            decode_path,
            lambda tiles: path.source(source if tiles is None else source.of_tiles(tiles), reader),
            Uploaded(source, self.stream),
            self.stream,
            refused=lambda: getattr(reader, "refused", 0),
            tally=tally,
            close=reader.close,
            is_shared=self._gpu_decode == "shared",
        )
        return replace(plan, source=decoded, decode_path=decode_path, tally=tally)

    def _tell(self, slide: Slide, why: str) -> None:
        """A warning for the first slide that the GPU does not decode for a reason, a line for the others."""
        kind = re.sub(r"[0-9.]+", "#", why.replace(str(slide.image_path), "").replace(slide.sample_id, ""))
        level = logging.INFO if kind in self._told else logging.WARNING
        self._told.add(kind)
        logger.log(
            level, "slide %s: decoded on the CPU, as others of its kind will be (%s)", slide.sample_id, why
        )

    def _opened(
        self, names: Sequence[str], host: SlideReader, reasons: list[str]
    ) -> Iterator[tuple[str, DecodePath, SlideReader]]:
        """The decode paths that take the file."""
        if not isinstance(host, PyramidReader):
            reasons.append(f"{host.backend} does not say what the file is")
            return
        for name, path in ((name, self._decode_paths[name]) for name in names if name in self._decode_paths):
            try:
                reader = path.open(host.probe)
            except (BackendError, ExtraMissingError) as error:
                reasons.append(f"{name}: {error}")
                continue
            planned = slice(host.planning_levels)
            if reader.level_dimensions[planned] == host.level_dimensions[planned]:
                yield name, path, reader
            else:
                reader.close()
                reasons.append(f"{name}: sees other levels {reader.level_dimensions}")


def tile_transfer(device: torch.device, gpu_decode: bool | Literal["auto", "shared"]) -> TileTransfer:
    """How tiles get to an engine's device.

    Raises:
        ConfigError: gpu_decode=True, and there is no GPU or nothing that decodes on it.
    """
    if device.type == "cuda":
        return DeviceTransfer(device, gpu_decode)
    if gpu_decode is True:
        raise ConfigError(f"gpu_decode=True needs an NVIDIA GPU, and the model is on {device}; leave it out")
    return HOST_TRANSFER
