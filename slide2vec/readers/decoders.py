"""What decodes JPEG tiles: OpenCV's libjpeg-turbo, or nvImageCodec on the CPU or a GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import cv2
import numpy as np

from slide2vec.errors import ExtraMissingError

__all__ = ["NvimgcodecDecoder", "OpencvDecoder", "TileDecoder", "nvimgcodec_unavailable"]


class TileDecoder(Protocol):
    """Decodes JPEGs that stand by themselves into pixels of its own kind: NumPy arrays or tensors."""

    def decode(self, jpegs: Sequence[bytes], *, rgb: bool) -> list[Any]:
        """(h, w, 3) uint8 RGB of each; None of one that cannot be decoded.

        Args:
            rgb: the components are RGB already, whatever a decoder would think.
        """
        ...

    def canvas(self, height: int, width: int) -> Any:
        """White (height, width, 3) uint8 pixels of the same kind."""
        ...


class OpencvDecoder:
    """libjpeg-turbo as OpenCV brings it: the pixels of OpenSlide and cuCIM, bit by bit."""

    def decode(self, jpegs: Sequence[bytes], *, rgb: bool) -> list[Any]:
        """See `TileDecoder`; NumPy arrays."""
        return [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) for jpeg in jpegs]

    def canvas(self, height: int, width: int) -> Any:
        """See `TileDecoder`."""
        return np.full((height, width, 3), 255, np.uint8)


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
    """

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

    def decode(self, jpegs: Sequence[bytes], *, rgb: bool) -> list[Any]:
        """See `TileDecoder`; tensors on the device."""
        library = self._library
        streams = [library.CodeStream(jpeg) for jpeg in jpegs]
        on_gpu = self._device.type == "cuda"
        # The GPU's parser knows no Adobe marker: asked for YCbCr, it leaves the components alone.
        colours = library.ColorSpec.SYCC if rgb and on_gpu else library.ColorSpec.SRGB
        params = library.DecodeParams(apply_exif_orientation=False, color_spec=colours)
        ordered = {"cuda_stream": self._torch.cuda.current_stream(self._device).cuda_stream} if on_gpu else {}
        with self._lock:
            images = self._decoder.decode(streams, params=params, **ordered)
        return [self._pixels(image, jpeg) for image, jpeg in zip(images, jpegs, strict=True)]

    def _pixels(self, image: Any, jpeg: bytes) -> Any:
        """A tensor; by OpenCV where nvImageCodec does not decode such a JPEG."""
        if image is not None and image.buffer_kind == self._library.ImageBufferKind.STRIDED_DEVICE:
            return self._torch.from_dlpack(image)
        if image is not None:
            return self._torch.from_numpy(np.array(image)).to(self._device)
        (pixels,) = OpencvDecoder().decode([jpeg], rgb=False)
        return None if pixels is None else self._torch.from_numpy(pixels).to(self._device)

    def canvas(self, height: int, width: int) -> Any:
        """See `TileDecoder`."""
        torch = self._torch
        return torch.full((height, width, 3), 255, dtype=torch.uint8, device=self._device)
