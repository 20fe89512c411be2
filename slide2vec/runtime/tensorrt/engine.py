"""A plan of TensorRT or TensorRT-RTX as an engine of the stream: PyTorch tensors, nothing leaves the GPU."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slide2vec.errors import ConfigError, EngineError
from slide2vec.runtime.base import BatchProfile, Layout
from slide2vec.runtime.record import EngineRecord, per_gpu
from slide2vec.runtime.tensorrt.available import require

if TYPE_CHECKING:
    from slide2vec.runtime.tensorrt.contexts import ContextPool

__all__ = ["TensorRTEngine", "load"]

logger = logging.getLogger(__name__)

DTYPES = {"float32_nchw": "float32", "uint8_nhwc": "uint8"}


def load(record: EngineRecord, file: Path, device: torch.device) -> TensorRTEngine:
    """The engine of a record, see `TensorRTEngine`; kernels of TensorRT-RTX are kept beside it."""
    kernels = None
    if record.runtime == "tensorrt-rtx":
        kernels = file.with_name(per_gpu("kernels", torch.cuda.get_device_name(device), "cache"))
    return TensorRTEngine(
        file,
        device=device,
        profile=record.profile,
        runtime=record.runtime,
        kernels=kernels,
        **record.engine_arguments,
    )


class TensorRTEngine:
    """See `slide2vec.runtime.base.Engine`. Safe to use from several threads.

    Args:
        plan: file that `slide2vec.compile.tensorrt.build_plan` wrote, for this GPU and with this TensorRT.
        device: a CUDA device.
        precision: what the plan was built at; for the record.
        feature_dim: D.
        layout: of the pixels that the plan takes.
        profile: batch sizes that it was built for. Larger batches are split, smaller ones padded.
        contexts: batches that can be under way; each costs the activations of a batch of the profile's max
            (with CUDA graphs: per size that has one, and one context more).
        cuda_graphs: whether batches of the profile's opt and max run as CUDA graphs.
        runtime: "tensorrt" or "tensorrt-rtx".
        kernels: file in which TensorRT-RTX keeps the kernels that it compiles on this GPU; None = nowhere.

    Raises:
        ExtraMissingError: TensorRT is not installed.
        EngineError: it cannot be used here, or the plan does not load or is not what was said.
        ConfigError: fewer than one context.
    """

    holds_gil = False  # it only queues work

    def __init__(
        self,
        plan: Path,
        *,
        device: torch.device,
        precision: str,
        feature_dim: int,
        layout: Layout,
        profile: BatchProfile,
        contexts: int = 2,
        cuda_graphs: bool = True,
        runtime: str = "tensorrt",
        kernels: Path | None = None,
    ) -> None:
        if contexts < 1:
            raise ConfigError(f"contexts={contexts}: 1 or more are needed")
        require(runtime, device)
        self.runtime = runtime
        self.device, self.precision, self.feature_dim, self.layout = device, precision, feature_dim, layout
        self._profile = profile
        with torch.cuda.device(device):
            self._contexts: ContextPool | None = self._load(plan, contexts, cuda_graphs, kernels)

    def _load(self, path: Path, contexts: int, cuda_graphs: bool, kernels: Path | None) -> ContextPool:
        from slide2vec.runtime.tensorrt.contexts import ContextPool
        from slide2vec.runtime.tensorrt.plans import Plan

        plan = Plan(path, self.runtime, kernels)
        if plan.input.dtype != DTYPES[self.layout] or plan.output.shape != (self.feature_dim,):
            raise EngineError(
                f"{path} takes {plan.input.dtype} and gives {plan.output.shape}; expected "
                f"{DTYPES[self.layout]} and ({self.feature_dim},): build it again"
            )
        self._shape, self._plan = plan.input.shape, plan
        started = time.perf_counter()
        pool = ContextPool(plan, self._profile, self.device, count=contexts, graphs=cuda_graphs)
        if plan.kernels is not None:
            pool.wait()
            plan.kernels.report_start(path, time.perf_counter() - started)
        return pool

    def run(self, pixels: Tensor) -> Tensor:
        """Pixels of `layout` -> (B, D) float32, which are the caller's: no later batch overwrites them.

        Raises:
            EngineError: pixels of another shape or dtype, or TensorRT fails, or the engine is closed.
        """
        pool = self._open(pixels)
        most = self._profile.max
        with torch.inference_mode(), torch.cuda.device(self.device):
            features = torch.empty((len(pixels), self.feature_dim), dtype=torch.float32, device=self.device)
            for part, out in zip(torch.split(pixels, most), torch.split(features, most), strict=True):
                pool.run(part, out)
        return features

    def _open(self, pixels: Tensor) -> ContextPool:
        """The contexts, if they take such pixels."""
        if self._contexts is None:
            raise EngineError("this engine is closed")
        found = (tuple(pixels.shape[1:]), str(pixels.dtype), pixels.device.type)
        if found != (self._shape, f"torch.{DTYPES[self.layout]}", self.device.type):
            raise EngineError(
                f"the engine takes (B, {', '.join(map(str, self._shape))}) {DTYPES[self.layout]} on "
                f"{self.device}, not {tuple(pixels.shape)} {pixels.dtype} on {pixels.device}"
            )
        return self._contexts

    def close(self) -> None:
        """Release the device's memory. May be called twice."""
        pool, self._contexts = self._contexts, None
        if pool is not None:
            pool.wait()
            if self._plan.kernels is not None:
                self._plan.kernels.keep()
            del self._plan
