"""Whether a decode path gives a slide's pixels: compared with the host's on several of its tissue tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slide2vec.prepare.pixel_difference import DECODED, tiles_to_compare
from slide2vec.stream.cuda_streams import DeviceStream
from slide2vec.stream.tile_sources import SlideSource, TileSource

__all__ = ["SampleTiles"]


class SampleTiles:
    """Some tiles of a slide with much texture, and their pixels.

    Args:
        source: reads them on the host.
    """

    def __init__(self, source: SlideSource) -> None:
        side = source.tiling.geometry.requested_tile_size_px
        self.tiles, self.pixels = tiles_to_compare(np.arange(len(source.tiling)), side, source.read_tile)

    def wrong(self, opened: Callable[[NDArray[np.int64]], TileSource], stream: DeviceStream) -> str | None:
        """What is wrong with a decode path's pixels of these tiles, None when nothing is.

        Args:
            opened: gives tiles of the slide by that path.
        """
        if not len(self.tiles):
            return "the CPU cannot decode the tiles that would be compared"
        try:
            with stream.current():
                found = torch.zeros(self.pixels.shape, dtype=torch.uint8, device=stream.device)
                source = opened(self.tiles)
                for number, block in enumerate(source.blocks):
                    targets: list[Any] = [found[tile] for tile in block.tolist()]
                    source.place(number, source.fetch(number), targets)
                pixels = found.cpu().numpy()
        except Exception as error:  # of the GPU's libraries, whatever it is
            return f"tiles cannot be compared ({error})"
        return DECODED.exceeded(pixels, self.pixels)
