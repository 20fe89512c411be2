"""Whether a decode path gives a slide's pixels: compared with the host's on several of its tissue tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slide2vec.errors import SlideReadError
from slide2vec.prepare.pixel_difference import DECODED, most_textured, spread
from slide2vec.stream.cuda_streams import DeviceStream
from slide2vec.stream.tile_sources import Pixels, SlideSource, TileSource, place_singly

__all__ = ["SampleTiles"]


class SampleTiles:
    """Some tiles of a slide with much texture, and their pixels.

    Args:
        source: reads them on the host.
    """

    def __init__(self, source: SlideSource) -> None:
        looked_at = spread(len(source.tiling))
        looked_at, pixels = _readable(source.of_tiles(looked_at), looked_at)
        most = most_textured(pixels)
        self.tiles, self.pixels = looked_at[most], pixels[most]

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


def _readable(source: SlideSource, tiles: NDArray[np.int64]) -> tuple[NDArray[np.int64], Pixels]:
    """Those of the tiles that can be decoded, and their pixels."""
    side = source.tiling.geometry.requested_tile_size_px
    pixels = np.empty((len(tiles), side, side, 3), np.uint8)
    good = np.ones(len(tiles), bool)
    for number, block in enumerate(source.blocks):
        targets = [pixels[tile] for tile in block.tolist()]
        try:
            source.place(number, source.fetch(number), targets)
        except SlideReadError:
            good[list(place_singly(source, number, targets))] = False
    return tiles[good], pixels[good]
