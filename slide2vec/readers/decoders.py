"""What decodes compressed tiles: strict decoders on the CPU, or nvImageCodec (JPEG, on a GPU above all)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from copy import copy
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slide2vec.errors import ExtraMissingError
from slide2vec.readers.codecs import decode_tile, tile_memory
from slide2vec.readers.tile_table import Parts, TileFormat, TilePlace

__all__ = ["HostDecoder", "NvimgcodecDecoder", "TileDecoder", "nvimgcodec_unavailable"]


class TileDecoder(Protocol):
    """Decodes tiles into pixels of its own kind: NumPy arrays or tensors. Used from several threads.

    Attributes:
        refused: tiles that it did not take, and had decoded on the CPU.
    """

    refused: int

    def decode(
        self, tiles: Sequence[Parts], form: TileFormat, places: Sequence[TilePlace], kept: Sequence[bool]
    ) -> Iterator[Any]:
        """(h, w, 3) uint8 RGB of each in turn: a whole tile, or no less than the level holds of it.

        Args:
            tiles: what is stored of them.
            form: how they are coded.
            places: where they lie.
            kept: pixels that must outlive the next step; others are good only until then.

        Raises:
            TileError: the next one cannot be decoded.
        """
        ...

    def canvas(self, height: int, width: int) -> Any:
        """Memory for (height, width, 3) uint8 pixels of the same kind, whatever is in it."""
        ...


class HostDecoder:
    """Strict decoders on the CPU (see `codecs`); of JPEG the pixels of OpenSlide and cuCIM, bit by bit."""

    refused = 0

    def __init__(self) -> None:
        self._own = threading.local()

    def decode(
        self, tiles: Sequence[Parts], form: TileFormat, places: Sequence[TilePlace], kept: Sequence[bool]
    ) -> Iterator[NDArray[np.uint8]]:
        """See `TileDecoder`; what need not be kept goes to the same memory, which stays in the cache."""
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

    def canvas(self, height: int, width: int) -> NDArray[np.uint8]:
        """See `TileDecoder`."""
        return np.empty((height, width, 3), np.uint8)


def nvimgcodec_unavailable() -> str | None:
    """Why nvImageCodec cannot be used here, None when it can."""
    if find_spec("nvidia") and find_spec("nvidia.nvimgcodec"):
        return None
    return 'nvImageCodec is not installed: pip install "slide2vec[cuda]" (Linux)'


class NvimgcodecDecoder:
    """nvImageCodec: batches on the GPU's hardware engines, or on the CPU; gives tensors.

    Pixels are ordered on the CUDA stream that is current when `decode` is called.

    Args:
        device: a torch.device, "cpu" or "cuda:…".

    Raises:
        ExtraMissingError: it is not installed.
        RuntimeError: it cannot be started: of the library.
    """

    refused = 0

    def __init__(self, device: Any) -> None:
        if reason := nvimgcodec_unavailable():
            raise ExtraMissingError(reason)
        self._torch, self._library = import_module("torch"), import_module("nvidia.nvimgcodec")
        self._device, self._lock = device, threading.Lock()
        library, options = self._library, ":fancy_upsampling=1"
        if device.type == "cpu":
            backends = [library.Backend(library.BackendKind.CPU_ONLY)]
            cpu = library.NVIMGCODEC_DEVICE_CPU_ONLY
            self._decoder = library.Decoder(device_id=cpu, backends=backends, options=options)
        else:
            index = self._torch.cuda.current_device() if device.index is None else device.index
            self._decoder = library.Decoder(device_id=index, options=options)

    def for_slide(self) -> NvimgcodecDecoder:
        """The same decoder, which counts what it refuses anew."""
        other = copy(self)
        other.refused = 0
        return other

    def decode(
        self, tiles: Sequence[Parts], form: TileFormat, places: Sequence[TilePlace], kept: Sequence[bool]
    ) -> Iterator[Any]:
        """See `TileDecoder`; tensors on the device, all decoded at once."""
        jpegs = [part for (part,) in tiles]
        for jpeg, image, place in zip(jpegs, self._images(jpegs, rgb=form.rgb), places, strict=True):
            yield self._pixels(image, jpeg, form, place)

    def _images(self, jpegs: Sequence[bytes], *, rgb: bool) -> Sequence[Any]:
        if not jpegs:
            return []
        library = self._library
        streams = [library.CodeStream(jpeg) for jpeg in jpegs]
        on_gpu = self._device.type == "cuda"
        # The GPU's parser knows no Adobe marker: asked for YCbCr, it leaves the components alone.
        colours = library.ColorSpec.SYCC if rgb and on_gpu else library.ColorSpec.SRGB
        params = library.DecodeParams(apply_exif_orientation=False, color_spec=colours)
        ordered = {"cuda_stream": self._torch.cuda.current_stream(self._device).cuda_stream} if on_gpu else {}
        with self._lock:
            images: Sequence[Any] = self._decoder.decode(streams, params=params, **ordered)
        return images

    def _pixels(self, image: Any, jpeg: bytes, form: TileFormat, place: TilePlace) -> Any:
        """A tensor; decoded on the CPU where nvImageCodec does not decode such a JPEG."""
        if image is not None and image.buffer_kind == self._library.ImageBufferKind.STRIDED_DEVICE:
            return self._torch.from_dlpack(image)
        if image is not None:
            return self._torch.from_numpy(np.array(image)).to(self._device)
        with self._lock:
            self.refused += 1
        pixels = decode_tile([jpeg], form, (place.height, place.width), None)
        return self._torch.from_numpy(pixels).to(self._device)

    def canvas(self, height: int, width: int) -> Any:
        """See `TileDecoder`."""
        return self._torch.empty((height, width, 3), dtype=self._torch.uint8, device=self._device)
