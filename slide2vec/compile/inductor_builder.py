"""Engines of AOTInductor, PyTorch's own compiler."""

from __future__ import annotations

import copy
import shutil

import torch

from slide2vec.compile.builders import BuildJob, Built
from slide2vec.compile.compiler_messages import first_line, silenced
from slide2vec.compile.export_module import at_one_size
from slide2vec.compile.onnx import batch_dimension, example_pixels
from slide2vec.errors import EngineError

__all__ = ["build", "unavailable"]


def unavailable(runtime: str, precision: str, device: torch.device) -> str | None:
    """Why it cannot be built here, None when it can."""
    if precision not in ("fp32", "bf16", "fp16"):
        return f"AOTInductor does not compute in {precision}"
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "AOTInductor needs a C++ compiler (g++ or clang++)"
    return None


def build(job: BuildJob) -> Built:
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
