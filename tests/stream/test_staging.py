"""Staging: same embeddings, original paths, the bound, fallbacks, and nothing left behind."""

from __future__ import annotations

import csv
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.cohort import tile_cohort
from slide2vec.errors import ConfigError, SlideOpenError
from slide2vec.readers.slide_files import slide_files
from slide2vec.slides import as_slide
from slide2vec.stream import stager_for
from slide2vec.stream.staging import Stager

PREPROCESSING = PreprocessingConfig(requested_tile_size_px=128, tissue_threshold=0.1)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_preset("scattering", device="cpu")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [generated_slide(folder / f"s{n}.svs", size_px=1024, seed=n, levels=1) for n in range(4)]


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    return tmp_path / "stage"


def staged_options(stage: Path, **more: Any) -> ExecutionOptions:
    return ExecutionOptions(stage_dir=stage, num_workers=2, num_preprocessing_workers=1, **more)


def opened_paths(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that planning opens from now on."""
    from slide2vec.stream import plan

    found: list[Path] = []
    real = plan.open_and_use

    def noted(slide: Any, backend: str, copy: Path | None, use: Any) -> Any:
        found.append(copy or slide.image_path)
        return real(slide, backend, copy, use)

    monkeypatch.setattr(plan, "open_and_use", noted)
    return found


def test_same_embeddings_and_original_paths(
    model: Model, slides: list[Path], stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.embed_slides(slides, PREPROCESSING)
    opened = opened_paths(monkeypatch)
    result = Pipeline(model, PREPROCESSING, staged_options(stage, output_dir=tmp_path / "out")).run(slides)
    assert len(opened) == 4 and all(path.is_relative_to(stage) for path in opened)
    for artifact, alone, path in zip(result.tile_artifacts, expected, slides, strict=True):
        assert torch.equal(torch.load(artifact.path, weights_only=True), alone.tile_embeddings)
        assert artifact.metadata["image_path"] == str(path)
    assert list(stage.iterdir()) == []
    written = [path for path in (tmp_path / "out").rglob("*") if path.suffix in {".json", ".csv"}]
    assert len(written) >= 9
    assert not [path for path in written if str(stage) in path.read_text()]
    with result.process_list_path.open(newline="") as file:
        assert [row["image_path"] for row in csv.DictReader(file)] == [str(path) for path in slides]
    assert result.summary is not None and "stage" in {s.name for s in result.summary.stations}


def test_the_bound_is_kept(
    model: Model, slides: list[Path], stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int(max(path.stat().st_size for path in slides) * 1.5)  # one at a time
    peaks = []
    real = Stager._copy_file

    def measured(self: Stager, source: Path, target: Path) -> None:
        real(self, source, target)
        peaks.append(sum(path.stat().st_size for path in stage.rglob("*.svs")))

    monkeypatch.setattr(Stager, "_copy_file", measured)
    assert len(model.embed_slides(slides, PREPROCESSING, staged_options(stage, stage_gb=limit / 1e9))) == 4
    assert len(peaks) == 4 and 0 < max(peaks) <= limit


def test_a_slide_larger_than_the_bound_is_read_in_place(
    model: Model,
    slides: list[Path],
    stage: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened = opened_paths(monkeypatch)
    with caplog.at_level(logging.INFO, "slide2vec.stream.staging"):
        model.embed_slides(slides[:2], PREPROCESSING, staged_options(stage, stage_gb=1e-6))
    assert opened == slides[:2]
    told = [record.message for record in caplog.records if "not staged" in record.message]
    assert len(told) == 2 and "stage_gb" in told[0]


def test_a_full_disk_does_not_fail_a_slide(
    model: Model,
    slides: list[Path],
    stage: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(self: Stager, source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Stager, "_copy_file", full)
    opened = opened_paths(monkeypatch)
    assert len(model.embed_slides(slides, PREPROCESSING, staged_options(stage))) == 4
    assert sorted(opened) == slides
    assert all(f"slide {path.stem} is read where it is" in caplog.text for path in slides)
    assert list(stage.iterdir()) == []


def test_bad_slides_fail_alone_and_name_the_original(
    model: Model, slides: list[Path], stage: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.svs"
    whole = slides[0].read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    missing = tmp_path / "missing.svs"
    outcomes = {
        outcome.slide.sample_id: outcome
        for outcome in model.iter_slides([cut, missing, slides[1]], PREPROCESSING, staged_options(stage))
    }
    assert str(cut) in str(outcomes["cut"].error) and str(missing) in str(outcomes["missing"].error)
    assert str(stage) not in f"{outcomes['cut'].error} {outcomes['missing'].error}"
    assert outcomes["s1"].embedded is not None
    assert list(stage.iterdir()) == []


def test_closed_early(model: Model, slides: list[Path], stage: Path) -> None:
    outcomes = model.iter_slides(slides, PREPROCESSING, staged_options(stage))
    next(outcomes)
    assert list(stage.iterdir())
    outcomes.close()
    assert list(stage.iterdir()) == []


def test_closing_does_not_wait_for_copies_without_room(slides: list[Path], stage: Path) -> None:
    size = max(path.stat().st_size for path in slides)
    with stager_for(staged_options(stage, stage_gb=size * 1.5 / 1e9)) as stager:
        taken = list(stager.ahead(as_slide(path) for path in slides))
        assert stager.take(taken[0]).image_path.read_bytes() == slides[0].read_bytes()
    assert list(stage.iterdir()) == []


def test_killed_runs_are_swept_and_living_ones_are_not(slides: list[Path], stage: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from slide2vec import ExecutionOptions;"
        "from slide2vec.slides import as_slide; from slide2vec.stream import stager_for\n"
        "with stager_for(ExecutionOptions(stage_dir=Path(sys.argv[1]))) as stager:\n"
        "    stager.take(as_slide(sys.argv[2])); print('staged', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(stage), str(slides[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "staged\n"
        (theirs,) = stage.rglob("s0.svs")
        with stager_for(staged_options(stage)) as stager:  # two runs at once
            mine = stager.take(as_slide(slides[1])).image_path
            assert theirs.exists() and mine.read_bytes() == slides[1].read_bytes()
        assert theirs.exists() and not mine.exists()
        os.kill(process.pid, signal.SIGKILL)
    assert theirs.exists()
    with stager_for(staged_options(stage)):
        assert not theirs.exists()
    assert list(stage.iterdir()) == []


def test_tiling_is_staged(slides: list[Path], stage: Path, tmp_path: Path) -> None:
    config = PREPROCESSING.resolved(0.5, 128)
    plain = ExecutionOptions(output_dir=tmp_path / "plain")
    expected = tile_cohort([as_slide(path) for path in slides], config, plain)
    options = staged_options(stage, output_dir=tmp_path / "out")
    result = tile_cohort([as_slide(path) for path in slides], config, options)
    assert not result.failed and not expected.failed and list(stage.iterdir()) == []
    for name in ("s0.coordinates.npz", "s0.coordinates.meta.json"):
        assert (tmp_path / "out/tiles" / name).read_bytes() == (tmp_path / "plain/tiles" / name).read_bytes()


def test_masks_are_staged(model: Model, slides: list[Path], stage: Path, tmp_path: Path) -> None:
    import numpy as np
    import tifffile

    tifffile.imwrite(tmp_path / "s0.svs.tif", np.ones((64, 64), np.uint8))
    given = {"image_path": slides[0], "mask_path": tmp_path / "s0.svs.tif"}
    plain = model.embed_slide(given, PREPROCESSING)
    staged = model.embed_slide(given, PREPROCESSING, staged_options(stage))
    assert torch.equal(staged.tile_embeddings, plain.tile_embeddings)
    assert staged.mask_path == given["mask_path"]


def test_remote_slides(model: Model, slides: list[Path], stage: Path) -> None:
    upath = pytest.importorskip("upath")
    url = "memory://bucket/s0.svs"
    upath.UPath(url).write_bytes(slides[0].read_bytes())
    with pytest.raises(SlideOpenError, match="stage_dir"):
        model.embed_slide(url, PREPROCESSING)
    remote = model.embed_slide(url, PREPROCESSING, staged_options(stage))
    plain = model.embed_slide(slides[0], PREPROCESSING)
    assert torch.equal(remote.tile_embeddings, plain.tile_embeddings)
    assert str(remote.image_path) == url
    with pytest.raises(SlideOpenError, match="cannot be staged"):
        model.embed_slide("memory://bucket/none.svs", PREPROCESSING, staged_options(stage))


def test_files_of_mrxs_and_vms(tmp_path: Path, stage: Path) -> None:
    (tmp_path / "a/sub").mkdir(parents=True)
    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "a/sub/more.dat", "b.mrxs"):
        (tmp_path / name).write_text(name)
    with stager_for(staged_options(stage)) as stager:
        staged = stager.take(as_slide(tmp_path / "a.mrxs"))
        folder = staged.image_path.parent
        found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
        staged.close()
        assert not folder.exists()
    names = ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "a/sub/more.dat")
    assert found == {name: name for name in names}
    assert slide_files(tmp_path / "c.vms") is None


def test_files_of_a_dicom_series(real_slide: Any, tmp_path: Path) -> None:
    series = [shutil.copy(real_slide("camelyon-jpeg.dcm"), tmp_path / f"{n}.dcm") for n in range(2)]
    shutil.copy(real_slide("sm_image.dcm"), tmp_path / "other.dcm")
    files = slide_files(Path(series[0]))
    assert files is not None
    assert sorted(source.name for source, _ in files) == ["0.dcm", "1.dcm"]


def test_a_stage_dir_that_cannot_be_written_to(slides: list[Path], model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="stage_dir"):
        model.embed_slide(slides[0], PREPROCESSING, staged_options(tmp_path / "file"))
