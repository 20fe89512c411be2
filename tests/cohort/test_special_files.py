"""Pipes, devices, links to nowhere and what may not be read: that slide fails, at once, and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slide2vec import ExecutionOptions, PreprocessingConfig
from slide2vec.cohort import tile_cohort
from slide2vec.slides import as_slides
from slide2vec.tiling.archives import archive_paths
from slide2vec.tiling.coordinates import coordinate_paths

#: A slide that hangs would do so for ever; importing takes a few seconds on a busy machine.
PATIENCE_S = 180

TOLD = {
    "pipe": "is a named pipe",
    "socket": "is a socket",
    "device": "is a device",
    "loop": "Too many levels of symbolic links",
    "directory": "is a directory",
    "unreadable": "Permission denied",
    "nul": "embedded null",
}


@pytest.fixture(scope="module")
def errors(generated_slide: Callable[..., Path]) -> Iterator[list[dict[str, str]]]:
    """Of slides that were read in place, and of staged ones."""
    with tempfile.TemporaryDirectory() as made:  # not pytest's, which is closed to others
        folder = Path(made)
        generated_slide(folder / "good.svs", size_px=768, seed=0, levels=1)
        command = [sys.executable, str(Path(__file__).with_name("special.py")), made]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        yield json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("staged", [False, True])
def test_special_files_fail_alone_and_at_once(errors: list[dict[str, str]], staged: bool) -> None:
    failed = errors[staged]
    kinds = [*TOLD, "dangling", "s3"]
    assert failed.keys() == {f"{what}-{kind}" for what in ("slide", "mask") for kind in kinds}
    for name, error in failed.items():
        assert error.startswith(f"slide {name}: "), error
        what, _, kind = name.partition("-")
        if kind == "dangling":
            assert ("there is no file" if what == "slide" else "it does not exist") in error
        elif kind == "s3":
            assert ("credentials" if staged else "ExecutionOptions(stage_dir=") in error
        else:
            assert TOLD[kind] in error, error


def test_special_coordinates_and_archives(tmp_path: Path, generated_slide: Callable[..., Path]) -> None:
    slide = generated_slide(tmp_path / "a.svs", size_px=768, seed=0, levels=1)
    config = PreprocessingConfig(
        requested_spacing_um=0.5, requested_tile_size_px=96, filtering={"a_t": 0}, save_tiles=True
    )
    execution = ExecutionOptions(output_dir=tmp_path / "out")
    given = as_slides([{"sample_id": name, "image_path": slide} for name in ("a", "b", "c")])
    assert not tile_cohort(given, config, execution).failed
    tiles, again = tmp_path / "out" / "tiles", ExecutionOptions(output_dir=tmp_path / "again")
    for path in (coordinate_paths(tiles, "a")[1], coordinate_paths(tiles, "b")[0]):
        path.unlink()
        os.mkfifo(path)
    result = tile_cohort(
        given, config.updated(read_coordinates_from=tmp_path / "out", save_tiles=False), again
    )
    assert [item.sample_id for item in result.failed] == ["a", "b"]
    assert all("is a named pipe" in str(item.error) for item in result.failed)
    archive = archive_paths(tiles, "c")[0]
    archive.unlink()
    os.mkfifo(archive)
    result = tile_cohort(given[2:], config.updated(read_tiles_from=tmp_path / "out", save_tiles=False), again)
    assert [item.sample_id for item in result.failed] == ["c"]
    assert "is a named pipe" in str(result.failed[0].error)
