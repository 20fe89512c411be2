"""What users choose by name, and which module of ours each name stands for.

The configuration, the command line, `slide2vec doctor` and the rooms that make them read these tables.
No module of a table is imported here; they are when they are first used. A name is a word of its `Literal`
and a row of its table. Readers, segmentation methods and formats of installed packages are rows, too
(`Choices`), without a word: type checkers know ours only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from slide2vec.errors import ConfigError, ExtraMissingError, nearest_names
from slide2vec.installation import add_extra

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "BACKENDS",
    "EXECUTORS",
    "LAYOUTS",
    "OUTPUT_FORMATS",
    "PREPARERS",
    "RUNTIMES",
    "SEGMENTATION_METHODS",
    "SLIDE_ENCODERS",
    "TEXT_ENCODERS",
    "TILE_ENCODERS",
    "Backend",
    "Choices",
    "CompiledRuntime",
    "EmbeddingFormat",
    "EngineChoice",
    "Executor",
    "Home",
    "OptionalPackage",
    "OutputFormat",
    "Precision",
    "PreparerChoice",
    "Runtime",
    "SegmentationMethod",
    "SlideFamily",
    "TextFamily",
    "TileFamily",
    "learned_methods",
]

Precision: TypeAlias = Literal["fp16", "bf16", "fp32", "fp8"]
Backend: TypeAlias = Literal["auto", "tiff", "dicom", "cucim", "vips", "openslide", "asap"]
OutputFormat: TypeAlias = Literal["pt", "npz", "safetensors", "h5"]
SegmentationMethod: TypeAlias = Literal[
    "hsv",
    "otsu",
    "threshold",
    "auto",
    "hest",
    "grandqc",
    "grandqc-artefact",
    "grandqc-artefact-1um",
    "grandqc-artefact-2um",
    "sam2",
]
PreparerChoice: TypeAlias = Literal["auto", "torch", "dali", "triton"]
Executor: TypeAlias = Literal["local", "ray"]
Runtime: TypeAlias = Literal["tensorrt", "tensorrt-rtx", "openvino", "inductor"]
EngineChoice: TypeAlias = Literal["auto", "torch", Runtime]
TileFamily: TypeAlias = Literal[
    "timm",
    "headed",
    "scattering",
    "coca",
    "clip_linear",
    "musk",
    "channelwise",
    "segmentation",
    "remote",
    "registered",
]
SlideFamily: TypeAlias = Literal[
    "titan", "prism", "longnet", "feather", "madeleine", "chief", "moozy_slide", "moozy_case"
]
TextFamily: TypeAlias = Literal["clip", "coca", "bert", "beit3"]


class OptionalPackage(NamedTuple):
    """An optional package, for people and for pip.

    Attributes:
        name: of the library.
        purpose: in a few words.
        extra: of ours that brings it.
        distributions: its names on PyPI, the first that is installed counts.
    """

    name: str
    purpose: str
    extra: str
    distributions: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that installs it."""
        return add_extra(self.extra)


class Home(NamedTuple):
    """Where what a name stands for is.

    Attributes:
        module: imported when it is first used.
        name: in that module.
        package: that it needs.
        brought_by: entry point of the installed package that it is of; "" of slide2vec.
    """

    module: str
    name: str
    package: OptionalPackage | None = None
    brought_by: str = ""

    def imported(self) -> Any:
        """What it is.

        Raises:
            ExtraMissingError: the package of somebody else's that it is of cannot be imported.
        """
        if not self.brought_by:
            return getattr(import_module(self.module), self.name)
        try:
            return getattr(import_module(self.module), self.name)
        except (Exception, SystemExit) as error:  # whatever other packages do
            raise ExtraMissingError(
                f"{self.brought_by} cannot be loaded: {type(error).__name__}: {error}"
            ) from error


Row = TypeVar("Row")


class Choices(Mapping[str, Row], Generic[Row]):
    """Rows by name: ours, and after them those of installed packages, which are looked for when a name is
    none of ours, or when all are listed. A name of ours is never theirs.

    Args:
        ours: rows of slide2vec.
        group: of the entry points of other packages; the name of each is the name of a row.
        row: makes it.
        others: words that are allowed in place of a name.
    """

    def __init__(
        self, ours: Mapping[str, Row], group: str, row: Callable[[EntryPoint], Row], *others: str
    ) -> None:
        self.ours, self.group, self._row, self._others = ours, group, row, others

    @cached_property
    def theirs(self) -> Mapping[str, Row]:
        """Rows of installed packages."""
        from slide2vec.plugins import providers

        return {each.name: self._row(each) for each in providers(self.group) if each.name not in self.ours}

    def __getitem__(self, name: str) -> Row:
        found = self.ours.get(name)
        return self.theirs[name] if found is None else found

    def __iter__(self) -> Iterator[str]:
        yield from self.ours
        yield from self.theirs

    def __len__(self) -> int:
        return len(self.ours) + len(self.theirs)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.ours or name in self.theirs)

    def checked(self, name: object) -> Any:
        """The name.

        Raises:
            ConfigError: there is none such; with the nearest.
        """
        if name in self._others or name in self:
            return name
        known = (*self._others, *self)
        near = nearest_names(str(name), known)
        hint = f". {near}" if near.startswith("Did") else ""
        *most, last = map(repr, known)
        raise ConfigError(f"input should be {', '.join(most)} or {last}, got {name!r}{hint}")


def _home(entry: EntryPoint) -> Home:
    return Home(entry.module, entry.attr, brought_by=f"{entry.name} ({entry.group}: {entry.value})")


_CUCIM = OptionalPackage("cuCIM", "fast slide reading", "cucim", ("cucim-cu13", "cucim-cu12", "cucim"))
_VIPS = OptionalPackage("libvips", "reads more TIFF files", "vips", ("pyvips",))
_DALI = OptionalPackage(
    "DALI", "preparing tiles on the GPU", "cuda", ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
)

#: Classes of readers, made of a `Probe`, in the order in which "auto" tries them; their modules have
#: `unavailable() -> str | None`, which says why it cannot be used and what to install.
BACKENDS = Choices(
    {
        "tiff": Home("slide2vec.readers.tiff", "TiffReader"),
        "dicom": Home("slide2vec.readers.dicom", "DicomReader"),
        "cucim": Home("slide2vec.readers.cucim", "CucimReader", _CUCIM),
        "vips": Home("slide2vec.readers.vips", "VipsReader", _VIPS),
        "openslide": Home("slide2vec.readers.openslide", "OpenslideReader"),
        "asap": Home("slide2vec.readers.asap", "AsapReader"),
    },
    "slide2vec.readers",
    _home,
    "auto",
)

#: Each a `TissueMethod`, a `Segmenter`, or a `LearnedMethod`, which makes one of its weights.
SEGMENTATION_METHODS = Choices(
    {
        "hsv": Home("slide2vec.tiling.tissue_methods", "HSV"),
        "otsu": Home("slide2vec.tiling.tissue_methods", "OTSU"),
        "threshold": Home("slide2vec.tiling.tissue_methods", "THRESHOLD"),
        "auto": Home("slide2vec.tiling.auto_tissue", "AUTO"),
        "hest": Home("slide2vec.segmenters.learned", "HEST"),
        "grandqc": Home("slide2vec.segmenters.learned", "GRANDQC"),
        "grandqc-artefact": Home("slide2vec.segmenters.learned", "GRANDQC_ARTEFACT"),
        "grandqc-artefact-1um": Home("slide2vec.segmenters.learned", "GRANDQC_ARTEFACT_1UM"),
        "grandqc-artefact-2um": Home("slide2vec.segmenters.learned", "GRANDQC_ARTEFACT_2UM"),
        "sam2": Home("slide2vec.segmenters.learned", "SAM2"),
    },
    "slide2vec.segmenters",
    _home,
)


def learned_methods() -> tuple[str, ...]:
    """Methods of segmentation of ours that have weights."""
    ours = SEGMENTATION_METHODS.ours.items()
    return tuple(name for name, home in ours if home.module.startswith("slide2vec.segmenters."))


#: Each makes a `slide2vec.prepare.choose.Preparer` of a transform, a device and a layout.
PREPARERS: Mapping[str, Home] = {
    "torch": Home("slide2vec.prepare.torch_preparer", "TorchPreparer"),
    "dali": Home("slide2vec.prepare.dali_preparer", "DaliPreparer", _DALI),
    "triton": Home("slide2vec.prepare.triton_preparer", "TritonPreparer"),
}

#: Each starts a `WorkerPool` for a loader of the model, devices and ExecutionOptions.
EXECUTORS: Mapping[str, Home] = {
    "local": Home("slide2vec.scale.local_pool", "start_local"),
    "ray": Home(
        "slide2vec.scale.ray_pool", "start_ray", OptionalPackage("Ray", "many machines", "ray", ("ray",))
    ),
}

#: Modules of PyTorch, made of an EncoderSpec and a Variant; that of "remote" comes with its weights, and that
#: of "registered" is a user's.
TILE_ENCODERS: Mapping[str, Home] = {
    "timm": Home("slide2vec.encoders.timm", "TimmEncoder"),
    "headed": Home("slide2vec.encoders.headed", "HeadedEncoder"),
    "scattering": Home("slide2vec.encoders.scattering", "scattering_encoder"),
    "coca": Home("slide2vec.encoders.coca", "CocaEncoder"),
    "clip_linear": Home("slide2vec.encoders.clip_linear", "ClipLinearEncoder"),
    "musk": Home("slide2vec.encoders.musk", "MuskEncoder"),
    "channelwise": Home("slide2vec.encoders.channelwise", "ChannelwiseEncoder"),
    "segmentation": Home("slide2vec.encoders.segmentation.networks", "segmentation_network"),
}
#: Modules of PyTorch, made of the keyword arguments of a recipe.
SLIDE_ENCODERS: Mapping[str, Home] = {
    "titan": Home("slide2vec.encoders.slide.titan", "TitanEncoder"),
    "prism": Home("slide2vec.encoders.slide.prism", "PrismEncoder"),
    "longnet": Home("slide2vec.encoders.slide.longnet", "LongNetEncoder"),
    "feather": Home("slide2vec.encoders.slide.abmil", "FeatherEncoder"),
    "madeleine": Home("slide2vec.encoders.slide.abmil", "MadeleineEncoder"),
    "chief": Home("slide2vec.encoders.slide.abmil", "ChiefEncoder"),
    "moozy_slide": Home("slide2vec.encoders.slide.moozy", "MoozySlideEncoder"),
    "moozy_case": Home("slide2vec.encoders.slide.moozy", "MoozyCaseTransformer"),
}


#: Modules of PyTorch that embed texts, made of the keyword arguments of a recipe's text side.
TEXT_ENCODERS: Mapping[str, Home] = {
    "clip": Home("slide2vec.encoders.text.clip", "ClipTextEncoder"),
    "coca": Home("slide2vec.encoders.text.coca", "CocaTextEncoder"),
    "bert": Home("slide2vec.encoders.text.bert", "BertTextEncoder"),
    "beit3": Home("slide2vec.encoders.text.beit3", "Beit3TextEncoder"),
}


class CompiledRuntime(NamedTuple):
    """A runtime of compiled engines.

    Attributes:
        home: the module that loads and runs them, a `slide2vec.runtime.loading.RuntimeModule`.
        builder: the module that compiles them, a `slide2vec.compile.builders.BuilderModule`.
        devices: kinds of device that they run on, as PyTorch calls them.
        versions: distributions whose version is in the key of an engine, the first that is installed counts.
        package: that brings it; None where PyTorch does.
    """

    home: str
    builder: str
    devices: tuple[str, ...]
    versions: tuple[str, ...]
    package: OptionalPackage | None = None

    @property
    def install(self) -> str:
        """The command that installs it; none for PyTorch's own."""
        return self.package.install if self.package else ""


class EmbeddingFormat(NamedTuple):
    """A format of embedding files; its name is their suffix.

    Attributes:
        home: the module that writes and reads them, a `slide2vec.artifacts.formats.FormatModule`.
        has_coords: whether they hold the tiles' coordinates, too.
    """

    home: str
    has_coords: bool


def _format(entry: EntryPoint) -> EmbeddingFormat:
    return EmbeddingFormat(entry.module, has_coords=True)  # asked for, and None where they are not in it


OUTPUT_FORMATS = Choices(
    {
        "pt": EmbeddingFormat("slide2vec.artifacts.pt_format", has_coords=False),
        "npz": EmbeddingFormat("slide2vec.artifacts.npz_format", has_coords=False),
        "safetensors": EmbeddingFormat("slide2vec.artifacts.safetensors_format", has_coords=True),
        "h5": EmbeddingFormat("slide2vec.artifacts.h5_format", has_coords=True),
    },
    "slide2vec.formats",
    _format,
)

#: `slide2vec.layouts.item.LayoutModule`s: the folders and keys of other tools, and Zarr.
LAYOUTS: Mapping[str, Home] = {
    "clam": Home("slide2vec.layouts.clam", "write"),
    "trident": Home("slide2vec.layouts.trident", "write"),
    "stamp": Home("slide2vec.layouts.stamp", "write"),
    "lazyslide": Home(
        "slide2vec.layouts.lazyslide",
        "write",
        OptionalPackage("SpatialData", "LazySlide's stores, to_spatialdata", "spatialdata", ("spatialdata",)),
    ),
    "zarr": Home(
        "slide2vec.layouts.zarr_folders",
        "write",
        OptionalPackage("Zarr", "embeddings as folders", "zarr", ("zarr",)),
    ),
}

_TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_RTX = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings")

#: Of the engines for a device, the first here is preferred.
RUNTIMES: Mapping[str, CompiledRuntime] = {
    "tensorrt": CompiledRuntime(
        "slide2vec.runtime.tensorrt",
        "slide2vec.compile.plan_builder",
        devices=("cuda",),
        versions=(*_TENSORRT, "tensorrt-cu13-bindings"),
        package=OptionalPackage("TensorRT", "compiled encoders, NVIDIA", "tensorrt", _TENSORRT),
    ),
    "tensorrt-rtx": CompiledRuntime(
        "slide2vec.runtime.tensorrt",
        "slide2vec.compile.plan_builder",
        devices=("cuda",),
        versions=_RTX,
        package=OptionalPackage("TensorRT-RTX", "compiled encoders, NVIDIA", "tensorrt-rtx", _RTX),
    ),
    "openvino": CompiledRuntime(
        "slide2vec.runtime.openvino_engine",
        "slide2vec.compile.openvino_builder",
        devices=("cpu",),
        versions=("openvino",),
        package=OptionalPackage("OpenVINO", "compiled encoders, CPU", "openvino", ("openvino",)),
    ),
    "inductor": CompiledRuntime(
        "slide2vec.runtime.inductor_engine",
        "slide2vec.compile.inductor_builder",
        devices=("cuda", "cpu"),
        versions=("torch",),
    ),
}
