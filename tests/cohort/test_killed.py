"""A run that is killed, again and again, ends with the files of one that was left in peace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cohort_helpers import files, rows

KILLER = Path(__file__).with_name("killed.py")


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
