"""Encoders that users bring, as the modules that everything else works with: registered classes, and modules
of PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from slide2vec.encoders.base_classes import BaseEncoder, PatientEncoder, SlideEncoder, TileEncoder
from slide2vec.encoders.code import code_of
from slide2vec.encoders.photometrics import geometry_of, statistics_of
from slide2vec.encoders.registration import module_of, place_of
from slide2vec.encoders.slide.bag import SlideFeatures, TileBag
from slide2vec.errors import ConfigError, PresetError
from slide2vec.recipes import REGISTERED, Recipe, Registered, Variant

__all__ = [
    "Brought",
    "BroughtTiles",
    "as_built",
    "brought_encoder",
    "code_identity",
    "refuse_overlap",
    "reloader",
]


class Brought(nn.Module):
    """An encoder of somebody else's.

    Args:
        own: the encoder. Of one that is no module of PyTorch itself, those that are its attributes are
            this module's, too.
        recipe: of it, before it was built.

    Attributes:
        code: what it is made of, for the identity of embeddings.
        dim: D of its embeddings; None of the slides of an encoder of patients, which does not say it.
    """

    where: Tensor

    def __init__(self, own: BaseEncoder | nn.Module, recipe: Recipe, variant: str) -> None:
        super().__init__()
        source = recipe.weights.repo if recipe.weights else ""
        self.own, self.code = own, {**code_of(type(getattr(own, "made_of", own))), "source": source}
        if revision := recipe.encoder.kwargs.get("revision"):
            self.code["aggregation_revision"] = revision
        self.parts = nn.ModuleList([] if isinstance(own, nn.Module) else _modules(own))
        self.register_buffer("where", torch.empty(0), persistent=False)
        self.variant = variant
        is_registered = recipe.name == recipe.encoder.arch
        self.dim = recipe.variants[variant].dim if is_registered else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Have the encoder know where it is, besides moving its parts."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self.own, BaseEncoder) and not isinstance(self.own, nn.Module):
            self.own.to(self.where.device)
        return self


class BroughtTiles(Brought):
    """`forward`: (B, 3, H, W) normalised pixels -> (B, D)."""

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        own: Any = self.own
        made = own.encode_tiles(pixels) if isinstance(own, TileEncoder) else own(pixels)
        if not isinstance(made, Tensor):
            raise TypeError(
                f"it gave {type(made).__name__} for tiles, not a tensor of a row for each: correct its code"
            )
        return made

    def ready_for_other_sizes(self, name: str) -> None:
        """Have it take tiles of other sizes: constructed anew where it has arguments for that."""
        found = REGISTERED.get(name)
        if found is None or not found.for_other_sizes:
            return
        own = _constructed(found, self.variant, found.for_other_sizes)
        own.to(self.where.device)
        self.own, self.parts = own, nn.ModuleList(_modules(own)).requires_grad_(False).eval()


class BroughtSlides(Brought):
    """`forward`: a TileBag -> SlideFeatures."""

    def forward(self, bag: TileBag) -> SlideFeatures:
        """See the class."""
        own = cast("SlideEncoder", self.own)
        made, latents = own.encode_slide_with_latents(
            bag.features, bag.coords, tile_size_lv0=bag.tile_size_lv0
        )
        return SlideFeatures(_one(made, self.dim), latents)


class BroughtPatients(Brought):
    """`forward`: (S, D) embeddings of slides -> (D',)."""

    def forward(self, slides: Tensor) -> Tensor:
        """See the class."""
        return _one(cast("PatientEncoder", self.own).encode_patient(slides), self.dim)


def _one(embedding: object, dim: int | None) -> Tensor:
    """(D,) of (D,) or (1, D).

    Raises:
        ValueError: it is none, or of another D than was registered: beside those of others it cannot be used.
    """
    made = embedding[0] if isinstance(embedding, Tensor) and embedding.shape[:-1] == (1,) else embedding
    if not isinstance(made, Tensor) or made.ndim != 1 or (dim is not None and len(made) != dim):
        given = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"type {type(made).__name__}"
        wanted = "one number for each feature" if dim is None else f"({dim},), its encode_dim"
        raise ValueError(f"it gave an embedding of {given}, not {wanted}: correct its code")
    return made


def _modules(own: object) -> Iterator[nn.Module]:
    """Modules of PyTorch that are attributes, or in a list, tuple or mapping that is one, by name."""
    for _, value in sorted(vars(own).items()):
        inside = value.values() if isinstance(value, Mapping) else value
        for each in inside if isinstance(inside, list | tuple | type({}.values())) else (value,):
            if isinstance(each, nn.Module):
                yield each


def brought_encoder(recipe: Recipe, variant: Variant, weights: object) -> Brought:
    """A registered encoder, constructed: on the CPU, in evaluation mode.

    Args:
        variant: one of the recipe's, that very object.

    Raises:
        PresetError: weights are given, or its class does not take what it is constructed with.
    """
    if weights is not None:
        raise PresetError(
            f"encoder {recipe.name} loads its weights itself: weights={weights!r} is not for it"
        )
    found = REGISTERED.get(recipe.encoder.arch)
    if found is None:
        raise PresetError(f"preset {recipe.name}: no encoder {recipe.encoder.arch!r} is registered")
    name = next(key for key, value in recipe.variants.items() if value is variant)
    kinds: Mapping[str, type[Brought]] = {
        "tile": BroughtTiles,
        "slide": BroughtSlides,
        "patient": BroughtPatients,
    }
    own = _constructed(found, name, {})
    made = kinds[recipe.level](own, recipe, name)
    return made.cpu().eval().requires_grad_(False)


def _constructed(found: Registered, variant: str, more: Mapping[str, Any]) -> BaseEncoder:
    """An instance of the class, which is given `allow_non_recommended_settings` where it takes that."""
    taken = inspect.signature(found.encoder).parameters
    given = {"output_variant": variant, **more}
    if "allow_non_recommended_settings" in taken:
        given["allow_non_recommended_settings"] = bool(more)
    free = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    if strange := [key for key in given if key not in taken and not free]:
        raise PresetError(
            f"encoder {found.recipe.name}: the constructor of {place_of(found.encoder)} has no argument "
            f"{strange[0]}"
        )
    return cast("BaseEncoder", found.encoder(**given))


def as_built(recipe: Recipe, variant: str, encoder: object) -> Recipe:
    """The recipe of an encoder, with what only the built one says: of others' than ours the statistics of
    pixels, the number of parameters, the work per tile.

    Raises:
        PresetError: it gives other features than it was registered with, or normalises pixels in another way
            than by a factor and an offset per channel.
    """
    if not isinstance(encoder, Brought):
        return recipe
    count = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    kwargs = {**recipe.encoder.kwargs, "code": encoder.code}  # another code, another engine
    found: dict[str, Any] = {
        "params_m": count,
        "encoder": recipe.encoder.model_copy(update={"kwargs": kwargs}),
    }
    if isinstance(encoder, BroughtTiles):
        found["gflops"] = _gflops(recipe, variant, encoder)
        if isinstance(encoder.own, TileEncoder):
            mean, std = statistics_of(encoder.own.get_normalization_transform(), recipe.name)
            found["transform"] = recipe.transform.model_copy(update={"mean": mean, "std": std})
            found["images"] = geometry_of(encoder.own.get_transform())
    return recipe.model_copy(update=found)


def code_identity(encoder: object) -> dict[str, Any]:
    """What of the code of an encoder decides an embedding; nothing of ours, whose features versions keep."""
    return {"code": encoder.code} if isinstance(encoder, Brought) else {}


def refuse_overlap(encoder: object, overlap: float) -> None:
    """Raise ConfigError where tiles overlap and a slide encoder says that it takes none that do."""
    own = encoder.own if isinstance(encoder, Brought) else None
    if overlap and isinstance(own, SlideEncoder) and not own.supports_tile_overlap:
        raise ConfigError(f"{type(own).__qualname__} takes no tiles that overlap, and overlap={overlap:g}")


def _gflops(recipe: Recipe, variant: str, encoder: nn.Module) -> float:
    """Of one tile, and that its features are as the recipe says."""
    from torch.utils.flop_counter import FlopCounterMode

    side, dim = recipe.transform.crop, recipe.variants[variant].dim
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        features = encoder(torch.zeros(1, 3, side, side))
    if not isinstance(features, Tensor) or features.shape != (1, dim):
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise PresetError(
            f"encoder {recipe.name}: of one tile of {side} px it gives {shape} instead of (1, {dim}), its "
            "encode_dim"
        )
    return float(flops.get_total_flops()) / 1e9


def reloader(recipes: Iterable[str], load: Callable[..., Any]) -> Callable[..., Any]:
    """`load` for another process, where these encoders are registered first: their modules are imported, and
    those that are no classes come along."""
    found = {name: there for name in recipes if (there := REGISTERED.added(name)) is not None}
    return _Elsewhere(found, load) if found else load


class _Elsewhere:
    """A picklable call, see `reloader`."""

    def __init__(self, found: Mapping[str, Registered], load: Callable[..., Any]) -> None:
        self._load = load
        self._modules = {name: module_of(there.encoder) for name, there in found.items()}
        self._brought = {name: there for name, there in found.items() if not isinstance(there.encoder, type)}
        if "__main__" in self._modules.values():  # a clearer error than pickle's, in the worker
            self._brought = {}

    def __call__(self, **given: Any) -> Any:
        for name, module in self._modules.items():
            if module == "__main__":
                raise ConfigError(
                    f"workers cannot import encoder {name}: its class is in the script or notebook that "
                    "runs. Put it into a module of its own and import that, or say num_gpus=1"
                )
            import_module(module)
        for name, there in self._brought.items():
            REGISTERED.add(name, there)
        return self._load(**given)
