"""From an exported encoder to a file that a runtime loads: what its builder gets and gives, and which can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from slide2vec.choices import RUNTIMES
from slide2vec.compile.export_module import ExportedEncoder
from slide2vec.compile.onnx import export_onnx
from slide2vec.errors import EngineError
from slide2vec.recipes import Recipe
from slide2vec.runtime.base import BatchProfile, Layout
from slide2vec.runtime.loading import runtimes_for

__all__ = ["BuildJob", "BuilderModule", "Built", "Progress", "builder_of", "default_runtime", "unavailable"]

#: Called with what is being done, and how far it is: step, of steps (0 = not known).
Progress: TypeAlias = Callable[[str, int, int], None]

ONNX_NAME = "encoder.onnx"


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """An engine to build.

    Attributes:
        encoder: in fp32, on the CPU.
        folder: empty, for the engine's files.
        device: it is for.
        opset: of the ONNX; None = the best that works.
        calibration: (N, H, W, 3) uint8, tiles that number ranges are taken from (fp8).
        keep_onnx: leave the ONNX file beside the engine.
        workspace_bytes, optimization_level, hardware_compatibility, timing_cache: TensorRT's.
        targets: compute capabilities, TensorRT-RTX's.
    """

    encoder: nn.Module
    recipe: Recipe
    folder: Path
    device: torch.device
    runtime: str
    precision: str
    layout: Layout
    profile: BatchProfile
    opset: int | None
    calibration: Tensor
    progress: Progress
    keep_onnx: bool = False
    workspace_bytes: int | None = None
    optimization_level: int = 3
    hardware_compatibility: str = "none"
    timing_cache: Path | None = None
    targets: tuple[str, ...] = ()

    def exported(self, precision: str) -> ExportedEncoder:
        """The module to export, in a precision of PyTorch's."""
        recipe = self.recipe
        made = ExportedEncoder(self.encoder, recipe.transform, self.layout, precision, recipe.engine)
        return made.eval()

    def to_onnx(self, precision: str, opset: int | None = None) -> tuple[Path, int]:
        """The encoder as ONNX in the folder, and its opset: that of the job, else `opset`, else the best."""
        self.progress("exporting to ONNX", 0, 0)
        path = self.folder / ONNX_NAME
        size = self.recipe.transform.crop
        asked = self.opset or opset
        return path, export_onnx(self.exported(precision), path, input_size_px=size, opset=asked)

    def drop_onnx(self, path: Path) -> None:
        """Remove the ONNX, unless it is to be kept."""
        if not self.keep_onnx:
            for each in self.folder.glob(f"{path.name}*"):
                each.unlink()


@dataclass(frozen=True)
class Built:
    """Name of the engine's file in the folder, the opset of the ONNX it was made from, and the layers that
    are not in fp8 for the sake of parity."""

    file: str
    opset: int | None = None
    left_out: tuple[str, ...] = ()


class BuilderModule(Protocol):
    """What the module that builds engines of a runtime has (`CompiledRuntime.builder`)."""

    def unavailable(self, runtime: str, precision: str, device: torch.device) -> str | None:
        """Why it cannot build here in a precision, None when it can."""
        ...

    def build(self, job: BuildJob) -> Built:
        """Write the engine's file into the folder of the job.

        Raises:
            EngineError: it cannot be built.
        """
        ...


def builder_of(runtime: str) -> BuilderModule:
    """The module that builds engines of a runtime."""
    return cast(BuilderModule, import_module(RUNTIMES[runtime].builder))


def unavailable(runtime: str, precision: str, device: torch.device) -> str | None:
    """Why engines of a runtime cannot be built here in a precision, None when they can."""
    if runtime not in runtimes_for(device):
        known = ", ".join(runtimes_for(device)) or "none"
        return f"{runtime} has no engines for {device.type}; those that have: {known}"
    return builder_of(runtime).unavailable(runtime, precision, device)


def default_runtime(precision: str, device: torch.device) -> str:
    """The best runtime that can build here.

    Raises:
        EngineError: none can, and why.
    """
    reasons = []
    # Of NVIDIA's two, TensorRT-RTX where it knows the GPU: it builds in seconds, and installs from PyPI.
    for runtime in sorted(runtimes_for(device), key=lambda name: name != "tensorrt-rtx"):
        reason = unavailable(runtime, precision, device)
        if reason is None:
            return runtime
        reasons.append(f"{runtime}: {reason}")
    raise EngineError(
        f"no engine in {precision} can be built for {device.type} here"
        + (f" ({'; '.join(reasons)})" if reasons else "")
    )
