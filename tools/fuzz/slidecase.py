"""One slide case: damage a sound slide, plan and read it as a run does, and say what has come of it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from math import floor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from slide2vec.errors import Slide2VecError
from slide2vec.slides import Slide
from slide2vec.stream.plan import SlidePlan, plan_slide
from tools.fuzz.damage import Regions, damage
from tools.fuzz.detect import Box, evidence
from tools.fuzz.slides import Base
from tools.fuzz.truth import Plan, Sound, planned, preprocessing

__all__ = ["badly_said", "damage_slide", "run_slide_case"]

NAME = "damaged-slide"
#: What no message to a user should say.
_INTERNALS = re.compile(r"division by zero|NoneType|object has no attribute|^'\w+'$")


def damage_slide(sound: Sound, regions: dict[str, Regions], rng: Random) -> tuple[str, bytes, list[str], str]:
    """(Name of one of a slide's files, its damaged content, what was done, how tissue is to be found)."""
    victim = rng.choice(sound.files)
    content = (sound.folder / "files" / victim).read_bytes()
    return victim, *damage(content, regions[victim], rng), rng.choice(sorted(sound.plans or ("mask",)))


def run_slide_case(
    base: Base, sound: Sound, folder: Path, victim: str, data: bytes, way: str
) -> dict[str, Any]:
    """Plan and read a slide, one of whose files is damaged, in `folder`; the outcome (`report.OUTCOMES`)."""
    for name in sound.files:
        content = data if name == victim else (sound.folder / "files" / name).read_bytes()
        (folder / name).write_bytes(content)
    slide = Slide(
        sample_id=NAME,
        image_path=folder / sound.main,
        mask_path=sound.mask if way == "mask" else None,
        spacing_at_level_0=base.spacing_um,
    )
    return _attempt(slide, sound, (sound.plans or {}).get(way), data)


def _attempt(slide: Slide, sound: Sound, right: Plan | None, data: bytes) -> dict[str, Any]:
    try:
        plan = plan_slide(slide, preprocessing(sound.spacing_um, sound.tile_px))
        try:
            found = planned(plan)
            boxes = list(_wrong_boxes(plan, found, sound))
            level = plan.tiling.segmentation.level
            searched = plan.source.reader.level_dimensions[level]  # type: ignore[attr-defined]
        finally:
            plan.source.close()
    except Slide2VecError as error:
        said = badly_said(str(error), NAME)
        return {
            "outcome": "refused" if said is None else "refused badly",
            "message": said or str(error)[:500],
        }
    except Exception:
        return {"outcome": "exception", "message": traceback.format_exc()[-1500:]}
    return {"backend": plan.source.backend, **_judged(found, right, boxes, data, tuple(searched))}


def _wrong_boxes(plan: SlidePlan, found: Plan, sound: Sound) -> Iterator[Box]:
    """Where pixels of the level that was read are not those of the sound slide; reads every tile."""
    source, tiling = plan.source, plan.tiling
    downsample = found.size[0] / found.read[0]
    same = found.read_tile_px == tiling.geometry.requested_tile_size_px
    for number, tiles in enumerate(source.blocks):
        side = tiling.geometry.requested_tile_size_px
        targets = [np.empty((side, side, 3), np.uint8) for _ in tiles]
        source.place(number, source.fetch(number), targets)
        for tile, target in zip(tiles.tolist(), targets, strict=True) if same else ():
            x, y = (floor(int(each[tile]) / downsample) for each in (tiling.x, tiling.y))
            known = sound.region(found.read, x, y, side)
            if known is None:
                continue
            differs = (target != known[0]).any(-1) & known[1]
            if differs.any() and not _as_close(target, known[0], source.backend, sound):
                rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
                yield (
                    x + int(columns[0]),
                    y + int(rows[0]),
                    int(columns[-1] - columns[0]) + 1,
                    int(rows[-1] - rows[0]) + 1,
                )


def _as_close(got: Any, right: Any, backend: str, sound: Sound) -> bool:
    """Another back end may decode the same lossy tile a little differently."""
    return backend != sound.backend and bool(np.abs(got.astype(np.int16) - right).max() <= 2)


def _judged(
    found: Plan, right: Plan | None, boxes: list[Box], data: bytes, searched: tuple[int, int]
) -> dict[str, Any]:
    if boxes:
        told = evidence(data, found.read, boxes)
        where = f"{len(boxes)} tiles of {len(found.tiles)}, the first at {boxes[0]} of {found.read}"
        if told:
            return {"outcome": "wrong pixels, detectable", "message": f"{where}: {told}"}
        return {"outcome": "wrong pixels, undetectable", "message": where}
    if right is None:
        return {"outcome": "right", "message": "read, although the sound slide is not"}
    changed = [
        f"{name} {getattr(right, name)} became {getattr(found, name)}"
        for name in ("size", "spacing_um", "read", "read_tile_px")
        if getattr(right, name) != getattr(found, name)
    ]
    if changed:
        return {"outcome": "another claim", "message": "; ".join(changed)}
    if found.tiles == right.tiles:
        return {"outcome": "right", "message": ""}
    whole = [(0, 0, *searched)]
    told = evidence(data, searched, whole)
    outcome = "other tiles, detectable" if told else "other tiles"
    return {
        "outcome": outcome,
        "message": f"{len(right.tiles)} became {len(found.tiles)}: {told or 'nothing tells'}",
    }


def badly_said(message: str, name: str) -> str | None:
    """What is wrong with an error's message, with it; None for nothing."""
    if name not in message:
        return f"does not name {name}: {message[:500]}"
    found = _INTERNALS.search(message)
    return f"speaks of {found[0]!r}: {message[:500]}" if found else None
