"""What a sound slide holds: its pixels, by an independent reader, and what is planned of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import Slide2VecError
from slide2vec.readers import open_slide
from slide2vec.slides import Slide
from slide2vec.stream.plan import SlidePlan, plan_slide
from slide2vec.stream.tile_sources import SlideSource
from tools.fuzz.slides import Base

__all__ = [
    "WAYS",
    "Pixels",
    "Plan",
    "Sound",
    "load_sound",
    "make_sound",
    "note_failure",
    "planned",
    "preprocessing",
]

Pixels = NDArray[np.uint8]
#: Largest difference between two decoders of the same lossy tile.
_CLOSE = 2
_TILE_PX = 128
#: Pixels of the level that is read, at most, where there are several.
_MOST_PX = 2_500_000


@dataclass(frozen=True)
class Way:
    """How a slide is tiled: tissue from a mask that is all tissue, or from its pixels; and by how much tiles
    are reduced."""

    by_mask: bool
    ratio: int


WAYS: Mapping[str, Way] = {"mask": Way(True, 1), "hsv": Way(False, 1), "reduced": Way(True, 2)}


@dataclass(frozen=True)
class Plan:
    """What is read of a slide.

    Attributes:
        size, spacing_um: of level 0.
        levels: (width, height) of every level.
        read: of the level that is read.
        tiles: (x, y) of every tile in level-0 px.
    """

    size: tuple[int, int]
    spacing_um: float
    levels: tuple[tuple[int, int], ...]
    read: tuple[int, int]
    read_tile_px: int
    tiles: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sound:
    """A sound slide on disk.

    Attributes:
        files: its files; main: the one to open.
        state: "read", "refused: …", "wrong: …", or "absent".
        spacing_um, tile_px: what to ask for.
        plans: by the names of `WAYS`; without those that find no tissue.
        folder: that also holds its levels.
    """

    folder: Path
    state: str
    main: str = ""
    files: tuple[str, ...] = ()
    spacing_um: float = 0.5
    tile_px: int = _TILE_PX
    backend: str = ""
    levels: tuple[tuple[int, int], ...] = ()
    plans: dict[str, Plan] | None = None

    @property
    def mask(self) -> Path:
        """A mask with tissue everywhere."""
        return self.folder / "mask.png"

    def region(self, size: tuple[int, int], x: int, y: int, side: int) -> tuple[Pixels, Pixels] | None:
        """Right pixels of a box of a level with this size, and 255 where it has them; None without one."""
        level = _level(self.folder, size)
        if level is None and size not in self.levels and self.levels:
            level = _level(self.folder, self.levels[0]) if size[0] > self.levels[0][0] // 2 else None
        if level is None:
            return None
        pixels, valid = np.full((side, side, 3), 255, np.uint8), np.zeros((side, side, 3), np.uint8)
        height, width = level.shape[:2]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, width), min(y + side, height)
        if x0 < x1 and y0 < y1:
            inside = slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)
            pixels[inside], valid[inside] = level[y0:y1, x0:x1], 255
        return pixels, valid


@cache
def _level(folder: Path, size: tuple[int, int]) -> Pixels | None:
    path = folder / f"level-{size[0]}x{size[1]}.npy"
    return np.load(path, mmap_mode="r") if path.is_file() else None


def preprocessing(spacing_um: float, tile_px: int, ratio: int) -> PreprocessingConfig:
    """As a run has it, without previews."""
    return PreprocessingConfig(
        requested_spacing_um=spacing_um * ratio,
        requested_tile_size_px=tile_px // ratio,
        preview={"save_mask_preview": False, "save_tiling_preview": False},
    )


def planned(plan: SlidePlan) -> Plan:
    """What is to be read of a slide."""
    assert isinstance(plan.source, SlideSource)
    tiling, reader = plan.tiling, plan.source.reader
    return Plan(
        size=tiling.dimensions,
        spacing_um=round(tiling.geometry.base_spacing_um, 6),
        levels=tuple(reader.level_dimensions),
        read=reader.level_dimensions[tiling.geometry.read_level],
        read_tile_px=tiling.geometry.read_tile_size_px,
        tiles=tuple(zip(tiling.x.tolist(), tiling.y.tolist(), strict=True)),
    )


def make_sound(base: Base, folder: Path) -> dict[str, str]:
    """Write a base's files, its levels and its plans into an empty folder; `sound.json` last."""
    source = folder / "files"
    source.mkdir(parents=True)
    main = base.make(source)
    _note(Sound(folder, "absent") if main is None else _examined(base, folder, main))
    return {"outcome": "right"}


def note_failure(base: Base, folder: Path, why: str) -> None:
    """Record that a sound slide could not even be looked at."""
    files = sorted((folder / "files").iterdir())
    main = max(files, key=lambda path: path.stat().st_size)
    _note(Sound(folder, why, main.name, tuple(path.name for path in files)))


def _note(found: Sound) -> None:
    folder = found.folder
    about = {**asdict(found), "folder": None}
    (folder / "sound.json").write_text(json.dumps(about))


def load_sound(folder: Path) -> Sound:
    """What `make_sound` has found."""
    about = json.loads((folder / "sound.json").read_text())
    plans = {
        way: Plan(
            **{
                **plan,
                "size": tuple(plan["size"]),
                "read": tuple(plan["read"]),
                "tiles": tuple(map(tuple, plan["tiles"])),
                "levels": tuple(map(tuple, plan["levels"])),
            }
        )
        for way, plan in (about["plans"] or {}).items()
    }
    levels = tuple(map(tuple, about["levels"]))
    return Sound(
        **{**about, "folder": folder, "plans": plans, "levels": levels, "files": tuple(about["files"])}
    )


def _examined(base: Base, folder: Path, main: Path) -> Sound:
    files = tuple(sorted(path.name for path in main.parent.iterdir()))
    slide = Slide(sample_id="sound", image_path=main, spacing_at_level_0=base.spacing_um)
    reference = _reference(main)
    try:
        with open_slide(slide) as reader:
            levels = {
                size: reader.read_region((0, 0), number, size)
                for number, size in enumerate(reader.level_dimensions)
            }
            spacing0, backend = base.spacing_um or reader.spacing_um or 0.5, reader.backend
            read = next((each for each in levels if each[0] * each[1] <= _MOST_PX), list(levels)[-1])
            spacing = spacing0 * reader.dimensions[0] / read[0]
        state = _compared(levels, reference)
    except Slide2VecError as error:
        levels, state, backend, read = reference, f"refused: {error}", "", (0, 0)
        spacing = base.spacing_um or 0.5
    for (width, height), pixels in levels.items():
        np.save(folder / f"level-{width}x{height}.npy", pixels)
    width, height = next(iter(levels), (800, 600))
    found = Sound(
        folder,
        state,
        main.name,
        files,
        spacing,
        _tile_px(read) if state == "read" else _TILE_PX,
        backend,
        tuple(levels),
    )
    Image.fromarray(np.ones((max(height // 8, 1), max(width // 8, 1)), np.uint8)).save(found.mask)
    return found if state != "read" else replace(found, plans=_plans(found, slide))


def _tile_px(read: tuple[int, int]) -> int:
    """Side of the tiles: fewer, larger ones of a large level."""
    return 32 if min(read) < _TILE_PX else _TILE_PX if min(read) < 1000 else 2 * _TILE_PX


def _plans(found: Sound, slide: Slide) -> dict[str, Plan]:
    plans = {}
    for name, way in WAYS.items():
        asked = replace(slide, mask_path=found.mask if way.by_mask else None)
        plan = plan_slide(asked, preprocessing(found.spacing_um, found.tile_px, way.ratio))
        try:
            if len(plan.tiling):
                plans[name] = planned(plan)
        finally:
            plan.source.close()
    return plans


def _reference(path: Path) -> dict[tuple[int, int], Pixels]:
    """Levels by tifffile, or OpenSlide for what is no TIFF; those that it cannot read are not there. Of
    several pages of a size, the first tiled one."""
    import tifffile

    found: dict[tuple[int, int], Pixels] = {}
    try:
        with tifffile.TiffFile(path) as tiff:
            if tiff.is_ndpi:
                raise ValueError("OpenSlide's")
            pages = [page for top in tiff.pages for page in (top, *(top.pages or ()))]
            for page in sorted(pages, key=lambda page: not page.is_tiled):
                pixels = page.asarray()
                pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 and pixels.shape[0] == 3 else pixels
                if pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8:
                    found.setdefault((pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels))
        return found
    except Exception:  # the reference may have its own limits
        return found or _by_openslide(path)


def _by_openslide(path: Path) -> dict[tuple[int, int], Pixels]:
    import openslide

    try:
        with openslide.OpenSlide(path) as slide:
            levels = enumerate(slide.level_dimensions)
            return {
                size: np.asarray(slide.read_region((0, 0), level, size).convert("RGB"))
                for level, size in levels
            }
    except openslide.OpenSlideError:
        return {}


def _compared(levels: dict[tuple[int, int], Pixels], reference: dict[tuple[int, int], Pixels]) -> str:
    for size, pixels in levels.items():
        if size in reference:
            difference = np.abs(pixels.astype(np.int16) - reference[size]).max()
            if difference > _CLOSE:
                return f"wrong: level of {size} px differs from the reference by {difference}"
    return "read"
