"""From the tiles of a slide to its embedding, by a slide encoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from slide2vec.artifacts.finite import remedy
from slide2vec.cpus import Budget
from slide2vec.embedded import EmbeddedSlide
from slide2vec.encoders.slide import TileBag
from slide2vec.errors import NotFiniteError, Slide2VecError, SlideError
from slide2vec.runtime.device import torch_threads

__all__ = ["with_slide_embedding"]


def with_slide_embedding(
    embedded: EmbeddedSlide, encoder: nn.Module, device: torch.device, *, preset: str, latents: bool = False
) -> EmbeddedSlide:
    """A slide with its slide_embedding, (D,) float32, and its latents where they are asked for.

    A slide without tiles stays as it is.

    Args:
        preset: of the slide encoder, for errors.

    Raises:
        SlideError: the encoder failed.
    """
    if not embedded.num_tiles:
        return embedded
    try:
        with torch.inference_mode(), torch_threads(Budget.of(device.type).encoder_threads):
            found = encoder(_bag(embedded, device))
    except Slide2VecError:
        raise
    except Exception as error:  # the boundary of one slide: out of memory, for instance
        raise SlideError(
            f"slide {embedded.sample_id}: the slide encoder {preset} failed on its {embedded.num_tiles} "
            f"tiles: {error or type(error).__name__}"
        ) from error
    made = found.embedding.float().cpu()
    kept = found.latents.float().cpu() if latents and found.latents is not None else None
    for what, values in (("embedding", made), ("latents", kept)):
        if values is not None and not values.isfinite().all():
            raise NotFiniteError(
                f"slide {embedded.sample_id}: the {what} that the slide encoder {preset} gives for its "
                f"{embedded.num_tiles} tiles hold NaN or infinities; PyTorch computed them in fp32 from "
                f"embeddings of tiles without: {remedy('fp32')}"
            )
    return replace(embedded, slide_embedding=made, latents=kept)


def _bag(embedded: EmbeddedSlide, device: torch.device) -> TileBag:
    coords = torch.stack([torch.as_tensor(embedded.x), torch.as_tensor(embedded.y)], dim=1)
    return TileBag(
        features=embedded.tile_embeddings.float().to(device),
        coords=coords.to(device),
        tile_size_lv0=embedded.tile_size_lv0,
    )
