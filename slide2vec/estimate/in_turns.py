"""What a run takes whose encoders take turns in groups: what each reads, and what waits for it decoded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slide2vec.cohort.resume import plan_everything
from slide2vec.cohort.scratch_room import (
    Tiles,
    TurnUse,
    scratch_folder,
    scratch_room,
    scratch_use,
    tile_bytes,
    tiles_wanted,
)
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import SlideError
from slide2vec.estimate.counts import Output, SlideEstimate, as_workers_take_them
from slide2vec.files.scratch import removed_again
from slide2vec.recipes import Level
from slide2vec.slides import Slide
from slide2vec.stream.plan import plan_slide

__all__ = ["InTurns", "in_turns", "read_together", "reading_seconds"]

#: CPU seconds of a tile of 224 px: decoded and cut; kept in the scratch besides; read from there, where it is
#: in the page cache (benchmarks/results/several-2026-11-28.md). Others by their px.
DECODE_S, KEEP_S, SCRATCH_S = 748e-6, 50e-6, 33e-6
_MEASURED_PX = 224


@dataclass(frozen=True)
class InTurns:
    """Groups of encoders that take turns, over the slides of a run.

    Attributes:
        groups: names of those that read together.
        uses: what each group has of the scratch.
        folder: of the scratch; None where nothing waits.
        limit_bytes: that may wait there.
        counts: of tiles, by the tiles of a slide.
        read_bytes: of each slide's file, by sample_id, all groups together.
    """

    groups: Sequence[Sequence[str]]
    uses: Sequence[TurnUse]
    folder: Path | None
    limit_bytes: int
    counts: Mapping[Tiles, int]
    read_bytes: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """The most that waits in the scratch."""
        return max(use.bytes for use in self.uses)

    @property
    def bytes_of(self) -> Mapping[str, int]:
        """Of each slide's tiles that are kept, by sample_id."""
        kept = set().union(*(use.kept for use in self.uses))
        sizes: Counter[str] = Counter()
        for tiles in kept:
            sizes[tiles[0]] += self.counts[tiles] * tile_bytes(tiles[2] or 0)
        return sizes

    @property
    def from_scratch(self) -> Counter[str]:
        """How many times the tiles of each slide come from there, by sample_id."""
        return self._times(use.taken for use in self.uses)

    @property
    def decoded_again(self) -> Counter[str]:
        """How many times each slide is decoded after another group has read it, by sample_id."""
        return self._times(use.again for use in self.uses)

    def _times(self, turns: Iterable[Collection[Tiles]]) -> Counter[str]:
        """In how many of these each slide is, in the order in which slides are taken."""
        return Counter(tiles[0] for turn in turns for tiles in self.counts if tiles in turn)

    @property
    def tiles_taken(self) -> set[tuple[float | None, int | None]]:
        """Spacing and side of those that come from the scratch."""
        return {tiles[1:] for use in self.uses for tiles in use.taken}

    def saved_seconds(
        self, decoding: Mapping[tuple[float | None, int | None], float | None], cpus: int
    ) -> float:
        """Seconds that the scratch saves where encoders share the CPUs with those who decode.

        Args:
            decoding: CPU seconds of a tile, by spacing and side; None: not measured.
            cpus: of the job.
        """
        saved = 0.0
        for use in self.uses:
            for tiles in use.taken:
                larger = ((tiles[2] or 0) / _MEASURED_PX) ** 2
                decode = decoding.get(tiles[1:]) or DECODE_S * larger
                saved += self.counts[tiles] * (decode - SCRATCH_S * larger)
            for tiles in use.kept:
                saved -= self.counts[tiles] * KEEP_S * ((tiles[2] or 0) / _MEASURED_PX) ** 2
        return saved / cpus


def read_together(
    groups: Sequence[Sequence[str]], levels: Mapping[str, Level], slides: Sequence[Slide], workers: int = 1
) -> list[list[str]]:
    """Of groups that are in memory together, those that read together: encoders of patients take slides
    patient by patient, and read for themselves where that is another order; workers have an order of their
    own for all of them.

    Args:
        levels: of each encoder.
    """
    is_other = workers == 1 and plan_everything(slides, "patient").slides != list(slides)
    found: list[list[str]] = []
    for group in groups:
        parts: dict[bool, list[str]] = {}
        for name in group:
            parts.setdefault(is_other and levels[name] == "patient", []).append(name)
        found += parts.values()
    return found


def in_turns(
    estimates: Sequence[SlideEstimate],
    outputs: Mapping[str, Output],
    groups: Sequence[Sequence[str]],
    execution: ExecutionOptions,
    takes_over: Collection[str] = (),
    workers: int = 1,
) -> InTurns:
    """What groups of encoders read of the slides, and what of them waits in the scratch.

    Args:
        outputs: by name of the encoder.
        takes_over: encoders that read nothing, since another keeps the embeddings of their tiles.
        workers: among whom slides are shared out, if there are several.

    Raises:
        ConfigError: nothing can be written into scratch_dir or stage_dir, as in the run.
    """
    if workers > 1:
        estimates = as_workers_take_them(estimates)
    folder = scratch_folder(execution)
    with removed_again(folder), scratch_room(execution, len(groups)) as room:
        limit = 0 if room is None else room.limit_bytes
    counts: dict[Tiles, int] = {}
    wanted: list[dict[Tiles, int]] = []
    for group in groups:
        now: dict[Tiles, int] = {}
        for each in estimates:
            for name in _reading(group, each, takes_over):
                tiles = _tiles(each, outputs[name])
                counts[tiles] = each.tiles[name]
                now[tiles] = each.tiles[name] * tile_bytes(tiles[2] or 0)
        wanted.append(now)
    uses = scratch_use(wanted, limit)
    read: Counter[str] = Counter()
    for group, use in zip(groups, uses, strict=True):
        for each in estimates:
            names = _reading(group, each, takes_over)
            decoding = [name for name in names if _tiles(each, outputs[name]) not in use.taken]
            read[each.slide.sample_id] += each.read_by(decoding)
    return InTurns(groups, uses, folder if limit else None, limit, counts, read)


def _reading(group: Sequence[str], estimate: SlideEstimate, takes_over: Collection[str]) -> list[str]:
    """Encoders of a group that read tiles of a slide."""
    return [name for name in group if name not in takes_over and estimate.tiles.get(name)]


def _tiles(estimate: SlideEstimate, output: Output) -> Tiles:
    (tiles,) = tiles_wanted(output.config, [estimate.slide])
    return tiles


def reading_seconds(
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Seconds in which one thread decodes and cuts a tile, from reading the first slides for so long, without
    the first block of each; None where they have too few tiles to tell.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
    """
    size = config.requested_tile_size_px or 0
    tiles, spent = 0, 0.0
    for slide in slides:
        if spent >= seconds:
            break
        with suppress(SlideError), closing(plan_slide(slide, config)) as plan:  # it is the run's business
            for number, block in enumerate(plan.source.blocks):
                targets = list(np.empty((len(block), size, size, 3), np.uint8))
                began = clock()
                plan.source.place(number, plan.source.fetch(number), targets)
                if number:
                    tiles, spent = tiles + len(block), spent + clock() - began
                if spent >= seconds:
                    break
    return spent / tiles if tiles else None
