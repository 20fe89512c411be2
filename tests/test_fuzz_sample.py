"""A few hundred damaged slides and files of tools/fuzz: no wrong pixel that could be noticed, no crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEED, CASES = 13, 320


def test_nothing_forbidden_comes_of_damage(tmp_path: Path) -> None:
    # In a process of its own: children are forked from one without threads.
    options = [
        "--sample",
        "--seed",
        str(SEED),
        "--cases",
        str(CASES),
        "--jobs",
        "2",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tools.fuzz", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stderr[-6000:]}\n(with --sample, and a --folder of yours)"
    results = [json.loads(line) for line in (tmp_path / f"seed-{SEED}.jsonl").read_text().splitlines()]
    assert len(results) == CASES
    outcomes = {result["outcome"] for result in results}
    assert {"right", "refused"} <= outcomes, "the damage reaches nothing, or everything"
