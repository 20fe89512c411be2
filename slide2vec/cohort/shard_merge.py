"""Shards become one run: their process lists together, and what is still missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slide2vec.cohort.lock import output_lock, shard_holders
from slide2vec.cohort.output_dir import remove_all_partial
from slide2vec.cohort.process_list import ProcessList, Row, State, state_of, state_of_all
from slide2vec.cohort.shard_lists import MergedProcessList, forget_shards, list_path, merged_process_list
from slide2vec.errors import ArtifactError

__all__ = ["MergedShards", "merge_shards"]


@dataclass(frozen=True, kw_only=True)
class MergedShards:
    """What became of the shards of an output directory.

    Attributes:
        found: all their rows.
        running: shards that are at work ("3/16"), and who; nothing was written because of them.
        process_list_path: the list that was written; None where it was not.
    """

    found: MergedProcessList
    running: Mapping[str, Mapping[str, Any]]
    process_list_path: Path | None

    def rows(self, *states: State) -> list[Row]:
        """Those of slides in one of the states."""
        return [row for row in self.found.rows.values() if state_of(row) in states]

    @property
    def finished(self) -> int:
        """Slides that are, with all their encoders."""
        missing = set(self.found.missing)
        states = state_of_all(self.found.rows.values())
        return sum(state == "finished" and name not in missing for name, state in states.items())

    @property
    def total(self) -> int:
        """Slides."""
        return len({name for name, _ in self.found.rows} | set(self.found.missing))

    @property
    def complete(self) -> bool:
        """Whether every slide of the cohort is finished."""
        return not (self.running or self.found.missing or self.rows("to do", "in progress", "failed"))


def merge_shards(output_dir: Path) -> MergedShards:
    """Write the common process list of shards and remove theirs. While one runs, only look.

    Raises:
        ArtifactError: there is no process list, or one that cannot be read.
        OutputLockedError: a run holds the directory.
        OutputError: a file cannot be written.
    """
    if running := shard_holders(output_dir):
        return MergedShards(found=merged_process_list(output_dir), running=running, process_list_path=None)
    common = list_path(output_dir, None)
    if not common.exists() and not merged_process_list(output_dir).by_shard:
        raise ArtifactError(f"{output_dir} has no process lists: it is not the output directory of a run")
    with output_lock(output_dir):
        found = merged_process_list(output_dir)
        with ProcessList(common, found.rows.values()):
            pass
        forget_shards(output_dir, order=not found.missing)
        remove_all_partial(output_dir)
    return MergedShards(found=found, running={}, process_list_path=common)
