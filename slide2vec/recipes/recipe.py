"""Recipe: everything that is known of a preset."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from slide2vec.errors import ConfigError, PresetError, nearest_names
from slide2vec.recipes.sections import (
    EncoderSpec,
    EnginePolicy,
    ImageGeometry,
    Licence,
    Section,
    TextSpec,
    TileEncoderRef,
    Transform,
    Variant,
    WeightsSource,
)

__all__ = ["GENERIC", "SCHEMA", "Level", "Recipe", "in_words"]

logger = logging.getLogger(__name__)

SCHEMA = 1
#: What begins the name of a model without a recipe file.
GENERIC = ("timm:", "hf-hub:")
#: Relative difference within which two spacings are one: 5 %, and what decimals lack in binary.
SAME_SPACING = 0.05 + 1e-9
Level = Literal["tile", "slide", "patient"]


class Recipe(Section):
    """Everything slide2vec knows about a preset.

    Attributes:
        name: of the preset, the stem of its file.
        aliases: what other tools call it, which is understood wherever a preset is named.
        file: where that is, of a file that is not slide2vec's own.
        schema_version: of the file.
        title, summary: for people.
        level: what it embeds.
        tile_encoder: of a slide preset, what its tiles are embedded with.
        slide_encoder: of a patient preset, the slide preset that its slides are embedded with.
        has_latents: whether a slide encoder has latents (L, D) beside its embedding.
        tile_size_px: side of the tiles it was trained on, in px at its spacing.
        spacing_um: µm/px it was trained on; empty = any.
        default_spacing_um: used when none is asked for; None = one has to be.
        precision: for accelerators; a CPU uses fp32 unless told otherwise. precision_note: why this one.
        params_m: millions of parameters, without those that are not used.
        gflops: GFLOP per tile (2 x MAC) of a tile encoder.
        transform: of tiles of `tile_size_px` on slides, which are normalised and, where its sizes are theirs,
            nothing else. Above the tile level that of the preset that feeds it, unless the file of a slide
            preset gives, as `fed_with`, the one that its authors fed it with.
        images: geometry of the published transform of ready images, where it differs from `transform`; the
            statistics are the same.
        positions: how position embeddings are resampled for inputs of another size: as timm does
            ("antialiased"), as transformers does ("plain") or once did ("shifted"); or not at all.
        variants, default_variant: its outputs.
        text: its text side; None where it has none that slide2vec runs.
        citation, note: for people.
        compile, compile_note: whether the encoder may be exported and compiled; why not, or what to mind.
        engine: how it is compiled.
        verified: how our loader was compared with the original one, without the published weights.
        unconfirmed: what only a site with access to the weights can confirm.
    """

    name: str
    file: str = ""
    schema_version: int
    title: str
    summary: str
    level: Level = "tile"
    aliases: tuple[str, ...] = ()
    tile_encoder: TileEncoderRef | None = None
    slide_encoder: str | None = None
    has_latents: bool = False
    tile_size_px: Annotated[int, Field(gt=0)]
    spacing_um: tuple[float, ...] = ()
    default_spacing_um: Annotated[float, Field(gt=0)] | None
    precision: Literal["fp16", "bf16", "fp32"]
    precision_note: str = ""
    params_m: float
    gflops: float = 0.0
    encoder: EncoderSpec
    weights: WeightsSource | None = None
    transform: Transform
    images: ImageGeometry | None = None
    positions: Literal["antialiased", "plain", "shifted", "fixed"] = "antialiased"
    variants: dict[str, Variant]
    default_variant: str
    text: TextSpec | None = None
    licence: Licence
    citation: str
    note: str = ""
    compile: bool = True
    compile_note: str = ""
    engine: EnginePolicy = EnginePolicy()
    verified: str = ""
    unconfirmed: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.schema_version != SCHEMA:
            raise ValueError(f"schema_version {self.schema_version} is not {SCHEMA}")
        if self.default_variant not in self.variants:
            raise ValueError(
                f"default_variant {self.default_variant!r} is not one of {sorted(self.variants)}"
            )
        for name in (self.text.variant, *self.text.projected) if self.text is not None else ():
            if name not in self.variants:
                raise ValueError(f"text: output {name!r} is not one of {sorted(self.variants)}")
        default = self.default_spacing_um
        if self.spacing_um and default is not None and default not in self.spacing_um:
            raise ValueError(f"default_spacing_um {default} is not in spacing_um")
        if not self.compile and not self.compile_note:
            raise ValueError("compile = false needs compile_note: why it cannot be compiled")
        for name, made in (("transform", self.transform), ("images", self.images)):
            if made is not None and made.crop > made.resize:
                raise ValueError(f"{name}.crop is larger than {name}.resize")
        if self.level == "tile" and "gflops" not in self.model_fields_set:
            raise ValueError("a tile preset needs gflops")
        if self.level != "slide" and (self.tile_encoder or self.has_latents):
            raise ValueError(
                f"tile_encoder and has_latents are for slide presets, not for level {self.level!r}"
            )
        if self.level != "patient" and self.slide_encoder:
            raise ValueError(f"slide_encoder is for patient presets, not for level {self.level!r}")
        return self

    @property
    def reference(self) -> str:
        """By what `load_recipe` finds it, wherever it is called."""
        return self.file or self.name

    @property
    def generic(self) -> bool:
        """Whether it is made from what timm says of a model, without a file."""
        return self.name.startswith(GENERIC)

    def tiles(self, spacing_um: float | None, tile_size_px: int | None) -> tuple[float, int]:
        """Spacing and tile size: what is asked for, else the preset's.

        Raises:
            ConfigError: no spacing is asked for, and the preset has none.
        """
        spacing_um = spacing_um or self.default_spacing_um
        if spacing_um is None:
            raise ConfigError(
                f"{self.name} says nothing of the spacing of its tiles: give requested_spacing_um "
                "(--spacing), in µm/px"
            )
        return spacing_um, tile_size_px or self.tile_size_px

    def not_recommended(self, spacing_um: float, tile_size_px: int) -> str | None:
        """In words, what the preset was not trained on: a spacing further than 5 % from its own, or
        tiles of another size. None for models that no preset describes, or that are not trained."""
        problems = []
        near = (abs(spacing_um - own) <= SAME_SPACING * own for own in self.spacing_um)
        if self.spacing_um and not any(near):
            allowed = ", ".join(f"{value:g}" for value in self.spacing_um)
            problems.append(f"{spacing_um:g} µm/px (it was trained at {allowed})")
        if self.weights is not None and not self.generic and tile_size_px != self.tile_size_px:
            problems.append(f"tiles of {tile_size_px} px (it was trained on {self.tile_size_px})")
        return f"preset {self.name} is not for {' or '.join(problems)}" if problems else None

    def check_recommended(self, spacing_um: float, tile_size_px: int, *, allowed: bool) -> None:
        """Refuse what the preset was not trained on, or only warn of it.

        Raises:
            ConfigError: it was not, and that is not allowed.
        """
        problem = self.not_recommended(spacing_um, tile_size_px)
        if problem is None:
            return
        if not allowed:
            raise ConfigError(
                f"{problem}. If that is what you want: allow_non_recommended_settings=True in "
                "Model.from_preset (--allow-non-recommended-settings)"
            )
        logger.warning("%s", problem)

    def variant(self, name: str | None) -> tuple[str, Variant]:
        """The named output variant, or the default one.

        Raises:
            PresetError: there is no such variant.
        """
        name = name or self.default_variant
        if name not in self.variants:
            raise PresetError(
                f"preset {self.name} has no output variant {name!r}. {nearest_names(name, self.variants)}"
            )
        return name, self.variants[name]


def in_words(error: ValidationError) -> str:
    """Which keys of a recipe are wrong, and how."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
