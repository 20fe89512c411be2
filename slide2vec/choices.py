"""What users choose by name, and which module of ours each name stands for.

The configuration, the command line, `slide2vec doctor` and the rooms that make them read these tables.
Nothing is imported here; modules are when they are first used. A name is a word of its `Literal` and a row of
its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

__all__ = [
    "OUTPUT_FORMATS",
    "RUNTIMES",
    "Backend",
    "CompiledRuntime",
    "EmbeddingFormat",
    "EngineChoice",
    "Executor",
    "OptionalPackage",
    "OutputFormat",
    "Precision",
    "PreparerChoice",
    "Runtime",
    "SegmentationMethod",
]

Precision: TypeAlias = Literal["fp16", "bf16", "fp32", "fp8"]
Backend: TypeAlias = Literal["auto", "tiff", "dicom", "cucim", "vips", "openslide", "asap"]
OutputFormat: TypeAlias = Literal["pt", "npz", "safetensors", "h5"]
SegmentationMethod: TypeAlias = Literal["hsv", "otsu", "threshold"]
PreparerChoice: TypeAlias = Literal["auto", "torch", "dali", "triton"]
Executor: TypeAlias = Literal["local", "ray"]
Runtime: TypeAlias = Literal["tensorrt", "tensorrt-rtx", "openvino", "inductor"]
EngineChoice: TypeAlias = Literal["auto", "torch", Runtime]


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
        return f'pip install "slide2vec[{self.extra}]"'


class CompiledRuntime(NamedTuple):
    """A runtime of compiled engines.

    Attributes:
        home: the module that loads and runs them, a `slide2vec.runtime.loading.RuntimeModule`.
        builder: the module that compiles them, a `slide2vec.compile.builders.BuilderModule`.
        devices: kinds of device that they run on, as PyTorch calls them.
        versions: distributions whose version is in the key of an engine, the first that is installed counts.
        library: None where PyTorch brings it.
    """

    home: str
    builder: str
    devices: tuple[str, ...]
    versions: tuple[str, ...]
    library: OptionalPackage | None = None

    @property
    def install(self) -> str:
        """The command that installs it; none for PyTorch's own."""
        return self.library.install if self.library else ""


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
        library=OptionalPackage("TensorRT", "compiled encoders, NVIDIA", "tensorrt", _TENSORRT),
    ),
    "tensorrt-rtx": CompiledRuntime(
        "slide2vec.runtime.tensorrt",
        "slide2vec.compile.plan_builder",
        devices=("cuda",),
        versions=_RTX,
        library=OptionalPackage("TensorRT-RTX", "compiled encoders, NVIDIA", "tensorrt-rtx", _RTX),
    ),
    "openvino": CompiledRuntime(
        "slide2vec.runtime.openvino_engine",
        "slide2vec.compile.openvino_builder",
        devices=("cpu",),
        versions=("openvino",),
        library=OptionalPackage("OpenVINO", "compiled encoders, CPU", "openvino", ("openvino",)),
    ),
    "inductor": CompiledRuntime(
        "slide2vec.runtime.inductor_engine",
        "slide2vec.compile.inductor_builder",
        devices=("cuda", "cpu"),
        versions=("torch",),
    ),
}
