"""Decoded tiles that wait in the scratch for later turns: where, how many of them, and for whom."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.files.scratch import is_in_memory
from slide2vec.slides import Slide

__all__ = [
    "Tiles",
    "TurnUse",
    "has_room",
    "scratch_folder",
    "scratch_limit",
    "scratch_use",
    "tile_bytes",
    "tiles_wanted",
]

#: sample_id, µm/px and side of the tiles.
Tiles: TypeAlias = tuple[str, float | None, int | None]


def tiles_wanted(config: PreprocessingConfig, slides: Iterable[Slide]) -> set[Tiles]:
    """Of which slides an encoder takes which tiles."""
    asked = config.requested_spacing_um, config.requested_tile_size_px
    return {(slide.sample_id, *asked) for slide in slides}


def tile_bytes(side_px: int) -> int:
    """Of a decoded tile, RGB."""
    return 3 * side_px**2


def scratch_folder(execution: ExecutionOptions) -> tuple[Path, bool]:
    """The folder in which tiles wait, and whether they do: not where none may, nor in memory unless that is
    asked for, nor on one of several machines."""
    given = execution.scratch_dir or execution.stage_dir
    folder = given or Path(tempfile.gettempdir())
    is_here = execution.executor == "local"
    return folder, is_here and execution.scratch_gb != 0 and (given is not None or not is_in_memory(folder))


def scratch_limit(execution: ExecutionOptions, folder: Path) -> int:
    """Bytes that they may take in a folder, or in one that is to be made.

    Raises:
        OSError: its disk does not say what is free.
    """
    if execution.scratch_gb is not None:
        return int(execution.scratch_gb * 1e9)
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free // 2


def has_room(taken: Iterable[int], more: int, limit: int) -> bool:
    """Whether tiles of so many bytes fit beside those that wait.

    Args:
        taken: bytes of each slide's tiles.
    """
    return sum(taken) + more <= limit


@dataclass(frozen=True)
class TurnUse:
    """What a turn of encoders has of the scratch.

    Attributes:
        taken: tiles that come from there.
        again: tiles of slides that an earlier turn has read, and that this one decodes.
        kept: tiles that it keeps for later ones.
        bytes: that wait when it ends.
    """

    taken: frozenset[Tiles]
    again: frozenset[Tiles]
    kept: frozenset[Tiles]
    bytes: int


def scratch_use(turns: Sequence[Mapping[Tiles, int]], limit: int) -> list[TurnUse]:
    """What each turn of a run has of the scratch, by what `TileScratch` does.

    Args:
        turns: the tiles that each wants, in order, and the bytes of each slide's.
        limit: bytes that may wait.
    """
    waiting: dict[Tiles, int] = {}
    read: set[str] = set()
    uses = []
    for number, now in enumerate(turns):
        later = set().union(*turns[number + 1 :])
        waiting = {tiles: size for tiles, size in waiting.items() if tiles in now or tiles in later}
        taken = frozenset(waiting.keys() & now.keys())
        kept: set[Tiles] = set()
        for tiles, size in now.items():
            if tiles in later and tiles not in waiting and has_room(waiting.values(), size, limit):
                waiting[tiles] = size
                kept.add(tiles)
        again = frozenset(tiles for tiles in now.keys() - taken if tiles[0] in read)
        uses.append(TurnUse(taken, again, frozenset(kept), sum(waiting.values())))
        read |= {sample_id for sample_id, _, _ in now}
    return uses
