"""Ready images and dense features on several devices: two CPUs, each with a model of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shallow import few_blocks

from slide2vec import DenseOptions, ExecutionOptions, Model, PreprocessingConfig, SlideRegions
from slide2vec.errors import ConfigError
from slide2vec.images import dense_encoder, devices
from slide2vec.images.dense_encoder import GridEncoder

TWO = ("cpu", "cpu")
ONE_BY_ONE = {"batch_size": 1, "engine": "torch"}


@pytest.fixture(autouse=True)
def _few_blocks() -> Any:
    """The model that is loaded anew has as few as the first."""
    with few_blocks():
        yield


def grids(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: torch.load(path, weights_only=True) for path in folder.rglob("*.pt")}


@pytest.fixture
def loaded(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """Models that were loaded anew."""
    found: list[Model] = []
    load = model.loader
    assert load is not None

    def noted(**options: Any) -> Model:
        found.append(load(**options))
        return found[-1]

    monkeypatch.setattr(model, "loader", noted)
    monkeypatch.setattr(devices, "_loaded", type(devices._loaded)())
    return found


def test_images_are_shared_out(
    model: Model, pictures: list[Path], loaded: list[Model], tmp_path: Path
) -> None:
    one, two = (
        ExecutionOptions(output_dir=tmp_path / name, devices=names, **ONE_BY_ONE)
        for name, names in (("one", None), ("two", TWO))
    )
    expected = model.embed_images(pictures, execution=one)
    assert not loaded
    made = model.embed_images(pictures, execution=two)
    assert [each.sample_id for each in made] == [each.sample_id for each in expected]
    assert len(loaded) == 1 and loaded[0].tile_encoding._engines  # it has encoded some
    found, right = grids(tmp_path / "two"), grids(tmp_path / "one")
    assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
    model.embed_images(pictures, execution=two.updated(output_dir=tmp_path / "three"))
    assert len(loaded) == 1  # kept for the next call


def test_regions_are_shared_out(
    model: Model,
    generated_slide: Callable[..., Path],
    loaded: list[Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slide = generated_slide(tmp_path / "a.svs", size_px=512, seed=3, levels=1)
    places = [(40 * each, 20) for each in range(5)]
    regions = [SlideRegions(sample_id="a", image_path=slide, coordinates=places)]
    dense = DenseOptions(spacing_um=0.25, target_size=70)
    model.embed_regions_dense(
        regions, dense=dense, execution=ExecutionOptions(output_dir=tmp_path / "one", **ONE_BY_ONE)
    )
    both, encode, at_work = threading.Barrier(2, timeout=600), GridEncoder.encode, set[int]()

    def together(self: GridEncoder, batch: torch.Tensor) -> torch.Tensor:
        if self not in at_work:
            at_work.add(self)  # type: ignore[arg-type]
            both.wait()  # comes back only where the other one is at work, too
        return encode(self, batch)

    monkeypatch.setattr(GridEncoder, "encode", together)
    execution = ExecutionOptions(output_dir=tmp_path / "two", devices=TWO, **ONE_BY_ONE)
    made = model.embed_regions_dense(regions, dense=dense, execution=execution)
    assert [(each.x, each.y) for each in made] == places and len(at_work) == 2 == len(loaded) + 1
    found, right = grids(tmp_path / "two"), grids(tmp_path / "one")
    for name, grid in right.items():
        torch.testing.assert_close(found[name], grid, atol=1e-5, rtol=0)
    assert len(right) == len(found) == 5


def test_patch_tokens_of_tiles_are_shared_out_and_in_order(
    model: Model,
    generated_slide: Callable[..., Path],
    loaded: list[Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slide = generated_slide(tmp_path / "a.svs", size_px=512, seed=3, levels=1)
    config = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=56, tissue_threshold=0.1)
    monkeypatch.setattr(model, "origin", {**model.origin, "allow_non_recommended_settings": True})
    execution = ExecutionOptions(output_dir=tmp_path / "one", **ONE_BY_ONE)
    artifacts = model.embed_tiles([slide], preprocessing=config, execution=execution)
    assert artifacts[0].num_tiles > 3
    model.save_patch_tokens(artifacts, execution=execution)
    model.save_patch_tokens(artifacts, execution=execution.updated(output_dir=tmp_path / "two", devices=TWO))
    one, two = (np.load(tmp_path / name / "patch_tokens/a.npy") for name in ("one", "two"))
    # They are stored in float16, whose numbers between 2 and 4 are 2e-3 apart.
    np.testing.assert_allclose(one, two, atol=2e-3)
    assert len(loaded) == 1


def test_few_images_take_one_device(
    model: Model, pictures: list[Path], loaded: list[Model], tmp_path: Path
) -> None:
    execution = ExecutionOptions(output_dir=tmp_path, devices=TWO, batch_size=8)
    model.embed_images(pictures, execution=execution)
    assert not loaded


def test_another_identity_on_another_device_is_an_error(
    model: Model, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Model.from_preset("dinov2-vitb14", weights="random", seed=1, device="cpu")
    monkeypatch.setattr(model, "loader", lambda device: other)
    monkeypatch.setattr(devices, "_loaded", type(devices._loaded)())
    execution = ExecutionOptions(output_dir=tmp_path, devices=TWO, **ONE_BY_ONE)
    with pytest.raises(ConfigError, match="weights would be 'random:1' on cpu, and is 'random:0'"):
        model.embed_images(pictures, execution=execution)
    monkeypatch.setattr(model, "loader", None)
    with pytest.raises(ConfigError, match=r"several devices need a model of Model\.from_preset"):
        model.embed_images(pictures, execution=execution)


@pytest.mark.parametrize(
    ("options", "what"), [({"executor": "ray"}, 'executor="ray"'), ({"shard": "1/2"}, "shard=1/2")]
)
def test_other_machines_are_refused(
    model: Model, pictures: list[Path], tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    execution = ExecutionOptions(output_dir=tmp_path, **options)
    dense = DenseOptions(spacing_um=0.5, target_size=70)
    for call in (
        lambda: model.embed_images(pictures, execution=execution),
        lambda: model.embed_regions_dense([], dense=dense, execution=execution),
    ):
        with pytest.raises(ConfigError, match=f"{what} is for slides"):
            call()


def test_whoever_is_free_takes_the_next_and_order_stays() -> None:
    slow = threading.Event()

    def work(worker: str, item: int) -> tuple[str, int]:
        if item == 0:
            slow.wait(600)
        if item == 3:
            slow.set()
        return worker, item

    found = list(devices.spread(["a", "b"], work, range(6)))
    assert [item for _, item in found] == list(range(6))
    (first,) = (worker for worker, item in found if item == 0)
    assert all(worker != first for worker, item in found if item in (1, 2, 3))


def test_cpus_are_shared(model: Model, loaded: list[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDE2VEC_CPUS", "8")
    dense = DenseOptions(spacing_um=0.5, target_size=70)
    execution = ExecutionOptions(devices=TWO, engine="torch")
    both = GridEncoder(model, dense, execution, "a test").on_each_device(9)
    threads = list[int]()
    monkeypatch.setattr(dense_encoder, "torch_threads", lambda n: nullcontext(threads.append(n)))
    for _ in range(2):  # and not a share of a share
        for each in both:
            each.encode(torch.zeros(1, 3, 70, 70))
        assert both == both[0].on_each_device(9)
    assert threads == [4, 4, 4, 4]
