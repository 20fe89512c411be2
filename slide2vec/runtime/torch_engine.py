"""The engine that is always there: the encoder itself in PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from slide2vec.runtime.base import Layout
from slide2vec.runtime.cuda_graphs import CudaGraphs

__all__ = ["DTYPES", "TorchEngine"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """See `slide2vec.runtime.base.Engine`. On CUDA, batches of a size that comes again run as a CUDA graph,
    to which smaller ones are padded.

    Args:
        encoder: in fp32, run under autocast below that; or `typed`. On CUDA it stays where it is.
        typed: the encoder computes in the precision by itself, and returns float32.
        compiled: its blocks by `torch.compile`, once for all of them and for each size of batch; smaller
            batches are padded to the largest that was there. That takes a while at the first batch.
        cuda_graphs: False runs every batch kernel by kernel.
    """

    runtime = "torch"
    layout: Layout = "float32_nchw"
    holds_gil = False

    def __init__(
        self,
        encoder: nn.Module,
        *,
        feature_dim: int,
        precision: str,
        device: torch.device,
        compiled: bool = False,
        typed: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        self.device, self.precision, self.feature_dim = device, precision, feature_dim
        self._converts = precision != "fp32" and not typed
        if compiled or device.type == "cuda":
            encoder = _own(encoder)
        self._encoder = encoder.to(device).eval()
        if compiled:
            _compile_blocks(self._encoder)
        self._run: Callable[[Tensor], Tensor] = _Padded(self._encode) if compiled else self._encode
        self._graphs: CudaGraphs | None = None
        if device.type == "cuda" and cuda_graphs:
            self._run = self._graphs = CudaGraphs(self._run, device)

    def run(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, D) float32."""
        with torch.inference_mode():
            return self._run(pixels)

    def _encode(self, pixels: Tensor) -> Tensor:
        with torch.autocast(
            self.device.type, dtype=DTYPES[self.precision], enabled=self._converts, cache_enabled=False
        ):
            features: Tensor = self._encoder(pixels).float()
        return features

    def close(self) -> None:
        """Release CUDA graphs. The encoder is the caller's."""
        if self._graphs is not None:
            self._graphs.close()


class _Padded:
    """Batches of one size for a function compiled for that: the largest that was there."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function, self._size = function, 0

    def __call__(self, batch: Tensor) -> Tensor:
        count = len(batch)
        self._size = max(self._size, count)
        if count == self._size:
            return self._function(batch)
        padding = batch.new_zeros((self._size - count, *batch.shape[1:]))
        return self._function(torch.cat([batch, padding]))[:count]


def _own(encoder: nn.Module) -> nn.Module:
    """The encoder's twin on the same memory. Where callers, who have the encoder in their hands, move it, the
    twin's parameters stay: a CUDA graph has their addresses in it."""
    same = {id(tensor): _alias(tensor) for tensor in chain(encoder.parameters(), encoder.buffers())}
    twin: nn.Module = copy.deepcopy(encoder, same)
    return twin


def _alias(tensor: Tensor) -> Tensor:
    alias = tensor.detach()
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


def _compile_blocks(encoder: nn.Module) -> None:
    """Have the repeated parts of a network compiled, which are one program with other parameters; a network
    without them as a whole."""
    for block in list(_blocks(encoder)) or [encoder]:
        block.compile(dynamic=False)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a network: those of the outermost lists of modules of one class."""
    for child in module.children():
        parts = list(child.children()) if isinstance(child, nn.Sequential | nn.ModuleList) else []
        if len(parts) > 1 and len({type(part) for part in parts}) == 1 and list(parts[0].children()):
            yield from parts
        else:
            yield from _blocks(child)
