"""From an exported encoder to a file that a runtime loads: one builder per runtime."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from slide2vec.compile.compiler_messages import first_line, silenced
from slide2vec.compile.export_module import ExportedEncoder, at_one_size
from slide2vec.compile.onnx import batch_dimension, example_pixels, export_onnx
from slide2vec.compile.onnx import unavailable as no_onnx
from slide2vec.errors import EngineError
from slide2vec.recipes import Recipe
from slide2vec.runtime.base import BatchProfile, Layout
from slide2vec.runtime.loading import runtimes_for

__all__ = ["BUILDERS", "BuildJob", "Built", "Progress", "default_runtime", "unavailable"]

logger = logging.getLogger(__name__)

#: Called with what is being done, and how far it is: step, of steps (0 = not known).
Progress: TypeAlias = Callable[[str, int, int], None]

ONNX_NAME = "encoder.onnx"
#: Of the distance to 1 that parity allows, what fp8 may take: fp16 and the compiler need the rest.
FP8_MARGIN = 0.9


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


def unavailable(runtime: str, precision: str, device: torch.device) -> str | None:
    """Why engines of a runtime cannot be built here in a precision, None when they can."""
    if runtime not in runtimes_for(device):
        known = ", ".join(runtimes_for(device)) or "none"
        return f"{runtime} has no engines for {device.type}; those that have: {known}"
    return _REASONS[runtime](precision, device)


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


def _openvino(job: BuildJob) -> Built:
    """OpenVINO's own model, in fp32: it computes in the precision that it is loaded for."""
    import openvino

    onnx, opset = job.to_onnx("fp32")
    job.progress("compiling for OpenVINO", 0, 0)
    try:
        model = openvino.Core().read_model(str(onnx))
        openvino.save_model(model, str(job.folder / "encoder.xml"), compress_to_fp16=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise EngineError(f"OpenVINO cannot compile preset {job.recipe.name}: {reason}") from error
    del model  # it maps the ONNX file
    job.drop_onnx(onnx)
    return Built("encoder.xml", opset)


def _no_openvino(precision: str, device: torch.device) -> str | None:
    from slide2vec.runtime.openvino_engine import unavailable

    return no_onnx() or unavailable(precision)


def _inductor(job: BuildJob) -> Built:
    """A package of compiled code and weights."""
    job.progress("compiling with AOTInductor", 0, 0)
    module = job.exported(job.precision)
    if job.device.type != "cpu":
        module = copy.deepcopy(module).to(job.device)
    pixels = example_pixels(module, job.recipe.transform.crop).to(job.device)
    shapes = batch_dimension(job.profile.max) if job.profile.max > 1 else None
    try:
        with silenced(), torch.no_grad(), at_one_size():
            program = torch.export.export(
                module, (pixels[: job.profile.max],), dynamic_shapes=shapes, strict=False
            )
            torch._inductor.aoti_compile_and_package(program, package_path=str(job.folder / "encoder.pt2"))
    except Exception as error:  # the compiler's own errors have no common base
        raise EngineError(
            f"AOTInductor cannot compile preset {job.recipe.name}: {first_line(error)}"
        ) from error
    return Built("encoder.pt2")


def _no_inductor(precision: str, device: torch.device) -> str | None:
    if precision not in ("fp32", "bf16", "fp16"):
        return f"AOTInductor does not compute in {precision}"
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "AOTInductor needs a C++ compiler (g++ or clang++)"
    return None


def _tensorrt(job: BuildJob) -> Built:
    """A plan for this GPU."""
    with torch.cuda.device(job.device):
        return _plan(job, "tensorrt")


def _tensorrt_rtx(job: BuildJob) -> Built:
    """A plan for the compute capabilities of the job."""
    return _plan(job, "tensorrt-rtx")


def _plan(job: BuildJob, runtime: str) -> Built:
    """A plan of one of NVIDIA's two compilers."""
    from slide2vec.compile.fp8 import quantise_fp8
    from slide2vec.compile.parity import for_layout
    from slide2vec.compile.tensorrt import build_plan

    transform = job.recipe.transform
    # In fp32 NVIDIA has no kernel for the Attention operator of newer opsets (TensorRT-RTX 1.7, in words).
    attends_in_fp32 = job.precision == "fp32" or "attention" in job.recipe.engine.islands
    best = 20 if attends_in_fp32 else None
    onnx, opset = job.to_onnx("fp16" if job.precision == "fp8" else job.precision, best)
    left_out: tuple[str, ...] = ()
    if job.precision == "fp8":
        job.progress("calibrating fp8", 0, 0)
        pixels = for_layout(job.calibration, (transform.mean, transform.std), job.layout).numpy()
        quantised = job.folder / f"{ONNX_NAME}.fp8"
        threshold = job.recipe.engine.threshold("fp8")
        kept = 1 - FP8_MARGIN * (1 - threshold)
        left_out = quantise_fp8(onnx, quantised, pixels, min_cosine=kept)
        if left_out:
            logger.warning("fp8 of %s: left in fp16: %s", job.recipe.name, ", ".join(left_out))
        onnx = quantised
    build_plan(
        onnx,
        job.folder / "encoder.plan",
        profile=job.profile,
        precision=job.precision,
        workspace_bytes=job.workspace_bytes,
        optimization_level=job.optimization_level,
        timing_cache=job.timing_cache,
        on_progress=job.progress,
        hardware_compatibility=job.hardware_compatibility,
        runtime=runtime,
        targets=job.targets,
    )
    job.drop_onnx(job.folder / ONNX_NAME)
    return Built("encoder.plan", opset, left_out)


def _no_tensorrt(precision: str, device: torch.device) -> str | None:
    from slide2vec.compile.tensorrt import unavailable

    return no_onnx() or unavailable("tensorrt", precision, device)


def _no_tensorrt_rtx(precision: str, device: torch.device) -> str | None:
    from slide2vec.compile.tensorrt import unavailable

    return no_onnx() or unavailable("tensorrt-rtx", precision, device)


def not_for_targets(precision: str, targets: tuple[str, ...]) -> str | None:
    """Why TensorRT-RTX cannot build for compute capabilities on this machine, with or without a GPU."""
    from slide2vec.runtime.tensorrt.available import not_loading
    from slide2vec.runtime.tensorrt.targets import check_targets

    check_targets(targets, precision)
    return no_onnx() or not_loading("tensorrt-rtx")


BUILDERS: dict[str, Callable[[BuildJob], Built]] = {
    "openvino": _openvino,
    "inductor": _inductor,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
}
_REASONS: dict[str, Callable[[str, torch.device], str | None]] = {
    "openvino": _no_openvino,
    "inductor": _no_inductor,
    "tensorrt": _no_tensorrt,
    "tensorrt-rtx": _no_tensorrt_rtx,
}
