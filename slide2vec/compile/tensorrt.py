"""Building a plan of TensorRT or TensorRT-RTX from an ONNX file: what can be asked for, and had here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slide2vec.errors import ConfigError, EngineError, ExtraMissingError
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.tensorrt.available import (
    TARGETS,
    is_installed,
    not_loading,
    require,
    unavailable,
    unsuited,
)

__all__ = ["build_plan", "check_targets", "default_targets", "unavailable"]

PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
LEVELS = range(6)
COMPATIBILITY = ("none", "same_compute_capability", "ampere_plus")
#: What TensorRT-RTX takes by default (its documentation: 8.0, 8.6, 8.9, 12.0).
USUAL = ("sm80", "sm86", "sm89", "sm120")


def build_plan(
    onnx: Path,
    plan: Path,
    *,
    profile: BatchProfile,
    precision: str,
    workspace_bytes: int | None = None,
    optimization_level: int = 3,
    timing_cache: Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    hardware_compatibility: str = "none",
    runtime: str = "tensorrt",
    targets: tuple[str, ...] = (),
) -> None:
    """Compile an ONNX file: with TensorRT for the current CUDA device (`torch.cuda.device`), which takes
    minutes; with TensorRT-RTX for compute capabilities, which needs no GPU. `plan` appears whole or not at
    all. Ctrl-C stops it at the next step.

    Args:
        onnx: with one input, the batch first; external data lies beside it. Networks are strongly typed:
            its dtypes are the precision.
        plan: the file to write. It loads on this TensorRT and this kind of GPU only.
        profile: batch sizes; where the ONNX file has a fixed batch, all three must be it.
        precision: what the ONNX file was exported at: "fp32" forbids TF32, which the fp32 layers of the
            others may use.
        workspace_bytes: most memory for a layer's scratch; None = all that the device has.
        optimization_level: 0 (fastest build) to 5 (most tactics tried).
        timing_cache: measured tactics from earlier builds, read and rewritten; one that belongs to another
            GPU or TensorRT is ignored and replaced.
        on_progress: called with (phase, steps done, steps), from TensorRT's threads. What it raises stops
            the build and is raised here.
        hardware_compatibility: other GPUs that the plan must run on: "none", "same_compute_capability" or
            "ampere_plus" (Ampere and newer); slower. TensorRT only.
        runtime: "tensorrt" or "tensorrt-rtx".
        targets: compute capabilities that the plan must run on ("sm89", …); TensorRT-RTX only, which needs
            one at least.

    Raises:
        ConfigError: an argument that is not allowed.
        ExtraMissingError: TensorRT is not installed.
        EngineError: it cannot be used here, cannot parse the file, or fails to build.
        OutputError: the plan cannot be written.
    """
    _check(precision, workspace_bytes, optimization_level, hardware_compatibility)
    if runtime == "tensorrt-rtx":
        check_targets(targets, precision)
        if reason := not_loading(runtime):
            raise (EngineError if is_installed(runtime) else ExtraMissingError)(reason)
        timing_cache = None  # with one it asks for a GPU, and times nothing
    else:
        require()
    from slide2vec.compile.tensorrt_builder import Settings, build

    settings = Settings(
        profile=profile,
        tf32=precision != "fp32",
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
        hardware_compatibility=hardware_compatibility,
        targets=targets,
    )
    build(runtime, onnx, plan, settings, timing_cache, on_progress)


def _check(precision: str, workspace_bytes: int | None, level: int, compatibility: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ConfigError(f"workspace_bytes={workspace_bytes}: 1 or more, or None for no limit")
    if level not in LEVELS:
        raise ConfigError(f"optimization_level={level} is not one of {LEVELS[0]} to {LEVELS[-1]}")
    if compatibility not in COMPATIBILITY:
        allowed = ", ".join(COMPATIBILITY)
        raise ConfigError(f"hardware_compatibility={compatibility!r} is not one of {allowed}")


def default_targets(precision: str) -> tuple[str, ...]:
    """Compute capabilities that a plan is built for where none are named and no GPU is at hand."""
    return tuple(target for target in USUAL if unsuited(target, precision) is None)


def check_targets(targets: tuple[str, ...], precision: str) -> None:
    """Raises ConfigError where there are none, or one cannot be built for."""
    if not targets:
        raise ConfigError(f"TensorRT-RTX needs a target, one or more of {', '.join(TARGETS)}")
    for target in targets:
        if reason := unsuited(target, precision):
            raise ConfigError(reason)
