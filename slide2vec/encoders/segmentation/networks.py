"""Networks that label pixels, by the `arch` of their recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from slide2vec.encoders.segmentation.deeplab import DeepLab
from slide2vec.encoders.segmentation.sam import TissueSam
from slide2vec.encoders.segmentation.unet import Unet, UnetPlusPlus
from slide2vec.recipes import EncoderSpec, Variant

__all__ = ["segmentation_network"]

_NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "deeplabv3": DeepLab,
    "sam2": TissueSam,
    "unet": Unet,
    "unet++": UnetPlusPlus,
}


def segmentation_network(spec: EncoderSpec, variant: Variant) -> nn.Module:
    """The network of a recipe: normalised pixels (B, 3, H, W) float -> logits of every class at every pixel,
    (B, classes · H · W) float, flat as engines have features; of "sam2" see `TissueSam`."""
    return _NETWORKS[spec.arch](**spec.kwargs)
