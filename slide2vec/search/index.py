"""All tile embeddings of an encoder in a run, gathered to be searched from front to back.

In `search/` beside `tile_embeddings/` (`search/texts/` for embeddings that are projected into the space of
texts), slide after slide: `halves`, rows of unit length in half precision,
which a search reads; `rows`, the embeddings in single precision, of which it reads those that may be the
nearest, so that its results are those of comparing with every tile in double precision; `places`, where the
tiles are; and `index.json`, which says whose they are. Made at the first search, and anew when a slide has
changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slide2vec.artifacts import load_stored, tile_artifacts, write_json
from slide2vec.artifacts.records import SIDECAR
from slide2vec.cpus import job_cpus
from slide2vec.errors import ArtifactError
from slide2vec.files import atomic_path, names_below
from slide2vec.runtime.device import torch_threads

__all__ = ["FoundTile", "TileIndex"]

logger = logging.getLogger(__name__)

#: Of `index.json`.
SCHEMA = 1
#: Of the rows in half precision that a thread has in hand: they stay in a core's cache.
BLOCK_BYTES = 2**20
#: Rows that are brought to double precision at once.
EXACT_ROWS = 2**14
#: Beyond so many threads memory is what they wait for.
MOST_THREADS = 8
#: What half precision changes a cosine of unit rows by, at most: each number by 2^-11 of itself, the smallest
#: by 2^-25, and the sum in single precision by less than what is left here.
HALF_ERROR = 2.0**-11 + 1e-5


@dataclass(frozen=True, kw_only=True)
class FoundTile:
    """A tile of a run.

    Attributes:
        sample_id, image_path: of its slide.
        row: which of the slide's tiles.
        x, y: its top-left corner, level-0 px.
        tile_size_lv0: its side in level-0 px.
        score: cosine of its embedding to what was searched for.
    """

    sample_id: str
    image_path: str
    row: int
    x: int
    y: int
    tile_size_lv0: int
    score: float


@dataclass(frozen=True, kw_only=True)
class _Slide:
    """Of `index.json`: rows of a slide, and its sidecar's size and time of change when they were taken."""

    sample_id: str
    image_path: str
    tile_size_lv0: int
    rows: int
    sidecar: list[int]


class TileIndex:
    """See the module. Built, or found, by `of`.

    Attributes:
        features: the folder of `tile_embeddings/`.
        folder: of the index.
        dim: of the embeddings.
    """

    def __init__(self, features: Path, folder: Path, dim: int, slides: list[_Slide]) -> None:
        self.features, self.folder, self.dim, self._slides = features, folder, dim, slides
        self._ends = np.cumsum([slide.rows for slide in slides])

    @classmethod
    def of(cls, features: Path, projection: torch.Tensor | None = None) -> TileIndex:
        """That of the tile embeddings in a folder of `tile_embeddings/`.

        Args:
            projection: (k, D) float32: what is searched are the first k numbers of the embeddings times it.

        Raises:
            ArtifactError: there are none, some cannot be read or have no coordinates, or they have several
                dimensions.
            OutputError: the index cannot be written.
        """
        there = _sidecars(features)
        if not there:
            raise ArtifactError(
                f"{features} has no tile embeddings to search (tile_embeddings/ of a run; models of slides "
                "write them with save_tile_embeddings)"
            )
        return _read(features, projection, there) or _built(features, projection, there)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def tile_at(self, sample_id: str, x: int, y: int) -> tuple[FoundTile, torch.Tensor]:
        """The tile with its top-left corner at a place (level-0 px), else one that holds the place; and its
        embedding (D,).

        Raises:
            ArtifactError: no such slide, or no tile there; says where the nearest is.
        """
        number = next((n for n, slide in enumerate(self._slides) if slide.sample_id == sample_id), None)
        if number is None:
            raise ArtifactError(f"{self.features} has no tile embeddings of slide {sample_id!r}")
        slide, start = self._slides[number], self._start(number)
        coords = np.asarray(self._mapped("places", np.int64, 2)[start : start + slide.rows])
        away = np.array([x, y]) - coords
        distance = np.abs(away).sum(axis=1)
        inside = np.flatnonzero(((away >= 0) & (away < slide.tile_size_lv0)).all(axis=1))
        if not len(inside):
            near = ",".join(map(str, coords[distance.argmin()])) if len(coords) else ""
            hint = f"; the nearest is at {near}" if near else ""
            raise ArtifactError(f"slide {sample_id} has no embedded tile at {x},{y} (level-0 px){hint}")
        row = start + int(inside[distance[inside].argmin()])
        embedding = torch.from_numpy(np.array(self._mapped("rows", np.float32, self.dim)[row]))
        return self._tile(row, 1.0), embedding

    def nearest(self, query: torch.Tensor, count: int) -> list[FoundTile]:
        """The tiles whose embeddings have the largest cosine to a query (D,), the nearest first."""
        query = _unit(query[None])[0]
        scores = self._scores(query.float())
        count = min(count, len(scores))
        if not count:
            return []
        last = np.partition(scores, len(scores) - count)[len(scores) - count]
        rows = np.flatnonzero(scores >= last - 2 * HALF_ERROR)
        exact = self._exact(rows, query)
        order = np.argsort(-exact.numpy(), kind="stable")[:count]
        return [self._tile(int(rows[place]), float(exact[place])) for place in order]

    def _exact(self, rows: NDArray[np.int64], query: torch.Tensor) -> torch.Tensor:
        """Cosines of some rows in double precision; not all in memory at once, for many may be alike."""
        values = self._mapped("rows", np.float32, self.dim)
        parts = [
            _unit(torch.from_numpy(values[rows[start : start + EXACT_ROWS]])) @ query
            for start in range(0, len(rows), EXACT_ROWS)
        ]
        return torch.cat(parts)

    def _scores(self, query: torch.Tensor) -> NDArray[np.float32]:
        """Cosines of all rows to a query of unit length, up to HALF_ERROR."""
        scores = torch.empty(len(self))
        threads = min(job_cpus(), MOST_THREADS)
        edges = [len(self) * part // threads for part in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            for done in [
                pool.submit(self._score, query, start, stop, scores) for start, stop in pairwise(edges)
            ]:
                done.result()
        return scores.numpy()

    def _score(self, query: torch.Tensor, start: int, stop: int, scores: torch.Tensor) -> None:
        """Cosines of some rows, block by block in the same memory: pages of a mapped file would count as the
        process's own."""
        rows = max(1, BLOCK_BYTES // (2 * self.dim))
        halves, floats = torch.empty(rows, self.dim, dtype=torch.float16), torch.empty(rows, self.dim)
        memory: Any = halves.numpy().view(np.uint8).reshape(-1)
        with torch_threads(1), self._path("halves").open("rb") as file:
            file.seek(2 * self.dim * start)
            while start < stop:
                count = min(rows, stop - start)
                if file.readinto(memory[: 2 * self.dim * count]) != 2 * self.dim * count:
                    raise ArtifactError(f"{self._path('halves')} is too short: delete {self.folder}")
                floats[:count].copy_(halves[:count])
                torch.mv(floats[:count], query, out=scores[start : start + count])
                start += count

    def _tile(self, row: int, score: float) -> FoundTile:
        number = int(np.searchsorted(self._ends, row, side="right"))
        slide = self._slides[number]
        x, y = self._mapped("places", np.int64, 2)[row]
        return FoundTile(
            sample_id=slide.sample_id,
            image_path=slide.image_path,
            row=row - self._start(number),
            x=int(x),
            y=int(y),
            tile_size_lv0=slide.tile_size_lv0,
            score=score,
        )

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - self._slides[number].rows

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _mapped(self, name: str, dtype: Any, columns: int) -> NDArray[Any]:
        return np.memmap(self._path(name), dtype, "r", shape=(len(self), columns))


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """(N, D) in double precision, of unit length; rows of zeros stay so."""
    return torch.nn.functional.normalize(rows.double(), dim=1)


def _sidecars(features: Path) -> dict[str, list[int]]:
    """Size and time of change of every sidecar of tile embeddings, by sample_id (of a class: "tumor/a")."""
    folder = features / "tile_embeddings"
    stats = {name: (folder / f"{name}{SIDECAR}").stat() for name in names_below(folder, SIDECAR)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _folder(features: Path, projection: torch.Tensor | None) -> Path:
    return features / "search" if projection is None else features / "search" / "texts"


def _digest(projection: torch.Tensor | None) -> str | None:
    if projection is None:
        return None
    return hashlib.sha256(projection.contiguous().numpy().tobytes()).hexdigest()[:32]


def _read(
    features: Path, projection: torch.Tensor | None, there: Mapping[str, list[int]]
) -> TileIndex | None:
    """The index that is there; None where it is not of just these files."""
    folder = _folder(features, projection)
    try:
        kept: dict[str, Any] = json.loads((folder / "index.json").read_text())
        if kept["schema_version"] != SCHEMA or kept.get("projection") != _digest(projection):
            return None
        slides = [_Slide(**each) for each in kept["slides"]]
        index = TileIndex(features, folder, kept["dim"], slides)
        sizes = [(folder / name).stat().st_size for name in ("halves", "rows", "places")]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    expected = [len(index) * number for number in (2 * index.dim, 4 * index.dim, 16)]
    same = {slide.sample_id: slide.sidecar for slide in slides} == there
    return index if same and sizes == expected else None


def _built(features: Path, projection: torch.Tensor | None, there: Mapping[str, list[int]]) -> TileIndex:
    """A new index, written."""
    logger.info("%s: the tile embeddings of %d slides are gathered for searching", features, len(there))
    slides: list[_Slide] = []
    dim, folder = 0, _folder(features, projection)
    (folder / "index.json").unlink(missing_ok=True)
    with ExitStack() as opened:
        halves, rows, places = (
            opened.enter_context(opened.enter_context(atomic_path(folder / name)).open("wb"))
            for name in ("halves", "rows", "places")
        )
        for artifact in tile_artifacts(features):
            stored = load_stored(artifact)
            dim = dim or stored.features.shape[1]
            if stored.features.shape[1] != dim:
                raise ArtifactError(
                    f"slide {artifact.sample_id}: its embeddings have {stored.features.shape[1]} dimensions, "
                    f"those before {dim}: embed the run with one encoder"
                )
            if stored.coords is None or stored.tile_size_lv0 is None:
                raise ArtifactError(
                    f"slide {artifact.sample_id}: no coordinate files say where its tiles are: tiles/ of the "
                    "run is missing"
                )
            for start in range(0, len(stored.features), EXACT_ROWS):
                part = stored.features[start : start + EXACT_ROWS]
                found = part.float() if projection is None else _projected(part, projection)
                _unit(found).half().numpy().tofile(halves)
                found.numpy().tofile(rows)
            stored.coords.tofile(places)
            slides.append(
                _Slide(
                    sample_id=artifact.name,
                    image_path=str(stored.metadata.get("image_path", "")),
                    tile_size_lv0=stored.tile_size_lv0,
                    rows=len(stored.features),
                    sidecar=there.get(artifact.name, [0, 0]),
                )
            )
    dim = dim if projection is None else projection.shape[1]
    described = {"schema_version": SCHEMA, "dim": dim, "slides": [vars(slide) for slide in slides]}
    write_json(folder / "index.json", {**described, "projection": _digest(projection)})
    return TileIndex(features, folder, dim, slides)


def _projected(features: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """(N, D) -> (N, D') float32."""
    return features[:, : len(projection)].float() @ projection
