"""Tiles and bytes of slides, before anything of them is embedded."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import as_slide_error
from slide2vec.readers.probe import probe
from slide2vec.readers.slide_files import bytes_of
from slide2vec.readers.tiff_levels import TiffLevel
from slide2vec.slides import Slide
from slide2vec.stream.plan import PlanRequest, SlidePlan, plan_together
from slide2vec.tiling import Tiling

__all__ = [
    "COORDINATES_BYTES",
    "Output",
    "SlideEstimate",
    "as_workers_take_them",
    "count_tiles",
    "unevenness",
]

#: Bytes of a tile's coordinates on disk: x and y as int64, tissue fraction as float32, index as int32.
COORDINATES_BYTES = 24


@dataclass(frozen=True)
class Output:
    """What an encoder takes and gives.

    Attributes:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        dim: D of an embedding of a tile.
        value_bytes: 4 for fp32, 2 for fp16.
        keeps_tiles: embeddings of tiles are written.
    """

    config: PreprocessingConfig
    dim: int
    value_bytes: int = 4
    keeps_tiles: bool = True


@dataclass(frozen=True)
class SlideEstimate:
    """A slide of a run that has not begun.

    Attributes:
        tiles: of each encoder, as the run will find them.
        written_bytes: embeddings and coordinates, about.
        errors: of encoders for which it cannot be planned.
        file_bytes: of its file.
        levels: of each encoder, the level that is read, and what share of the file its tiles are.
    """

    slide: Slide
    tiles: Mapping[str, int]
    written_bytes: int
    errors: Mapping[str, Exception]
    file_bytes: int = 0
    levels: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def read_bytes(self) -> int:
        """About what is read of its file by all encoders together."""
        return self.read_by(self.levels)

    def read_by(self, names: Iterable[str]) -> int:
        """About what is read of its file by encoders that read together: its share of the levels that
        they read, of each the largest that one of them has."""
        shares: dict[int, float] = {}
        for level, share in (self.levels[name] for name in names if name in self.levels):
            shares[level] = max(shares.get(level, 0.0), share)
        return round(self.file_bytes * min(1.0, sum(shares.values())))


def count_tiles(
    slides: Sequence[Slide], outputs: Mapping[str, Output], threads: int
) -> Iterator[SlideEstimate]:
    """The tiles of each slide, in order. Tissue is found as in a run, on a coarse level, and no tile is read,
    but for the pixel filters, which look at tiles in a coarse spacing.

    Args:
        outputs: by name of the encoder.
        threads: slides at once.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="plan") as pool:
        yield from pool.map(lambda slide: _estimate(slide, outputs), slides)


def as_workers_take_them(estimates: Iterable[SlideEstimate]) -> list[SlideEstimate]:
    """Slides in the order in which workers are given them: the largest files first."""
    return sorted(estimates, key=lambda each: each.file_bytes, reverse=True)


def unevenness(estimates: Iterable[SlideEstimate], workers: int) -> float:
    """How many times longer workers take than if all of them ended together, as one of them does all of a
    slide. 1 at least."""
    loads = [0] * workers
    for each in as_workers_take_them(estimates):
        heapq.heapreplace(loads, loads[0] + sum(each.tiles.values()))
    return max(loads) * workers / sum(loads) if any(loads) else 1.0


def _estimate(slide: Slide, outputs: Mapping[str, Output]) -> SlideEstimate:
    configs = {name: output.config for name, output in outputs.items()}
    different = list({config.model_dump_json(): config for config in configs.values()}.values())
    made: list[SlidePlan | Exception]
    try:
        made = plan_together(slide, [PlanRequest(config) for config in different])
    except Exception as error:
        made = [error] * len(different)
    plans = {config.model_dump_json(): plan for config, plan in zip(different, made, strict=True)}
    good = [plan for plan in made if isinstance(plan, SlidePlan)]
    file_bytes, of_tiff = (bytes_of(slide.image_path), probe(slide).levels) if good else (0, ())
    tiles: dict[str, int] = {}
    errors: dict[str, Exception] = {}
    levels: dict[str, tuple[int, float]] = {}
    written = 0
    for name, output in outputs.items():
        plan = plans[configs[name].model_dump_json()]
        if isinstance(plan, Exception):
            errors[name] = as_slide_error(plan, slide.sample_id, "finding its tiles")
            continue
        tiles[name], levels[name] = len(plan.tiling), _share_read(plan, of_tiff, file_bytes)
        kept = output.dim * output.value_bytes if output.keeps_tiles else 0
        written += len(plan.tiling) * kept
    for plan in good:
        plan.source.close()
        written += len(plan.tiling) * COORDINATES_BYTES
    return SlideEstimate(slide, tiles, written, errors, file_bytes, levels)


def _share_read(plan: SlidePlan, levels: Sequence[TiffLevel], file_bytes: int) -> tuple[int, float]:
    """The level that is read, and the share of the file that is: of a tiled TIFF the bytes of what tiles
    touch, else by area.

    Args:
        levels: of a TIFF.
    """
    tiling, geometry = plan.tiling, plan.tiling.geometry
    level = geometry.read_level
    if level < len(levels) and (shape := levels[level].tile) is not None:
        return level, _bytes_under(levels[level], shape, tiling) / file_bytes
    width, height = tiling.dimensions
    areas = [width * height / downsample**2 for downsample in tiling.downsamples]
    read = min(len(tiling) * geometry.read_tile_size_px**2, areas[level])
    return level, read / sum(areas)


def _bytes_under(level: TiffLevel, shape: tuple[int, int], tiling: Tiling) -> int:
    """Of the compressed tiles, of this shape, that a slide's tiles touch."""
    side, downsample = tiling.geometry.read_tile_size_px, tiling.downsamples[tiling.geometry.read_level]
    wide, high = shape
    columns, rows = -(-level.width // wide), -(-level.height // high)
    x, y = (np.rint(each / downsample).astype(np.int64) for each in (tiling.x, tiling.y))
    is_read = np.zeros((rows, columns), bool)
    for right, down in product(range(0, side + wide, wide), range(0, side + high, high)):
        column, row = (x + min(right, side - 1)) // wide, (y + min(down, side - 1)) // high
        is_read[row.clip(0, rows - 1), column.clip(0, columns - 1)] = True
    per_plane = level.counts.reshape(-1, is_read.size)  # one, but for channels that are apart
    return int(per_plane[:, is_read.ravel()].sum())
