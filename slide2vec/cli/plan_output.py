"""What `slide2vec plan` has found, as CSV, JSON and tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slide2vec.cli.console import Sentences, cause, facts, stdout, table

if TYPE_CHECKING:
    from slide2vec.estimate import InTurns, SlideEstimate, Trial

__all__ = ["described", "print_tables", "write_csv"]


#: Slides that are decoded again and named in the table; the CSV and JSON have all.
_NAMED = 5


def write_csv(
    path: Path, estimates: Sequence[SlideEstimate], names: Sequence[str], turns: InTurns | None = None
) -> None:
    """A line per slide; with what the scratch has of it, where encoders take turns."""
    from slide2vec.files import atomic_path

    per_slide = _per_slide(estimates, turns)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(
            [
                "sample_id",
                "image_path",
                *(f"tiles_{name}" for name in names),
                *(per_slide[0] if per_slide else ()),
                "error",
            ]
        )
        for each, sizes in zip(estimates, per_slide, strict=True):
            errors = "; ".join(dict.fromkeys(str(error) for error in each.errors.values()))
            counts = [each.tiles.get(name, "") for name in names]
            lines.writerow([each.slide.sample_id, each.slide.image_path, *counts, *sizes.values(), errors])


def _per_slide(estimates: Sequence[SlideEstimate], turns: InTurns | None) -> list[dict[str, int]]:
    """Bytes of each slide; and how many groups have it from the scratch, or decode it again."""
    if turns is None:
        return [{"read_bytes": each.read_bytes, "written_bytes": each.written_bytes} for each in estimates]
    sizes, taken, again = turns.bytes_of, turns.from_scratch, turns.decoded_again
    return [
        {
            "read_bytes": turns.read_bytes[each.slide.sample_id],
            "written_bytes": each.written_bytes,
            "scratch_bytes": sizes[each.slide.sample_id],
            "from_scratch": taken[each.slide.sample_id],
            "decoded_again": again[each.slide.sample_id],
        }
        for each in estimates
    ]


def described(
    estimates: Sequence[SlideEstimate],
    tiles: Mapping[str, int],
    trials: Mapping[str, Trial],
    rows: Sequence[Mapping[str, Any]],
    devices: Sequence[str],
    groups: Sequence[Sequence[str]],
    turns: InTurns | None,
    saved_s: float | None,
) -> dict[str, Any]:
    """All of it, JSON-ready.

    Args:
        devices: that the run uses; each has a worker, if there are several.
        turns: where encoders take turns.
        saved_s: seconds that the scratch saves here, where that is known.
    """
    made: dict[str, Any] = {
        "slides": [
            {
                "sample_id": each.slide.sample_id,
                "image_path": each.slide.image_path,
                "tiles": dict(each.tiles),
                **sizes,
                "errors": {name: str(error) for name, error in each.errors.items()},
            }
            for each, sizes in zip(estimates, _per_slide(estimates, turns), strict=True)
        ],
        "tiles": dict(tiles),
        "tiles_per_s": {name: trial.tiles_per_s for name, trial in trials.items()},
        "start_s": {name: trial.start_s for name, trial in trials.items()},
        "build_s": {name: trial.build_s for name, trial in trials.items()},
        "machines": list(rows),
        "devices": list(devices),
        "groups": [list(names) for names in groups],
    }
    if turns is not None:
        made["scratch"] = {
            "folder": turns.folder,
            "limit_bytes": turns.limit_bytes,
            "bytes": turns.bytes,
            "from_scratch": turns.from_scratch.total(),
            "decoded_again": turns.decoded_again.total(),
            "saved_s": saved_s,
        }
    return made


def print_tables(
    estimates: Sequence[SlideEstimate],
    tiles: Mapping[str, int],
    trials: Mapping[str, Trial],
    rows: Sequence[Mapping[str, Any]],
    devices: Sequence[str],
    turns: InTurns | None,
    saved_s: float | None,
    output: Path | None,
) -> None:
    """What a person wants to know of it; see `described`."""
    from rich.text import Text

    console = stdout()
    failed = [each for each in estimates if each.errors]
    sizes = _per_slide(estimates, turns)
    heads = ("encoder", "slides", "tiles", "a slide", "tiles/s encoding")
    cells = []
    for name, count in tiles.items():
        planned = sum(name in each.tiles for each in estimates)
        here = f"{trials[name].tiles_per_s:,.1f}" if name in trials else ""
        cells.append((name, f"{planned:,}", f"{count:,}", f"{count / max(1, planned):,.0f}", here))
    console.print(table(heads, cells, numbers=heads[1:]))
    console.print(
        facts(
            [
                ("to read", f"about {_size(sum(each['read_bytes'] for each in sizes))}{_groups(turns)}"),
                ("to write", f"about {_size(sum(each['written_bytes'] for each in sizes))}"),
                *([] if turns is None else [("scratch", _scratch(turns, saved_s))]),
                *([] if len(devices) < 2 else [("workers", f"{len(devices)}: {', '.join(devices)}")]),
                *([] if output is None else [("per slide", str(output))]),
            ]
        )
    )
    console.print()
    priced = any(row["price"] is not None for row in rows)
    columns = ("on", "takes", "tiles/s in all", "kWh", *(["price"] * priced))
    machines = [
        (
            row["machine"],
            _duration(row["hours"]),
            "" if row["tiles_per_s"] is None else _rounded(row["tiles_per_s"]),
            "not measured" if row["kwh"] is None else _hundredths(row["kwh"]),
            *([_hundredths(row["price"])] if priced else ()),
        )
        for row in rows
    ]
    if machines:
        console.print(table(columns, machines, numbers=columns[1:]))
        console.print(facts([(row["machine"], row["source"]) for row in rows]))
    else:
        said = "How long it takes is not known: without --no-trial it is tried, and --speed says it."
        console.print(Text(said, "dim"))
    if len(rows) > 1:
        console.print(
            Text("GPUs: one of them, encoding alone; where reading is slower it takes longer.", "dim")
        )
    if failed:
        console.print()
        console.print(Text(f"{len(failed):,} of {len(estimates):,} slides cannot be planned", "bold red"))
        first = [(each.slide.sample_id, next(iter(each.errors.values()))) for each in failed[:50]]
        console.print(Sentences(("slide", "error"), [(name, cause(name, error)) for name, error in first]))


def _groups(turns: InTurns | None) -> str:
    """Who reads, where encoders do not fit into memory together."""
    if turns is None:
        return ""
    names = ", then for ".join(" + ".join(group) for group in turns.groups)
    return f", in {len(turns.groups)} groups that take turns: for {names}"


def _scratch(turns: InTurns, saved_s: float | None) -> str:
    """What waits there decoded, and what does not."""
    again = turns.decoded_again
    named = ", ".join([*again][:_NAMED]) + (f" and {len(again) - _NAMED} more" if len(again) > _NAMED else "")
    decoded = f"{again.total():,} decoded again{f': {named}' if again else ''}"
    if turns.folder is None:
        return "none: each group decodes its slides"
    sizes = f"about {_size(turns.bytes)} of {_size(turns.limit_bytes)} in {turns.folder}"
    saved = "" if saved_s is None or saved_s < 1 else f"; saves about {_duration(saved_s / 3600)}"
    return f"{sizes}{saved}; slides: {turns.from_scratch.total():,} from the scratch, {decoded}"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.{0 if hours >= 10 else 1}f} h"
    if hours >= 1 / 30:
        return f"{60 * hours:.0f} min"
    return "< 1 s" if 0 < hours < 0.5 / 3600 else f"{3600 * hours:.0f} s"


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _hundredths(amount: float) -> str:
    return "< 0.01" if 0 < amount < 0.01 else f"{amount:,.2f}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
