"""What encoders of one's own are made of: the classes that `register_encoder` takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from slide2vec.errors import PresetError, UnsupportedError
from slide2vec.lazy import import_timm

__all__ = [
    "BaseEncoder",
    "PatientEncoder",
    "SlideEncoder",
    "TileEncoder",
    "TimmTileEncoder",
    "TorchTileEncoder",
]


class BaseEncoder(ABC):
    """What all of them have. Modules of PyTorch that are attributes of it are moved to devices, converted and
    digested by slide2vec; a module in an attribute of an attribute is not seen.

    A class is constructed as `cls(output_variant=name)`, and with `allow_non_recommended_settings` where its
    constructor has such an argument.

    Attributes:
        supports_tile_overlap: of slide and patient encoders, whether they take tiles that overlap.
    """

    supports_tile_overlap: bool = True

    @property
    @abstractmethod
    def encode_dim(self) -> int:
        """D, the dimension of an embedding."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move it to a device."""


class TileEncoder(BaseEncoder):
    """Embeds tiles."""

    @abstractmethod
    def get_transform(self) -> Callable[[Any], Tensor]:
        """From a ready image, of any size, to the encoder's input (3, H, W) float."""

    @abstractmethod
    def encode_tiles(self, batch: Tensor) -> Tensor:
        """(B, 3, H, W) float -> (B, D) float."""

    def get_normalization_transform(self) -> Callable[[Any], Tensor]:
        """From a tile (H, W, 3) uint8 to (3, H, W) float of the same size: a factor and an offset per channel
        and nothing else, so that slide2vec can apply them on any device and compile them into engines."""
        raise NotImplementedError(f"{type(self).__name__} has no get_normalization_transform")

    def encode_tiles_dense(self, batch: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w), a feature for each patch."""
        raise NotImplementedError(f"{type(self).__name__} has no encode_tiles_dense")

    def encode_tiles_dense_prenorm(self, batch: Tensor) -> Tensor:
        """As `encode_tiles_dense`, before the last normalisation."""
        raise NotImplementedError(f"{type(self).__name__} has no encode_tiles_dense_prenorm")

    def encode_tiles_attention(
        self, batch: Tensor, *, blocks: tuple[int, ...] = (-1,), include_registers: bool = False
    ) -> Tensor:
        """(B, 3, H, W) -> (B, K, h, w), attention of the class token (and registers) by block and head."""
        raise NotImplementedError(f"{type(self).__name__} has no encode_tiles_attention")

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in px."""
        raise NotImplementedError(f"{type(self).__name__} has no patch_size")


class SlideEncoder(BaseEncoder):
    """Embeds a slide from the embeddings of its tiles."""

    @abstractmethod
    def encode_slide(
        self, tile_features: Tensor, coordinates: Tensor | None = None, *, tile_size_lv0: int | None = None
    ) -> Tensor:
        """(N, D) float32 features, (N, 2) int64 x and y in level-0 px, side of a tile there -> (D',)."""

    def encode_slide_with_latents(
        self, tile_features: Tensor, coordinates: Tensor | None = None, *, tile_size_lv0: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The embedding, and latents (L, D'') where the encoder has them."""
        return self.encode_slide(tile_features, coordinates, tile_size_lv0=tile_size_lv0), None


class PatientEncoder(SlideEncoder):
    """Embeds a patient from the embeddings of their slides, which it makes, too."""

    @abstractmethod
    def encode_patient(self, slide_embeddings: Tensor) -> Tensor:
        """(S, D') float32 -> (D''',)."""


class TorchTileEncoder(TileEncoder):
    """A tile encoder that is one module of PyTorch, (B, 3, H, W) float -> (B, encode_dim).

    Args:
        model: with its weights.
        encode_dim: of its output.
        input_size: to which ready images are resized, px.
        mean, std: per RGB channel, of values in [0, 1].
        output_variant: as given to the constructor of the subclass; it has one, "default".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        encode_dim: int,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        output_variant: str | None = None,
    ) -> None:
        if not hasattr(self, "_output_variant"):  # subclasses with outputs of their own set it first
            _only_default(output_variant)
            self._output_variant = "default"
        self._model, self._device = model.eval(), torch.device("cpu")
        self._encode_dim, self._input_size = int(encode_dim), int(input_size)
        self._mean, self._std = tuple(map(float, mean)), tuple(map(float, std))

    def get_transform(self) -> Callable[[Any], Tensor]:
        """Resize to `input_size` whatever the aspect, and normalise."""
        return _composed(self._mean, self._std, (self._input_size, self._input_size))

    def get_normalization_transform(self) -> Callable[[Any], Tensor]:
        """By mean and std."""
        return _composed(self._mean, self._std)

    def encode_tiles(self, batch: Tensor) -> Tensor:
        """(B, 3, H, W) float -> (B, D) float."""
        return cast("Tensor", self._model(batch))

    def encode_tiles_attention(
        self, batch: Tensor, *, blocks: tuple[int, ...] = (-1,), include_registers: bool = False
    ) -> Tensor:
        """Of a module that is a vision transformer of timm: see `slide2vec.encoders.attention`."""
        from slide2vec.encoders.attention import encode_tiles_attention

        return encode_tiles_attention(self._model, batch, blocks=blocks, include_registers=include_registers)

    @property
    def encode_dim(self) -> int:
        """D."""
        return self._encode_dim

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self._device

    def to(self, device: torch.device | str) -> Self:
        """Move the module."""
        self._device = torch.device(device)
        self._model.to(self._device)
        return self


class TimmTileEncoder(TorchTileEncoder):
    """A tile encoder that is a model of timm, with the statistics and the transform that timm has for it.

    Args:
        model_name: of timm; "hf-hub:owner/repo" as well.
        output_variant: as given to the constructor of the subclass; it has one, "default".
        timm_kwargs: of `timm.create_model`; pretrained=True and num_classes=0 unless they say otherwise.
    """

    def __init__(self, model_name: str, *, output_variant: str | None = None, **timm_kwargs: Any) -> None:
        timm = import_timm()
        model = timm.create_model(model_name, **{"pretrained": True, "num_classes": 0, **timm_kwargs})
        self._data = timm.data.resolve_data_config(model.pretrained_cfg, model=model)
        super().__init__(
            model,
            encode_dim=model.num_features,
            input_size=self._data["input_size"][-1],
            mean=self._data["mean"],
            std=self._data["std"],
            output_variant=output_variant,
        )

    def get_transform(self) -> Callable[[Any], Tensor]:
        """timm's own for evaluation."""
        return cast("Callable[[Any], Tensor]", import_timm().data.create_transform(**self._data))

    def encode_tiles_dense(self, batch: Tensor) -> Tensor:
        """Of a vision transformer: its patch tokens after the closing norm, (B, C, H, W) -> (B, d, h, w),
        h and w in patches.

        Raises:
            UnsupportedError: the network has none.
        """
        return self._patch_tokens(batch, norm=True)

    def encode_tiles_dense_prenorm(self, batch: Tensor) -> Tensor:
        """The same, before that norm."""
        return self._patch_tokens(batch, norm=False)

    def _patch_tokens(self, batch: Tensor, *, norm: bool) -> Tensor:
        model = cast("Any", self._model)
        if not hasattr(model, "num_prefix_tokens"):
            raise UnsupportedError(f"{type(model).__name__} has no patch tokens: it is no vision transformer")
        found = model.forward_intermediates(
            batch, indices=1, norm=norm, intermediates_only=True, output_fmt="NCHW"
        )
        return cast("Tensor", found[-1])

    @property
    def patch_size(self) -> tuple[int, int]:
        """Of its patch embedding."""
        height, width = cast("Any", self._model).patch_embed.patch_size
        return int(height), int(width)


def _only_default(output_variant: str | None) -> None:
    if output_variant not in (None, "default"):
        raise PresetError(f"there is no output variant {output_variant!r}. Allowed: default.")


def _composed(
    mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None = None
) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    resize = [] if size is None else [v2.Resize(size, antialias=True)]
    steps = [v2.ToImage(), *resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=mean, std=std)]
    return cast("Callable[[Any], Tensor]", v2.Compose(steps))
