"""A run that is killed, again and again, ends with the files of one that was left in peace."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

KILLER = Path(__file__).with_name("killed.py")
#: Not compared: the lock, logs, and the process list, which is compared by row.
APART = {".slide2vec.lock", "process_list.csv", "logs"}


def files(folder: Path) -> dict[str, bytes]:
    """What a run made, its own path taken out."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"OUT")
        for path in found
        if path.relative_to(folder).parts[0] not in APART
    }


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "process_list.csv").open(newline="") as file:
        return [
            {name: cell.replace(str(folder), "OUT") for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_kill_9_in_a_loop(manifest: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    code = "import sys; from pathlib import Path; import killed, torch; from slide2vec import Model; "
    code += "torch.set_num_threads(1); "
    code += "killed.run(Model.from_preset('scattering', device='cpu'), *map(Path, sys.argv[1:]))"
    subprocess.run(
        [sys.executable, "-c", code, str(manifest), str(undisturbed)],
        cwd=KILLER.parent,
        check=True,
        timeout=120,
    )
    expected = files(undisturbed)
    assert sum(name.startswith("tile_embeddings/") for name in expected) == 12
    kills = 0
    for seed in range(3):
        disturbed = tmp_path / f"disturbed{seed}"
        ended = subprocess.run(
            [sys.executable, str(KILLER), str(manifest), str(disturbed), str(seed)],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert ended.returncode == 0, ended.stderr
        count, status = map(int, ended.stdout.split())
        assert status == 0, ended.stderr
        kills += count
        assert files(disturbed) == expected
        assert rows(disturbed) == rows(undisturbed)
    assert kills >= 6  # two of a run's first operations, three times; the others depend on the machine
