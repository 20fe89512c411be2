"""`slide2vec run` into a bucket, through the S3 protocol: a server of moto, s3fs as users configure it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork_workers
from moto.server import ThreadedMotoServer
from typer.testing import Result

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.artifacts import load_embeddings
from slide2vec.cohort.lock import LOCK_NAME, output_lock
from slide2vec.errors import OutputError, OutputLockedError
from slide2vec.files import as_path
from slide2vec.files.remote import create

TILE_PX, THRESHOLD = 128, 0.1

Run = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def endpoint() -> Iterator[str]:
    """A server, and the variables of the environment that lead there."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_PROFILE", raising=False)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield f"http://{host}:{port}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [generated_slide(folder / f"s{n}.svs", size_px=1024, seed=n, levels=1) for n in range(2)]


@pytest.fixture(scope="module")
def manifest(slides: list[Path]) -> str:
    """In the bucket; the slides are on this machine."""
    path = as_path("s3://bucket/cohorts/slides.csv")
    path.write_text("sample_id,image_path\n" + "".join(f"{p.stem},{p}\n" for p in slides))
    return str(path)


def in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which has nothing but the environment."""
    return subprocess.run(
        [sys.executable, "-m", "slide2vec", *arguments], capture_output=True, text=True, timeout=300
    )


def run_arguments(manifest: str, output: str) -> tuple[str, ...]:
    return (
        *("run", "--manifest", manifest, "--output", output, "--preset", "scattering", "--run-on-cpu"),
        *("--tile-size", str(TILE_PX), "--tissue-threshold", str(THRESHOLD), "--previews", "--json"),
    )


def modified(output_dir: Path) -> dict[str, Any]:
    """When each artifact was published, as the server says."""
    store: Any = output_dir
    files = store.fs.find(f"{store.path}/tile_embeddings", detail=True)
    return {Path(name).name: about["LastModified"] for name, about in files.items()}


@pytest.mark.slow
def test_run_and_resume(manifest: str, slides: list[Path], tmp_path: Path, run: Run) -> None:
    output_dir = as_path("s3://bucket/run")
    arguments = run_arguments(manifest, "s3://bucket/run")
    done = in_process(*arguments)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert first["resumed"] == 0 and [made["sample_id"] for made in first["slides"]] == ["s0", "s1"]
    made = modified(output_dir)
    assert sorted(made) == ["s0.meta.json", "s0.pt", "s1.meta.json", "s1.pt"]

    model = Model.from_preset("scattering", device="cpu")
    config = PreprocessingConfig(requested_tile_size_px=TILE_PX, tissue_threshold=THRESHOLD)
    execution = ExecutionOptions(output_dir=tmp_path / "here")
    here = Pipeline(model, config, execution).run(slides)
    for artifact in here.tile_artifacts:
        there = load_embeddings(output_dir / "tile_embeddings" / artifact.path.name)
        assert artifact.num_tiles > 0 and torch.equal(there, load_embeddings(artifact.path))

    folders = {path.name for path in output_dir.iterdir()}
    made_files = {"bill.json", "config.yaml", "process_list.csv"}
    assert folders == {"logs", "preview", "tile_embeddings", "tiles"} | made_files
    assert len(list((output_dir / "preview/mask").iterdir())) == 2
    assert (
        (output_dir / "config.yaml").read_text().startswith(f"csv: {manifest}\noutput_dir: s3://bucket/run")
    )
    (log,) = (output_dir / "logs").iterdir()
    assert "slide s1: " in log.read_text()

    done_again = run(*arguments)
    assert done_again.exit_code == 0, done_again.output
    again = json.loads(done_again.stdout)
    assert again["resumed"] == 2 and not again["recomputed"] and modified(output_dir) == made
    assert not (output_dir / LOCK_NAME).exists()

    status = run("status", "s3://bucket/run", "--json")
    found = json.loads(status.stdout)
    assert (found["finished"], found["slides"], found["running"]) == (2, 2, None)

    exported = run("export", "s3://bucket/run", "-o", "s3://bucket/h5", "--json")
    assert exported.exit_code == 0, exported.output
    assert torch.equal(
        load_embeddings("s3://bucket/h5/tile_embeddings/s0.h5"),
        load_embeddings("s3://bucket/run/tile_embeddings/s0.pt"),
    )


def test_workers_publish_themselves(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes into one bucket: the same as one into a folder."""
    fork_workers(monkeypatch)
    model = Model.from_preset("scattering", device="cpu")
    config = PreprocessingConfig(requested_tile_size_px=TILE_PX, tissue_threshold=THRESHOLD, resume=True)
    here = Pipeline(model, config, ExecutionOptions(output_dir=tmp_path)).run(slides)
    execution = ExecutionOptions(output_dir=as_path("s3://bucket/two"), devices=["cpu", "cpu"])
    there = Pipeline(model, config, execution).run(slides)
    assert not there.failed and len(there.tile_artifacts) == 2
    for local, artifact in zip(here.tile_artifacts, there.tile_artifacts, strict=True):
        assert str(artifact.path) == f"s3://bucket/two/tile_embeddings/{local.path.name}"
        assert torch.equal(load_embeddings(artifact.path), load_embeddings(local.path))
    assert Pipeline(model, config, execution).run(slides).resumed == 2


@pytest.mark.slow
def test_without_credentials_there_is_one_line(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for arguments in (("status", "s3://bucket/run"), ("export", "s3://bucket/run", "-o", "elsewhere")):
        done = in_process(*arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "NoCredentialsError" in done.stderr


def test_one_creation_succeeds() -> None:
    """Moto does as S3: an object is created once (If-None-Match)."""
    path = as_path("s3://bucket/once")
    assert create(path, b"first") and not create(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_second_run_is_refused(manifest: str, run: Run) -> None:
    with output_lock(as_path("s3://bucket/held")):
        with pytest.raises(OutputLockedError), output_lock(as_path("s3://bucket/held")):
            raise AssertionError("not reached")
        done = run("run", "--manifest", manifest, "-o", "s3://bucket/held", "-p", "scattering")
    assert done.exit_code == 1 and f"process {os.getpid()} on" in done.stderr


def test_a_bucket_that_is_not_there() -> None:
    with (
        pytest.raises(OutputError, match="s3://nowhere/run"),
        output_lock(as_path("s3://nowhere/run")),
    ):
        raise AssertionError("not reached")


def test_a_manifest_that_is_not_there(run: Run) -> None:
    done = run("run", "--manifest", "s3://bucket/no.csv", "-o", "s3://bucket/x", "-p", "scattering")
    assert done.exit_code == 1 and "manifest s3://bucket/no.csv cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
