"""`slide2vec status`: of real runs, of lists of other makers, of large ones, and of none."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from slide2vec.cohort.lock import output_lock
from slide2vec.cohort.process_list import COLUMNS

STATES = ("finished", "in progress", "to do", "failed")

DONE = {"tiling_status": "success", "feature_status": "success", "num_tiles": "10"}
PLANNED = {"tiling_status": "success", "feature_status": "tbp", "num_tiles": "7"}
TO_DO = {"feature_status": "tbp"}
NOT_TILED = {"tiling_status": "failed", "feature_status": "error", "error": "slide X: no tissue mask"}
NOT_EMBEDDED = {"tiling_status": "success", "feature_status": "error", "num_tiles": "5", "error": "bad tile"}


def _write(directory: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """A process list of rows that have a name each."""
    directory.mkdir(exist_ok=True)
    with (directory / "process_list.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        for index, row in enumerate(rows):
            table.writerow({"sample_id": f"s{index}", "encoder_name": "uni", **row})
    return directory


def _counts(run, directory: Path) -> dict[str, int]:
    result = run("status", directory, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    return {state: content[state] for state in STATES}


def test_of_a_real_run(run, small_slide: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"sample_id,image_path\ngood,{small_slide}\ngone,{tmp_path}/gone.svs\n")
    options = ("--preset", "scattering", "--device", "cpu", "--spacing", "2", "--tile-size", "64")
    done = json.loads(run("run", "-m", manifest, *options, "-o", tmp_path / "out", "--json").stdout)
    content = json.loads(run("status", tmp_path / "out", "--json").stdout)
    assert {state: content[state] for state in STATES} == dict(zip(STATES, (1, 0, 0, 1), strict=True))
    assert content["tiles"] == done["slides"][0]["num_tiles"] > 0
    assert (content["state"], content["running"], content["goes_on_by"]) == ("done", None, None)
    assert content["encoders"] == ["scattering"]
    assert [item["sample_id"] for item in content["failures"]] == ["gone"]
    text = run("status", tmp_path / "out").stdout
    assert "1 of 2 slides (50%)" in text and "gone" in text and "  done" in text and "Traceback" not in text


def test_states_and_tiles(run, tmp_path: Path) -> None:
    rows = [DONE, DONE, {**DONE, "num_tiles": "0"}, PLANNED, TO_DO, TO_DO, TO_DO, NOT_TILED, NOT_EMBEDDED]
    directory = _write(tmp_path / "out", rows)
    assert _counts(run, directory) == dict(zip(STATES, (3, 1, 3, 2), strict=True))
    text = run("status", directory).stdout
    assert "3 of 9 slides (33%)" in text and "20, 7 in progress" in text and "no tissue" in text
    assert "stopped: the same command goes on with it" in text
    content = json.loads(run("status", directory, "--json").stdout)
    assert (content["state"], content["goes_on_by"]) == ("stopped", None)
    assert "no tissue mask" in text and "bad tile" in text


@pytest.mark.parametrize(
    ("row", "state"),
    [
        ({"tiling_status": "success", "num_tiles": "3"}, "finished"),  # only tiled
        ({"tiling_status": "failed"}, "failed"),
        ({}, "to do"),
        ({"tiling_status": "tbp", "feature_status": "tbp"}, "to do"),
        ({**DONE, "aggregation_status": "tbp"}, "in progress"),
        ({**DONE, "aggregation_status": "error"}, "failed"),
        ({**DONE, "aggregation_status": "success"}, "finished"),
        ({**DONE, "num_tiles": "12.0"}, "finished"),
        ({**DONE, "num_tiles": "many"}, "finished"),
    ],
)
def test_lists_of_other_makers(run, tmp_path: Path, row: dict[str, str], state: str) -> None:
    counts = _counts(run, _write(tmp_path / "out", [row]))
    assert {name for name, count in counts.items() if count} == {state}


def test_counts_of_tiles_as_pandas_writes_them(run, tmp_path: Path) -> None:
    directory = _write(tmp_path / "out", [{**DONE, "num_tiles": "12.0"}, {**DONE, "num_tiles": "nan"}])
    assert json.loads(run("status", directory, "--json").stdout)["tiles"] == 12


def test_the_newest_failures_are_shown(run, tmp_path: Path) -> None:
    directory = _write(tmp_path / "out", [NOT_TILED] * 30)
    text = run("status", directory).stdout
    shown = re.findall(r"^s\d+", text, flags=re.MULTILINE)
    assert shown == [f"s{i}" for i in range(20, 30)]
    assert "… and 20 more in" in text


def test_large_lists(run, tmp_path: Path) -> None:
    rows = [DONE] * 15_000 + [PLANNED] * 100 + [TO_DO] * 4_890 + [NOT_TILED] * 10
    directory = _write(tmp_path / "out", rows)
    assert _counts(run, directory) == dict(zip(STATES, (15_000, 100, 4_890, 10), strict=True))
    assert "15,000 of 20,000 slides (75%)" in run("status", directory).stdout


def test_who_is_running(run, tmp_path: Path) -> None:
    directory = _write(tmp_path / "out", [PLANNED, TO_DO])
    with output_lock(directory):
        assert json.loads(run("status", directory, "--json").stdout)["running"]["pid"] == os.getpid()
        text = run("status", directory).stdout
        assert f"running, process {os.getpid()}" in text and "stopped" not in text
    content = json.loads(run("status", directory, "--json").stdout)
    assert (content["state"], content["running"]) == ("stopped", None)
    assert json.loads(run("status", directory, "--json").stdout)["running"] is None


def test_a_stopped_run_names_the_command_that_goes_on_with_it(
    run, small_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("slides.csv").write_text(f"sample_id,image_path\ngood,{small_slide}\n")
    options = ("--preset", "scattering", "--device", "cpu", "--spacing", "2", "--tile-size", "64")
    assert run("run", "-m", "slides.csv", *options, "-o", "my out", "--no-resume").exit_code == 0
    table = Path("my out/process_list.csv")
    table.write_text(table.read_text().replace("success", "tbp"))  # as a killed run leaves it
    for path in Path("my out/tile_embeddings").iterdir():
        path.unlink()
    found = json.loads(run("status", "my out", "--json").stdout)
    assert found["state"] == "stopped"
    assert found["goes_on_by"] == "slide2vec run 'my out/config.yaml' resume=true"
    assert f"stopped: {found['goes_on_by']} goes on with it" in " ".join(
        run("status", "my out").stdout.split()
    )
    monkeypatch.chdir(small_slide.parent)  # where the paths in it mean other files
    assert json.loads(run("status", tmp_path / "my out", "--json").stdout)["goes_on_by"] is None
    monkeypatch.chdir(tmp_path)
    assert run(*shlex.split(found["goes_on_by"])[1:]).exit_code == 0
    assert json.loads(run("status", "my out", "--json").stdout)["state"] == "done"


def test_a_run_that_has_just_begun(run, tmp_path: Path) -> None:
    with output_lock(tmp_path / "out"):
        content = json.loads(run("status", tmp_path / "out", "--json").stdout)
    assert (content["slides"], content["tiles"]) == (0, 0) and content["running"]
    assert content["state"] == "running"


def test_watching_ends_with_the_run(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = _write(tmp_path / "out", [PLANNED, TO_DO])
    slept: list[float] = []
    with ExitStack() as running:
        running.enter_context(output_lock(directory))

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            _write(directory, [DONE, PLANNED] if len(slept) == 1 else [DONE, DONE])
            if len(slept) == 2:
                running.close()

        monkeypatch.setattr(time, "sleep", sleep)
        result = run("status", directory, "--watch")
    assert result.exit_code == 0 and slept == [2.0, 2.0]
    assert "2 of 2 slides (100%)" in result.stdout and "  done" in result.stdout


def test_watching_can_be_left(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    directory = _write(tmp_path / "out", [PLANNED])
    monkeypatch.setattr(time, "sleep", interrupted)
    with output_lock(directory):
        result = run("status", directory, "--watch")
    assert result.exit_code == 0 and "interrupted" not in result.stderr


def test_what_is_no_run_is_one_clear_error(run, tmp_path: Path) -> None:
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "process_list.csv").write_bytes(b"\0\xff\xfe junk")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "process_list.csv").write_text("a,b\n1,2\n")
    for directory, words in (
        (tmp_path, "is not the output directory of a run"),
        (tmp_path / "gone", "is not the output directory of a run"),
        (tmp_path / "junk", "cannot be read"),
        (tmp_path / "other", "no process list"),
    ):
        result = run("status", directory)
        assert result.exit_code == 1 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and words in line and str(directory) in line


def test_watch_and_json_exclude_each_other(run, tmp_path: Path) -> None:
    result = run("status", _write(tmp_path / "out", [DONE]), "--watch", "--json")
    assert result.exit_code == 1 and "--watch and --json" in result.stderr
