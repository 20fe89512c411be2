"""From pixels to grids of tokens: normalised, padded, encoded at once or window by window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from slide2vec.config import ExecutionOptions
from slide2vec.encoders.attention import attention_channels, encode_tiles_attention
from slide2vec.encoders.patch_tokens import (
    encode_tiles_dense,
    encode_tiles_dense_prenorm,
    patch_size,
    ready_for,
)
from slide2vec.errors import ConfigError, ModelLevelError
from slide2vec.images.dense_options import DenseImageOptions, DenseLike, DenseOptions
from slide2vec.images.devices import check_alike, on_each_device
from slide2vec.images.pixels import transform_record
from slide2vec.images.pooled import ImageModel
from slide2vec.images.token_engine import TokenEngine
from slide2vec.images.windows import DenseEncodeGeometry, blended, dense_geometry, padded, windows_of
from slide2vec.runtime import resolve_precision
from slide2vec.runtime.device import torch_threads
from slide2vec.runtime.torch_engine import DTYPES

__all__ = ["DenseEncodeKit", "DensePreprocessor", "GridEncoder", "dense_identity", "prepare_dense_encoder"]


@dataclass(frozen=True)
class DensePreprocessor:
    """Normalises a picture and pads it to whole patches; may be pickled.

    Attributes:
        mean, std: per channel, of pixels from 0 to 1.
    """

    geometry: DenseEncodeGeometry
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_mode: str
    image_pad_value: float | None

    def __call__(self, item: Tensor) -> Tensor:
        """(3, H, W) uint8 RGB on the CPU -> (3, H + pad, W + pad) float32.

        Raises:
            ConfigError: a ValueError: it is no such tensor, or of another size than `target_size`.
        """
        if not isinstance(item, Tensor) or item.device.type != "cpu" or item.dtype != torch.uint8:
            raise ConfigError(f"a picture must be a uint8 tensor on the CPU, got {_in_words(item)}")
        if tuple(item.shape) != (3, *self.geometry.target_size):
            raise ConfigError(
                f"a picture must be (3, H, W), {(3, *self.geometry.target_size)} as target_size says; got "
                f"{tuple(item.shape)}: nothing is resized or cropped here"
            )
        return self.prepared(item)

    def prepared(self, pixels: Tensor) -> Tensor:
        """(…, 3, H, W) uint8, anywhere -> the same normalised and padded, float32."""
        mean, std = (
            torch.tensor(each, device=pixels.device)[:, None, None] for each in (self.mean, self.std)
        )
        normalised = (pixels.float() / 255.0 - mean) / std
        return padded(normalised, self.geometry, self.pad_mode, self.image_pad_value)


class GridEncoder:
    """An encoder that gives grids of tokens of pictures of one size, in PyTorch or by an engine of the store.

    Attributes:
        geometry: of the pictures.
        dtype: of the grids.
        runtime, precision: that it computes in.
    """

    def __init__(self, model: ImageModel, dense: DenseLike, execution: ExecutionOptions, method: str) -> None:
        if model.level != "tile":
            raise ModelLevelError(
                f"{method} needs a tile-level preset; {model.name} is {model.level}-level: take its tile "
                "encoder"
            )
        self._model, self._execution, self._method = model, execution, method
        self._others: dict[ImageModel, GridEncoder] = {}
        self._share = 1  # of this machine's CPUs: one in so many
        self.device, self._dense = model.device, dense
        self.geometry = dense_geometry(dense.size, patch_size(model.encoder))
        self._windows = windows_of(self.geometry, dense.window_size, dense.overlap)
        asked = f"target_size={dense.target_size}"
        if dense.window_size is not None:
            asked += f", window_size={dense.window_size}"
        ready_for(model.encoder, model.recipe, self._windows.size, asked)
        engine = TokenEngine.of(model.tile_encoding, model.encoder, dense, self._windows.size, execution)
        self.runtime = "torch" if engine is None else engine.runtime
        self.precision = dense_precision(model, execution) if engine is None else engine.precision
        self.dtype = getattr(torch, execution.feature_dtype(self.precision))
        transform = model.recipe.transform
        self.preprocessor = DensePreprocessor(
            self.geometry, transform.mean, transform.std, dense.pad_mode, dense.image_pad_value
        )
        padded(torch.zeros((3, *dense.size)), self.geometry, dense.pad_mode, None)  # says now what cannot be
        self._tokens = engine or self._tap(model.encoder)
        self._threads = execution.budget(self.device.type, model.recipe.gflops).encoder_threads
        area = self._windows.size[0] * self._windows.size[1] / model.recipe.transform.crop**2
        #: GFLOP of a window.
        self.gflops = model.recipe.gflops * area
        model.encoder.to(self.device).eval().requires_grad_(False)

    def _tap(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        """What makes a grid of a window; what it cannot do it says now."""
        kind, dense = self._dense.feature_kind, self._dense
        if kind == "patch_features":
            return partial(encode_tiles_dense, encoder)
        if kind == "patch_features_prenorm":
            return partial(encode_tiles_dense_prenorm, encoder)
        asked: dict[str, Any] = {
            "blocks": tuple(dense.attention_blocks),
            "include_registers": dense.attention_include_registers,
        }
        attention_channels(encoder, **asked)
        return partial(encode_tiles_attention, encoder, **asked)

    def on_each_device(self, batches: int) -> list[GridEncoder]:
        """This one, and others like it on the other devices of a call, of which there are not more than
        batches.

        Raises:
            ConfigError: a device is not there, or would make other grids.
        """
        models = on_each_device(self._model, self._execution, batches)
        found = [self if model is self._model else self._like_it(model) for model in models]
        for each in found:
            each._share = len(found)
        return found

    def _like_it(self, model: ImageModel) -> GridEncoder:
        """One of the same model on another device."""
        if model not in self._others:
            other = GridEncoder(model, self._dense, self._execution, self._method)
            check_alike(other.device, self.identity, other.identity)
            self._others[model] = other
        return self._others[model]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See `dense_identity`."""
        return dense_identity(self._model, self._dense, self._execution, self.runtime, self.precision)

    def encode(self, batch: Tensor) -> Tensor:
        """(B, 3, H + pad, W + pad) prepared, on the device -> (B, d, rows, columns) of `dtype` there."""
        threads = max(1, self._threads // self._share)
        with torch.no_grad(), self._autocast(), torch_threads(threads):
            grids = blended(batch, self.geometry, self._windows, self._tokens)
        return grids.detach().to(self.dtype)

    def grids(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, d, rows, columns) on the CPU; in halves where memory does not suffice."""
        try:
            pixels = pictures.to(self.device).permute(0, 3, 1, 2)
            return self.encode(self.preprocessor.prepared(pixels)).cpu()
        except torch.OutOfMemoryError:
            if len(pictures) == 1:
                raise
        return torch.cat([self.grids(half) for half in pictures.tensor_split(2)])

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)


def dense_precision(model: ImageModel, execution: ExecutionOptions) -> str:
    """What dense features are computed in.

    Raises:
        ConfigError: PyTorch does not compute in it.
    """
    asked = execution.precision
    found = model.precision if asked is None else resolve_precision(asked, "fp32", model.device)
    if found not in DTYPES:
        raise ConfigError(f"PyTorch makes these dense features, and does not compute in {found}: use bf16")
    return found


def dense_identity(
    model: ImageModel, dense: DenseLike, execution: ExecutionOptions, runtime: str, precision: str
) -> dict[str, Any]:
    """What of a call decides its grids, besides what each is of; JSON-ready.

    Raises:
        WeightsError: the weights are not those that they were known as; grids are compared with these, and
            made with them.
    """
    made = {
        "encoder_name": model.name,
        "output_variant": model.variant,
        "weights": model.tile_encoding.weights_digest,
        "precision": precision,
        "runtime": runtime,
        **dense_options(dense),
        "dtype": execution.feature_dtype(precision),
        "transform": transform_record(model.recipe),
    }
    if isinstance(dense, DenseImageOptions):
        geometry = dense_geometry(dense.size, patch_size(model.encoder))
        made |= geometry_record(geometry)
    model.tile_encoding.confirm_weights()
    return made


def dense_options(dense: DenseLike) -> dict[str, Any]:
    """The options that decide grids, as sidecars record them."""
    return {
        "pad_mode": dense.pad_mode,
        "image_pad_value": None if dense.image_pad_value is None else float(dense.image_pad_value),
        "window_size": dense.window_size,
        "overlap": float(dense.overlap),
        "feature_kind": dense.feature_kind,
        "attention_blocks": list(dense.attention_blocks),
        "attention_include_registers": dense.attention_include_registers,
    }


def geometry_record(geometry: DenseEncodeGeometry) -> dict[str, Any]:
    """A geometry as sidecars record it."""
    made = dataclasses.asdict(geometry)
    del made["crop_box"]
    return {name: list(value) for name, value in made.items()}


class DenseEncodeKit:
    """Dense features of pictures that are in the hands of whoever calls: augmented ones, while a decoder is
    trained. Nothing is written.

    Attributes:
        geometry: of the pictures.
    """

    def __init__(self, encoder: GridEncoder) -> None:
        self._encoder = encoder
        self.geometry = encoder.geometry

    def preprocessor(self) -> DensePreprocessor:
        """What prepares one picture, (3, H, W) uint8 on the CPU; may be pickled, for a DataLoader."""
        return self._encoder.preprocessor

    def encode(self, batch: Tensor) -> Tensor:
        """Prepared pictures (B, 3, H + pad, W + pad) float on the CPU -> grids (B, d, rows, columns) on the
        encoder's device, without gradients.

        Raises:
            ConfigError: a ValueError: the batch is another one.
        """
        if not isinstance(batch, Tensor) or batch.device.type != "cpu" or not batch.is_floating_point():
            raise ConfigError(
                "a batch must be a float tensor on the CPU, of pictures of preprocessor(); got "
                f"{_in_words(batch)}"
            )
        if batch.ndim != 4 or tuple(batch.shape[1:]) != (3, *self.geometry.encoded_size):
            raise ConfigError(
                f"a batch must be (B, 3, H, W) with (H, W) = {self.geometry.encoded_size}, of pictures of "
                f"preprocessor(); got {tuple(batch.shape)}"
            )
        return self._encoder.encode(batch.to(self._encoder.device))


def prepare_dense_encoder(
    self: ImageModel, *, dense: DenseOptions | DenseImageOptions, execution: ExecutionOptions | None = None
) -> DenseEncodeKit:
    """Dense features of pictures in memory, batch by batch; nothing is written. What `dense` says of
    reading (spacing, tolerance, backend) is ignored; errors are as for `embed_regions_dense`."""
    if not isinstance(dense, DenseOptions | DenseImageOptions):
        raise ConfigError(f"dense must be DenseOptions or DenseImageOptions, got {type(dense).__name__}")
    return DenseEncodeKit(GridEncoder(self, dense, execution or ExecutionOptions(), "prepare_dense_encoder"))


def _in_words(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"{tuple(item.shape)} {str(item.dtype).removeprefix('torch.')} on {item.device}"
    return type(item).__name__
