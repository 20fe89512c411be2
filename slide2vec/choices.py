"""What users choose by name, and which module of ours each name stands for.

The configuration, the command line, `slide2vec doctor` and the rooms that make them read these tables.
No module of a table is imported here; they are when they are first used. A name is a word of its `Literal`
and a row of its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal, NamedTuple, TypeAlias

from slide2vec.installation import add_extra

__all__ = [
    "BACKENDS",
    "EXECUTORS",
    "OUTPUT_FORMATS",
    "PREPARERS",
    "RUNTIMES",
    "SEGMENTATION_METHODS",
    "SLIDE_ENCODERS",
    "TILE_ENCODERS",
    "Backend",
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
    "TileFamily",
]

Precision: TypeAlias = Literal["fp16", "bf16", "fp32", "fp8"]
Backend: TypeAlias = Literal["auto", "tiff", "dicom", "cucim", "vips", "openslide", "asap"]
OutputFormat: TypeAlias = Literal["pt", "npz", "safetensors", "h5"]
SegmentationMethod: TypeAlias = Literal["hsv", "otsu", "threshold", "auto"]
PreparerChoice: TypeAlias = Literal["auto", "torch", "dali", "triton"]
Executor: TypeAlias = Literal["local", "ray"]
Runtime: TypeAlias = Literal["tensorrt", "tensorrt-rtx", "openvino", "inductor"]
EngineChoice: TypeAlias = Literal["auto", "torch", Runtime]
TileFamily: TypeAlias = Literal[
    "timm", "scattering", "coca", "clip_linear", "musk", "channelwise", "remote", "registered"
]
SlideFamily: TypeAlias = Literal["titan", "prism", "longnet", "moozy_slide", "moozy_case"]


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
    """

    module: str
    name: str
    package: OptionalPackage | None = None

    def imported(self) -> Any:
        """What it is."""
        return getattr(import_module(self.module), self.name)


_CUCIM = OptionalPackage("cuCIM", "fast slide reading", "cucim", ("cucim-cu13", "cucim-cu12", "cucim"))
_VIPS = OptionalPackage("libvips", "reads more TIFF files", "vips", ("pyvips",))
_DALI = OptionalPackage(
    "DALI", "preparing tiles on the GPU", "cuda", ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
)

#: Classes of readers, made of a `Probe`, in the order in which "auto" tries them; their modules have
#: `unavailable() -> str | None`, which says why it cannot be used and what to install.
BACKENDS: Mapping[str, Home] = {
    "tiff": Home("slide2vec.readers.tiff", "TiffReader"),
    "dicom": Home("slide2vec.readers.dicom", "DicomReader"),
    "cucim": Home("slide2vec.readers.cucim", "CucimReader", _CUCIM),
    "vips": Home("slide2vec.readers.vips", "VipsReader", _VIPS),
    "openslide": Home("slide2vec.readers.openslide", "OpenslideReader"),
    "asap": Home("slide2vec.readers.asap", "AsapReader"),
}

#: Each a `TissueMethod` or a `Segmenter`.
SEGMENTATION_METHODS: Mapping[str, Home] = {
    "hsv": Home("slide2vec.tiling.tissue_methods", "HSV"),
    "otsu": Home("slide2vec.tiling.tissue_methods", "OTSU"),
    "threshold": Home("slide2vec.tiling.tissue_methods", "THRESHOLD"),
    "auto": Home("slide2vec.tiling.auto_tissue", "AUTO"),
}

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
    "scattering": Home("slide2vec.encoders.scattering", "scattering_encoder"),
    "coca": Home("slide2vec.encoders.coca", "CocaEncoder"),
    "clip_linear": Home("slide2vec.encoders.clip_linear", "ClipLinearEncoder"),
    "musk": Home("slide2vec.encoders.musk", "MuskEncoder"),
    "channelwise": Home("slide2vec.encoders.channelwise", "ChannelwiseEncoder"),
}
#: Modules of PyTorch, made of the keyword arguments of a recipe.
SLIDE_ENCODERS: Mapping[str, Home] = {
    "titan": Home("slide2vec.encoders.slide.titan", "TitanEncoder"),
    "prism": Home("slide2vec.encoders.slide.prism", "PrismEncoder"),
    "longnet": Home("slide2vec.encoders.slide.longnet", "LongNetEncoder"),
    "moozy_slide": Home("slide2vec.encoders.slide.moozy", "MoozySlideEncoder"),
    "moozy_case": Home("slide2vec.encoders.slide.moozy", "MoozyCaseTransformer"),
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


OUTPUT_FORMATS: Mapping[str, EmbeddingFormat] = {
    "pt": EmbeddingFormat("slide2vec.artifacts.pt_format", has_coords=False),
    "npz": EmbeddingFormat("slide2vec.artifacts.npz_format", has_coords=False),
    "safetensors": EmbeddingFormat("slide2vec.artifacts.safetensors_format", has_coords=True),
    "h5": EmbeddingFormat("slide2vec.artifacts.h5_format", has_coords=True),
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
