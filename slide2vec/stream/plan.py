"""The first station: from a slide to what will be read of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from slide2vec.config import PreprocessingConfig
from slide2vec.readers import SlideReader, open_slide, resolve_spacing
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling, TissueMask, read_coordinates, tile_slide
from slide2vec.tiling.previews import write_mask_preview, write_tiling_preview
from slide2vec.tiling.supertiles import Supertile, plan_supertiles

__all__ = ["SlidePlan", "plan_slide"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlidePlan:
    """A slide, opened, with its tiles and the blocks they are read in."""

    slide: Slide
    reader: SlideReader
    tiling: Tiling
    supertiles: tuple[Supertile, ...]
    mask_preview_path: Path | None = None
    tiling_preview_path: Path | None = None


def plan_slide(slide: Slide, config: PreprocessingConfig, output_dir: Path | None = None) -> SlidePlan:
    """Open a slide, find its tissue and tiles (or read them from coordinate files), group them.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        output_dir: where previews go, if the config asks for them.

    Raises:
        SlideError: the slide cannot be opened, has no spacing, an unreadable mask, …
    """
    reader = open_slide(slide, config.backend)
    try:
        tiling, mask = _tiles(reader, slide, config)
        mask_path, tiling_path = _previews(reader, tiling, mask, config, output_dir)
        return SlidePlan(slide, reader, tiling, _supertiles(reader, tiling, config), mask_path, tiling_path)
    except BaseException:
        reader.close()
        raise


def _tiles(
    reader: SlideReader, slide: Slide, config: PreprocessingConfig
) -> tuple[Tiling, TissueMask | None]:
    if config.read_coordinates_from is not None:
        return read_coordinates(config.read_coordinates_from, slide, reader, config), None
    return tile_slide(reader, slide, resolve_spacing(reader, slide), config)


def _previews(
    reader: SlideReader,
    tiling: Tiling,
    mask: TissueMask | None,
    config: PreprocessingConfig,
    output_dir: Path | None,
) -> tuple[Path | None, Path | None]:
    if output_dir is None:
        return None, None
    mask_path = tiling_path = None
    name = f"{tiling.sample_id}.jpg"
    if config.preview.save_mask_preview and mask is not None:
        mask_path = output_dir / "preview" / "mask" / name
        write_mask_preview(mask_path, reader, mask, config.preview)
    if config.preview.save_tiling_preview:
        tiling_path = output_dir / "preview" / "tiling" / name
        write_tiling_preview(tiling_path, reader, tiling, config.preview)
    return mask_path, tiling_path


def _supertiles(reader: SlideReader, tiling: Tiling, config: PreprocessingConfig) -> tuple[Supertile, ...]:
    level = tiling.geometry.read_level
    return tuple(
        plan_supertiles(
            tiling.x,
            tiling.y,
            tiling.geometry,
            reader.downsamples[level],
            file_tile=reader.tile_shapes[level],
            grouped=config.use_supertiles,
        )
    )
