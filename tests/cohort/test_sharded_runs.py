"""Shards into one directory, one after the other and at the same time, give what one run gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cohort_helpers import files, rows

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.cohort import RunResult, tile_cohort
from slide2vec.cohort.lock import holder, output_lock, shard_holders
from slide2vec.cohort.process_list import read_process_list
from slide2vec.cohort.shard_merge import merge_shards
from slide2vec.errors import OutputLockedError
from slide2vec.files import atomic_path
from slide2vec.slides import as_slides

#: Few, small tiles.
CONFIG = PreprocessingConfig(requested_spacing_um=2.0, requested_tile_size_px=64, resume=True)
HOLD = """
import sys, time
from pathlib import Path
from slide2vec.cohort.lock import output_lock
with output_lock(Path(sys.argv[1]), sys.argv[2] or None):
    print("held", flush=True)
    time.sleep(60)
"""


def embed(model: Model, manifest: Path, out: Path, shard: str | None = None) -> RunResult:
    execution = ExecutionOptions(output_dir=out, shard=shard, num_workers=1, num_preprocessing_workers=1)
    return Pipeline(model, CONFIG, execution).run(manifest_path=manifest)


@pytest.fixture(scope="module")
def whole(model: Model, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run makes of the manifest."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert not embed(model, manifest, out).failed
    return out


def held(out: Path, shard: str | None) -> subprocess.Popen[str]:
    """Another process that holds a shard, or the whole directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), shard or ""], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Holds shard 2/3 of tmp_path/out."""
    process = held(tmp_path / "out", "2/3")
    yield process
    process.kill()
    process.wait()


def test_one_after_the_other(model: Model, manifest: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made: list[str] = []
    for shard in ("3/3", "1/3", "2/3"):
        result = embed(model, manifest, out, shard)
        made += [artifact.sample_id for artifact in result.tile_artifacts]
        assert result.tile_artifacts and result.summary is not None
        listed = read_process_list(result.process_list_path)
        assert [row["sample_id"] for row in listed] == [a.sample_id for a in result.tile_artifacts]
    assert sorted(made) == [f"s{number}" for number in range(6)]
    assert not (out / "process_list.csv").exists()
    merged = merge_shards(out)
    assert merged.complete and not merged.found.in_two
    assert rows(out) == rows(whole)  # in the order of the manifest
    assert files(out) == files(whole)  # nothing of the shards is left
    assert len(list((out / "logs").iterdir())) == 3
    assert merge_shards(out).complete and rows(out) == rows(whole)


@pytest.mark.slow
def test_two_at_the_same_time(manifest: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "slide2vec", "run", "-m", manifest, "-o", out, "-p", "scattering"]
    command += ["--device", "cpu", "--spacing", "2", "--tile-size", "64"]
    command += ["--num-workers", "1", "--num-preprocessing-workers", "1"]
    jobs = [
        subprocess.Popen([*command, "--shard", shard], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for shard in ("1/2", "2/2")
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
        assert b"slide2vec merge -o" in errors
    assert merge_shards(out).complete
    assert rows(out) == rows(whole)
    made, expected = files(out), files(whole)
    del made["config.yaml"], expected["config.yaml"]  # of flags, and of Python
    assert made == expected


def test_the_configuration_is_that_of_the_whole_run(model: Model, manifest: Path, tmp_path: Path) -> None:
    embed(model, manifest, tmp_path / "out", "2/6")
    text = (tmp_path / "out/config.yaml").read_text()
    assert "shard: null" in text or "shard:\n" in text
    assert "2/6" not in text


def test_a_shard_is_resumed(model: Model, manifest: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = [artifact.sample_id for artifact in embed(model, manifest, out, "2/2").tile_artifacts]
    lost = out / f"tile_embeddings/{names[1]}.meta.json"
    lost.unlink()
    again = embed(model, manifest, out, "2/2")
    assert again.resumed == len(names) - 1 and lost.exists()
    assert [artifact.sample_id for artifact in again.tile_artifacts] == names
    embed(model, manifest, out, "1/2")
    assert merge_shards(out).complete
    assert files(out) == files(whole)
    # and once more after merging: of what is finished nothing depends on who had it
    assert embed(model, manifest, out, "1/2").resumed == 6 - len(names)
    assert merge_shards(out).complete and rows(out) == rows(whole)


def test_a_missing_shard(model: Model, manifest: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mine = {
        shard: [a.sample_id for a in embed(model, manifest, out, shard).tile_artifacts]
        for shard in ("1/3", "3/3")
    }
    first = merge_shards(out)
    assert not first.complete and first.found.not_run == ("2/3",)
    assert sorted([*first.found.missing, *mine["1/3"], *mine["3/3"]]) == [f"s{n}" for n in range(6)]
    second = merge_shards(out)  # still known without the lists
    assert not second.complete and second.found.missing == first.found.missing
    embed(model, manifest, out, "2/3")
    assert merge_shards(out).complete
    assert rows(out) == rows(whole) and files(out) == files(whole)


def test_a_slide_that_fails(model: Model, slides: list[Path], tmp_path: Path) -> None:
    manifest, out = tmp_path / "slides.csv", tmp_path / "out"
    named = [("gone", tmp_path / "gone.svs"), ("a", slides[0]), ("b", slides[1])]
    manifest.write_text("sample_id,image_path\n" + "".join(f"{name},{path}\n" for name, path in named))
    failed = [f.sample_id for shard in ("1/2", "2/2") for f in embed(model, manifest, out, shard).failed]
    assert failed == ["gone"]  # told by its shard
    merged = merge_shards(out)
    assert not merged.complete and not merged.found.missing
    (row,) = merged.rows("failed")
    assert row["sample_id"] == "gone" and "gone.svs" in row["error"]
    assert [row["sample_id"] for row in rows(out)] == ["gone", "a", "b"]
    assert not merge_shards(out).complete


def test_files_that_change_between_jobs(model: Model, slides: list[Path], tmp_path: Path) -> None:
    """A slide that grows may come into another shard: into two of them, or into none."""
    paths = []
    for number, slide in enumerate(slides[:3]):
        paths.append(tmp_path / f"{number}.svs")
        paths[-1].write_bytes(slide.read_bytes())
    manifest, out = tmp_path / "slides.csv", tmp_path / "out"
    manifest.write_text("sample_id,image_path\n" + "".join(f"{p.stem},{p}\n" for p in paths))
    with paths[0].open("ab") as file:
        file.write(bytes(10**6))
    assert [a.sample_id for a in embed(model, manifest, out, "1/2").tile_artifacts] == ["0"]
    with paths[2].open("ab") as file:
        file.write(bytes(3 * 10**6))
    assert [a.sample_id for a in embed(model, manifest, out, "2/2").tile_artifacts] == ["0", "1"]
    merged = merge_shards(out)
    assert merged.found.in_two == {"0": ("1/2", "2/2")}
    assert merged.found.missing == ("2",) and merged.found.not_run == () and not merged.complete
    embed(model, manifest, out)
    assert merge_shards(out).complete


def test_a_whole_run_takes_over_the_lists_of_shards(model: Model, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = [artifact.sample_id for artifact in embed(model, manifest, out, "1/3").tile_artifacts]
    less = tmp_path / "less.csv"
    lines = manifest.read_text().splitlines()
    less.write_text("\n".join(line for line in lines if line.split(",")[0] not in named) + "\n")
    embed(model, less, out)
    listed = rows(out)
    assert [row["sample_id"] for row in listed][-len(named) :] == named and len(listed) == 6
    assert {row["feature_status"] for row in listed} == {"success"}
    assert not list(out.glob("process_list.shard*")) and not list(out.glob(".slide2vec.s*"))


def test_more_shards_than_slides(model: Model, manifest: Path, tmp_path: Path) -> None:
    result = embed(model, manifest, tmp_path / "out", "9/9")
    assert not result.tile_artifacts and not result.failed
    assert read_process_list(result.process_list_path) == []
    assert merge_shards(tmp_path / "out").found.not_run == tuple(f"{number}/9" for number in range(1, 9))


def test_only_tiled(slides: list[Path], tmp_path: Path) -> None:
    for shard in ("1/2", "2/2"):
        execution = ExecutionOptions(output_dir=tmp_path / "out", shard=shard)
        assert len(tile_cohort(as_slides(slides), CONFIG, execution).process_list_path.read_text()) > 0
    assert merge_shards(tmp_path / "out").complete
    assert len(list((tmp_path / "out/tiles").glob("*.meta.json"))) == 6


# locks ------------------------------------------------------------------------------------------


def test_a_running_shard_and_others(
    other: subprocess.Popen[str], model: Model, manifest: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert holder(out) is None and list(shard_holders(out)) == ["2/3"]
    told = f"process {other.pid} on .* is writing into {out}"
    with pytest.raises(OutputLockedError, match=told):
        embed(model, manifest, out)  # a whole run
    with pytest.raises(OutputLockedError, match=told):
        embed(model, manifest, out, "2/3")
    assert embed(model, manifest, out, "1/3").tile_artifacts
    merged = merge_shards(out)
    assert list(merged.running) == ["2/3"] and not merged.complete and merged.process_list_path is None
    assert (out / "process_list.shard-1-of-3.csv").exists() and not (out / "process_list.csv").exists()


def test_a_killed_shard_is_free_again(
    other: subprocess.Popen[str], model: Model, manifest: Path, tmp_path: Path
) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert shard_holders(tmp_path / "out") == {}
    assert embed(model, manifest, tmp_path / "out", "2/3").tile_artifacts
    assert not merge_shards(tmp_path / "out").running


def test_no_shard_while_a_whole_run_goes_on(model: Model, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = held(out, None)
    try:
        with pytest.raises(OutputLockedError, match=f"process {process.pid} on"):
            embed(model, manifest, out, "1/3")
        with pytest.raises(OutputLockedError, match=f"process {process.pid} on"):
            (out / "process_list.csv").write_text("sample_id\n")
            merge_shards(out)
    finally:
        process.kill()
        process.wait()


def test_half_written_files_of_other_shards_stay(model: Model, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_lock(out, "1/3"), atomic_path(out / "tile_embeddings/x.pt") as temporary:
        temporary.write_text("half")
        embed(model, manifest, out, "2/3")
        assert temporary.read_text() == "half"
    left = out / "tile_embeddings/.x.abc.partial"
    left.mkdir()
    merge_shards(out)
    assert not left.exists()
