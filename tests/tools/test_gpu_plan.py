"""The plan for a GPU, tried on the CPU: every stage's Python runs, and writes what it will there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from tools import gpu_probe
from tools.gpu_check import ROOT

#: As tools/gpu_plan.sh --dry-run has them, and as few tiles as can be.
TINY = ["--device", "cpu", "--size", "1024", "--batch-size", "2", "--seconds", "0.01", "--trial", "1"]
#: As many files as a machine without a network may give back.
MOST_FILES = 8


@pytest.fixture
def work_dir(tmp_path: Path, generated_slide: Callable[..., Path]) -> Path:
    generated_slide(tmp_path / "synthetic-1024.svs", size_px=1024, seed=0, levels=1)
    return tmp_path


def run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["test", *TINY, *map(str, arguments)])
    main()


@pytest.mark.slow
def test_probe(work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = work_dir / "probe.json"
    monkeypatch.setattr(gpu_probe, "TURNS", 2)
    run(gpu_probe.main, monkeypatch, "--out", out, "--presets", "scattering", "--work-dir", work_dir)
    found = json.loads(out.read_text())
    assert not [item for item in found.values() if "FAILED" in str(item)]
    decoded = found["decoding synthetic-1024.svs"]
    assert all(row.get("decoded_by", {}).keys() <= {row.get("decode_path")} for row in decoded.values())
    assert decoded["uploaded"]["tiles_per_s"] > 0 and decoded["uploaded"]["worst_tile"] == 0
    assert found["encoder scattering"]["as a run has it"]["least cosine"] > 0.9999


def test_an_item_that_fails_ends_only_itself(tmp_path: Path) -> None:
    findings = gpu_probe.Findings(tmp_path / "probe.json")
    findings.keep("bad", lambda: 1 / 0)
    findings.keep("good", lambda: 1)
    kept = json.loads((tmp_path / "probe.json").read_text())
    assert kept == {"bad": "FAILED ZeroDivisionError: division by zero", "good": 1}


@pytest.mark.slow
def test_benchmark(work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = work_dir / "bench"
    options = ("--out", out, "--work-dir", work_dir, "--rounds", 1, "--most-slides", 2)
    run(gpu.main, monkeypatch, *options, "--presets", "scattering", "--parts", "presets")
    run(gpu.main, monkeypatch, *options, "--parts", "decode", "--add")
    parts = json.loads(out.with_suffix(".json").read_text())["parts"]
    assert set(parts) == {"scattering", "decode synthetic-1024.svs"}
    ends = parts["scattering"]["end to end"]
    assert ends["tiles"] > 0 and ends["share_of_encoder"] > 0 and ends["stations"] and ends["memory_mb"]
    assert parts["scattering"]["OpenSlide DataLoader"]["tiles_per_s"] > 0
    assert "| end to end |" in out.with_suffix(".md").read_text()


def test_what_is_aimed_at_stands_beside_what_was_measured() -> None:
    def row(speed: float, **more: float) -> gpu.Row:
        return {"tiles_per_s": speed, "host_cpu_share": 0.5, "gpu_utilisation": 0.9, **more}

    ends = row(1350, share_of_encoder=0.9, running_tiles_per_s=1440, running_share_of_encoder=0.96)
    parts = {"encode": row(1500), "end to end": ends, "OpenSlide DataLoader": row(450)}
    decoded = row(9000, mean_difference=0.1, worst_tile=0.4)
    decoded |= {"decode_path": "a", "decoded_by": {"a": 90, "tiff, uploaded": 10}}
    found = {
        "date": "",
        "gpu": "",
        "cpus": 2,
        "packages": {},
        "parts": {"virchow2": parts, "decode": {"a": decoded}},
    }
    lines = gpu.report(found).splitlines()
    expected = (
        "| 1,350 | 1,440 | ≥ 1,400 | 0.90, once running 0.96 (goal ≥ 0.95) | 3.0 (goal ≥ 3) | 90% | 50% |"
    )
    assert f"| end to end {expected}" in lines
    assert "| a | 9,000 (10 tiles by tiff, uploaded) | 0.100 | 0.400 | 90% | 50% |" in lines


def test_a_part_that_fails_is_reported() -> None:
    def rows() -> Any:
        yield "one", {"tiles": 2, "seconds": 1.0}
        raise RuntimeError("no memory")

    found: gpu.Row = {"parts": {}}
    gpu.run_part(found, "part", rows(), lambda: None)
    assert found["parts"]["part"]["one"]["tiles_per_s"] == 2
    assert found["parts"]["part"]["the rest"] == {"not_run": "RuntimeError: no memory"}


@pytest.mark.slow
def test_whole_plan(work_dir: Path) -> None:
    (work_dir / "slide2vec-gpu").mkdir()
    (work_dir / "synthetic-1024.svs").rename(work_dir / "slide2vec-gpu" / "synthetic-1024.svs")
    own = {"OUT": str(work_dir / "out"), "TMPDIR": str(work_dir), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tools" / "gpu_plan.sh"), "--dry-run"]
    ended = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    results = (work_dir / "out" / "results.md").read_text()
    table = results.split("\n\n")[0]
    stages = re.findall(r"^\| ([^|]+) \| ([^|]+) \| \d+ \|", table, re.MULTILINE)
    assert len(stages) == 6 and {status for _, status in stages} == {"0"}, ended.stdout
    assert "## scattering" in results
    assert len(list((work_dir / "out").iterdir())) <= MOST_FILES


def test_archives_are_unpacked_once(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("found = 1")
    archive = tmp_path / "base" / "site.tar.xz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(tmp_path / "module.py", "package/module.py")
    own = {"WHEELS": str(tmp_path), "TMPDIR": str(tmp_path), "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tools" / "gpu_plan.sh"), "--unpack"]
    unpacked = tmp_path / "slide2vec-gpu" / "site" / "package" / "module.py"
    for _ in range(2):
        subprocess.run(command, env=os.environ | own, check=True, capture_output=True)
        assert unpacked.read_text() == "found = 1"
        unpacked.write_text("found = 1")  # what is there already stays
        archive.write_bytes(b"no archive")


def test_unknown_options_are_refused() -> None:
    ended = subprocess.run(["bash", ROOT / "tools" / "gpu_plan.sh", "--quik"], capture_output=True, text=True)
    assert ended.returncode == 2 and "--quik" in ended.stderr
