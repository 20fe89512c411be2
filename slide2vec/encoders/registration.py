"""`register_encoder`: a class becomes an encoder that is called by a name, as a preset is."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from slide2vec.encoders.base_classes import BaseEncoder, PatientEncoder, SlideEncoder, TileEncoder
from slide2vec.errors import PresetError
from slide2vec.recipes import (
    REGISTERED,
    EncoderSpec,
    Licence,
    Recipe,
    Registered,
    TileEncoderRef,
    Transform,
    Variant,
    WeightsSource,
    is_built_in,
)

__all__ = ["Declared", "check_free", "module_of", "place_of", "register_encoder"]

Class = TypeVar("Class", bound=type[BaseEncoder])
Level = Literal["tile", "slide", "patient"]

#: What a name may hold: it is part of the names of folders and engines.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_BASES: Mapping[str, type] = {"tile": TileEncoder, "slide": SlideEncoder, "patient": PatientEncoder}
_NOT_COMPILED = "encoders of slides and patients run in PyTorch"


def register_encoder(
    name: str,
    *,
    encode_dim: int | None = None,
    output_variants: Mapping[str, Mapping[str, Any]] | None = None,
    default_output_variant: str | None = None,
    input_size: int | None = None,
    supports_variable_input_size: bool | None = None,
    variable_input_model_kwargs: Mapping[str, Any] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    level: Level = "tile",
    tile_encoder: str | None = None,
    tile_encoder_output_variant: str | None = None,
    aggregation_revision: int | None = None,
    supported_spacing_um: float | Sequence[float] | None,
    default_spacing_um: float | None = None,
    precision: Literal["fp16", "bf16", "fp32"] = "fp16",
    source: str = "",
) -> Callable[[Class], Class]:
    """Decorate a class so that it is an encoder of that name; arguments as in slide2vec 7.1.4.

    It is constructed when a model of that name is built, and loads its weights itself.

    Args:
        name: letters, digits, ".", "_" and "-".
        encode_dim: D of its only output; or, of several, output_variants={name: {"encode_dim": D}} with
            default_output_variant.
        input_size: side of its tiles in px; tile encoders have to say it.
        supports_variable_input_size: whether it takes tiles of other sizes; tile encoders have to say it.
        variable_input_model_kwargs: arguments of its constructor that it needs for that.
        patch_size: of its patches in px, or (height, width); inputs are multiples of it.
        level: what it embeds. "slide" and "patient" encoders say with tile_encoder whose embeddings they
            take, a tile preset or registered encoder, and with tile_encoder_output_variant which.
        aggregation_revision: of slide and patient encoders: counted up when the same tiles give another
            embedding, so that nothing is resumed from the old ones.
        supported_spacing_um: µm/px that it was trained on; None = any.
        default_spacing_um: where none is asked for; None = supported_spacing_um, if that is one.
        precision: on a GPU; a CPU uses fp32.
        source: where it comes from, for people and sidecars.

    Raises:
        PresetError: a ValueError: an argument is missing or does not fit the others or the class, or the
            name is taken.
    """
    variants, default = _outputs(name, encode_dim, output_variants, default_output_variant)
    declared = Declared(
        name=name,
        variants=variants,
        default_variant=default,
        input_size=input_size,
        takes_other_sizes=supports_variable_input_size,
        for_other_sizes=dict(variable_input_model_kwargs or {}),
        patch_size=patch_size,
        level=level,
        feeder=(tile_encoder, tile_encoder_output_variant),
        revision=aggregation_revision,
        spacings=_spacings(supported_spacing_um),
        default_spacing_um=default_spacing_um,
        precision=precision,
        source=source,
    )
    declared.check()

    def decorator(encoder: Class) -> Class:
        _check_class(name, encoder, level)
        check_free(name, encoder)
        for recipe in declared.recipes(encoder):
            REGISTERED.add(recipe.name, Registered(recipe, encoder, declared.for_other_sizes))
        return encoder

    return decorator


def place_of(encoder: Any) -> str:
    """Where a class is defined, or that of a module which was given: "module:name"."""
    made_of = _class_of(encoder)
    return f"{made_of.__module__}:{made_of.__qualname__}"


def module_of(encoder: Any) -> str:
    """The module of Python that `place_of` names."""
    return _class_of(encoder).__module__


def _class_of(encoder: Any) -> type:
    """Of a `Registered.encoder`: the class itself, or that of the module which another one is made with."""
    return encoder if isinstance(encoder, type) else type(encoder.args[0])


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What is said of an encoder when it is registered: see `register_encoder`."""

    name: str
    variants: Mapping[str, int]
    default_variant: str
    input_size: int | None
    takes_other_sizes: bool | None
    for_other_sizes: dict[str, Any] = field(default_factory=dict)
    patch_size: int | tuple[int, int] | None = None
    level: Level = "tile"
    feeder: tuple[str | None, str | None] = (None, None)
    revision: int | None = None
    spacings: tuple[float, ...]
    default_spacing_um: float | None = None
    precision: str
    source: str

    def check(self) -> None:
        """Raise PresetError for the first thing that is wrong."""
        for problem in (self._wrong_with_name(), self._wrong_with_tiles(), self._wrong_with_slides()):
            if problem is not None:
                raise _refusal(self.name, problem)

    def _wrong_with_name(self) -> str | None:
        if not _NAME.fullmatch(self.name):
            return 'its name may hold letters, digits, ".", "_" and "-"'
        if self.level not in _BASES:
            return f"level={self.level!r} is not tile, slide or patient"
        if self.spacings and self.default_spacing_um not in (None, *self.spacings):
            return f"default_spacing_um={self.default_spacing_um} is not in supported_spacing_um"
        return None

    def _wrong_with_tiles(self) -> str | None:
        if self.level != "tile":
            return None
        if type(self.takes_other_sizes) is not bool:
            return "supports_variable_input_size has to be True or False"
        if type(self.input_size) is not int or self.input_size <= 0:
            return f"input_size={self.input_size!r} has to be the side of its tiles in px"
        return None

    def _wrong_with_slides(self) -> str | None:
        revision = self.revision
        if revision is not None and (self.level == "tile" or type(revision) is not int or revision <= 0):
            return f"aggregation_revision={revision!r} has to be 1 or more, of a slide or patient encoder"
        if self.level != "tile" and None in self.feeder:
            return f"a {self.level} encoder has to say tile_encoder and tile_encoder_output_variant"
        return None

    def recipes(self, encoder: type) -> list[Recipe]:
        """Of the class that does it; two of a patient encoder, which makes the embeddings of slides, too."""
        made = self._recipe(encoder)
        if self.level == "tile":
            return [made]
        preset, variant = self.feeder
        feeds = TileEncoderRef(preset=str(preset), variant=str(variant))
        above: dict[str, Any] = {"compile": False, "compile_note": _NOT_COMPILED}
        slides: dict[str, Any] = {**above, "level": "slide", "tile_encoder": feeds, "slide_encoder": None}
        if self.level == "slide":
            own = cast("type[SlideEncoder]", encoder).encode_slide_with_latents
            slides["has_latents"] = own is not SlideEncoder.encode_slide_with_latents
            return [made.model_copy(update=slides)]
        below = f"{self.name}-slides"
        return [
            made.model_copy(update={**slides, "name": below}),
            made.model_copy(update={**above, "slide_encoder": below}),
        ]

    def _recipe(self, encoder: type) -> Recipe:
        kwargs = {"revision": self.revision} if self.revision else {}
        if self.patch_size is not None:  # inputs are multiples of it
            sides = self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size,)
            kwargs["patch_size"] = math.lcm(*sides)
        only = self.spacings[0] if len(self.spacings) == 1 else None
        documented = inspect.cleandoc(encoder.__doc__ or "").partition("\n")[0]
        side = self.input_size or 1
        try:
            return Recipe(
                name=self.name,
                schema_version=1,
                title=encoder.__qualname__,
                summary=documented or f"Registered by {encoder.__module__}",
                level="tile" if self.level == "tile" else "patient",  # `recipes` says what is above
                tile_size_px=side,
                spacing_um=self.spacings,
                default_spacing_um=only if self.default_spacing_um is None else self.default_spacing_um,
                precision=cast("Any", self.precision),
                params_m=0.0,  # it says this, its work and its statistics when it is built
                gflops=0.0,
                encoder=EncoderSpec(family="registered", arch=self.name, kwargs=kwargs),
                weights=WeightsSource(repo=self.source, revision="", files=()),
                transform=Transform(resize=side, crop=side, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
                positions="antialiased" if self.takes_other_sizes else "fixed",
                variants={key: Variant(dim=dim, pool="none") for key, dim in self.variants.items()},
                default_variant=self.default_variant,
                licence=Licence(name="not known", terms="see its source", url=self.source),
                citation=self.source or "see its source",
            )
        except (ValueError, TypeError) as error:
            raise _refusal(self.name, " ".join(str(error).split())) from None


def _outputs(
    name: str,
    encode_dim: int | None,
    output_variants: Mapping[str, Mapping[str, Any]] | None,
    default_output_variant: str | None,
) -> tuple[dict[str, int], str]:
    """D by output, and the output that is taken where none is asked for."""
    if encode_dim is not None and (output_variants, default_output_variant) != (None, None):
        raise _refusal(name, "give encode_dim, or output_variants with default_output_variant, not both")
    if encode_dim is not None:
        output_variants, default_output_variant = {"default": {"encode_dim": encode_dim}}, "default"
    if output_variants is None or default_output_variant is None:
        raise _refusal(name, "it has to say encode_dim, or output_variants with default_output_variant")
    if default_output_variant not in output_variants:
        raise _refusal(name, f"default_output_variant={default_output_variant!r} is not in output_variants")
    dims = {key: values.get("encode_dim") for key, values in output_variants.items()}
    for key, dim in dims.items():
        if type(dim) is not int or dim <= 0:
            raise _refusal(name, f"encode_dim of output {key!r} has to be a positive number, got {dim!r}")
    return cast("dict[str, int]", dims), default_output_variant


def _spacings(supported: float | Sequence[float] | None) -> tuple[float, ...]:
    if supported is None:
        return ()
    return tuple(map(float, supported)) if isinstance(supported, Sequence) else (float(supported),)


def _check_class(name: str, encoder: type, level: str) -> None:
    base = _BASES[level]
    if not issubclass(encoder, base) or (level == "slide" and issubclass(encoder, PatientEncoder)):
        raise _refusal(name, f"level={level!r}, and {place_of(encoder)} is no {base.__name__}")
    missing = sorted(getattr(encoder, "__abstractmethods__", ()))
    unsaid = TileEncoder.get_normalization_transform
    if issubclass(encoder, TileEncoder) and encoder.get_normalization_transform is unsaid:
        missing.append("get_normalization_transform")
    if missing:
        raise _refusal(name, f"{place_of(encoder)} has no {', '.join(missing)}")


def check_free(name: str, encoder: Any) -> None:
    """Raise PresetError where somebody else has the name. A module of Python that is loaded again may
    register its class again, and modules of PyTorch follow one another."""
    if is_built_in(name):
        raise _refusal(name, "slide2vec has a preset of that name")
    there = REGISTERED.added(name)
    if there is None or not (isinstance(there.encoder, type) or isinstance(encoder, type)):
        return
    if not isinstance(there.encoder, type) or place_of(there.encoder) != place_of(encoder):
        raise _refusal(name, f"{place_of(there.encoder)} is already registered under that name")


def _refusal(name: str, problem: str) -> PresetError:
    return PresetError(f"encoder {name!r} cannot be registered: {problem}")
