"""What decodes compressed tiles: strict decoders on the CPU, or nvImageCodec (JPEG, on a GPU above all)."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slide2vec.cpus import job_cpus
from slide2vec.errors import ExtraMissingError
from slide2vec.installation import add_extra
from slide2vec.readers.codecs import decode_tile, tile_memory
from slide2vec.readers.tile_table import Parts, TileFormat, TilePlace

__all__ = ["HostDecoder", "NvimgcodecDecoder", "NvimgcodecMemory", "nvimgcodec_unavailable"]

logger = logging.getLogger(__name__)

#: Memory for decoded tiles that is kept for the next ones.
POOL_BYTES = 1 << 30
#: Tiles that a memory holds at least, so that it serves most supertiles.
_LEAST_SLOTS = 64


class HostDecoder:
    """Strict decoders on the CPU (see `codecs`); of JPEG the pixels of OpenSlide and cuCIM, bit by bit. Used
    from several threads."""

    def __init__(self) -> None:
        self._own = threading.local()

    def decode(
        self, tiles: Sequence[Parts], form: TileFormat, places: Sequence[TilePlace], kept: Sequence[bool]
    ) -> Iterator[NDArray[np.uint8]]:
        """(h, w, 3) uint8 RGB of each in turn: a whole tile, or no less than the level holds of it.

        Args:
            tiles: what is stored of them.
            form: how they are coded.
            places: where they lie.
            kept: pixels that must outlive the next step; others go to the same memory, which stays in the
                cache.

        Raises:
            TileError: the next one cannot be decoded.
        """
        shared = self._buffer(form)
        for parts, place, keep in zip(tiles, places, kept, strict=True):
            yield decode_tile(parts, form, (place.height, place.width), None if keep else shared)

    def _buffer(self, form: TileFormat) -> NDArray[np.uint8]:
        """Memory of this thread for a tile."""
        shape = form.height, form.width, 3
        found: NDArray[np.uint8] | None = getattr(self._own, "buffer", None)
        if found is None or found.shape != shape:
            found = self._own.buffer = tile_memory(*shape)
        return found


def nvimgcodec_unavailable() -> str | None:
    """Why nvImageCodec cannot be used here, None when it can."""
    if find_spec("nvidia") and find_spec("nvidia.nvimgcodec"):
        return None
    return f"nvImageCodec is not installed: {add_extra('cuda')} (Linux)"


class NvimgcodecMemory(NamedTuple):
    """Memory of a device for decoded tiles.

    Attributes:
        pixels: (n, height, width, 3) uint8, a tensor.
        images: nvImageCodec's, of each tile of them: made once, since that is dear (12 us each).
    """

    pixels: Any
    images: Sequence[Any] = ()


class NvimgcodecDecoder:
    """nvImageCodec: JPEG tiles in batches on the GPU's hardware engines, or on the CPU. Used from several
    threads.

    Pixels are ordered on the CUDA stream that is current when `decode` is called, the same each time: before
    it writes, nvImageCodec waits for what was enqueued there; what is enqueued afterwards waits for it.

    Args:
        device: a torch.device, "cpu" or "cuda:…".

    Raises:
        ExtraMissingError: it is not installed.
        RuntimeError: it cannot be started: of the library.
    """

    def __init__(self, device: Any) -> None:
        if reason := nvimgcodec_unavailable():
            raise ExtraMissingError(reason)
        self._torch, self._library = import_module("torch"), import_module("nvidia.nvimgcodec")
        self._device, self._lock = device, threading.Lock()
        self._decoding = threading.Lock()  # one for memory beside it: who gives that back waits for no batch
        library = self._library
        options: dict[str, Any] = {
            "options": ":fancy_upsampling=1",
            "max_num_cpu_threads": decoder_threads(),
        }
        if device.type == "cpu":
            backends = [library.Backend(library.BackendKind.CPU_ONLY)]
            cpu = library.NVIMGCODEC_DEVICE_CPU_ONLY
            self._decoder = library.Decoder(device_id=cpu, backends=backends, **options)
        else:
            index = self._torch.cuda.current_device() if device.index is None else device.index
            self._decoder = library.Decoder(device_id=index, **options)
        self._params = {rgb: self._parameters(rgb=rgb) for rgb in (False, True)}
        self._free: list[NvimgcodecMemory] = []
        #: Whether it decodes into memory that it is given: 0.9 does on a CPU, against what it says of itself.
        self._writes_there: bool | None = None

    def _parameters(self, *, rgb: bool) -> Any:
        library = self._library
        # The GPU's parser knows no Adobe marker: asked for YCbCr, it leaves the components alone.
        alone = rgb and self._device.type == "cuda"
        colours = library.ColorSpec.SYCC if alone else library.ColorSpec.SRGB
        return library.DecodeParams(apply_exif_orientation=False, color_spec=colours)

    def decode(self, jpegs: Sequence[bytes], form: TileFormat) -> tuple[NvimgcodecMemory, list[int]]:
        """Each into a slot of its own, at the slot's top left, and which it does not decode.

        Args:
            jpegs: no larger than a tile.
            form: how they are coded.
        """
        memory = self._memory(len(jpegs), form)
        if not jpegs:
            return memory, []
        streams = list(map(self._library.CodeStream, jpegs))
        with self._decoding:
            found = self._into(memory, streams, self._params[form.rgb])
        return memory, [number for number, image in enumerate(found) if image is None]

    def _into(self, memory: NvimgcodecMemory, streams: Sequence[Any], params: Any) -> Sequence[Any]:
        """Its images; None for those that it does not decode."""
        more = {"params": params}
        if self._device.type == "cuda":
            more["cuda_stream"] = self._stream()
        if self._writes_there is not False:
            try:
                images = memory.images[: len(streams)]
                found: Sequence[Any] = self._decoder.decode(streams, images=images, **more)
            except (TypeError, ValueError) as error:
                self._writes_there = self._warned(error)
            else:
                if self._writes_there is None and any(found):
                    self._writes_there = _is_in(memory.pixels, found) or self._warned("it wrote elsewhere")
                if self._writes_there is not False:
                    return found
        found = self._decoder.decode(streams, **more)
        for slot, image in enumerate(found):
            if image is not None:
                on_device = image.buffer_kind == self._library.ImageBufferKind.STRIDED_DEVICE
                pixels = self._torch.from_dlpack(image) if on_device else np.asarray(image)
                height, width = pixels.shape[:2]
                memory.pixels[slot, :height, :width].copy_(self._torch.as_tensor(pixels))
        return found

    def _warned(self, why: object) -> bool:
        logger.warning(
            "nvImageCodec does not decode into memory of %s that it is given, which costs time (%s)",
            self._device,
            why,
        )
        return False

    def _stream(self) -> int:
        handle: int = self._torch.cuda.current_stream(self._device).cuda_stream
        return handle

    def _memory(self, count: int, form: TileFormat) -> NvimgcodecMemory:
        """Memory that nobody needs any more, else new."""
        shape = form.height, form.width, 3
        with self._lock:
            for number, memory in enumerate(self._free):
                if memory.pixels.shape[1:] == shape and len(memory.images) >= count:
                    return self._free.pop(number)
        slots = max(_LEAST_SLOTS, 1 << (count - 1).bit_length())
        pixels = self._torch.empty((slots, *shape), dtype=self._torch.uint8, device=self._device)
        if self._device.type == "cuda":
            return NvimgcodecMemory(pixels, self._library.as_images(list(pixels), cuda_stream=self._stream()))
        return NvimgcodecMemory(pixels, self._library.as_images(list(pixels.numpy())))

    def release(self, memory: NvimgcodecMemory) -> None:
        """What is enqueued on the device is the last that needs it."""
        with self._lock:
            self._free.insert(0, memory)
            held = 0
            for number, each in enumerate(self._free):
                held += each.pixels.nbytes
                if held > POOL_BYTES:
                    del self._free[number:]
                    break

    def white(self, height: int, width: int) -> Any:
        """(height, width, 3) uint8 of the device, white."""
        return self._torch.full((height, width, 3), 255, dtype=self._torch.uint8, device=self._device)


def _is_in(pixels: Any, images: Sequence[Any]) -> bool:
    """Whether the first of them that is there lies where it should."""
    slot = next(slot for slot, image in enumerate(images) if image is not None)
    kind = "__cuda_array_interface__" if pixels.device.type == "cuda" else "__array_interface__"
    address: int = getattr(images[slot], kind)["data"][0]
    expected: int = pixels[slot].data_ptr()
    return address == expected


def decoder_threads() -> int:
    """CPU threads of nvImageCodec: those of the job, which do not wait for one another's decoding alone; one
    less on a machine of its own, since it counts the calling thread, and says so where it is given more."""
    return max(1, min(job_cpus(), (os.cpu_count() or 1) - 1))
