"""The engine that is always there: the encoder itself in PyTorch, under autocast below fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slide2vec.runtime.base import Layout

__all__ = ["TorchEngine"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """See `slide2vec.runtime.base.Engine`.

    Args:
        compiled: by `torch.compile`, which takes a while at the first batch.
    """

    runtime = "torch"
    layout: Layout = "float32_nchw"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        feature_dim: int,
        precision: str,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        self.device = device
        self.precision = precision
        self.feature_dim = feature_dim
        self._encoder: Callable[[Tensor], Tensor] = encoder.to(device).eval()
        if compiled:
            self._encoder = torch.compile(self._encoder)

    def run(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, D) float32."""
        with torch.inference_mode(), self._autocast():
            return self._encoder(pixels).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type,
            dtype=DTYPES[self.precision],
            enabled=self.precision != "fp32",
            cache_enabled=False,
        )

    def close(self) -> None:
        """Nothing to release beyond the encoder itself."""
