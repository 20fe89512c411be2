"""Ray clusters of several nodes on this machine: the same embeddings, whatever becomes of the nodes."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scale_helpers import (
    SIZES,
    Deadly,
    OnGpus,
    Recorder,
    Small,
    Unloadable,
    Unshared,
    Waiting,
    end_workers,
    files,
    rows,
    same,
    same_on_disk,
)
from typer.testing import CliRunner

from slide2vec import EmbeddedSlide, ExecutionOptions, Model, Pipeline, PreprocessingConfig, RunResult
from slide2vec.artifacts import load_embeddings
from slide2vec.cli import app
from slide2vec.errors import ConfigError, EmbedSlidesError, ExtraMissingError, WorkerLostError
from slide2vec.progress import RunFinished, RunStarted, SlidePlanned, TilesEncoded, activate_progress_reporter
from slide2vec.scale.ray_pool import RayPool

cluster_utils = pytest.importorskip("ray.cluster_utils")

#: Small tiles, so that slides have many.
PREPROCESSING = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5, resume=True)
STORE_BYTES = 80 * 2**20


class Clusters:
    """One cluster at a time: a head with one CPU, and other nodes."""

    def __init__(self) -> None:
        self.now: Any = None
        self.others: list[Any] = []
        self.start()

    def start(self, nodes: int = 2) -> None:
        self.end()
        head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.now = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        for _ in range(nodes - 1):
            self.add()

    def add(self, **resources: int) -> None:
        options = {"num_cpus": 1, "object_store_memory": STORE_BYTES, **resources}
        self.others.append(self.now.add_node(**options))

    def lose(self) -> None:
        """The last node, as if its plug were pulled."""
        self.now.remove_node(self.others.pop(), allow_graceful=False)

    def complete(self) -> None:
        """Two nodes again."""
        if not self.others:
            self.add()

    def options(self, **options: Any) -> ExecutionOptions:
        return ExecutionOptions(executor="ray", ray_address=self.now.address, **options)

    def end(self) -> None:
        if self.now is not None:
            self.now.shutdown()
            self.now = None
            self.others.clear()


@pytest.fixture(scope="module")
def left_by_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("left")


@pytest.fixture(scope="module")
def clusters(left_by_workers: Path) -> Iterator[Clusters]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("SLIDE2VEC_TEST_FOLDER", str(left_by_workers))
        clusters = Clusters()
        yield clusters
        clusters.end()


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [
        generated_slide(folder / f"s{n}.svs", size_px=size, seed=n, levels=1) for n, size in enumerate(SIZES)
    ]


@pytest.fixture(scope="module")
def kept(clusters: Clusters) -> Iterator[Deadly]:
    """A model whose workers are kept from test to test."""
    model = Deadly.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    yield model
    end_workers(model)


@pytest.fixture
def model(kept: Deadly, clusters: Clusters) -> Deadly:
    clusters.complete()
    return kept


@pytest.fixture(scope="module")
def alone(kept: Deadly, slides: list[Path]) -> list[EmbeddedSlide]:
    """In this process."""
    return kept.embed_slides(slides, PREPROCESSING)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad") / "bad.svs"
    path.write_bytes(b"no slide")
    return path


@pytest.fixture(scope="module")
def expected(
    kept: Deadly, slides: list[Path], bad: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    """On disk, from this process."""
    execution = ExecutionOptions(output_dir=tmp_path_factory.mktemp("one"))
    return Pipeline(kept, PREPROCESSING, execution).run([*slides, bad])


def test_slides_are_the_same_in_the_order_of_the_input(
    model: Deadly, clusters: Clusters, slides: list[Path], alone: list[EmbeddedSlide]
) -> None:
    recorder = Recorder()
    with activate_progress_reporter(recorder):
        found = model.embed_slides(slides, PREPROCESSING, clusters.options())
    for one, other in zip(found, alone, strict=True):
        same(one, other)
        assert one.x.flags.writeable, "nothing of Ray's object store"
    tiles = sum(each.num_tiles for each in alone)
    assert recorder.events[0] == RunStarted(len(slides), "scattering")
    assert sum(event.count for event in recorder.events if isinstance(event, TilesEncoded)) == tiles
    summary = recorder.events[-1].summary
    assert isinstance(recorder.events[-1], RunFinished) and (summary.slides, summary.tiles) == (6, tiles)
    same(model.embed_slide(slides[1], PREPROCESSING, clusters.options()), alone[1])
    ((pool,),) = model._pools.values()
    assert isinstance(pool, RayPool) and list(pool._actors) == ["#1", "#2"], "they wait for the next call"


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(
    model: Deadly, clusters: Clusters, slides: list[Path], bad: Path, expected: RunResult, tmp_path: Path
) -> None:
    once = Path(f"{slides[2]}.once")
    once.touch()
    persisted: list[str] = []
    run = Pipeline(model, PREPROCESSING, clusters.options(output_dir=tmp_path)).run
    found = run([*slides, bad], on_slide_persisted=lambda made: persisted.append(made.sample_id))
    assert not once.exists(), "a worker has killed itself"
    same_on_disk(found, expected)
    assert sorted(persisted) == [f"s{n}" for n in range(6)]
    assert [each.sample_id for each in found.failed] == ["bad"] and "slide bad" in str(found.failed[0].error)


@pytest.mark.slow
def test_a_slide_that_kills_its_workers_fails_alone(
    model: Deadly, clusters: Clusters, slides: list[Path], alone: list[EmbeddedSlide]
) -> None:
    given: list[Any] = [*slides[:3], {"sample_id": "deadly", "image_path": slides[1]}]
    with pytest.raises(EmbedSlidesError) as caught:
        model.embed_slides(given, PREPROCESSING, clusters.options())
    assert list(caught.value.failed) == ["deadly"]
    assert isinstance(caught.value.failed["deadly"], WorkerLostError)
    for one, other in zip(caught.value.results[:-1], alone, strict=False):
        same(one, other)


@pytest.mark.slow
def test_a_lost_node_costs_nothing(
    model: Deadly, clusters: Clusters, slides: list[Path], bad: Path, expected: RunResult, tmp_path: Path
) -> None:
    lost: list[str] = []

    def lose(made: Any) -> None:
        if not lost:
            lost.append(made.sample_id)
            clusters.lose()

    execution = clusters.options(output_dir=tmp_path)
    found = Pipeline(model, PREPROCESSING, execution).run([*slides, bad], on_slide_persisted=lose)
    assert lost and not clusters.others
    same_on_disk(found, expected)


@pytest.mark.slow
def test_a_node_that_comes_late_gets_work(
    kept: Deadly, clusters: Clusters, slides: list[Path], alone: list[EmbeddedSlide]
) -> None:
    end_workers(kept)
    while clusters.others:
        clusters.lose()

    def add(event: Any) -> None:
        if isinstance(event, SlidePlanned) and not clusters.others:
            clusters.add()

    model = Waiting.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    with activate_progress_reporter(Recorder(add)):
        found = model.embed_slides(slides, PREPROCESSING, clusters.options())
    end_workers(model)
    for one, other in zip(found, alone, strict=True):
        same(one, other)
    assert len(list(slides[0].parent.glob("*.here"))) == 2


@pytest.mark.slow
def test_patients_are_the_same(kept: Deadly, clusters: Clusters, slides: list[Path], tmp_path: Path) -> None:
    end_workers(kept)
    model = Small.from_preset("moozy", weights="random", device="cpu", allow_non_recommended_settings=True)
    cohort = [
        {"sample_id": path.stem, "image_path": path, "patient_id": f"p{n // 2}"}
        for n, path in enumerate(slides)
    ]
    one, two = (
        Pipeline(
            model, PREPROCESSING, options.updated(output_dir=tmp_path / name, save_slide_embeddings=True)
        ).run(cohort)
        for name, options in (("one", ExecutionOptions()), ("two", clusters.options()))
    )
    end_workers(model)
    assert files(two) == files(one) and rows(two) == rows(one)
    assert (len(two.slide_artifacts), len(two.patient_artifacts)) == (6, 3)
    for kind in ("slide_artifacts", "patient_artifacts"):
        for found, wanted in zip(getattr(two, kind), getattr(one, kind), strict=True):
            assert torch.equal(load_embeddings(found.path), load_embeddings(wanted.path))


@pytest.mark.slow
def test_the_command_line(
    kept: Deadly, clusters: Clusters, slides: list[Path], expected: RunResult, tmp_path: Path
) -> None:
    end_workers(kept)
    manifest = tmp_path / "slides.csv"
    manifest.write_text("sample_id,image_path\n" + "".join(f"{p.stem},{p}\n" for p in slides[:3]))
    tiles = ("--tile-size", "64", "--allow-non-recommended-settings", "--device", "cpu")
    where = ("--executor", "ray", "--address", clusters.now.address, "--devices", "cpu,cpu")
    given = ("run", "--manifest", str(manifest), "-p", "scattering", "-o", str(tmp_path / "out"), "--json")
    done = CliRunner().invoke(app, [*given, *tiles, *where])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["output_dir"] == str(tmp_path / "out")
    for number in range(3):
        name = f"tile_embeddings/s{number}.pt"
        whole = expected.process_list_path.parent / name
        assert (tmp_path / "out" / name).read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Unloadable, "no such weights here"),
        pytest.param(Unshared, "is not that of the run", marks=pytest.mark.slow),
    ],
)
def test_workers_that_cannot_work_end_the_run(
    kept: Deadly,
    clusters: Clusters,
    slides: list[Path],
    tmp_path: Path,
    kind: type[Model],
    error: str,
) -> None:
    end_workers(kept)
    model = kind.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    with pytest.raises(ValueError, match=error):
        Pipeline(model, PREPROCESSING, clusters.options(output_dir=tmp_path)).run(slides[:2])
    assert not list(tmp_path.glob("tile_embeddings/*")) and not list(tmp_path.glob("tiles/*"))


@pytest.mark.slow
def test_another_cluster_goes_on_where_one_was_left(
    kept: Deadly, clusters: Clusters, slides: list[Path], bad: Path, expected: RunResult, tmp_path: Path
) -> None:
    first = Pipeline(kept, PREPROCESSING, clusters.options(output_dir=tmp_path)).run(slides[:4])
    assert len(first.tile_artifacts) == 4
    with pytest.raises(ConfigError, match="already; drop the models"):
        kept.embed_slides(slides, PREPROCESSING, ExecutionOptions(executor="ray", ray_address="auto"))
    end_workers(kept)
    clusters.start(nodes=1)
    recorder = Recorder()
    with activate_progress_reporter(recorder):
        found = Pipeline(kept, PREPROCESSING, clusters.options(output_dir=tmp_path)).run([*slides, bad])
    assert found.resumed == 4
    encoded = sum(event.count for event in recorder.events if isinstance(event, TilesEncoded))
    assert encoded == sum(artifact.metadata["num_tiles"] for artifact in found.tile_artifacts[4:])
    same_on_disk(found, expected)
    recorder.events.clear()
    with activate_progress_reporter(recorder):
        again = Pipeline(kept, PREPROCESSING, clusters.options(output_dir=tmp_path)).run(slides)
    assert again.resumed == 6
    assert not any(isinstance(event, TilesEncoded) for event in recorder.events)


@pytest.mark.slow
def test_a_worker_has_a_gpu_of_its_own_and_its_share_of_the_cpus(
    kept: Deadly, clusters: Clusters, slides: list[Path], alone: list[EmbeddedSlide], left_by_workers: Path
) -> None:
    """The last of the cluster."""
    end_workers(kept)
    clusters.add(num_cpus=2, num_gpus=2)
    try:
        model = OnGpus.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
        found = model.embed_slides(slides, PREPROCESSING, clusters.options())
        end_workers(model)
    finally:
        clusters.end()  # Ray believes in a lost node, and its GPUs, for a while
    for one, other in zip(found, alone, strict=True):
        same(one, other)
    assert {path.name for path in left_by_workers.iterdir()} == {"gpu 0, cpus 1", "gpu 1, cpus 1"}


def test_an_address_where_nothing_answers_is_told(kept: Deadly, slides: list[Path]) -> None:
    end_workers(kept)
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"ray_address={address}: .*refused.*ray start --head"):
            kept.embed_slides(slides, PREPROCESSING, ExecutionOptions(executor="ray", ray_address=address))
    with pytest.raises(ConfigError, match=r"ray_address=headnode: .*an address is host:port"):
        kept.embed_slides(slides, PREPROCESSING, ExecutionOptions(executor="ray", ray_address="headnode"))


def test_ray_that_is_not_installed_is_told(
    kept: Deadly, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    end_workers(kept)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExtraMissingError, match=r"\[ray\]"):
        kept.embed_slides(slides, PREPROCESSING, ExecutionOptions(executor="ray"))


def test_a_model_made_otherwise_is_told(kept: Deadly, slides: list[Path]) -> None:
    bare = Model(
        kept.recipe, kept.variant, kept.encoder, device=kept.device, precision="fp32", weights="mine"
    )
    with pytest.raises(ConfigError, match=r'Model\.from_preset.* executor="local"'):
        bare.embed_slides(slides[:2], PREPROCESSING, ExecutionOptions(executor="ray"))
