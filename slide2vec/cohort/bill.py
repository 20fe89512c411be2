"""bill.json: what each run into an output directory took."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from slide2vec.cohort.lock import shard_stem
from slide2vec.cohort.log import RunLog
from slide2vec.files import atomic_path, entries, remove
from slide2vec.progress import RunSummary

__all__ = ["SCHEMA_VERSION", "bill_path", "collect_bills", "write_bill"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_OF_SHARDS = "bill.shard-*.json"


def bill_path(output_dir: Path, shard: str | None = None) -> Path:
    """Where it is; shards run at the same time, so that each has its own."""
    return output_dir / ("bill.json" if shard is None else f"bill.{shard_stem(shard)}.json")


def write_bill(log: RunLog, summary: RunSummary | None, encoders: Mapping[str, RunSummary | None]) -> None:
    """Add the run's entry to those of earlier runs; none where nothing was embedded.

    Args:
        summary: of all of it.
        encoders: the summary of each, by name.

    Raises:
        OutputError: it cannot be written.
    """
    if summary is None:
        return
    entry = {
        "started": log.started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "shard": log.shard,
        **summary.bill(),
        "encoders": {name: each.bill() for name, each in encoders.items() if each is not None},
        "of_slides": list(_shares(summary, log.finished)),
    }
    path = bill_path(log.output_dir, log.shard)
    _write(path, [*_runs(path), entry])


def collect_bills(output_dir: Path) -> None:
    """Put those of shards into that of the whole. Only for who holds the whole directory.

    Raises:
        OutputError: a file cannot be written or removed.
    """
    paths = [path for path in entries(output_dir) if fnmatch(path.name, _OF_SHARDS)]
    if paths:
        runs = _runs(bill_path(output_dir))
        runs += [run for path in paths for run in _runs(path) if run not in runs]
        _write(bill_path(output_dir), sorted(runs, key=lambda run: str(run["started"])))
        for path in paths:
            remove(path)


def _write(path: Path, runs: list[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary:
        content = {"schema_version": SCHEMA_VERSION, "runs": runs}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _runs(path: Path) -> list[dict[str, Any]]:
    """Entries of earlier runs."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        if all(run["started"] for run in runs):
            return list(runs)
        raise ValueError("a run without its start")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s: %s); a new one is begun", path, type(error).__name__, error)
        return []


def _shares(summary: RunSummary, tiles: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """A run's seconds and watt-hours, shared out among its slides by their tiles: slides are in work at the
    same time, and their tiles in one batch."""
    total = sum(tiles.values())
    for name, count in tiles.items():
        share = count / total if total else 0.0
        watt_hours = None if summary.watt_hours is None else summary.watt_hours * share
        yield {
            "sample_id": name,
            "tiles": count,
            "seconds": summary.seconds * share,
            "watt_hours": watt_hours,
        }
