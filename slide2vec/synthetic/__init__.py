"""Synthetic H&E slides: Aperio SVS files of any size, made from a seed, that every reader opens.

For tests, examples and throughput measurements where no patient's slide is at hand. Tissue is a
composition of procedural textures in stain concentrations, coloured by the Beer-Lambert law with the
stain vectors of Ruifrok and Johnston (Anal Quant Cytol Histol 2001; 23: 291-299).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.cpus import job_cpus
from slide2vec.errors import ConfigError
from slide2vec.files import atomic_path
from slide2vec.geometry import is_plausible_spacing
from slide2vec.synthetic.painting import GLASS_RGB, Painter
from slide2vec.synthetic.svs import SvsWriter, encode_jpeg
from slide2vec.synthetic.tissues import TISSUES

__all__ = ["TISSUES", "write_synthetic_slide"]

_FACTOR = 4  # between levels, as Aperio does
_SMALLEST_LEVEL_PX = 1500  # levels are added while the shorter side of the last is longer
_THUMBNAIL_PX = 1024
_KEPT_LEVEL = 2  # 1/16: small enough to be held in memory, and made into all coarser levels


def write_synthetic_slide(
    path: str | os.PathLike[str],
    *,
    size_px: tuple[int, int] | int,
    seed: int = 0,
    tile_px: int = 256,
    quality: int = 80,
    spacing_um: float = 0.25,
    levels: int | None = None,
    bigtiff: bool = False,
    threads: int | None = None,
) -> Path:
    """Write an H&E-like Aperio SVS and return its path. The same arguments give the same bytes.

    Args:
        path: of the file, by custom ending in ".svs"; written beside and moved into place.
        size_px: (width, height) of level 0, or the side of a square.
        seed: another seed is another slide.
        tile_px: side of the file's JPEG tiles, a multiple of 16.
        quality: of the JPEGs, 1 to 100.
        spacing_um: µm/px of level 0.
        levels: number of levels, 1 to 5, each a quarter of the side of the one before; by default as many
            as it takes for the shorter side of the last to be below 1,500 px.
        bigtiff: write a BigTIFF even where a classic TIFF (4 GB) would do.
        threads: that paint; by default one per CPU of the job.

    Raises:
        ConfigError: an argument is out of range.
    """
    size = (size_px, size_px) if isinstance(size_px, int) else size_px
    _check(size, tile_px, quality, spacing_um, levels)
    path = Path(path)
    dimensions = _level_dimensions(size, levels)
    painter = Painter(size, seed, spacing_um)
    description = _description(size, tile_px, quality, spacing_um)
    with (
        atomic_path(path) as temporary,
        SvsWriter(temporary, dimensions, tile_px, description, bigtiff=bigtiff) as svs,
    ):
        _write(svs, painter, dimensions, tile_px, quality, threads or job_cpus())
    return path


@dataclass(frozen=True)
class _Block:
    """4 x 4 level-0 tiles, the level-1 tile they make and its reduction to level 2."""

    column: int
    row: int
    fine: list[bytes]
    coarse: bytes
    reduced: NDArray[Any]


def _write(
    svs: SvsWriter,
    painter: Painter,
    dimensions: list[tuple[int, int]],
    tile_px: int,
    quality: int,
    threads: int,
) -> None:
    """Paint and store all levels; only level 2 and a few blocks are ever in memory."""
    width, height = (-(-side // (_FACTOR * tile_px)) * tile_px // _FACTOR for side in dimensions[0])
    overview = np.empty((height, width, 3), np.uint8)
    step = tile_px // _FACTOR
    for block in _blocks(painter, dimensions[0], tile_px, quality, threads):
        _store_block(svs, block, len(dimensions))
        top, left = block.row * step, block.column * step
        overview[top : top + step, left : left + step] = block.reduced
    last: NDArray[Any] = overview
    for level, (wide, high) in enumerate(dimensions[_KEPT_LEVEL:], start=_KEPT_LEVEL):
        if level > _KEPT_LEVEL:
            last = last[: high * _FACTOR, : wide * _FACTOR]
            last = cv2.resize(last, (wide, high), interpolation=cv2.INTER_AREA)
        last = last[:high, :wide]
        _store_level(svs, level, last, tile_px, quality)
    svs.write_thumbnail(_thumbnail(overview, dimensions[0]), quality)


def _blocks(
    painter: Painter, size: tuple[int, int], tile_px: int, quality: int, threads: int
) -> Iterator[_Block]:
    """All blocks of a slide, row by row, painted ahead by threads in bounded number."""
    columns, rows = (-(-side // (_FACTOR * tile_px)) for side in size)
    glass = painter.glass(tile_px)
    glass_jpeg = encode_jpeg(glass, quality)

    def make(column: int, row: int) -> _Block:
        pixels = np.empty((_FACTOR * tile_px, _FACTOR * tile_px, 3), np.uint8)
        jpegs = []
        for top in range(0, _FACTOR * tile_px, tile_px):
            for left in range(0, _FACTOR * tile_px, tile_px):
                x, y = column * _FACTOR * tile_px + left, row * _FACTOR * tile_px + top
                bare = painter.is_glass(x, y, tile_px)
                tile = glass if bare else painter.paint(x, y, tile_px)
                pixels[top : top + tile_px, left : left + tile_px] = tile
                jpegs.append(glass_jpeg if bare else encode_jpeg(tile, quality))
        quarter = cv2.resize(pixels, (tile_px, tile_px), interpolation=cv2.INTER_AREA)
        side = tile_px // _FACTOR
        sixteenth = cv2.resize(quarter, (side, side), interpolation=cv2.INTER_AREA)
        return _Block(column, row, jpegs, encode_jpeg(quarter, quality), sixteenth)

    places = ((column, row) for row in range(rows) for column in range(columns))
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(pool.submit(make, *place) for place in islice(places, 2 * threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(make, *place) for place in islice(places, 1))


def _store_block(svs: SvsWriter, block: _Block, levels: int) -> None:
    columns, rows = svs.grid(0)
    for index, jpeg in enumerate(block.fine):
        column, row = block.column * _FACTOR + index % _FACTOR, block.row * _FACTOR + index // _FACTOR
        if column < columns and row < rows:
            svs.write_tile(0, column, row, jpeg)
    if levels > 1 and block.column < svs.grid(1)[0] and block.row < svs.grid(1)[1]:
        svs.write_tile(1, block.column, block.row, block.coarse)


def _store_level(svs: SvsWriter, level: int, pixels: NDArray[Any], tile_px: int, quality: int) -> None:
    """Cut a level into tiles, the last ones padded with glass."""
    columns, rows = svs.grid(level)
    for row in range(rows):
        for column in range(columns):
            part = pixels[row * tile_px : (row + 1) * tile_px, column * tile_px : (column + 1) * tile_px]
            tile = np.full((tile_px, tile_px, 3), GLASS_RGB, np.uint8)
            tile[: part.shape[0], : part.shape[1]] = part
            svs.write_tile(level, column, row, encode_jpeg(tile, quality))


def _thumbnail(overview: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """At most 1,024 px on the longer side, from the 1/16 level."""
    width, height = (max(1, side // _FACTOR**_KEPT_LEVEL) for side in size)
    scale = min(1.0, _THUMBNAIL_PX / max(width, height))
    target = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(overview[:height, :width], target, interpolation=cv2.INTER_AREA)


def _level_dimensions(size: tuple[int, int], levels: int | None) -> list[tuple[int, int]]:
    dimensions = [size]
    while min(dimensions[-1]) >= _SMALLEST_LEVEL_PX if levels is None else len(dimensions) < levels:
        width, height = dimensions[-1]
        dimensions.append((width // _FACTOR, height // _FACTOR))
    return dimensions


def _description(size: tuple[int, int], tile_px: int, quality: int, spacing_um: float) -> str:
    """What Aperio scanners write, as far as readers look at it."""
    width, height = size
    return (
        f"Aperio Image Library v12.0.0 \r\n{width}x{height} [0,0 {width}x{height}] ({tile_px}x{tile_px}) "
        f"JPEG/RGB Q={quality}|AppMag = {10 / spacing_um:g}|MPP = {spacing_um:g}|ScanScope ID = synthetic"
    )


def _check(size: tuple[int, int], tile_px: int, quality: int, spacing_um: float, levels: int | None) -> None:
    """Refuse what no slide can be."""
    problems = {
        f"size_px: {size} must be at least 256 px a side": min(size) < 256,
        f"tile_px: {tile_px} must be a multiple of 16 from 64 to 1024": tile_px not in range(64, 1025, 16),
        f"quality: {quality} must be from 1 to 100": not 1 <= quality <= 100,
        f"spacing_um: {spacing_um} must be a plausible µm/px": not is_plausible_spacing(spacing_um),
        f"levels: {levels} must be 1 to 5": levels is not None and levels not in range(1, 6),
    }
    for problem, found in problems.items():
        if found:
            raise ConfigError(problem)
