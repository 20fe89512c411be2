"""Decoded tiles that wait in the scratch for later turns: where, how many of them, and for whom."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ConfigError
from slide2vec.files.scratch import is_in_memory, private_folder
from slide2vec.slides import Slide

__all__ = [
    "Room",
    "Tiles",
    "TurnUse",
    "has_room",
    "scratch_folder",
    "scratch_room",
    "scratch_use",
    "tile_bytes",
    "tiles_wanted",
]

logger = logging.getLogger(__name__)

#: sample_id, µm/px and side of the tiles.
Tiles: TypeAlias = tuple[str, float | None, int | None]


def tiles_wanted(config: PreprocessingConfig, slides: Iterable[Slide]) -> set[Tiles]:
    """Of which slides an encoder takes which tiles."""
    asked = config.requested_spacing_um, config.requested_tile_size_px
    return {(slide.sample_id, *asked) for slide in slides}


def tile_bytes(side_px: int) -> int:
    """Of a decoded tile, RGB."""
    return 3 * side_px**2


@dataclass(frozen=True)
class Room:
    """Where tiles wait.

    Attributes:
        folder: of this run alone.
        limit_bytes: that they may take in it.
    """

    folder: Path
    limit_bytes: int


@contextmanager
def scratch_room(execution: ExecutionOptions, turns: int) -> Iterator[Room | None]:
    """Where tiles wait for a later turn, gone when the block ends; what dead runs have left there goes first.
    None where they do not: where none may, nor in memory unless that is asked for, nor on one of several
    machines.

    Args:
        turns: of the encoders: with one nothing is kept.

    Raises:
        ConfigError: nothing can be written into scratch_dir or stage_dir.
    """
    if turns < 2 or execution.scratch_gb == 0:
        yield None
        return
    given = execution.scratch_dir or execution.stage_dir
    folder = scratch_folder(execution)
    if execution.executor != "local":
        logger.info("decoded tiles are not kept: workers on several machines have no disk in common")
        yield None
        return
    if given is None and is_in_memory(folder):
        logger.info(
            "decoded tiles are not kept: %s is in memory; scratch_dir takes a folder on a disk", folder
        )
        yield None
        return
    with ExitStack() as stack:
        try:
            own = stack.enter_context(private_folder(folder))
            limit = _limit_bytes(execution, own)
        except OSError as error:
            why = f"{folder} cannot be written to ({error.strerror or error})"
            if given is not None:
                name = "stage_dir" if execution.scratch_dir is None else "scratch_dir"
                raise ConfigError(
                    f"{name}: {why}: give scratch_dir, a folder on a local disk, or scratch_gb=0, and each "
                    "group of encoders decodes the slides"
                ) from error
            logger.warning("decoded tiles are not kept: %s", why)
            yield None
            return
        yield Room(own, limit)


def scratch_folder(execution: ExecutionOptions) -> Path:
    """The folder in which runs have theirs."""
    return execution.scratch_dir or execution.stage_dir or Path(tempfile.gettempdir())


def _limit_bytes(execution: ExecutionOptions, folder: Path) -> int:
    """Bytes that tiles may take in a folder.

    Raises:
        OSError: its disk does not say what is free.
    """
    if execution.scratch_gb is not None:
        return int(execution.scratch_gb * 1e9)
    return shutil.disk_usage(folder).free // 2


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
