"""The tables of a recipe file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slide2vec.choices import Precision, SlideFamily, TextFamily, TileFamily

__all__ = [
    "MIN_COSINE",
    "EncoderSpec",
    "EnginePolicy",
    "ImageGeometry",
    "Licence",
    "Section",
    "TextSpec",
    "TileEncoderRef",
    "Transform",
    "Variant",
    "WeightsSource",
]

#: Least cosine of an engine's features to the encoder's in fp32, where a recipe asks for no other.
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999, "fp8": 0.99}
Pool = Literal["none", "cls", "cls_patch_mean", "patch_mean", "token_mean", "aligned", "base", "diagnostic"]


class Section(BaseModel):
    """A table of a recipe file, or the whole: any other key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderSpec(Section):
    """Which module to build: `family` names the builder, `arch` and `kwargs` are its arguments.

    Values of `kwargs` that name a layer class (`mlp_layer`, `act_layer`, `norm_layer`) are resolved
    by the builder. `prefix_tokens` counts class and register tokens before the patch tokens.
    """

    family: TileFamily | SlideFamily
    arch: str = ""
    kwargs: dict[str, Any] = {}
    prefix_tokens: int = 1


class WeightsSource(Section):
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


class Transform(Section):
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


class ImageGeometry(Section):
    """How the authors bring a ready image to the encoder's input, where that is not as its tiles are: see
    `Transform`. `square` resizes both sides, whatever the image's aspect. `tensor`: PyTorch resizes, not
    Pillow, which differ by a grey level here and there. `odd_margin`: which whole number of pixels is cut off
    at the left and the top where half the margin is none: the even one, as torchvision's CenterCrop does, or
    the smaller one ("down"), as image processors of transformers do."""

    resize: Annotated[int, Field(gt=0)]
    crop: Annotated[int, Field(gt=0)]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    square: bool = False
    tensor: bool = False
    odd_margin: Literal["even", "down"] = "even"


class Variant(Section):
    """One output of the encoder: its dimension, how tokens are pooled into it, and whether the result
    is divided by its Euclidean norm. "none": the encoder's module pools by itself; "patch_mean": without
    class and register tokens, "token_mean" with them; "aligned": by itself, and projected into the space that
    is shared with texts; "base" and "diagnostic" are outputs of Prism2's own
    code."""

    dim: Annotated[int, Field(gt=0)]
    pool: Pool
    normalise: bool = False


class EnginePolicy(Section):
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


class TileEncoderRef(Section):
    """The tile preset, and which of its outputs, whose embeddings a slide encoder takes."""

    preset: str
    variant: str


class TextSpec(Section):
    """The text side of a preset, from the same weights: `family` names the module, `kwargs` its arguments.

    `variant` is the output whose space texts are in; `projected` has other outputs that its projection takes
    there: how many of their first numbers it takes. `tokeniser` has the names of the file beside the weights
    that cuts texts into tokens (none: CLIP's vocabulary, which open-clip-torch has), and `tokeniser_url` says
    where it is had where that is not the repository of the weights.
    """

    variant: str
    family: TextFamily = "clip"
    kwargs: dict[str, Any] = {}
    projected: dict[str, int] = {}
    tokeniser: tuple[str, ...] = ()
    tokeniser_url: str = ""


class Licence(Section):
    """The licence's name, what it allows in a line, and where to ask for access."""

    name: str
    terms: str
    url: str
