"""Where the stream keeps tiles, and how they get there: what a transfer is, and that of the host's memory."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import torch
from torch import Tensor

from slide2vec.stream.cuda_streams import DeviceStream, HostStream
from slide2vec.stream.plan import SlidePlan

__all__ = ["HOST_TRANSFER", "HostTransfer", "TileTransfer"]


class TileTransfer(Protocol):
    """Where tiles are kept, and how they get there: host memory, or that of a GPU.

    Attributes:
        device: that keeps batches of tiles.
        stream: the device stream that writes them.
        kind: equal for those that bring the same pixels to the same device.
    """

    device: torch.device
    stream: DeviceStream
    kind: Hashable

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of the device for tiles, uint8, in the order of the device stream."""
        ...

    def bind(self, plan: SlidePlan) -> SlidePlan:
        """The plan with a source whose tiles can be placed there, and its decode path. Called in planning
        threads.

        Raises:
            BackendError: gpu_decode=True, and the slide cannot be decoded on the GPU.
        """
        ...


class HostTransfer:
    """Tiles in host memory, written by the sources themselves. See `TileTransfer`."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.stream: DeviceStream = HostStream(self.device)
        self.kind: Hashable = "host"

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """See `TileTransfer.allocate`."""
        return torch.zeros(shape, dtype=torch.uint8)

    def bind(self, plan: SlidePlan) -> SlidePlan:
        """The plan as it is."""
        return plan


HOST_TRANSFER = HostTransfer()
