"""What users choose by name.

Nothing is imported here: the command line reads the same names as the configuration, which needs pydantic.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = [
    "Backend",
    "EngineChoice",
    "Executor",
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
#: Of compiled engines.
Runtime: TypeAlias = Literal["tensorrt", "tensorrt-rtx", "openvino", "inductor"]
EngineChoice: TypeAlias = Literal["auto", "torch", Runtime]
