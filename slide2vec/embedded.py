"""What the API returns."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slide2vec.errors import ConfigError, Slide2VecError
from slide2vec.frames import SlideFrame, anndata_of, spatialdata_of
from slide2vec.labels import class_name
from slide2vec.slides import Slide

if TYPE_CHECKING:
    import anndata
    import spatialdata
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image

    from slide2vec.tiling.slide_pictures import PictureKind
    from slide2vec.tiling.types import Tiling

__all__ = ["EmbeddedPatient", "EmbeddedSlide", "SlideAttention"]

#: Pictures of a slide in a notebook, and their longer side in px.
_NOTEBOOK_KINDS: tuple[PictureKind, ...] = ("tiles", "map")
_NOTEBOOK_PX = 480


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddedSlide:
    """The embeddings of one slide.

    Attributes:
        sample_id: the slide's name.
        tile_embeddings: (N, D) float32 (float16 for fp16 runs), on the CPU, in the order of x and y. With
            regions (R, m², D): tile k of a region is in its row k // m, column k % m.
        slide_embedding: (D,) for slide-level models, else None.
        x, y: (N,) int64, top-left corners of the tiles in level-0 px; sorted by x, then y. With regions
            (R,): those of the regions.
        tile_size_lv0: side of a tile in level-0 px.
        image_path, mask_path: the files.
        num_tiles: N, with regions R · m²; 0 for a slide without tissue.
        mask_preview_path, tiling_preview_path: pictures, where they were asked for.
        latents: of slide encoders that have them.
        annotation: the class that the tiles are of, where masks sample classes ("merged": all of them); else
            "tissue". One slide then has an EmbeddedSlide per class.
        tile_x, tile_y: (R, m²) int64, top-left corners of the tiles of regions in level-0 px; else None.
        tiling: how the tiles came about: sizes and spacings, tissue fractions, segmentation; None where they
            were not made by a model.
        encoder_input_size_px: side of what the encoder was handed, px; None where no model embedded it here.
        transform: from a tile to that, as the recipe and the sidecars have it; JSON-ready.
    """

    sample_id: str
    tile_embeddings: torch.Tensor
    slide_embedding: torch.Tensor | None
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    tile_size_lv0: int
    image_path: Path
    mask_path: Path | None
    num_tiles: int
    mask_preview_path: Path | None = None
    tiling_preview_path: Path | None = None
    latents: torch.Tensor | None = None
    tile_x: NDArray[np.int64] | None = None
    tile_y: NDArray[np.int64] | None = None
    annotation: str | None = None
    tiling: Tiling | None = None
    encoder_input_size_px: int | None = None
    transform: Mapping[str, Any] | None = None

    def plot(self, kind: PictureKind = "map", *, size_px: int = 1024) -> Image:
        """A picture of the slide, with what it shows, a scale bar and a key below it.

        The slide is opened again. A PIL image is what it gives because that needs nothing else: a notebook
        shows it, `.save("map.png")` writes it, and `np.asarray` or `plt.imshow` take it.

        Args:
            kind: "map": tiles coloured by principal components of their embeddings, alike where these are;
                "tiles": their outlines; "tissue": the outline of what was taken for tissue.
            size_px: longer side of the picture without the words.

        Raises:
            ConfigError: there is no such kind, or the slide was made without its tiling.
            SlideError: the slide cannot be read, or is another one by now.
        """
        from PIL import Image

        from slide2vec.tiling.slide_pictures import draw_slide

        tiling = self.tiling
        if tiling is None:
            raise ConfigError(
                f"slide {self.sample_id}: plot needs its tiling, which slides that a model embeds have: "
                "model.embed_slide(path).plot()"
            )
        slide = Slide(
            sample_id=class_name(tiling.annotation, self.sample_id),
            image_path=self.image_path,
            mask_path=self.mask_path,
            spacing_at_level_0=tiling.spacing_at_level_0,
        )
        embeddings = self.tile_embeddings.detach().cpu().float().flatten(0, -2).numpy()
        return Image.fromarray(draw_slide(kind, slide, tiling, embeddings, size_px))

    def to_anndata(self) -> anndata.AnnData:
        """The tiles as an AnnData: `X` (N, D) float32; `obs` with sample_id, x, y, tile_size_lv0, and where
        known tissue_fraction, region and what `qc` measured; `obsm["spatial"]` (N, 2), the centres of the
        tiles in level-0 px; `uns["slides"]` what is known of the slide; `uns["slide_embedding"]` of models of
        slides.

        Raises:
            ExtraMissingError: anndata is not installed (extra `anndata`).
        """
        return anndata_of([self._frame()], self._own_vector())

    def to_spatialdata(self) -> spatialdata.SpatialData:
        """The tiles as a SpatialData: `shapes["tiles"]`, squares in level-0 px (coordinate system "global"),
        and the table "embeddings", as `to_anndata` has it. Empty where there are no tiles.

        Raises:
            ExtraMissingError: spatialdata is not installed (extra `spatialdata`).
        """
        return spatialdata_of([self._frame()], self._own_vector())

    def _own_vector(self) -> dict[str, Any]:
        vector = self.slide_embedding
        return {} if vector is None else {"slide_embedding": vector.detach().cpu().float().numpy()}

    def _frame(self) -> SlideFrame:
        x = self.x if self.tile_x is None else self.tile_x
        y = self.y if self.tile_y is None else self.tile_y
        columns: dict[str, NDArray[Any]] = {}
        about: dict[str, Any] = {"image_path": str(self.image_path), "annotation": self.annotation}
        if self.tile_x is not None:
            columns["region"] = np.arange(len(self.tile_x)).repeat(self.tile_x.shape[1])
        if self.tiling is not None:
            geometry = self.tiling.geometry
            columns |= {"tissue_fraction": self.tiling.tissue_fractions, **self.tiling.artefacts}
            about |= {
                "base_spacing_um": geometry.base_spacing_um,
                "requested_spacing_um": geometry.requested_spacing_um,
                "requested_tile_size_px": geometry.requested_tile_size_px,
            }
        return SlideFrame(
            sample_id=class_name(self.annotation, self.sample_id),
            features=self.tile_embeddings.detach().cpu().float().flatten(0, -2).numpy(),
            x=x.ravel(),
            y=y.ravel(),
            tile_size_lv0=self.tile_size_lv0,
            columns={name: values for name, values in columns.items() if len(values) == x.size},
            about=about,
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the words, and where the slide can be read its tiles and map."""
        try:
            shown = "".join(_html_image(self.plot(kind, size_px=_NOTEBOOK_PX)) for kind in _NOTEBOOK_KINDS)
        except Slide2VecError as error:
            shown = f"<i>{escape(str(error))}</i>"
        return f"<code>{escape(repr(self))}</code><br>{shown}"

    def __repr__(self) -> str:
        of_class = "" if self.annotation in (None, "tissue") else f", annotation={self.annotation!r}"
        return (
            f"EmbeddedSlide(sample_id={self.sample_id!r}, num_tiles={self.num_tiles:,}, "
            f"tile_embeddings={_shape(self.tile_embeddings)}, "
            f"slide_embedding={_shape(self.slide_embedding)}, "
            f"tile_size_lv0={self.tile_size_lv0}, image_path={str(self.image_path)!r}{of_class})"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideAttention:
    """Attention maps of tiles of one slide.

    Attributes:
        sample_id, image_path: of the slide.
        maps: (N, K, h, w) float32, on the CPU: a value per channel and patch of a tile, what a token takes
            in of that patch; those of a channel add up to at most 1.
        channels: K of (block, token, head): which block, 0 the first, whose attention ("class", "register 1",
            …), and of which head; None = the mean over all.
        tile_embeddings: (N, D) float32 of the same tiles, from the same pass over the encoder.
        x, y: (N,) int64, top-left corners of the tiles, level-0 px.
        tile_size_lv0: side of a tile in level-0 px.
    """

    sample_id: str
    image_path: Path
    maps: torch.Tensor
    channels: tuple[tuple[int, str, int | None], ...]
    tile_embeddings: torch.Tensor
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    tile_size_lv0: int

    def __repr__(self) -> str:
        return (
            f"SlideAttention(sample_id={self.sample_id!r}, maps={_shape(self.maps)}, "
            f"channels=<{len(self.channels)}>, "
            f"tile_embeddings={_shape(self.tile_embeddings)}, image_path={str(self.image_path)!r})"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddedPatient:
    """The embedding of one patient.

    Attributes:
        patient_id: whose it is.
        patient_embedding: (D,) float32, on the CPU; None where no slide has tissue.
        slide_embeddings: sample_id -> (D,) float32 of each slide that it was made from.
    """

    patient_id: str
    patient_embedding: torch.Tensor | None
    slide_embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"EmbeddedPatient(patient_id={self.patient_id!r}, "
            f"patient_embedding={_shape(self.patient_embedding)}, "
            f"slide_embeddings=<{len(self.slide_embeddings)}>)"
        )


def _shape(embedding: torch.Tensor | None) -> str:
    """A tensor by its shape and number type: its numbers fill a screen, and say nothing."""
    if embedding is None:
        return "None"
    return f"<{tuple(embedding.shape)} {str(embedding.dtype).removeprefix('torch.')}>"


def _html_image(picture: Image) -> str:
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img style="vertical-align:top; margin:4px" src="data:image/jpeg;base64,{data}">'
