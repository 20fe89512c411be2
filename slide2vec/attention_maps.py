"""Attention maps of the tiles of a slide, and pictures of them over the tissue."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from slide2vec.cohort.sink import MemorySink
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.embedded import SlideAttention
from slide2vec.encoders import attention
from slide2vec.encoders.attention import AttentionEncoder
from slide2vec.encoders.input_size import for_input
from slide2vec.errors import ConfigError
from slide2vec.files import atomic_path
from slide2vec.pictures import attention_key, attention_map, attention_overlay, with_footer
from slide2vec.readers import open_and_use, open_slide
from slide2vec.runtime.torch_engine import DTYPES
from slide2vec.slides import Slide, SlideLike, as_slide
from slide2vec.tiling.given import tiling_at
from slide2vec.tiling.previews import thumbnail

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from slide2vec.readers import SlideReader
    from slide2vec.tile_embedder import TileEmbedder
    from slide2vec.tiling import Tiling

__all__ = [
    "attention_maps",
    "attention_of_slide",
    "draw_attention",
    "encode_tiles_attention",
    "with_attention",
    "write_attention",
]

#: Longer side of a picture.
PICTURE_PX = 2048


class TileModel(Protocol):
    """A model of tiles, as far as attention maps need it."""

    def resolve_preprocessing(self, config: PreprocessingConfig | None = None) -> PreprocessingConfig: ...


class AttentionModel(Protocol):
    """A model of any level, as far as attention maps of its tiles need it."""

    @property
    def tile_model(self) -> TileModel: ...

    @property
    def tile_encoding(self) -> TileEmbedder: ...


def encode_tiles_attention(
    self: AttentionModel,
    batch: torch.Tensor,
    *,
    blocks: Sequence[int] = (-1,),
    include_registers: bool = False,
    mean_heads: bool = False,
) -> torch.Tensor:
    """Attention of the class token to the patches of normalised tiles: (B, 3, H, W) -> (B, K, h, w).

    See `slide2vec.encoders.attention.encode_tiles_attention`, also for the errors.
    """
    embedder = self.tile_encoding
    encoder, device, precision = embedder.encoder, embedder.device, embedder.precision
    for side in dict.fromkeys(batch.shape[2:]):
        for_input(embedder.recipe, encoder, side, f"a batch of {tuple(batch.shape)}")
    converts = torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")
    with torch.inference_mode(), converts:
        return attention.encode_tiles_attention(
            encoder.to(device),
            batch.to(device),
            blocks=blocks,
            include_registers=include_registers,
            mean_heads=mean_heads,
        )


def attention_maps(
    self: AttentionModel,
    slide: SlideLike,
    preprocessing: PreprocessingConfig | None = None,
    execution: ExecutionOptions | None = None,
    *,
    at: Sequence[tuple[int, int]] | None = None,
    blocks: Sequence[int] = (-1,),
    include_registers: bool = False,
    mean_heads: bool = True,
) -> SlideAttention:
    """Attention maps of a slide's tiles, with their embeddings from the same pass; on the model's device.

    Args:
        slide, preprocessing, execution: as for `embed_slide`; larger tiles, where the backbone takes
            them, are asked for as `requested_tile_size_px`.
        at: (x, y) of the tiles wanted, level-0 px of their top-left corners; None = all that hold
            tissue. A map of 16 x 16 patches takes 1 KB of memory per tile and channel.
        blocks, include_registers, mean_heads: see `encode_tiles_attention`.

    Raises:
        UnsupportedError, ConfigError: as of `encode_tiles_attention`.
        SlideError: the slide cannot be embedded, or a place is not on it.
    """
    return attention_of_slide(
        self.tile_encoding,
        as_slide(slide),
        self.tile_model.resolve_preprocessing(preprocessing),
        execution or ExecutionOptions(),
        at,
        blocks=blocks,
        include_registers=include_registers,
        mean_heads=mean_heads,
    )


def attention_of_slide(
    embedder: TileEmbedder,
    slide: Slide,
    config: PreprocessingConfig,
    execution: ExecutionOptions,
    at: Sequence[tuple[int, int]] | None,
    **asked: Any,
) -> SlideAttention:
    """Maps and embeddings of a slide's tiles, or of those at given places, from one pass.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        at: see `attention_maps`.

    Raises:
        UnsupportedError, ConfigError, SlideError: as of `attention_maps`.
    """
    size = config.requested_tile_size_px
    assert size is not None
    if config.hierarchical:
        raise ConfigError(
            "attention maps are of tiles, not of regions of several: leave region_tile_multiple out, and ask "
            "for larger tiles (requested_tile_size_px) where the map of a larger field is wanted"
        )
    if execution.torch_compile:
        raise ConfigError(
            "torch_compile=True leaves no attention to look at: leave it out for attention maps"
        )
    encoder = AttentionEncoder(embedder.encoder, **asked)
    with_maps = with_attention(embedder, encoder, size)
    given = None if at is None else _tiling(slide, config, at)
    execution = execution.updated(output_dtype="fp32", output_dir=None)
    sink = MemorySink(config, execution, tilings={} if given is None else {slide.sample_id: given})
    with closing(with_maps.embed_into(sink, [slide])) as outcomes:
        (outcome,) = outcomes
    if outcome.error is not None:
        raise outcome.error
    embedded = outcome.embedded
    assert embedded is not None
    order = slice(None) if at is None else _order(embedded.x, embedded.y, at)
    features, maps = encoder.apart(embedded.tile_embeddings[order], with_maps.recipe.transform.crop)
    return SlideAttention(
        sample_id=slide.sample_id,
        image_path=slide.image_path,
        maps=maps,
        channels=tuple(encoder.channels),
        tile_embeddings=features,
        x=embedded.x[order],
        y=embedded.y[order],
        tile_size_lv0=embedded.tile_size_lv0,
    )


def with_attention(embedder: TileEmbedder, encoder: AttentionEncoder, tile_size_px: int) -> TileEmbedder:
    """The same with maps behind the features: what an engine of both is built from, and found by.

    Args:
        encoder: around that of the embedder.
    """
    size = embedder.recipe_for(tile_size_px).transform.crop
    dim = embedder.recipe.variants[embedder.variant].dim + int(np.prod(encoder.map_shape(size)))
    return embedder.with_encoder(encoder, f"{embedder.variant}+{encoder.output_name}", dim, tile_size_px)


def _tiling(slide: Slide, config: PreprocessingConfig, at: Sequence[tuple[int, int]]) -> Tiling:
    reader, tiling = open_and_use(
        slide, config.backend, None, lambda reader: tiling_at(reader, slide, config, at)
    )
    reader.close()
    return tiling


def _order(x: NDArray[Any], y: NDArray[Any], at: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Where each place asked for is among the tiles."""
    where = {place: index for index, place in enumerate(zip(x.tolist(), y.tolist(), strict=True))}
    return np.array([where[int(left), int(top)] for left, top in at], np.int64)


def draw_attention(
    attention: SlideAttention, *, tile: int | None = None, channel: int | None = None, backend: str = "auto"
) -> NDArray[np.uint8]:
    """The tissue with attention over it, (h, w, 3) uint8 RGB of at most 2,048 px a side; of a slide, with
    what its colours mean in a strip below.

    Args:
        tile: index of one tile; None = the whole slide with all of them.
        channel: which of the maps; None = the mean over all.

    Raises:
        ConfigError: there is no such tile or channel.
        SlideError: the slide cannot be read.
    """
    for what, index, count in (
        ("tile", tile, len(attention.maps)),
        ("channel", channel, attention.maps.shape[1]),
    ):
        if index is not None and not 0 <= index < count:
            raise ConfigError(f"{what}={index}: slide {attention.sample_id} has {count}, 0 to {count - 1}")
    maps = attention.maps
    heat = (maps.mean(dim=1) if channel is None else maps[:, channel]).numpy()
    with open_slide(Slide(sample_id=attention.sample_id, image_path=attention.image_path), backend) as reader:
        if tile is not None:
            corner = int(attention.x[tile]), int(attention.y[tile])
            return attention_overlay(_read_square(reader, corner, attention.tile_size_lv0), heat[tile])
        background = thumbnail(reader, max(reader.dimensions) / PICTURE_PX)
        dimensions = reader.dimensions
    drawn = attention_map(heat, attention.x, attention.y, attention.tile_size_lv0, dimensions, background)
    line = f"attention of {len(attention.maps):,} tiles, the most at the top of the bar"
    return with_footer(drawn, [line], key=attention_key()) if len(heat) else drawn


def write_attention(path: Path, attention: SlideAttention) -> Path:
    """Write maps as .npz: `maps` (N, K, h, w) and `embeddings` (N, D) float32; `x`, `y` (N,) and
    `tile_size_lv0`, level-0 px; `channels` (K,) text, such as "block 23, class, head 0"."""
    names = [
        f"block {block}, {token}, {'mean of heads' if head is None else f'head {head}'}"
        for block, token, head in attention.channels
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            maps=attention.maps.numpy(),
            embeddings=attention.tile_embeddings.numpy(),
            x=attention.x,
            y=attention.y,
            tile_size_lv0=attention.tile_size_lv0,
            channels=np.array(names),
        )
    return path


def _read_square(reader: SlideReader, corner: tuple[int, int], side_lv0: int) -> NDArray[np.uint8]:
    """A square of the slide, from the finest level where it has at most PICTURE_PX a side."""
    fine = (level for level, ds in enumerate(reader.downsamples) if side_lv0 / ds <= PICTURE_PX)
    level = next(fine, len(reader.downsamples) - 1)
    side = max(1, round(side_lv0 / reader.downsamples[level]))
    return reader.read_region(corner, level, (side, side))
