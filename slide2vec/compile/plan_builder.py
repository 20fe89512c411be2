"""Engines of NVIDIA's two compilers, TensorRT and TensorRT-RTX: plans."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch

from slide2vec.compile import tensorrt
from slide2vec.compile.builders import ONNX_NAME, BuildJob, Built
from slide2vec.compile.onnx import unavailable as no_onnx
from slide2vec.compile.tensorrt import build_plan, check_targets

__all__ = ["build", "not_for_targets", "unavailable"]

logger = logging.getLogger(__name__)

#: Of the distance to 1 that parity allows, what fp8 may take: fp16 and the compiler need the rest.
FP8_MARGIN = 0.9


def unavailable(runtime: str, precision: str, device: torch.device) -> str | None:
    """Why it cannot be built here, None when it can."""
    return no_onnx() or tensorrt.unavailable(runtime, precision, device)


def not_for_targets(precision: str, targets: tuple[str, ...]) -> str | None:
    """Why TensorRT-RTX cannot build for compute capabilities on this machine, with or without a GPU."""
    from slide2vec.runtime.tensorrt.available import not_loading

    check_targets(targets, precision)
    return no_onnx() or not_loading("tensorrt-rtx")


def build(job: BuildJob) -> Built:
    """A plan for this GPU, or of TensorRT-RTX for the compute capabilities of the job."""
    with torch.cuda.device(job.device) if job.runtime == "tensorrt" else nullcontext():
        return _plan(job)


def _plan(job: BuildJob) -> Built:
    from slide2vec.compile.fp8 import quantise_fp8
    from slide2vec.compile.parity import for_layout

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
        runtime=job.runtime,
        targets=job.targets,
    )
    job.drop_onnx(job.folder / ONNX_NAME)
    return Built("encoder.plan", opset, left_out)
