"""`register_module`: a module of PyTorch becomes an encoder that is called by a name, as a preset is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slide2vec.encoders.base_classes import TorchTileEncoder
from slide2vec.encoders.photometrics import statistics_of, without_geometry
from slide2vec.encoders.registration import Declared, check_free
from slide2vec.errors import PresetError
from slide2vec.recipes import REGISTERED, Registered

__all__ = ["GivenModule", "register_module"]


class GivenModule(TorchTileEncoder):
    """A module that a user has built, as a tile encoder.

    Attributes:
        made_of: the module.
    """

    def __init__(
        self,
        module: nn.Module,
        transform: Callable[[Any], Any] | None,
        described: Mapping[str, Any],
        output_variant: str | None = None,
    ) -> None:
        super().__init__(module, output_variant=output_variant, **described)
        self.made_of, self._transform = module, transform

    def get_transform(self) -> Callable[[Any], Tensor]:
        """The transform that was given with it."""
        return super().get_transform() if self._transform is None else self._transform


def register_module(
    module: nn.Module,
    name: str,
    *,
    tile_size_px: int,
    spacing_um: float | None = None,
    transform: Callable[[Any], Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    any_tile_size: bool = False,
    precision: Literal["fp16", "bf16", "fp32"] = "fp32",
    source: str = "",
) -> str:
    """Make a module a preset of that name; it takes the place of another module of that name.

    Args:
        module: (B, 3, H, W) float -> (B, D) float, on the CPU, with its weights; it is switched to
            evaluation and its parameters need no gradients any more.
        tile_size_px: side of its tiles; ready images are resized to it.
        spacing_um: µm/px that it was trained on; None = any, and runs have to say it.
        transform: of torchvision, from a picture to its input, in place of mean and std: tiles are only
            normalised as it says, ready images resized and cropped, too.
        mean, std: per RGB channel, of values in [0, 1].
        any_tile_size: whether it takes tiles of other sizes.
        precision: on a GPU; a CPU uses fp32.
        source: where it comes from, for people and sidecars.

    Returns:
        The name.

    Raises:
        PresetError: the name is taken, the transform is more than a resize, a crop and a normalisation, or
            the module gives something else than (B, D).
    """
    if (transform is None) == (mean is None or std is None):
        raise PresetError(f"encoder {name}: give either transform, or mean and std")
    if transform is not None:
        mean, std = statistics_of(without_geometry(transform), name)
    dim = _dim(module.eval().requires_grad_(False), tile_size_px, name)
    declared = Declared(
        name=name,
        variants={"default": dim},
        default_variant="default",
        input_size=tile_size_px,
        takes_other_sizes=any_tile_size,
        spacings=() if spacing_um is None else (spacing_um,),
        precision=precision,
        source=source,
    )
    declared.check()
    described = {"encode_dim": dim, "input_size": tile_size_px, "mean": mean, "std": std}
    made = partial(GivenModule, module, transform, described)
    check_free(name, made)
    (recipe,) = declared.recipes(type(module))
    REGISTERED.add(name, Registered(recipe, made, {}))
    return name


def _dim(module: nn.Module, side: int, name: str) -> int:
    with torch.inference_mode():
        features = module(torch.zeros(1, 3, side, side))
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise PresetError(f"encoder {name}: of (1, 3, {side}, {side}) it gives {shape} instead of (1, D)")
    return features.shape[1]
