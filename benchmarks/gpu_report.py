"""The tables of benchmarks.gpu."""

from __future__ import annotations

from typing import Any

__all__ = ["GOALS", "report"]

Row = dict[str, Any]

#: Tiles/s end to end that are aimed at on an H100 (bf16, random weights), by preset.
GOALS = {"virchow2": 1_400, "uni": 3_500, "prost40m": 10_000}
#: Share of the encoder alone, and times the per-tile DataLoader, that are aimed at end to end.
SHARE_GOAL, LEAD_GOAL = 0.95, 3.0


def report(found: Row) -> str:
    """Markdown: a table per part, with what is aimed at beside what was measured."""
    lines = [f"# GPU benchmark, {found['date']}", "", f"{found['gpu']}, {found['cpus']} CPUs, "]
    lines[-1] += ", ".join(f"{name} {number}" for name, number in found["packages"].items() if number)
    for name, rows in found["parts"].items():
        table = _decoding(rows) if name.startswith("decode") else _speeds(name, rows)
        lines += ["", f"## {name}", "", *table]
    return "\n".join(lines) + "\n"


def _decoding(rows: dict[str, Row]) -> list[str]:
    lines = ["| decode path | tiles/s | mean difference, grey levels | of the worst tile | GPU | host CPU |"]
    lines.append("|---|---|---|---|---|---|")
    for what, row in rows.items():
        if "not_run" in row:
            lines.append(f"| {what} | not run: {_short(row['not_run'])} | | | | |")
            continue
        pixels = f"{row['mean_difference']:.3f} | {row['worst_tile']:.3f}"
        speed = f"{row['tiles_per_s']:,.0f}{_elsewhere(row)}"
        lines.append(f"| {what} | {speed} | {pixels} | {_busy(row)} |")
    return lines


def _elsewhere(row: Row) -> str:
    """Tiles that the path left to others."""
    others = {path: tiles for path, tiles in row["decoded_by"].items() if path != row["decode_path"]}
    return f" ({', '.join(f'{tiles:,} tiles by {path}' for path, tiles in others.items())})" if others else ""


def _speeds(preset: str, rows: dict[str, Row]) -> list[str]:
    lines = [
        "| what | tiles/s | once running | goal | of the encoder | times the DataLoader | GPU | host CPU |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    rival = rows.get("OpenSlide DataLoader", {}).get("tiles_per_s")
    for what, row in rows.items():
        if "not_run" in row:
            lines.append(f"| {what} | not run: {_short(row['not_run'])} | | | | | | |")
            continue
        ours, goal = what == "end to end", GOALS.get(preset)
        wanted = f"≥ {goal:,}" if ours and goal else ""
        share, lead = _share(row, ours), _lead(row, rival) if ours else ""
        running = f"{row['running_tiles_per_s']:,.0f}" if "running_tiles_per_s" in row else ""
        speed = f"{row['tiles_per_s']:,.0f} | {running}"
        lines.append(f"| {what} | {speed} | {wanted} | {share} | {lead} | {_busy(row)} |")
    for what, row in rows.items():
        if row.get("summary"):
            lines += ["", f"{what}: {row['summary']}"]
        if row.get("memory_mb"):
            noted = "; ".join(f"after {n}: {_memory(mb)}" for n, mb in row["memory_mb"].items())
            lines += ["", f"Peak memory, {row['slides']} slides: {noted}."]
    return lines


def _share(row: Row, ours: bool) -> str:
    share = row.get("share_of_encoder")
    if not share:
        return ""
    running = row.get("running_share_of_encoder")
    later = f", once running {running:.2f}" if running else ""
    return f"{share:.2f}{later}{f' (goal ≥ {SHARE_GOAL})' if ours else ''}"


def _lead(row: Row, rival: float | None) -> str:
    return f"{row['tiles_per_s'] / rival:.1f} (goal ≥ {LEAD_GOAL:g})" if rival else ""


def _busy(row: Row) -> str:
    busy = row.get("gpu_utilisation")
    return f"{'not measured' if busy is None else f'{busy:.0%}'} | {row['host_cpu_share']:.0%}"


def _memory(mb: Row) -> str:
    return ", ".join(f"{where} {number:,} MB" for where, number in mb.items())


def _short(text: str) -> str:
    return " ".join(text.split())[:300].replace("|", "/")
