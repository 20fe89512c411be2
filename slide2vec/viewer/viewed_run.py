"""What the page asks of a run: its slides by number, their pictures, tiles, colours and like tiles.

Slides are asked for by their number in the process list and by nothing else: no path comes from the page.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from slide2vec.errors import ArtifactError, ConfigError, Slide2VecError, nearest_names
from slide2vec.labels import split_class_name
from slide2vec.pictures import encoded_picture, slide_size
from slide2vec.readers import SlideReader, open_slide
from slide2vec.report.slide_facts import ReportedRun, ReportedSlide
from slide2vec.report.slide_images import embedded_tiles, tiled_slide
from slide2vec.search import FoundTile, Run, has_texts, searched_run, text_query, tile_pixels
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling
from slide2vec.tiling.previews import tiles_in_words
from slide2vec.tiling.previous_files import recorded_masks
from slide2vec.tiling.slide_pictures import open_tiled
from slide2vec.tiling.tile import tissue_again
from slide2vec.viewer.deep_zoom import PICTURE_SIDE, DeepZoom
from slide2vec.viewer.kept_readers import KeptReaders
from slide2vec.viewer.tile_colours import (
    as_hex,
    cluster_colours,
    clusters_of,
    component_colours,
    nearness_colours,
)

__all__ = ["ViewedRun"]

#: Pictures of deep zoom that are kept, encoded: about 20 KB each.
KEPT_PICTURES = 4096
#: Like tiles that are shown at most.
MOST_SIMILAR = 60
_QUALITY = 85


@dataclass(frozen=True, eq=False)
class _Tiles:
    """Of a slide and an encoder: where its tiles are, and their embeddings (N, D), if there are any; and why
    there are none."""

    tiling: Tiling | None
    embeddings: NDArray[np.float32] | None = None
    problem: str = ""


class ViewedRun:
    """A run to be looked at; used from several threads.

    Args:
        directory: output directory of a run or of `slide2vec tile`.
        encoder: the one that is shown first.
        slides_dir: where the slides are now, if they were moved.
        weights: of the encoder, for texts; None = as `slide2vec.search.text_query`.

    Raises:
        ArtifactError: it is no output directory of a run.
        ConfigError: the run has no such encoder.
    """

    def __init__(
        self,
        directory: Path,
        encoder: str | None = None,
        slides_dir: Path | None = None,
        weights: str | None = None,
    ) -> None:
        self.directory, self._weights = directory, weights
        self._run = ReportedRun(directory, directory, slides_dir)
        names = list(dict.fromkeys(self._encoders_of_tiles()))
        if encoder is not None:
            if encoder not in names and encoder in self._run.owners:  # of slides, over the tiles of another
                of_it = self._run.owners[encoder]
                encoder = next((name for name in names if self._run.owners[name] == of_it), encoder)
            if encoder not in names:
                raise ConfigError(
                    f"{directory} has no embeddings of tiles by {encoder!r}. {nearest_names(encoder, names)}"
                )
            names.remove(encoder)
            names.insert(0, encoder)
        self.encoders: Sequence[str] = names
        self._numbers = {slide.name: number for number, slide in enumerate(self._run.slides)}
        self._computing = threading.RLock()
        self._open = KeptReaders(self._open_slide)
        self._picture = lru_cache(KEPT_PICTURES)(self._cut)
        self._loaded = lru_cache(32)(self._load)
        self._tiles = lru_cache(2)(self._read_tiles)
        self._outlines = lru_cache(8)(self._find_outlines)
        self._asked = lru_cache(16)(self._text)
        self._searched = lru_cache(4)(self._search)

    def close(self) -> None:
        """Close the slides."""
        self._open.close()

    def _encoders_of_tiles(self) -> Iterator[str]:
        """Names of those that have embeddings of tiles, or regions."""
        for owner in self._run.owners.values():
            for kind in ("tile", "hierarchical"):
                if kind in owner.sidecars:
                    yield self._run.name_of(owner, str(owner.sidecars[kind].get("encoder_name")))

    def facts(self) -> dict[str, Any]:
        """Of the run, with every slide's name and state; JSON-ready."""
        return {
            "directory": str(self.directory),
            "encoders": list(self.encoders),
            "texts": [has_texts(name) for name in self.encoders],
            "side": PICTURE_SIDE,
            "slides": [self._line(slide) for slide in self._run.slides],
        }

    def slide(self, number: int, encoder: int) -> dict[str, Any]:
        """Sizes of a slide, and its tiles by an encoder; what cannot be had of it is said in "problems"."""
        slide, tiles = self._loaded(number), self._tiles(number, encoder)
        found: dict[str, Any] = {"problems": [*slide.problems, *([tiles.problem] if tiles.problem else [])]}
        tiling = tiles.tiling
        try:
            with self._open.reader(number) as reader:
                found |= {"size": reader.dimensions, "last": DeepZoom(reader).last, "pixels": True}
                spacing = reader.spacing_um
        except (Slide2VecError, OSError) as error:
            found["problems"].append(str(error))
            found["pixels"], spacing = False, None
        if tiling is not None:
            spacing = tiling.geometry.base_spacing_um
            found.setdefault("size", tiling.dimensions)
            found["tiles"] = {
                "x": tiling.x.tolist(),
                "y": tiling.y.tolist(),
                "side": tiling.geometry.tile_size_lv0,
                "text": tiles_in_words(tiling),
                "embedded": tiles.embeddings is not None,
            }
        found["spacing_um"] = spacing
        found["text"] = slide_size(found["size"], spacing) if "size" in found and spacing else ""
        return found

    def picture(self, number: int, level: int, column: int, row: int) -> bytes:
        """A JPEG of deep zoom. Raises ConfigError, SlideError and OSError."""
        return self._picture(number, level, column, row)

    def descriptor(self, number: int) -> str:
        """Of deep zoom, for other viewers."""
        with self._open.reader(number) as reader:
            return DeepZoom(reader).descriptor()

    def tile(self, number: int, encoder: int, index: int) -> bytes:
        """A JPEG of one of a slide's tiles."""
        tiling = self._tiling(number, encoder)
        if not index < len(tiling):
            raise ConfigError(f"slide {self._name(number)} has {len(tiling):,} tiles, no number {index}")
        with self._open.reader(number) as reader:
            corner = int(tiling.x[index]), int(tiling.y[index])
            return encoded_picture(
                tile_pixels(reader, corner, tiling.geometry.tile_size_lv0), ".jpg", _QUALITY
            )

    def outlines(self, number: int, encoder: int) -> dict[str, Any]:
        """Of the slide's tissue, looked for again: rings of x, y in level-0 px, one after the other."""
        return self._outlines(number, encoder)

    def colours(
        self, number: int, encoder: int, by: str, tile: int | None = None, text: str | None = None
    ) -> dict[str, Any]:
        """A colour for every tile, and what its colours are of.

        Args:
            by: "pca", "cluster", "tile" (cosine to that tile of the slide) or "text" (to that text).

        Raises:
            ConfigError: something that is needed was not said. Others: as of `text_query`.
        """
        with self._computing:
            embeddings = self._embeddings(number, encoder)
            if by == "pca":
                return {"colours": as_hex(component_colours(embeddings))}
            if by == "cluster":
                labels = clusters_of(embeddings)
                return {"colours": as_hex(cluster_colours(labels)), "clusters": np.bincount(labels).tolist()}
            rows = torch.from_numpy(embeddings)
            if by == "text":
                run, query = self._asked(encoder, text or "")
                rows = run.projected(rows)
            elif by == "tile" and tile is not None and tile < len(rows):
                query = rows[tile]
            else:
                raise ConfigError(
                    f"tiles are coloured by pca, cluster, a tile of the slide or a text, not by {by!r}"
                )
            cosines = (F.normalize(rows, dim=1) @ F.normalize(query.float(), dim=0)).numpy()
        colours = as_hex(nearness_colours(cosines))
        return {"colours": colours, "cosines": [round(float(each), 4) for each in cosines]}

    def similar(
        self, encoder: int, count: int, number: int = 0, tile: int | None = None, text: str | None = None
    ) -> list[dict[str, Any]]:
        """The tiles of the whole run nearest to a tile of a slide, or to a text.

        Raises:
            ArtifactError, ConfigError, OutputError: as of `Run.nearest`. Others: as of `text_query`.
        """
        count = min(count, MOST_SIMILAR)
        with self._computing:
            if text is not None:
                run, query = self._asked(encoder, text)
                return self._found(run.nearest(query, count))
            tiling, run = self._tiling(number, encoder), self._searched(encoder)
            if tile is None or not tile < len(tiling):
                raise ConfigError(f"slide {self._name(number)} has {len(tiling):,} tiles: say which (tile=)")
            place = int(tiling.x[tile]), int(tiling.y[tile])
            asked, query = run.index.tile_at(self._name(number), *place)
            return self._found(run.nearest(query, count, without=asked))

    def _found(self, tiles: Sequence[FoundTile]) -> list[dict[str, Any]]:
        wanted = ("row", "x", "y", "score")
        return [
            {"slide": self._numbers[tile.sample_id], **{name: asdict(tile)[name] for name in wanted}}
            for tile in tiles
            if tile.sample_id in self._numbers
        ]

    def _line(self, slide: ReportedSlide) -> dict[str, Any]:
        """Of the list: what is known without opening anything."""
        counts = [row["num_tiles"] for row in slide.rows]
        errors = list(dict.fromkeys(row["error"] for row in slide.rows if row["error"]))
        try:
            gone = not slide.image_path.exists()
        except OSError as error:
            gone, errors = True, [*errors, str(error)]
        if gone:
            errors.append(
                f"{slide.image_path} is gone; if the slides were moved, say where with --slides-dir"
            )
        return {
            "id": slide.name,
            "state": self._run.states[slide.name],
            "tiles": max((int(float(count)) for count in counts if count), default=None),
            "gone": gone,
            "problems": errors,
        }

    def _slide(self, number: int) -> ReportedSlide:
        if not 0 <= number < len(self._run.slides):
            raise ConfigError(f"the run has {len(self._run.slides):,} slides, no number {number}")
        return self._run.slides[number]

    def _name(self, number: int) -> str:
        return self._slide(number).name

    def _load(self, number: int) -> ReportedSlide:
        """The slide with its coordinates; they are not kept for all slides."""
        slide = replace(self._slide(number), tilings={}, problems=[])
        slide.load()
        return slide

    def _open_slide(self, number: int) -> SlideReader:
        slide = self._loaded(number)
        tiling = next(iter(slide.tilings.values()), None)
        if tiling is not None:
            return open_tiled(tiled_slide(slide, tiling), tiling)
        annotation = split_class_name(slide.name)[0]
        return open_slide(
            Slide(sample_id=slide.name, image_path=slide.image_path, annotation=annotation), "auto"
        )

    def _cut(self, number: int, level: int, column: int, row: int) -> bytes:
        with self._open.reader(number) as reader:
            return encoded_picture(DeepZoom(reader).picture(level, column, row), ".jpg", _QUALITY)

    def _encoder(self, number: int) -> str:
        if not 0 <= number < len(self.encoders):
            raise ConfigError(
                f"the run has embeddings of tiles by {len(self.encoders)} encoders, no number {number}"
            )
        return self.encoders[number]

    def _read_tiles(self, number: int, encoder: int) -> _Tiles:
        """Without encoders in the run, the first tiling."""
        slide = self._loaded(number)
        if not self.encoders:
            return _Tiles(next(iter(slide.tilings.values()), None))
        name = self._encoder(encoder)
        tiling = slide.tilings.get(self._run.owners[name].tiling)
        if tiling is None:
            return _Tiles(None)
        try:
            found = embedded_tiles(slide, name, tiling)
        except (Slide2VecError, OSError) as error:
            return _Tiles(tiling, problem=str(error))
        return _Tiles(tiling) if found is None else _Tiles(found[1], found[0])

    def _tiling(self, number: int, encoder: int) -> Tiling:
        """Its tiles; embeddings are read only where it takes them to know, for tiles of regions."""
        slide = self._loaded(number)
        owner = self._run.owners[self._encoder(encoder)] if self.encoders else None
        if owner is not None and "tile" in owner.sidecars and self._given(slide, encoder) is None:
            found = slide.tilings.get(owner.tiling)
        else:
            found = self._tiles(number, encoder).tiling
        if found is None:
            raise ArtifactError(f"slide {self._name(number)} has no tiles")
        return found

    def _embeddings(self, number: int, encoder: int) -> NDArray[np.float32]:
        found = self._tiles(number, encoder)
        if found.embeddings is None:
            raise ArtifactError(found.problem or f"slide {self._name(number)} has no embeddings of tiles")
        return found.embeddings

    def _given(self, slide: ReportedSlide, encoder: int) -> Path | None:
        """The folder of a slide's coordinates that were given to the run of an encoder, if they were."""
        return slide.given.get(self._encoder(encoder)) if self.encoders else None

    def _find_outlines(self, number: int, encoder: int) -> dict[str, Any]:
        slide, tiling = self._loaded(number), self._tiling(number, encoder).recorded
        place = self._given(slide, encoder) or next(
            slide.places[folder] for folder, each in slide.tilings.items() if each.geometry == tiling.geometry
        )
        masks = recorded_masks(place, slide.name)
        with self._open.reader(number) as reader:
            tissue = tissue_again(reader, tiled_slide(slide, tiling), tiling, masks)
        rings: Mapping[str, list[Any]] = {"outer": [], "holes": []}
        for piece in tissue.pieces:
            for kind, contour in [("outer", piece.contour), *(("holes", hole) for hole in piece.holes)]:
                simple = cv2.approxPolyDP(contour, 0.7, True).reshape(-1, 2)
                # the middle of a pixel of the mask
                rings[kind].append(((simple + 0.5) * np.array(tissue.scale)).round(1).ravel().tolist())
        return dict(rings)

    def _text(self, encoder: int, text: str) -> tuple[Run, torch.Tensor]:
        if not text.strip():
            raise ConfigError("say what to look for: the text is empty")
        return text_query(self._searched(encoder), text, weights=self._weights)

    def _search(self, encoder: int) -> Run:
        name = self._encoder(encoder)
        if "tile" not in self._run.owners[name].sidecars:
            raise ArtifactError(
                f"the embeddings by {name} are of regions: runs without region_tile_multiple can be searched"
            )
        return searched_run(self.directory, name)
