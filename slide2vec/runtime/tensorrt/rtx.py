"""What only TensorRT-RTX has: targets, validity of plans, kernels that are compiled when they first run.

Import it only where TensorRT-RTX is installed.
"""

from __future__ import annotations

import logging
from pathlib import Path

import tensorrt_rtx_bindings as trt

from slide2vec.errors import EngineError, OutputError
from slide2vec.files import atomic_path

__all__ = ["Kernels", "invalidity", "set_targets"]

logger = logging.getLogger(__name__)

CAPABILITIES = {
    "sm75": trt.ComputeCapability.SM75,
    "sm80": trt.ComputeCapability.SM80,
    "sm86": trt.ComputeCapability.SM86,
    "sm89": trt.ComputeCapability.SM89,
    "sm120": trt.ComputeCapability.SM120,
    "sm121": trt.ComputeCapability.SM121,
}
#: Diagnostics are a sum of these.
FAULTS = {
    trt.EngineInvalidityDiagnostics.VERSION_MISMATCH: "it was built by another version of TensorRT-RTX",
    trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC: "it was not built for this kind of GPU",
    trt.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER: "the NVIDIA driver is too old",
    trt.EngineInvalidityDiagnostics.OLD_CUDA_RUNTIME: "the CUDA runtime is too old",
    trt.EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY: "the GPU has too little memory",
    trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE: "it is no plan of this version of TensorRT-RTX",
    trt.EngineInvalidityDiagnostics.CUDA_ERROR: "CUDA is not installed as it should be",
}


def set_targets(config: trt.IBuilderConfig, targets: tuple[str, ...]) -> None:
    """Have a plan built for compute capabilities, see `available.TARGETS`."""
    config.num_compute_capabilities = len(targets)
    for place, target in enumerate(targets):
        if not config.set_compute_capability(CAPABILITIES[target], place):
            raise EngineError(f"TensorRT-RTX refuses target {target}")


def invalidity(runtime: trt.Runtime, plan: bytes) -> list[str] | None:
    """Why a plan cannot run here, None when it can. Only its header is looked at.

    The list is empty where TensorRT-RTX names no fault; its log may say more.
    """
    validity, faults = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    if validity != trt.EngineValidity.INVALID:
        if validity == trt.EngineValidity.SUBOPTIMAL:
            logger.info("TensorRT-RTX expects this plan to run more slowly than one built for this GPU")
        return None
    return [words for fault, words in FAULTS.items() if int(fault) & faults]


class Kernels:
    """Execution contexts of an engine, and the kernels that they compile for this GPU.

    Args:
        engine: whose.
        path: where kernels are kept between processes; what is there and fits is not compiled again.
    """

    def __init__(self, engine: trt.ICudaEngine, path: Path | None) -> None:
        self._engine, self._path = engine, path
        self._config = engine.create_runtime_config()
        # Before a batch size first runs, not in the background meanwhile: a CUDA graph would keep the slower
        # kernels, and the same tiles would give other bits in the middle of a slide.
        self._config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._cache: trt.IRuntimeCache = self._config.create_runtime_cache()
        self._kept = _read(path)
        #: Whether kernels were there.
        self.found = bool(self._kept) and self._cache.deserialize(self._kept)
        if self._kept and not self.found:
            logger.info("%s is of another GPU, driver or TensorRT-RTX: kernels are compiled anew", path)
        self._config.set_runtime_cache(self._cache)

    def context(self) -> trt.IExecutionContext | None:
        """A new execution context; None when it cannot be made."""
        return self._engine.create_execution_context(runtime_config=self._config)

    def report_start(self, plan: Path, seconds: float) -> None:
        """Say what starting took, and write kernels down."""
        before = len(self._kept)
        self.keep()
        if self.found and len(self._kept) == before:
            logger.info("%s was ready in %.1f s: its kernels were there", plan, seconds)
        else:
            logger.warning(
                "%s was ready in %.1f s: kernels were compiled for this GPU, and are kept (%.1f MB)",
                plan,
                seconds,
                len(self._kept) / 1e6,
            )

    def keep(self) -> None:
        """Write down what was compiled since. Where that fails, it is compiled again next time."""
        made = bytes(self._cache.serialize())
        if self._path is None or made == self._kept:
            return
        try:
            with atomic_path(self._path) as temporary:
                temporary.write_bytes(made)
        except OutputError as error:
            logger.info("compiled kernels are not kept: %s", error)
            return
        self._kept = made


def _read(path: Path | None) -> bytes:
    """Nothing where there is no file, or none that can be read."""
    try:
        return path.read_bytes() if path is not None else b""
    except OSError:
        return b""
