"""What shards of a cohort keep beside the process list that all slides end up in."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from slide2vec.artifacts.places import Owner
from slide2vec.cohort.bill import collect_bills
from slide2vec.cohort.lock import PLACES_LOCK, SHARD_LOCKS, output_lock, shard_holders, shard_stem
from slide2vec.cohort.process_list import (
    PROCESS_LIST,
    Key,
    ProcessList,
    Row,
    key_of,
    read_process_list,
    state_of,
)
from slide2vec.errors import OutputError
from slide2vec.files import as_os_errors, atomic_path, entries, remove

__all__ = [
    "MergedProcessList",
    "encoders_at_work",
    "encoders_path",
    "enter_empty",
    "forget_shards",
    "list_path",
    "merged_process_list",
    "write_encoders",
    "write_order",
]

#: The sample_ids of a whole cohort in the order of its manifest, one a line. Every shard writes the same.
_ORDER = ".slide2vec.slides"
#: Matches what shards keep of their encoders.
_ENCODERS = ".slide2vec.shard-*-of-*.encoders"
_LIST = re.compile(r"process_list\.shard-(\d+)-of-(\d+)\.csv")


def list_path(output_dir: Path, shard: str | None) -> Path:
    """The process list of a run, or of one shard of it."""
    return output_dir / (PROCESS_LIST if shard is None else f"process_list.{shard_stem(shard)}.csv")


def write_order(output_dir: Path, sample_ids: Iterable[str]) -> None:
    """Keep which slides the whole cohort has, for `merged_process_list`.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_path(output_dir / _ORDER) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in sample_ids), encoding="utf-8")


def enter_empty(output_dir: Path, shard: str, sample_ids: Iterable[str]) -> Path:
    """The process list of a shard without slides, so that it counts as run.

    Args:
        sample_ids: of the whole cohort.

    Raises:
        OutputLockedError: the whole directory, or this shard, is held.
        OutputError: a file cannot be written.
    """
    path = list_path(output_dir, shard)
    with output_lock(output_dir, shard):
        write_order(output_dir, sample_ids)
        with ProcessList(path, ()):
            return path


def encoders_path(output_dir: Path, shard: str) -> Path:
    """Where a shard keeps its encoders while it runs."""
    return output_dir / f".slide2vec.{shard_stem(shard)}.encoders"


def write_encoders(output_dir: Path, shard: str, encoders: Sequence[Owner]) -> None:
    """Keep the encoders of a shard, with the folders that are theirs though nothing may be there yet.

    Raises:
        OutputError: they cannot be written.
    """
    kept = [[each.folder.relative_to(output_dir).parts, each.sidecars] for each in encoders]
    with atomic_path(encoders_path(output_dir, shard)) as temporary:
        temporary.write_text(json.dumps(kept), encoding="utf-8")


def encoders_at_work(output_dir: Path, shard: str) -> list[Owner]:
    """Those of all other shards that run now.

    Raises:
        OutputError: a shard's cannot be read.
    """
    found: list[Owner] = []
    for other in shard_holders(output_dir).keys() - {shard}:
        path = encoders_path(output_dir, other)
        try:
            with as_os_errors(path):
                kept = json.loads(path.read_bytes())
        except FileNotFoundError:  # it has not looked for its folders yet
            continue
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{path}, which says where shard {other} writes, cannot be read ({error}): start again once "
                "that shard has ended"
            ) from error
        found += [Owner(output_dir, output_dir.joinpath(*parts), sidecars) for parts, sidecars in kept]
    return found


@dataclass(frozen=True, kw_only=True)
class MergedProcessList:
    """All process lists of an output directory together.

    Attributes:
        rows: by sample_id and encoder, in the order of the manifest where shards have written it; then those
            of other slides, as they were in the common list.
        by_shard: the slides of each shard that has a list, with their encoders, by the shards' numbers
            ("3/16").
        missing: slides of the cohort that are in no list, or not with an encoder that shards have.
    """

    rows: Mapping[Key, Row]
    by_shard: Mapping[str, tuple[Key, ...]]
    missing: tuple[str, ...]

    @property
    def not_run(self) -> tuple[str, ...]:
        """Shards without a list, as long as slides are missing: later all is in the common list."""
        counts = {shard.split("/")[1] for shard in self.by_shard} if self.missing else set()
        every = (
            f"{number}/{count}" for count in sorted(counts, key=int) for number in range(1, int(count) + 1)
        )
        return tuple(shard for shard in every if shard not in self.by_shard)

    @property
    def in_two(self) -> dict[str, tuple[str, ...]]:
        """Slides that several shards had for one encoder, and which."""
        times = Counter(key for keys in self.by_shard.values() for key in keys)
        where: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for shard, keys in self.by_shard.items():
            for key in keys:
                if times[key] > 1:
                    where[key[0]][shard] = None
        return {name: tuple(shards) for name, shards in where.items()}


def merged_process_list(output_dir: Path) -> MergedProcessList:
    """What the process lists of an output directory say.

    Of a slide in several lists a shard's row counts over the common one (a shard's list that is there is
    newer), and among shards one that is finished.

    Raises:
        ArtifactError: a list cannot be read.
    """
    common = list_path(output_dir, None)
    rows = {key_of(row): row for row in read_process_list(common)} if common.exists() else {}
    by_shard: dict[str, tuple[Key, ...]] = {}
    newer: dict[Key, Row] = {}
    for shard, path in _lists(output_dir):
        listed = {key_of(row): row for row in read_process_list(path)}
        by_shard[shard] = tuple(listed)
        newer |= {
            key: row for key, row in listed.items() if key not in newer or state_of(newer[key]) != "finished"
        }
    sharded = {name for name, _ in newer}
    kept = {key: row for key, row in rows.items() if key[1] or key[0] not in sharded}
    found, order = {**kept, **newer}, _order(output_dir)
    encoders = dict.fromkeys(encoder for _, encoder in found)
    names = order or sorted({name for name, _ in newer})
    first = [(name, encoder) for name in names for encoder in encoders]
    ranked = {key: found[key] for key in (*first, *found) if key in found}
    at_work = ({encoder for _, encoder in newer} - {""}) or set(encoders) or {""}
    missing = tuple(
        name
        for name in order
        if not all((name, encoder) in found or (name, "") in newer for encoder in at_work)
    )
    return MergedProcessList(rows=ranked, by_shard=by_shard, missing=missing)


def _lists(output_dir: Path) -> Iterator[tuple[str, Path]]:
    found = [
        (int(match[2]), int(match[1]), path)
        for path in entries(output_dir)
        if (match := _LIST.fullmatch(path.name))
    ]
    for count, number, path in sorted(found):
        yield f"{number}/{count}", path


def _order(output_dir: Path) -> list[str]:
    """Of the whole cohort, each slide once; nothing where no shard has written it."""
    try:
        text = (output_dir / _ORDER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    return list(dict.fromkeys(line for line in text.split("\n") if line))


def forget_shards(output_dir: Path, *, order: bool) -> None:
    """Remove the lists, locks and encoders of shards, once the common list has their rows, and their bills,
    which go into the common one. Only for who holds the whole directory.

    Args:
        order: remove what tells which slides are missing, too.

    Raises:
        OutputError: one cannot be removed, or the common bill not written.
    """
    collect_bills(output_dir)
    kept = [
        path
        for path in entries(output_dir)
        if fnmatch(path.name, SHARD_LOCKS) or fnmatch(path.name, _ENCODERS)
    ]
    gone = [path for _, path in _lists(output_dir)] + kept
    gone.append(output_dir / PLACES_LOCK)
    for path in [*gone, output_dir / _ORDER] if order else gone:
        remove(path)
