"""`slide2vec run --shard` and `slide2vec merge`, as they are typed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from slide2vec.cohort.lock import output_lock
from slide2vec.cohort.process_list import COLUMNS
from slide2vec.cohort.shard_lists import list_path, write_order

DONE = {"tiling_status": "success", "feature_status": "success", "num_tiles": "10"}
PLANNED = {"tiling_status": "success", "feature_status": "tbp", "num_tiles": "7"}
NOT_TILED = {"tiling_status": "failed", "feature_status": "error", "error": "slide X: no tissue mask"}
FAST = ("--preset", "scattering", "--device", "cpu", "--spacing", "2", "--tile-size", "64")


def write(directory: Path, shard: str | None, rows: Mapping[str, Mapping[str, str]]) -> None:
    directory.mkdir(exist_ok=True)
    with list_path(directory, shard).open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        table.writerows({"sample_id": name, **row} for name, row in rows.items())


def listed(directory: Path) -> list[str]:
    with (directory / "process_list.csv").open(newline="") as file:
        return [row["sample_id"] for row in csv.DictReader(file)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two of three shards: one finished, one broke off and had a failure; a slide of an older run."""
    out = tmp_path / "out"
    write(out, None, {"old": DONE, "a": PLANNED})
    write(out, "1/3", {"a": DONE, "d": DONE})
    write(out, "3/3", {"b": NOT_TILED, "e": PLANNED})
    write_order(out, "abcdef")
    return out


def manifest_of(folder: Path, slides: Iterable[tuple[str, Path]]) -> Path:
    path = folder / "slides.csv"
    path.write_text("sample_id,image_path\n" + "".join(f"{name},{image}\n" for name, image in slides))
    return path


def test_what_is_missing_is_told(run, out: Path) -> None:
    result = run("merge", "-o", out, "--json")
    content = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (content["slides"], content["finished"]) == (7, 3)
    assert content["shards"] == ["1/3", "3/3"] and content["shards_not_run"] == ["2/3"]
    assert content["missing"] == ["c", "f"] and content["not_finished"] == ["e"]
    assert [item["sample_id"] for item in content["failed"]] == ["b"]
    assert content["in_several_shards"] == {} == content["shards_running"]
    assert listed(out) == ["a", "b", "d", "e", "old"]
    assert not list(out.glob("process_list.shard*"))


def test_in_words(run, out: Path) -> None:
    result = run("merge", "-o", out)
    assert result.exit_code == 1
    for words in ("3 of 7 slides", "shards 2/3", "no tissue mask", "broke off: e"):
        assert words in result.stdout
    again = run("merge", "-o", out)  # the lists are gone, what is missing is known
    assert again.exit_code == 1 and "2 slides: c, f" in again.stdout


def test_nothing_is_merged_while_a_shard_runs(run, out: Path) -> None:
    with output_lock(out, "2/3"):
        result = run("merge", "-o", out, "--json")
        assert result.exit_code == 1
        content = json.loads(result.stdout)
        assert list(content["shards_running"]) == ["2/3"] and content["process_list_path"] is None
        assert "nothing is merged" in run("merge", "-o", out).stdout
    assert list_path(out, "1/3").exists() and listed(out) == ["old", "a"]


def test_a_slide_in_two_shards_is_as_its_best_row(run, out: Path) -> None:
    write(out, "2/3", {"b": DONE, "c": DONE, "f": DONE})
    write(out, "3/3", {"b": NOT_TILED, "e": DONE})
    result = run("merge", "-o", out, "--json")
    content = json.loads(result.stdout)
    assert result.exit_code == 0 and content["finished"] == 7
    assert content["in_several_shards"] == {"b": ["2/3", "3/3"]}
    assert not list(out.glob(".slide2vec.slides"))  # nothing is missing any more


def test_what_has_no_lists(run, tmp_path: Path) -> None:
    result = run("merge", "-o", tmp_path)
    assert result.exit_code == 1 and "has no process lists" in result.stderr
    assert not list(tmp_path.iterdir())


def test_status_shows_shards_together(run, out: Path) -> None:
    content = json.loads(run("status", out, "--json").stdout)
    counts = {state: content[state] for state in ("slides", "finished", "in progress", "to do", "failed")}
    assert counts == {"slides": 7, "finished": 3, "in progress": 1, "to do": 2, "failed": 1}
    with output_lock(out, "3/3"):
        content = json.loads(run("status", out, "--json").stdout)
        assert list(content["shards"].pop("running")) == ["3/3"] and content["running"]["pid"]
        assert content["shards"] == {"ended": ["1/3"], "not_run": ["2/3"]}
        text = run("status", out).stdout
        assert "1 running, 1 ended, 1 not begun" in text and "running, process" in text


def test_shards_from_the_command_line(run, small_slide: Path, tmp_path: Path) -> None:
    manifest, out = manifest_of(tmp_path, [("b", small_slide), ("a", small_slide)]), tmp_path / "out"
    first = run("run", "-m", manifest, *FAST, "-o", out, "--shard", "1/3", "--json")
    assert first.exit_code == 0, first.output
    content = json.loads(first.stdout)
    assert [item["sample_id"] for item in content["slides"]] == ["a"]
    assert content["process_list_path"].endswith("process_list.shard-1-of-3.csv")
    assert "when all are done: slide2vec merge" in first.stderr
    only_tiled = run("run", "-m", manifest, *FAST, "-o", out, "--shard", "2/3", "--tiling-only")
    assert only_tiled.exit_code == 0 and "1 slide" in only_tiled.stdout
    empty = run("run", "-m", manifest, *FAST, "-o", out, "--shard", "3/3")
    assert empty.exit_code == 0 and "shard 3/3 is empty" in empty.stderr
    assert "loading" not in empty.stderr
    merged = run("merge", "-o", out, "--json")
    assert merged.exit_code == 0, merged.output
    assert json.loads(merged.stdout)["shards"] == ["1/3", "2/3", "3/3"]
    assert listed(out) == ["b", "a"]


def test_wrong_shards_are_one_clear_error(run, small_slide: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [("a", small_slide)])
    result = run("run", "-m", manifest, *FAST, "-o", tmp_path / "out", "--shard", "0/3")
    assert result.exit_code == 1 and "--shard: " in result.stderr and "from 1/n to n/n" in result.stderr
    assert not (tmp_path / "out").exists()
