"""Engines of OpenVINO."""

from __future__ import annotations

import torch

from slide2vec.compile.builders import BuildJob, Built
from slide2vec.compile.onnx import unavailable as no_onnx
from slide2vec.errors import EngineError
from slide2vec.runtime import openvino_engine

__all__ = ["build", "unavailable"]


def unavailable(runtime: str, precision: str, device: torch.device) -> str | None:
    """Why it cannot be built here, None when it can."""
    return no_onnx() or openvino_engine.unavailable(runtime, precision, device)


def build(job: BuildJob) -> Built:
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
