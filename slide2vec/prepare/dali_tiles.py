"""Compressed JPEG tiles to tiles of the requested size, in one DALI pipeline: decoded, assembled, averaged.

Measured on a CPU (DALI 2.4): its decoder gives libjpeg's pixels, bit by bit. Its resizing by two, rounded as
here, is area averaging; no other is (57 grey levels off with antialiasing), so that it does no other.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from slide2vec.cpus import job_cpus
from slide2vec.errors import ExtraMissingError
from slide2vec.prepare.dali_archive import fault, unavailable
from slide2vec.prepare.tile_parts import TileParts

__all__ = ["RATIOS", "DaliTiles", "Geometry"]

#: By what its pipeline reduces.
RATIOS = (1, 2)
#: Of several geometries, which slides of other spacings have.
_MOST_PIPELINES = 4
#: Samples that a pipeline takes at least: it is built anew for more.
_LEAST_SAMPLES = 256
#: Bytes of a GPU's memory and of page-locked memory that each decoding thread keeps: tiles are small.
_KEPT_BYTES = 2 << 20
#: Side of the JPEG that fills a batch, px.
_FILLER_PX = 16
#: Area averages by two are multiples of 1/4; halves are to be rounded up, as OpenCV does, whatever DALI does
#: with halves.
_UP = 0.125

_INPUTS = ("jpegs", "tile", "at", "shape", "to")


class Geometry(NamedTuple):
    """What a pipeline is built for.

    Attributes:
        width, height: of the boxes that are assembled, px.
        ratio: by which they are then reduced, one of `RATIOS`.
        rgb: the JPEGs' components are RGB already.
    """

    width: int
    height: int
    ratio: int
    rgb: bool


class DaliTiles:
    """Decodes compressed JPEG tiles and assembles boxes of them. Used from several threads.

    Args:
        device: that does it; the CPU, too.

    Raises:
        ExtraMissingError: DALI is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        if reason := unavailable():
            raise ExtraMissingError(reason)
        self._device, self._lock = device, threading.Lock()
        self._pipelines: OrderedDict[Geometry, _Pipeline] = OrderedDict()

    def boxes(self, jpegs: Sequence[bytes], parts: TileParts, geometry: Geometry) -> Tensor:
        """(n, height / ratio, width / ratio, 3) uint8 on the device, in the order of the current CUDA stream.

        Args:
            jpegs: complete ones, of `parts.tiles`, that were checked: one without a header may end the
                process with SIGSEGV (DALI 2.4, where a batch has more than four for each thread).

        Raises:
            RuntimeError: of DALI: one of them cannot be decoded, or memory does not suffice.
        """
        samples = max(len(jpegs) + parts.is_white, len(parts.tile))
        pipeline = self._pipeline(geometry, samples)
        try:
            return pipeline.run(jpegs, parts, samples)
        except (RuntimeError, ValueError, TypeError) as error:
            with self._lock:  # what was fed may still be in it
                if self._pipelines.get(geometry) is pipeline:
                    del self._pipelines[geometry]
            raise RuntimeError(f"DALI: {fault(error)}") from error

    def _pipeline(self, geometry: Geometry, samples: int) -> _Pipeline:
        with self._lock:
            found = self._pipelines.pop(geometry, None)
            if found is None or found.most < samples:
                found = _Pipeline(geometry, self._device, max(samples, _LEAST_SAMPLES))
            self._pipelines[geometry] = found
            if len(self._pipelines) > _MOST_PIPELINES:
                self._pipelines.popitem(last=False)
            return found


class _Pipeline:
    """One of a geometry, for batches of up to `most` samples: in each, a JPEG and a box."""

    def __init__(self, geometry: Geometry, device: torch.device, most: int) -> None:
        self.most, self._device, self._lock = most, device, threading.Lock()
        self._filler = _white_jpeg(_FILLER_PX, _FILLER_PX, geometry.rgb)
        self._white = _white_jpeg(geometry.width, geometry.height, geometry.rgb)
        self._dali = _build(geometry, device, most)

    def run(self, jpegs: Sequence[bytes], parts: TileParts, samples: int) -> Tensor:
        fed = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        fed += [self._white] if parts.is_white else []
        fed += [self._filler] * (samples - len(fed))
        given: list[Any] = [
            fed,
            *(_filled(part, samples) for part in (parts.tile, parts.at, parts.shape, parts.to)),
        ]
        ordered = () if self._device.type == "cpu" else (torch.cuda.current_stream(self._device),)
        with self._lock:
            for name, values in zip(_INPUTS, given, strict=True):
                self._dali.feed_input(name, values)
            (found,) = self._dali.run(*ordered)
        return from_dlpack(found.as_tensor())[: len(parts.tile)]


def _filled(part: NDArray[np.int32], samples: int) -> NDArray[np.int32]:
    """For as many samples: the last one again."""
    found = np.empty((samples, *part.shape[1:]), np.int32)
    found[: len(part)], found[len(part) :] = part, part[-1]
    return found


def _white_jpeg(width: int, height: int, rgb: bool) -> NDArray[np.uint8]:
    pixels = np.full((height, width, 3), 255, np.uint8)
    colours = {"outcolorspace": "RGB" if rgb else "YCBCR"}
    return np.frombuffer(import_module("imagecodecs").jpeg8_encode(pixels, level=90, **colours), np.uint8)


def _build(geometry: Geometry, device: torch.device, most: int) -> Any:
    dali, fn, types = (import_module(f"nvidia.dali{name}") for name in ("", ".fn", ".types"))
    cuda = device.type == "cuda"
    number = (torch.cuda.current_device() if device.index is None else device.index) if cuda else None
    pipeline = dali.Pipeline(most, job_cpus(), device_id=number, prefetch_queue_depth=1)
    with pipeline:
        kinds = [(types.UINT8, 1), (types.INT32, 1), *[(types.INT32, 2)] * 3]
        jpegs, tile, at, shape, to = (
            fn.external_source(name=name, dtype=dtype, ndim=ndim)
            for name, (dtype, ndim) in zip(_INPUTS, kinds, strict=True)
        )
        mixed = {"affine": False, "device_memory_padding": _KEPT_BYTES, "host_memory_padding": _KEPT_BYTES}
        tiles = fn.decoders.image(
            jpegs,
            device="mixed" if cuda else "cpu",
            # the components as they are: a GPU's parser does not see the marker that says RGB
            output_type=types.ANY_DATA if geometry.rgb else types.RGB,
            jpeg_fancy_upsampling=True,
            adjust_orientation=False,
            **(mixed if cuda else {}),
        )
        boxes = fn.multi_paste(
            tiles,
            in_ids=tile,
            in_anchors=at,
            shapes=shape,
            out_anchors=to,
            output_size=(geometry.height, geometry.width),
        )
        pipeline.set_outputs(boxes if geometry.ratio == 1 else _averaged(fn, types, boxes, geometry))
    pipeline.build()
    return pipeline


def _averaged(fn: Any, types: Any, boxes: Any, geometry: Geometry) -> Any:
    """The mean of 2 x 2 pixels, halves rounded up."""
    size = geometry.height // geometry.ratio, geometry.width // geometry.ratio
    # without antialiasing: the point between four pixels, weighted equally
    means = fn.resize(boxes, size=size, interp_type=types.INTERP_LINEAR, antialias=False, dtype=types.FLOAT)
    return fn.crop_mirror_normalize(
        means, dtype=types.UINT8, output_layout="HWC", mean=[-_UP] * 3, std=[1.0] * 3
    )
