"""Recipes: what a preset is, read from one TOML file each in `engines/`.

A recipe says what the encoder is and where its weights are, how tiles are prepared for it, which
outputs it offers, and what its licence asks. `docs` of every key: the classes below.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slide2vec.errors import PresetError, nearest_names

__all__ = ["Recipe", "Transform", "Variant", "WeightsSource", "list_models", "load_recipe", "read_recipe"]

SCHEMA = 1
Level = Literal["tile", "slide", "patient"]
Pool = Literal["none", "cls", "cls_patch_mean", "token_mean"]
Family = Literal["timm", "scattering", "coca", "clip_linear", "musk", "channelwise", "remote"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderSpec(_Section):
    """Which module to build: `family` names the builder, `arch` and `kwargs` are its arguments.

    Values of `kwargs` that name a layer class (`mlp_layer`, `act_layer`, `norm_layer`) are resolved
    by the builder. `prefix_tokens` counts class and register tokens before the patch tokens.
    """

    family: Family
    arch: str = ""
    kwargs: dict[str, Any] = {}
    prefix_tokens: int = 1


class WeightsSource(_Section):
    """Where the weights are on the Hugging Face hub.

    `revision` is a commit, so that embeddings do not change under a user; "main" only where no
    commit is known. `files` are tried in order. Keys matching `ignore` (glob patterns) may be in
    the checkpoint without being in the encoder; anything else must match exactly. `convert` names
    the function of `slide2vec.encoders.checkpoints` that renames (and fuses, splits) the checkpoint's
    keys into the encoder's; "" = they are the encoder's already.
    """

    repo: str
    revision: str
    files: tuple[str, ...]
    gated: bool = False
    ignore: tuple[str, ...] = ()
    convert: str = ""
    note: str = ""


class Transform(_Section):
    """From a tile of the requested size to the encoder's input.

    Resize the shorter side to `resize` px (antialiased), crop the centre to `crop` px, scale to
    [0, 1], subtract `mean` and divide by `std` per RGB channel.
    """

    resize: Annotated[int, Field(gt=0)]
    crop: Annotated[int, Field(gt=0)]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Variant(_Section):
    """One output of the encoder: its dimension, how tokens are pooled into it, and whether the result
    is divided by its Euclidean norm. "none": the encoder's module pools by itself."""

    dim: Annotated[int, Field(gt=0)]
    pool: Pool
    normalise: bool = False


class Licence(_Section):
    """The licence's name, what it allows in a line, and where to ask for access."""

    name: str
    terms: str
    url: str


class Recipe(_Section):
    """Everything slide2vec knows about a preset.

    Attributes:
        name: of the preset, the stem of its file.
        schema_version: of the file.
        title, summary: for people.
        level: what it embeds.
        tile_size_px: side of the tiles it was trained on, in px at its spacing.
        spacing_um: µm/px it was trained on; empty = any.
        default_spacing_um: used when none is asked for.
        precision: for accelerators; a CPU uses fp32 unless told otherwise.
        params_m, gflops: millions of parameters; GFLOP per tile (2 x MAC).
        variants, default_variant: its outputs.
        citation, note: for people.
        verified: how our loader was compared with the original one, without the published weights.
        unconfirmed: what only a site with access to the weights can confirm.
    """

    name: str
    schema_version: int
    title: str
    summary: str
    level: Level = "tile"
    tile_size_px: Annotated[int, Field(gt=0)]
    spacing_um: tuple[float, ...] = ()
    default_spacing_um: Annotated[float, Field(gt=0)]
    precision: Literal["fp16", "bf16", "fp32"]
    params_m: float
    gflops: float
    encoder: EncoderSpec
    weights: WeightsSource | None = None
    transform: Transform
    variants: dict[str, Variant]
    default_variant: str
    licence: Licence
    citation: str
    note: str = ""
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
        if self.spacing_um and self.default_spacing_um not in self.spacing_um:
            raise ValueError(f"default_spacing_um {self.default_spacing_um} is not in spacing_um")
        if self.transform.crop > self.transform.resize:
            raise ValueError("transform.crop is larger than transform.resize")
        return self

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


def _recipe_dir() -> Path:
    """`engines/` inside the installed package, or at the top of the source tree."""
    installed = Path(__file__).parent / "engines"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "engines"


def read_recipe(path: Path) -> Recipe:
    """Parse a recipe file; its stem is the preset's name.

    Raises:
        PresetError: the file is not TOML or breaks the schema; names the file and the keys.
    """
    try:
        with path.open("rb") as file:
            return Recipe(name=path.stem, **tomllib.load(file))
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        raise PresetError(f"recipe {path}: {error}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise PresetError(f"recipe {path}: {wrong}") from None


@functools.cache
def _all_recipes() -> dict[str, Recipe]:
    return {path.stem: read_recipe(path) for path in sorted(_recipe_dir().glob("*.toml"))}


def load_recipe(name: str) -> Recipe:
    """The recipe of a preset.

    Raises:
        PresetError: no such preset; the message gives the nearest names.
    """
    path = _recipe_dir() / f"{name}.toml"
    if Path(name).name != name or not path.is_file():
        raise PresetError(f"there is no preset {name!r}. {nearest_names(name, list_models())}")
    return read_recipe(path)


def list_models(level: Level | None = None) -> list[str]:
    """Names of the presets, sorted; of one level ("tile", "slide", "patient") when given.

    Raises:
        PresetError: no such level.
    """
    if level not in (None, "tile", "slide", "patient"):
        raise PresetError(f"there is no level {level!r}. Allowed: tile, slide, patient.")
    return [name for name, recipe in _all_recipes().items() if level in (None, recipe.level)]
