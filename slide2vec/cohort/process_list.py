"""process_list.csv: what has become of every slide of a run, kept up to date while it goes."""

from __future__ import annotations

import csv
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from slide2vec.errors import ArtifactError, OutputError
from slide2vec.files import as_os_errors, atomic_path
from slide2vec.labels import class_name

__all__ = [
    "COLUMNS",
    "PROCESS_LIST",
    "STATES",
    "Key",
    "ProcessList",
    "Row",
    "State",
    "by_encoder",
    "key_of",
    "read_process_list",
    "state_of",
    "state_of_all",
]

#: Its name in an output directory.
PROCESS_LIST = "process_list.csv"

COLUMNS = (
    "sample_id",
    "image_path",
    "mask_path",
    "requested_backend",
    "backend",
    "spacing_at_level_0",
    "tiling_status",
    "num_tiles",
    "coordinates_npz_path",
    "coordinates_meta_path",
    "tiles_tar_path",
    "mask_preview_path",
    "tiling_preview_path",
    "feature_status",
    "feature_path",
    "encoder_name",
    "output_variant",
    "feature_kind",
    "aggregation_status",
    "error",
    "traceback",
)
#: Seconds between two writes while rows change; a long list is written more rarely, so that writing
#: takes at most a fiftieth of the time.
_EVERY_S = 1.0
_SHARE = 50

Row = dict[str, str]
#: sample_id, with the class before it ("tumor/a") where the slide is sampled by class, and encoder_name.
Key: TypeAlias = tuple[str, str]
State: TypeAlias = Literal["finished", "in progress", "to do", "failed"]
#: From good to bad.
_BAD: tuple[State, ...] = ("finished", "to do", "in progress", "failed")
STATES: tuple[State, ...] = ("finished", "in progress", "to do", "failed")


def read_process_list(path: Path) -> list[Row]:
    """The rows of a process list, text by column; columns that are absent are blank.

    Raises:
        ArtifactError: it is missing or no process list.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # tracebacks are long
    try:
        with as_os_errors(path), path.open(newline="", encoding="utf-8") as file:
            table = csv.reader(file, strict=True)
            header = next(table, [])
            if "sample_id" not in header:
                raise ArtifactError(f"{path} is no process list: it has no column sample_id")
            rows = []
            for cells in filter(None, table):
                if len(cells) != len(header):
                    raise ArtifactError(
                        f"process list {path} is damaged: line {table.line_num} has {len(cells)} cells, its "
                        f"header {len(header)}; delete it: the next run into the folder begins a new one"
                    )
                rows.append({**dict.fromkeys(COLUMNS, ""), **dict(zip(header, cells, strict=True))})
            return rows
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise ArtifactError(f"process list {path} cannot be read: {error}") from error


def state_of(row: Mapping[str, str]) -> State:
    """What has become of a slide; one that is only tiled has no feature_status."""
    features, tiling = row["feature_status"], row["tiling_status"]
    if tiling == "failed" or "error" in (features, row["aggregation_status"]):
        return "failed"
    if tiling == "success" and features in ("", "success") and row["aggregation_status"] != "tbp":
        return "finished"
    return "in progress" if tiling == "success" else "to do"


def by_encoder(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each encoder ("" where slides are only tiled), in order of first appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key_of(row)[1], []).append(row)
    return found


def state_of_all(rows: Iterable[Row]) -> dict[str, State]:
    """What has become of each slide (or class of one) with all its encoders: the worst of its rows."""
    found: dict[str, State] = {}
    for row in rows:
        name, _ = key_of(row)
        found[name] = max((found.get(name, "finished"), state_of(row)), key=_BAD.index)
    return found


def key_of(row: Mapping[str, Any]) -> Key:
    """What a row is of: a slide or a class of one, and the encoder that embeds it ("": it is only tiled)."""
    annotation = str(row.get("annotation") or "")  # a column of lists with classes
    return class_name(annotation, str(row["sample_id"])), str(row.get("encoder_name") or "")


class ProcessList:
    """The rows of slides, one per encoder, written in the background whenever they have changed.

    Used from several threads. Leaving its context writes what is not yet written.

    Raises:
        OutputError: from `update` or at the end, when the file cannot be written.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        self.path = path
        self._rows = {key_of(row): _text(row) for row in rows}
        self._lock = threading.Lock()
        self._changed, self._closing = True, threading.Event()
        self._broken: OutputError | None = None
        self._thread = threading.Thread(target=self._write_regularly, name="process-list", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        try:
            self._write()
        except OutputError:
            if error is None:  # else the first error is raised
                raise

    def update(self, sample_id: str, encoder: str = "", /, **values: Any) -> None:
        """Set columns of the row of a slide and an encoder; None is a blank cell."""
        if self._broken is not None:
            raise self._broken
        with self._lock:
            self._rows[sample_id, encoder].update(_text(values))
            self._changed = True

    def row(self, sample_id: str, encoder: str = "") -> Row:
        """A copy of the row of a slide and an encoder."""
        with self._lock:
            return dict(self._rows[sample_id, encoder])

    def _write_regularly(self) -> None:
        pause = _EVERY_S
        while not self._closing.wait(pause):
            try:
                pause = max(_EVERY_S, _SHARE * self._write())
            except OutputError as error:
                self._broken = error
                return

    def _write(self) -> float:
        """Write if anything has changed; the seconds it took."""
        started = time.perf_counter()
        with self._lock:
            if not self._changed:
                return 0.0
            rows = [dict(row) for row in self._rows.values()]
            self._changed = False
        columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        with atomic_path(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(columns), restval="")
            table.writeheader()
            table.writerows(rows)
        return time.perf_counter() - started


def _text(values: Mapping[str, Any]) -> Row:
    return {name: "" if value is None else str(value) for name, value in values.items()}
