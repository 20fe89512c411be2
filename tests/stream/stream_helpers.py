"""A planner whose plans are made up, and a device's decoder that is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.readers.codecs import decode_tile
from slide2vec.readers.decoders import NvimgcodecMemory
from slide2vec.readers.tile_table import TileFormat
from slide2vec.slides import Slide
from slide2vec.stream import Planner, SlidePlan


class PlanBy(Planner):
    """Plans by a function of the slide."""

    def __init__(self, plan: Callable[[Slide], SlidePlan]) -> None:
        super().__init__(PreprocessingConfig(), ExecutionOptions())
        self._made_up = plan

    def plan(self, slide: Slide) -> SlidePlan:
        return self._made_up(slide)


class StandInDecoder:
    """A device's decoder of JPEG tiles: strict, on the CPU, its slots filled with what is no tile's."""

    def decode(self, jpegs: Sequence[bytes], form: TileFormat) -> tuple[Any, list[int]]:
        pixels = torch.full((len(jpegs) + 1, form.height, form.width, 3), 99, dtype=torch.uint8)
        for slot, jpeg in enumerate(jpegs):
            found = decode_tile([jpeg], form, (1, 1), None)
            pixels[slot, : found.shape[0], : found.shape[1]] = torch.from_numpy(found)
        return NvimgcodecMemory(pixels), []

    def release(self, memory: Any) -> None:
        memory.pixels.fill_(98)

    def white(self, height: int, width: int) -> torch.Tensor:
        return torch.full((height, width, 3), 255, dtype=torch.uint8)
