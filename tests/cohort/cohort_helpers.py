"""What runs into different folders have in common."""

from __future__ import annotations

import csv
from pathlib import Path

#: Not compared: the lock, logs and bills, and the process list, which is compared by row.
APART = {".slide2vec.lock", "process_list.csv", "logs", "bill.json"}


def files(folder: Path) -> dict[str, bytes]:
    """What a run made, its own path taken out."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"OUT")
        for path in found
        if path.relative_to(folder).parts[0] not in APART
    }


def rows(folder: Path) -> list[dict[str, str]]:
    """The process list, the path of the run taken out."""
    with (folder / "process_list.csv").open(newline="") as file:
        return [
            {name: cell.replace(str(folder), "OUT") for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]
