"""The job scripts of docs/slurm are what a shell and this command line take."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from slide2vec.cli import app

DOCS = Path(__file__).parents[1] / "docs"
SCRIPTS = sorted((DOCS / "slurm").glob("*.sbatch"))

#: A call of slide2vec, with the lines that it goes on for.
_CALL = re.compile(r"\bslide2vec (run|merge|status)((?:[^\n'`\\]|\\\n)*)")


def calls(text: str) -> list[tuple[str, list[str]]]:
    """Subcommands, their long flags, and a manifest that stands without one."""
    return [
        (command, re.findall(r"(?<!\S)(?:--[a-z-]+|[^-\s]\S*\.csv)", rest))
        for command, rest in _CALL.findall(text)
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_reads_it(script: Path) -> None:
    assert script.read_text().startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("path", [*SCRIPTS, DOCS / "cluster.md"], ids=lambda path: path.name)
def test_flags_exist(path: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = calls(path.read_text())
    assert any(
        command == "run" and "--preset" in given and not {"--manifest", "slides.csv"}.isdisjoint(given)
        for command, given in found
    )
    for command, given in found:
        flags = {each for each in given if each.startswith("--")}
        known = {
            name for option in commands[command].params for name in (*option.opts, *option.secondary_opts)
        }
        assert flags - known == set(), f"{path.name}: slide2vec {command}"


def test_array_counts_from_one_whatever_slurm_counts_from() -> None:
    line = next(line for line in (DOCS / "slurm/array.sbatch").read_text().splitlines() if "--shard" in line)
    for variables, shard in (
        ("SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_COUNT=16", "1/16"),
        ("SLURM_ARRAY_TASK_ID=15 SLURM_ARRAY_TASK_COUNT=16", "16/16"),
        ("SLURM_ARRAY_TASK_ID=3 SLURM_ARRAY_TASK_COUNT=1 SHARDS=16", "4/16"),  # one index again
    ):
        code = f"unset SHARDS; {variables.replace(' ', ';')}; echo {line}"
        said = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert said.stdout.split() == ["--shard", shard]


def test_all_scripts_are_there_and_linked() -> None:
    text = (DOCS / "cluster.md").read_text()
    assert {path.name for path in SCRIPTS} == {"one-node.sbatch", "array.sbatch", "ray.sbatch"}
    assert all(f"](slurm/{path.name})" in text for path in SCRIPTS)
