"""Recipes: what a preset is, read from one TOML file each in `engines/`.

A recipe says what the encoder is and where its weights are, how tiles are prepared for it, which
outputs it offers, and what its licence asks. `docs` of every key: the classes below. Any other model of
timm has a recipe too, made from what timm says of it: "timm:<architecture>", "hf-hub:<owner>/<repo>".
A preset of a slide encoder names the tile preset that feeds it, one of a patient encoder the slide preset.
Users' recipes are files of theirs, named by their path or found in the folders of SLIDE2VEC_RECIPES.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import tomllib
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slide2vec.choices import Precision, SlideFamily, TileFamily
from slide2vec.errors import ConfigError, PresetError, nearest_names
from slide2vec.files import hub_or_cache
from slide2vec.lazy import import_timm
from slide2vec.plugins import EncoderProviderDiagnostic, Registry

__all__ = [
    "REGISTERED",
    "ImageGeometry",
    "Recipe",
    "Registered",
    "TileEncoderRef",
    "Transform",
    "Variant",
    "WeightsSource",
    "all_recipes",
    "is_built_in",
    "list_encoder_provider_diagnostics",
    "list_models",
    "load_recipe",
    "read_recipe",
    "segmenter_recipe",
]

logger = logging.getLogger(__name__)

SCHEMA = 1
#: Folders with recipes of users, separated as in PATH.
SEARCH_PATH = "SLIDE2VEC_RECIPES"
SUFFIX = ".toml"
#: What begins the name of a model without a recipe file.
GENERIC = ("timm:", "hf-hub:")
#: Relative difference within which two spacings are one: 5 %, and what decimals lack in binary.
SAME_SPACING = 0.05 + 1e-9
#: Least cosine of an engine's features to the encoder's in fp32, where a recipe asks for no other.
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999, "fp8": 0.99}
Level = Literal["tile", "slide", "patient"]
Pool = Literal["none", "cls", "cls_patch_mean", "patch_mean", "token_mean", "base", "diagnostic"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderSpec(_Section):
    """Which module to build: `family` names the builder, `arch` and `kwargs` are its arguments.

    Values of `kwargs` that name a layer class (`mlp_layer`, `act_layer`, `norm_layer`) are resolved
    by the builder. `prefix_tokens` counts class and register tokens before the patch tokens.
    """

    family: TileFamily | SlideFamily
    arch: str = ""
    kwargs: dict[str, Any] = {}
    prefix_tokens: int = 1


class WeightsSource(_Section):
    """Where the weights are: in `repo` on the Hugging Face hub, or else at `url`, where a user gets them; of
    a user's recipe also beside its file.

    `revision` is a commit, so that embeddings do not change under a user; "main" only where no
    commit is known. `files` are tried in order; `sha256` has the digests of those that are known, and a file
    of such a name with another digest is refused. Keys matching `ignore` (glob patterns) may be in
    the checkpoint without being in the encoder; anything else must match exactly. `convert` names
    the function of `slide2vec.encoders.checkpoints` that renames (and fuses, splits) the checkpoint's
    keys into the encoder's; "" = they are the encoder's already.

    Where a file holds several models, `part` names the entry with this one's weights, and `config` the
    entries, tried in order, with the configuration it was trained with, which must agree with
    `encoder.kwargs` and `expect`.
    """

    repo: str = ""
    revision: str = ""
    url: str = ""
    files: tuple[str, ...]
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = {}
    gated: bool = False
    ignore: tuple[str, ...] = ()
    convert: str = ""
    part: str = ""
    config: tuple[str, ...] = ()
    expect: dict[str, Any] = {}
    note: str = ""

    @model_validator(mode="after")
    def _somewhere(self) -> WeightsSource:
        if self.repo and self.url:
            raise ValueError("weights are in a repo on the hub or at a url, not both")
        if strange := sorted(self.sha256.keys() - set(self.files)):
            raise ValueError(f"sha256 of {strange[0]}, which is not one of files")
        return self

    @property
    def page(self) -> str:
        """Where people find them."""
        return self.url or f"https://huggingface.co/{self.repo}"


class Transform(_Section):
    """From a picture to the encoder's input.

    Resize the shorter side to `resize` px (antialiased), crop the centre to `crop` px, scale to
    [0, 1], subtract `mean` and divide by `std` per RGB channel. Where both sizes are the picture's,
    nothing is resized or cropped.
    """

    resize: Annotated[int, Field(gt=0)]
    crop: Annotated[int, Field(gt=0)]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ImageGeometry(_Section):
    """How the authors bring a ready image to the encoder's input, where that is not as its tiles are: see
    `Transform`. `square` resizes both sides, whatever the image's aspect. `tensor`: PyTorch resizes, not
    Pillow, which differ by a grey level here and there."""

    resize: Annotated[int, Field(gt=0)]
    crop: Annotated[int, Field(gt=0)]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    square: bool = False
    tensor: bool = False


class Variant(_Section):
    """One output of the encoder: its dimension, how tokens are pooled into it, and whether the result
    is divided by its Euclidean norm. "none": the encoder's module pools by itself; "patch_mean": without
    class and register tokens, "token_mean" with them; "base" and "diagnostic" are outputs of Prism2's own
    code."""

    dim: Annotated[int, Field(gt=0)]
    pool: Pool
    normalise: bool = False


class EnginePolicy(_Section):
    """How the encoder is compiled, and how close an engine has to stay to it.

    Attributes:
        islands: parts that stay in fp32 in a half-precision engine: "norm" (layer norms),
            "patch_embed", "attention" (queries, keys and values are brought to fp32 for the product).
        layout: what its engines take (see `slide2vec.runtime.base.Layout`), where none is asked for.
        advised: whether runs that have no engine say how to build one.
        min_cosine: least cosine similarity, over real tissue tiles, of an engine's features to those of
            the encoder in fp32; below it an engine is not published.
    """

    islands: tuple[Literal["norm", "patch_embed", "attention"], ...] = ("norm", "patch_embed")
    layout: Literal["float32_nchw", "uint8_nhwc"] = "uint8_nhwc"
    advised: bool = True
    min_cosine: dict[Precision, Annotated[float, Field(gt=0, lt=1)]] = {}

    def threshold(self, precision: str) -> float:
        """The least cosine of engines of a precision."""
        asked = (least for name, least in self.min_cosine.items() if name == precision)
        return next(asked, MIN_COSINE[precision])


class TileEncoderRef(_Section):
    """The tile preset, and which of its outputs, whose embeddings a slide encoder takes."""

    preset: str
    variant: str


class TextSpec(_Section):
    """The text side of a preset that embeds texts beside tiles: CLIP's, with `kwargs` of
    `slide2vec.encoders.clip_text.ClipTextEncoder`, from the same weights. `variant` is the output whose space
    texts are in."""

    variant: str
    kwargs: dict[str, Any] = {}


class Licence(_Section):
    """The licence's name, what it allows in a line, and where to ask for access."""

    name: str
    terms: str
    url: str


class Recipe(_Section):
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
        if self.text is not None and self.text.variant not in self.variants:
            raise ValueError(f"text.variant {self.text.variant!r} is not one of {sorted(self.variants)}")
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
            content = tomllib.load(file)
        where = {} if _recipe_dir() in path.parents else {"file": str(path.absolute())}
        return Recipe(name=path.stem, **where, **_with_transform(content, path))
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        raise PresetError(f"recipe {path}: {error}") from error
    except ValidationError as error:
        raise PresetError(f"recipe {path}: {_in_words(error)}") from None


def _with_transform(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A recipe file's content; above the tile level with the transform of the preset that feeds it,
    unless `fed_with` is what its authors fed it with."""
    level = content.get("level", "tile")
    if level not in ("slide", "patient"):
        return content
    key, below = ("tile_encoder", "tile") if level == "slide" else ("slide_encoder", "slide")
    named = content.get(key)
    preset = named.get("preset") if isinstance(named, dict) else named
    if not isinstance(preset, str):
        raise PresetError(f"recipe {path}: a {level} preset needs {key}: the {below} preset that feeds it")
    if "transform" in content:
        raise PresetError(f"recipe {path}: transform is that of {preset}, and not to be given again")
    made = {name: value for name, value in content.items() if name != "fed_with"}
    feeder = _feeder(preset, path)
    if isinstance(named, dict):
        made[key] = {**named, "preset": feeder.reference}
    else:
        made[key] = feeder.reference
    if feeder.level != below:
        raise PresetError(f"recipe {path}: {key} names {preset}, which is a {feeder.level} preset")
    if isinstance(named, dict):
        feeder.variant(named.get("variant"))
    return {**made, "transform": content.get("fed_with", feeder.transform)}


def _feeder(preset: str, path: Path) -> Recipe:
    """The preset that feeds the one of a recipe file: a file beside it where it is one's own, or any."""
    beside = path.parent / (preset if preset.endswith(SUFFIX) else f"{preset}{SUFFIX}")
    if beside.is_file():
        return read_recipe(beside)
    try:
        return load_recipe(preset)
    except PresetError as error:
        raise PresetError(f"recipe {path}: {error}") from None


def _in_words(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


@functools.cache
def all_recipes() -> dict[str, Recipe]:
    """The recipes of all presets by name, sorted."""
    paths = sorted(_recipe_dir().glob("*.toml"), key=lambda path: path.stem)
    return {path.stem: read_recipe(path) for path in paths}


@functools.cache
def segmenter_recipe(name: str) -> Recipe:
    """The recipe of a learned method of segmentation. Its "features" are logits of every pixel, so that it is
    none of the presets."""
    return read_recipe(_recipe_dir() / "segmenters" / f"{name}{SUFFIX}")


class Registered(NamedTuple):
    """An encoder that `register_encoder` has made a preset.

    Attributes:
        recipe: what is known before it is built.
        encoder: its class, or a `functools.partial` of one and the module that it is made with.
        for_other_sizes: arguments of its constructor for tiles of another size than its own.
    """

    recipe: Recipe
    encoder: Any
    for_other_sizes: dict[str, Any]


REGISTERED: Registry[Registered] = Registry("slide2vec.encoders")


def is_built_in(name: str) -> bool:
    """Whether slide2vec itself has a preset of that name."""
    return Path(name).name == name and (_recipe_dir() / f"{name}.toml").is_file()


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """The recipe of a preset or registered encoder; of a recipe file by its path, which ends in ".toml"; or
    of any model as "timm:<architecture>" or "hf-hub:<owner>/<repo>".

    Raises:
        PresetError: no such preset, file or model; the message gives the nearest names.
    """
    name = os.fspath(name)
    if name.startswith(GENERIC):
        return _generic_recipe(name)
    if name.endswith(SUFFIX):
        return read_recipe(Path(name).expanduser())
    theirs = [path for path in _users_recipes() if path.stem == name]
    if is_built_in(name):
        theirs.insert(0, _recipe_dir() / f"{name}{SUFFIX}")
    if len(theirs) > 1:
        raise PresetError(
            f"{name!r} may mean {' or '.join(map(str, theirs))}: rename one, or give the path of its file"
        )
    if theirs:
        return read_recipe(theirs[0])
    found = REGISTERED.get(name)
    if found is None:
        return _called(name)
    return _fed(found.recipe)


def _users_recipes() -> list[Path]:
    """Files in the folders of SLIDE2VEC_RECIPES."""
    folders = [Path(each).expanduser() for each in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if each]
    return [path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))]


def _fed(recipe: Recipe) -> Recipe:
    """A registered recipe; above the tile level with the tiles of the preset that feeds it."""
    if recipe.level == "tile":
        return recipe
    below = recipe.tile_encoder.preset if recipe.tile_encoder else recipe.slide_encoder
    feeder = load_recipe(below or "")
    if feeder.level != ("tile" if recipe.tile_encoder else "slide"):
        raise PresetError(f"preset {recipe.name} takes what {below} embeds, which is {feeder.level}-level")
    if recipe.tile_encoder:
        feeder.variant(recipe.tile_encoder.variant)
    return recipe.model_copy(
        update={"transform": feeder.transform, "tile_size_px": feeder.tile_size_px, "images": feeder.images}
    )


def list_encoder_provider_diagnostics() -> tuple[EncoderProviderDiagnostic, ...]:
    """Installed packages whose encoders were left out, and why: of the entry points `slide2vec.encoders`,
    which are called when encoders are first looked up."""
    return REGISTERED.diagnostics()


def _left_out() -> list[str]:
    """A sentence on the packages whose encoders could not be registered; none where there are none."""
    failed = "; ".join(f"{each.provider_key} ({each.concise()})" for each in REGISTERED.diagnostics())
    return [f"Encoders of these packages were left out: {failed}."] if failed else []


def _called(alias: str) -> Recipe:
    """The recipe of the preset that other tools call so."""
    recipes = all_recipes()
    for recipe in recipes.values():
        if alias in recipe.aliases:
            logger.info("preset %s: %s of other tools", recipe.name, alias)
            return recipe
    others = (alias for recipe in recipes.values() for alias in recipe.aliases)
    users = [path.stem for path in _users_recipes()]
    hint = nearest_names(alias, [*recipes, *others, *REGISTERED, *users])
    raise PresetError(f"there is no preset {alias!r}. {' '.join((hint, *_left_out()))}")


def list_models(level: Level | None = None) -> list[str]:
    """Names of the presets and registered encoders, sorted; of one level ("tile", "slide", "patient") when
    given. Warns of installed packages whose encoders could not be registered.

    Raises:
        PresetError: no such level.
    """
    if level not in (None, "tile", "slide", "patient"):
        raise PresetError(f"there is no level {level!r}. Allowed: tile, slide, patient.")
    problems = _left_out()
    known = {
        **all_recipes(),
        **{name: found.recipe for name in REGISTERED if (found := REGISTERED.get(name))},
    }
    for path in _users_recipes():
        try:
            known[path.stem] = load_recipe(path.stem)
        except PresetError as error:
            problems.append(f"Left out: {error}")
    for problem in problems:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return sorted(name for name, recipe in known.items() if level in (None, recipe.level))


@functools.cache
def _generic_recipe(name: str) -> Recipe:
    """What timm says of a model: its own pooled features, its input size, its statistics."""
    arch = name.removeprefix("timm:")  # "hf-hub:" is timm's own spelling
    try:
        with hub_or_cache() if name.startswith("hf-hub:") else nullcontext():
            found = _tried(arch)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        raise PresetError(f"{name}: {_why_not(arch, error)}") from error
    described, data = found.pop("described"), found.pop("data")
    repo, _, revision = (described.get("hf_hub_id") or "").partition("@")
    heads = described.get("classifier") or ()
    side = min(data["input_size"][1:])
    try:
        return Recipe(
            **found,
            name=name,
            schema_version=SCHEMA,
            title=described.get("architecture") or arch,
            summary="A model of timm as it is, which no preset describes",
            tile_size_px=side,
            default_spacing_um=None,
            precision="fp32",
            encoder=EncoderSpec(family="timm", arch=arch, kwargs={"num_classes": 0}, prefix_tokens=0),
            weights=WeightsSource(
                repo=repo,
                revision=revision or "main",
                files=("model.safetensors", "pytorch_model.bin"),
                ignore=tuple(f"{head}.*" for head in ((heads,) if isinstance(heads, str) else heads)),
            ),
            transform=Transform(
                resize=side, crop=side, **{key: data[key] for key in ("interpolation", "mean", "std")}
            ),
            images=ImageGeometry(
                resize=int(side / data["crop_pct"]),
                crop=side,
                interpolation=data["interpolation"],
                square=data["crop_mode"] == "squash",
            ),
            default_variant="default",
            licence=Licence(
                name=described.get("license") or "not known",
                terms="see the page of the model",
                url=f"https://huggingface.co/{repo}",
            ),
            citation="see the page of the model",
            unconfirmed="whether it suits pathology; it was not compared with anything",
        )
    except ValidationError as error:
        raise PresetError(f"{name}: {_in_words(error)}") from None


def _tried(arch: str) -> dict[str, Any]:
    """Build a model of timm on the meta device and run it on one tile: what it is and what comes out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    timm = import_timm()
    with torch.device("meta"):
        model = timm.create_model(arch, pretrained=False, num_classes=0).eval().requires_grad_(False)
        data = timm.data.resolve_model_data_config(model)
        with FlopCounterMode(display=False) as flops:
            features = model(torch.empty(1, *data["input_size"]))
    if features.ndim != 2:
        raise ValueError(f"its output is not pooled, it has shape {tuple(features.shape)}")
    return {
        "described": model.pretrained_cfg,
        "data": data,
        "params_m": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "gflops": flops.get_total_flops() / 1e9,
        "variants": {"default": Variant(dim=features.shape[1], pool="none")},
    }


def _why_not(arch: str, error: Exception) -> str:
    """Why timm has no such model, with the nearest names."""
    timm = import_timm()
    if timm.is_model(arch.partition(".")[0]):
        return str(error)
    if arch.startswith("hf-hub:"):
        return f"its configuration could not be read from https://huggingface.co ({error})"
    close = difflib.get_close_matches(arch, timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() has their names"
    return f"timm has no such architecture; {hint}"
