"""One slide in parts, for several devices, and its embeddings put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from slide2vec.config import PreprocessingConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.scale.messages import ALONE, Known, Task
from slide2vec.stream import SlideOutcome, SlidePlan
from slide2vec.tiling import BadTile, Tiling

__all__ = ["SplitSlide", "divisible"]

Indices = NDArray[np.int64]


def divisible(config: PreprocessingConfig) -> bool:
    """Whether parts of a slide can be read by themselves: not from or into an archive of its tiles."""
    return config.read_tiles_from is None and config.on_the_fly and not config.save_tiles


class SplitSlide:
    """A slide's tiles (or regions), as many in each part, supertiles whole.

    Args:
        plan: of the whole slide; its source may be closed.
        count: parts that are wanted; fewer for a slide of few supertiles, one for a slide without tissue.
    """

    def __init__(self, plan: SlidePlan, count: int) -> None:
        self._plan = plan
        self._all: Tiling = plan.tiling.recorded
        groups = _by_region(self._all, count) if plan.tiling.regions is not None else _by_block(plan, count)
        self._indices = [group for group in groups if len(group)] or [np.arange(0, dtype=np.int64)]
        self.tasks = [self._task(number) for number in range(len(self._indices))]

    def _task(self, number: int) -> Task:
        slide, indices = self._plan.slide, self._indices[number]
        name = f"{slide.sample_id}.part-{number + 1}-of-{len(self._indices)}"
        tiling = replace(
            self._all,
            sample_id=name,
            x=self._all.x[indices],
            y=self._all.y[indices],
            tissue_fractions=self._all.tissue_fractions[indices],
        )
        return Task(replace(slide, sample_id=name), {ALONE: Known(tiling)})

    def joined(self, outcomes: Sequence[SlideOutcome]) -> SlideOutcome:
        """The slide's own outcome from those of its parts, in their order."""
        for outcome in outcomes:
            if outcome.error is not None:
                return SlideOutcome(self._plan.slide, error=self._error(outcome))
        skipped = tuple(bad for outcome in outcomes for bad in outcome.skipped)
        tiling = self._plan.tiling.without(_places(self._plan.tiling, skipped)) if skipped else None
        return SlideOutcome(
            self._plan.slide,
            embedded=self._embedded([_embedded(outcome) for outcome in outcomes]),
            tiling=tiling or self._plan.tiling,
            backend=outcomes[0].backend,
            skipped=(*self._plan.skipped, *skipped),
        )

    def _error(self, outcome: SlideOutcome) -> Exception:
        """With the slide's own name."""
        error = outcome.error
        assert error is not None
        message = str(error).replace(outcome.slide.sample_id, self._plan.slide.sample_id)
        try:
            return type(error)(message)
        except TypeError:  # a class that is made otherwise
            return error

    def _embedded(self, parts: Sequence[EmbeddedSlide]) -> EmbeddedSlide:
        kept = [
            indices[np.isin(_keys(self._all.x[indices], self._all.y[indices]), _keys(part.x, part.y))]
            for indices, part in zip(self._indices, parts, strict=True)
        ]
        order = np.argsort(np.concatenate(kept), kind="stable")
        first = parts[0]

        def together(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
            return np.concatenate(arrays)[order]

        regions = first.tile_x is not None
        embeddings = torch.cat([part.tile_embeddings for part in parts])[torch.from_numpy(order)]
        return replace(
            first,
            sample_id=self._plan.slide.sample_id,
            tile_embeddings=embeddings,
            x=together([part.x for part in parts]),
            y=together([part.y for part in parts]),
            num_tiles=sum(part.num_tiles for part in parts),
            mask_preview_path=self._plan.mask_preview_path,
            tiling_preview_path=self._plan.tiling_preview_path,
            tile_x=together([part.tile_x for part in parts if part.tile_x is not None]) if regions else None,
            tile_y=together([part.tile_y for part in parts if part.tile_y is not None]) if regions else None,
        )


def _embedded(outcome: SlideOutcome) -> EmbeddedSlide:
    assert outcome.embedded is not None
    return outcome.embedded


def _by_region(tiling: Tiling, count: int) -> list[Indices]:
    return np.array_split(np.arange(len(tiling), dtype=np.int64), count)


def _by_block(plan: SlidePlan, count: int) -> list[Indices]:
    """Neighbouring supertiles, as many tiles in each part as can be."""
    blocks, total = plan.source.blocks, len(plan.tiling)
    middles = np.cumsum([len(block) for block in blocks]) - [len(block) / 2 for block in blocks]
    parts = np.minimum((middles * count / total).astype(np.int64), count - 1)
    groups = [[block for block, part in zip(blocks, parts, strict=True) if part == n] for n in range(count)]
    return [np.sort(np.concatenate(group)) for group in groups if group]


def _keys(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number per place: a slide has fewer than 2^31 px a side."""
    return (x << 32) + y


def _places(tiling: Tiling, bad: Sequence[BadTile]) -> list[int]:
    """Indices of tiles by their places."""
    at = {(int(x), int(y)): number for number, (x, y) in enumerate(zip(tiling.x, tiling.y, strict=True))}
    return [at[each.x, each.y] for each in bad]
