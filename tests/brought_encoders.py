"""Encoders that tests register, in a module that workers import."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slide2vec import TileEncoder, TorchTileEncoder, register_encoder
from slide2vec.encoders import PatientEncoder, SlideEncoder

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def net(dim: int, seed: int = 0) -> nn.Module:
    """(B, 3, H, W) -> (B, dim), patches of 8 px; the same weights each time."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, dim)
    )


@register_encoder(
    "tests-tiles",
    encode_dim=8,
    input_size=64,
    patch_size=8,
    supports_variable_input_size=True,
    supported_spacing_um=[0.25, 0.5],
    default_spacing_um=0.5,
    source="tests",
)
class Tiles(TorchTileEncoder):
    """Tiles of 64 px.

    More about them."""

    def __init__(self, output_variant: str | None = None) -> None:
        super().__init__(
            net(8), encode_dim=8, input_size=64, mean=MEAN, std=STD, output_variant=output_variant
        )


@register_encoder(
    "tests-by-hand",
    output_variants={"sum": {"encode_dim": 3}, "both": {"encode_dim": 6}},
    default_output_variant="sum",
    input_size=32,
    supports_variable_input_size=False,
    supported_spacing_um=None,
)
class ByHand(TileEncoder):
    """No module of PyTorch's, and two outputs."""

    def __init__(self, output_variant: str) -> None:
        self.output, self.place = output_variant, torch.device("cpu")

    def get_transform(self):  # type: ignore[no-untyped-def]
        return lambda picture: self.get_normalization_transform()(picture)

    def get_normalization_transform(self):  # type: ignore[no-untyped-def]
        import numpy as np

        return lambda picture: torch.from_numpy(np.array(picture).transpose(2, 0, 1)).float() / 255

    def encode_tiles(self, batch: Tensor) -> Tensor:
        mean = batch.mean(dim=(2, 3))
        return mean if self.output == "sum" else torch.cat([mean, mean * 2], dim=1)

    @property
    def encode_dim(self) -> int:
        return 3 if self.output == "sum" else 6

    @property
    def device(self) -> torch.device:
        return self.place

    def to(self, device: torch.device | str) -> ByHand:
        self.place = torch.device(device)
        return self


class _Pooled(SlideEncoder):
    supports_tile_overlap = False

    def __init__(self, output_variant: str) -> None:
        self.linear, self.place = net(8), torch.device("cpu")

    def encode_slide(
        self, tile_features: Tensor, coordinates: Tensor | None = None, *, tile_size_lv0: int | None = None
    ) -> Tensor:
        assert coordinates is not None and tile_size_lv0 is not None
        return torch.cat([tile_features.mean(0), coordinates.float().mean(0) / tile_size_lv0])[None]

    @property
    def encode_dim(self) -> int:
        return 10

    @property
    def device(self) -> torch.device:
        return self.place

    def to(self, device: torch.device | str) -> _Pooled:
        self.place = torch.device(device)
        return self


@register_encoder(
    "tests-slides",
    encode_dim=10,
    level="slide",
    tile_encoder="tests-tiles",
    tile_encoder_output_variant="default",
    aggregation_revision=2,
    supported_spacing_um=0.5,
)
class Slides(_Pooled):
    """The mean of a slide's tiles, and where it is."""

    def encode_slide_with_latents(
        self, tile_features: Tensor, coordinates: Tensor | None = None, *, tile_size_lv0: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        made = self.encode_slide(tile_features, coordinates, tile_size_lv0=tile_size_lv0)
        return made, tile_features[:2]


@register_encoder(
    "tests-patients",
    encode_dim=10,
    level="patient",
    tile_encoder="tests-tiles",
    tile_encoder_output_variant="default",
    supported_spacing_um=0.5,
)
class Patients(PatientEncoder, _Pooled):
    """The highest of a patient's slides."""

    def encode_patient(self, slide_embeddings: Tensor) -> Tensor:
        return slide_embeddings.amax(0)
