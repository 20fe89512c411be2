"""The encoder's transform as a DALI pipeline: the same definition on a GPU and on the CPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from slide2vec.cpus import job_cpus
from slide2vec.errors import ExtraMissingError
from slide2vec.prepare.dali_archive import unavailable
from slide2vec.recipes import Transform
from slide2vec.runtime.base import Layout

__all__ = ["DaliPreparer"]

#: DALI's own threads, on the CPU, where the job has as many.
_THREADS = 2


class DaliPreparer:
    """See `slide2vec.prepare.choose.Preparer`. One thread uses it.

    Tiles go in and pixels come out without a copy, in the order of the current CUDA stream. What comes out
    is not written again while somebody holds it.

    Raises:
        ExtraMissingError: DALI is not installed.
    """

    def __init__(self, transform: Transform, device: torch.device, layout: Layout = "float32_nchw") -> None:
        if reason := unavailable():
            raise ExtraMissingError(reason)
        self.transform, self.device, self.layout = transform, device, layout
        self._pipeline: Any | None = None
        self._most, self._side = 0, 0

    def prepare(self, tiles: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, crop, crop) float32, or (B, crop, crop, 3) uint8, on the device."""
        count, side = tiles.shape[:2]
        if self._pipeline is None or count > self._most or side != self._side:
            self._most, self._side = count, side
            self._pipeline = _build(self.transform, self.layout, self.device, side, count)
        tiles = tiles.to(self.device, non_blocking=True).contiguous()
        if self.device.type != "cuda":
            self._pipeline.feed_input("tiles", tiles.numpy())
            (found,) = self._pipeline.run()
            return from_dlpack(found.as_tensor())
        stream = torch.cuda.current_stream(self.device)
        self._pipeline.feed_input("tiles", tiles, cuda_stream=stream)
        (found,) = self._pipeline.run(stream)
        return from_dlpack(found.as_tensor())


def _build(transform: Transform, layout: Layout, device: torch.device, side: int, most: int) -> Any:
    dali, fn, types = (import_module(f"nvidia.dali{name}") for name in ("", ".fn", ".types"))
    cuda = device.type == "cuda"
    number = (torch.cuda.current_device() if device.index is None else device.index) if cuda else None
    pipeline = dali.Pipeline(most, min(_THREADS, job_cpus()), device_id=number, prefetch_queue_depth=1)
    with pipeline:
        source = {"device": "gpu" if cuda else "cpu", "layout": "HWC", "dtype": types.UINT8}
        tiles = fn.external_source(name="tiles", no_copy=True, **source)
        pipeline.set_outputs(
            _cropped(fn, types, _resized(fn, types, tiles, transform, side), transform, layout)
        )
    pipeline.build()
    return pipeline


def _resized(fn: Any, types: Any, tiles: Any, transform: Transform, side: int) -> Any:
    """Antialiased always: without, DALI is up to 86 grey levels off."""
    if side == transform.resize:
        return tiles
    cubic = transform.interpolation == "bicubic"
    kind = types.INTERP_CUBIC if cubic else types.INTERP_LINEAR
    return fn.resize(tiles, size=(transform.resize, transform.resize), interp_type=kind, antialias=True)


def _cropped(fn: Any, types: Any, tiles: Any, transform: Transform, layout: Layout) -> Any:
    """The middle, as torchvision's CenterCrop rounds it; normalised for engines that do not."""
    room = transform.resize - transform.crop
    at = round(room / 2) / room if room else 0.5
    crop = {"crop": (transform.crop, transform.crop), "crop_pos_x": at, "crop_pos_y": at}
    if layout == "uint8_nhwc":
        return fn.crop(tiles, **crop) if room else fn.copy(tiles)
    return fn.crop_mirror_normalize(
        tiles,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in transform.mean],
        std=[255 * value for value in transform.std],
        **crop,
    )
