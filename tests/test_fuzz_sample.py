"""Damaged slides and files of tools/fuzz, of every container and codec: no wrong pixel that could be noticed,
no crash."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools.fuzz.others import OTHERS
from tools.fuzz.slides import BASES

#: Those of the sample.
SLIDES = [base for base in BASES if base.sample]
ROOT = Path(__file__).parents[1]
SEED = 13
#: Three or more of every container, codec and kind of file; and, slowly, ten.
CASES = [128, pytest.param(320, marks=pytest.mark.slow)]


@pytest.mark.parametrize("cases", CASES)
def test_nothing_forbidden_comes_of_damage(tmp_path: Path, cases: int) -> None:
    # In a process of its own: children are forked from one without threads.
    options = [
        "--sample",
        "--seed",
        str(SEED),
        "--cases",
        str(cases),
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
    assert len(results) == cases
    for kind, each in (("slide", SLIDES), ("other", OTHERS)):
        tried = Counter(result["base"] for result in results if result["kind"] == kind)
        assert min(tried[base.name] for base in each) >= 3
    outcomes = {result["outcome"] for result in results}
    assert {"right", "refused"} <= outcomes, "the damage reaches nothing, or everything"
