"""Building, parity, the way down, the store, and selection, with a small encoder on the CPU."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compile_helpers import CPU, build, copied, only, smooth_pixels, tiny_encoder, tiny_recipe
from forked import CONTEXT
from torch import nn

from slide2vec.compile import (
    BuildOptions,
    EngineStore,
    EngineTarget,
    StoredEngine,
    build_engine,
    find_engine,
    openvino_builder,
    select_engine,
)
from slide2vec.compile import build as build_module
from slide2vec.compile.builders import BuildJob, Built
from slide2vec.compile.comparison_tiles import tissue_pixels
from slide2vec.compile.parity import verify_engine
from slide2vec.encoders.weights import weights_digest
from slide2vec.errors import ConfigError, EngineError, OutputError
from slide2vec.recipes import EnginePolicy, Recipe
from slide2vec.runtime.openvino_engine import capabilities
from slide2vec.runtime.record import RECORD_NAME, SCHEMA, key_of, read_record

#: Such small encoders are no measure.
FAST = {"engine": 200.0, "torch": 100.0}
FP32 = BuildOptions(runtime="openvino", precision="fp32")


def subject_of(recipe: Recipe, encoder: nn.Module) -> EngineTarget:
    return EngineTarget(recipe, "both", CPU, lambda: weights_digest(encoder))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> StoredEngine:
    recipe = tiny_recipe()
    return build(recipe, tiny_encoder(recipe), EngineStore(tmp_path_factory.mktemp("built")), FP32)


@pytest.fixture
def store(built: StoredEngine, tmp_path: Path) -> EngineStore:
    """A store of one engine that was fast, to be spoilt."""
    store = copied(built, tmp_path)
    changed_record(store, speed=FAST)
    return store


def changed_record(store: EngineStore, **changes: Any) -> None:
    path = only(store).directory / RECORD_NAME
    if "identity" in changes:
        changes["key"] = key_of(changes["identity"])
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# building --------------------------------------------------------------------------------------


def test_record_of_what_was_built(built: StoredEngine, recipe: Recipe) -> None:
    record = built.record
    assert (record.preset, record.variant, record.runtime, record.precision) == (
        "tiny",
        "both",
        "openvino",
        "fp32",
    )
    assert record.parity["min_cosine"] >= 0.9999 and record.parity["finite"]
    assert record.parity["batch_sizes"] == [1, 2, 4, 8] and record.parity["tiles"] == 16
    assert record.speed["engine"] > 0 and record.speed["torch"] > 0
    assert record.opset == 23 and record.feature_dim == 128 and record.steps_down == []
    assert recipe.licence.terms in record.licence
    assert recipe.licence.terms in (built.directory / "LICENCE.txt").read_text()
    names = {path.name for path in built.directory.iterdir()}
    assert names == {"encoder.xml", "encoder.bin", "reference.npz", "LICENCE.txt", RECORD_NAME}
    assert set(record.checksums) == names - {RECORD_NAME}
    assert read_record(built.directory) == record
    assert sorted(path.name for path in built.directory.parent.iterdir() if path.suffix == ".partial") == []


def test_engine_gives_the_features_of_the_encoder(
    built: StoredEngine, recipe: Recipe, encoder: nn.Module
) -> None:
    pixels = tissue_pixels(recipe, 16)
    store = EngineStore(built.directory.parent)
    engine = select_engine("openvino", encoder, subject_of(recipe, encoder), "fp32", store=store).engine
    mean, std = (torch.tensor(v)[:, None, None] for v in (recipe.transform.mean, recipe.transform.std))
    with torch.inference_mode():
        expected = encoder((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    torch.testing.assert_close(engine.run(pixels), expected, atol=1e-4, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_what_is_there_is_not_built_again(
    store: EngineStore, recipe: Recipe, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_Build", None)
    assert build(recipe, encoder, store, FP32) == only(store)


def test_force_replaces(store: EngineStore, recipe: Recipe, encoder: nn.Module) -> None:
    before = only(store)
    after = build(recipe, encoder, store, replace(FP32, force=True, keep_onnx=True))
    assert only(store) == after and after.name == before.name
    assert (after.directory / "encoder.onnx").is_file()


def test_bad_parity_is_not_published(recipe: Recipe, encoder: nn.Module, tmp_path: Path) -> None:
    strict = recipe.model_copy(update={"engine": EnginePolicy(min_cosine={"fp32": 0.9999})})

    def spoilt(job: BuildJob) -> Built:
        with torch.no_grad():
            job.encoder.trunk.norm.bias += 3  # type: ignore[union-attr, operator]
        return _OPENVINO(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_builder, "build", spoilt)
        with pytest.raises(
            EngineError, match=r"could be built \(fp32: its least cosine .* is 0\.\d+, below 0.9999"
        ):
            build(strict, encoder, EngineStore(tmp_path), FP32)
    assert list(EngineStore(tmp_path)) == []
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


_OPENVINO = openvino_builder.build


def test_values_that_are_not_finite_are_not_published(
    recipe: Recipe, encoder: nn.Module, tmp_path: Path
) -> None:
    class Overflowing(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return encoder(pixels) / 0.0

    with pytest.raises(EngineError, match="not finite"):
        build(recipe, Overflowing().eval(), EngineStore(tmp_path), FP32)


@pytest.mark.slow
@pytest.mark.skipif("BF16" not in capabilities(), reason="this CPU does not compute in bf16")
def test_way_down_is_taken_and_recorded(
    recipe: Recipe, encoder: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """bf16 cannot be as close as is asked here; the fp32 engine answers for it, and says so."""
    strict = recipe.model_copy(update={"engine": EnginePolicy(min_cosine={"bf16": 0.99999999})})
    store = EngineStore(tmp_path)
    made = build(strict, encoder, store, replace(FP32, precision="bf16"))
    assert (made.record.asked_precision, made.record.precision) == ("bf16", "fp32")
    (step,) = made.record.steps_down
    assert step["precision"] == "bf16" and "below 1" in step["reason"]
    assert "bf16" in caplog.text
    caplog.clear()
    changed_record(store, speed=FAST)
    selected = select_engine("auto", encoder, subject_of(strict, encoder), "bf16", store=store)
    assert (selected.engine.runtime, selected.engine.precision) == ("openvino", "fp32")
    assert "computes in fp32, not bf16" in caplog.text
    again = build(strict, encoder, store, replace(FP32, precision="bf16"))
    assert again.record.built_at == made.record.built_at  # not tried again


def test_what_cannot_be_compiled_says_why(recipe: Recipe, encoder: nn.Module, tmp_path: Path) -> None:
    refused = recipe.model_copy(update={"compile": False, "compile_note": "it is code of others"})
    with pytest.raises(EngineError, match="tiny cannot be compiled: it is code of others"):
        build(refused, encoder, EngineStore(tmp_path), FP32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            BuildOptions(runtime="tensorrt"),
            EngineError,
            "tensorrt has no engines for cpu; those that have: openvino",
        ),
        (BuildOptions(runtime="openvino", precision="fp8"), EngineError, "OpenVINO does not compute in fp8"),
        (BuildOptions(precision="fp8"), EngineError, "no engine in fp8 can be built for cpu here"),
        (BuildOptions(runtime="onnx"), ConfigError, "not one of tensorrt, tensorrt-rtx, openvino"),
    ],
)
def test_what_is_not_possible_here(
    recipe: Recipe,
    encoder: nn.Module,
    tmp_path: Path,
    options: BuildOptions,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        build(recipe, encoder, EngineStore(tmp_path), options)


def test_slide_with_too_little_tissue(
    recipe: Recipe, encoder: nn.Module, tmp_path: Path, reference_slide: Path
) -> None:
    large = recipe.model_copy(update={"tile_size_px": 1024})
    with pytest.raises(EngineError, match=r"CMU-1-Small-Region.*name another slide"):
        tissue_pixels(large, 16, reference_slide)
    assert tissue_pixels(recipe, 16, reference_slide).shape == (16, 64, 64, 3)


# the store -------------------------------------------------------------------------------------


def test_names(store: EngineStore) -> None:
    engine = only(store)
    assert store.named(engine.name) == store.named("tiny-both") == engine
    with pytest.raises(EngineError, match="no engine 'virchow'"):
        store.named("virchow")
    shutil.copytree(engine.directory, store.root / f"{engine.name}x")
    with pytest.raises(EngineError, match="may be any of"):
        store.named("tiny-both")
    assert store.named(engine.name).name == engine.name


def test_a_disk_without_room_is_told_before_the_build(
    recipe: Recipe, encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(value.nbytes for value in encoder.state_dict().values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * weights))
    with pytest.raises(
        OutputError, match=r"the disk of .* MB free, and .* make room, or .*SLIDE2VEC_ENGINES"
    ):
        build_engine(encoder, recipe, "both", CPU, FP32, store=EngineStore(tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_remove(store: EngineStore) -> None:
    store.remove(only(store))
    assert list(store) == [] and list(store.root.glob("tiny*")) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(
            json.dumps({**json.loads(path.read_text()), "schema_version": SCHEMA + 1})
        ),
        lambda path: path.write_text(
            json.dumps({**json.loads(path.read_text()), "file": "../../encoder.xml"})
        ),
        lambda path: path.write_text(
            json.dumps({**json.loads(path.read_text()), "profile": {"min": 0, "opt": 1, "max": 1}})
        ),
        lambda path: path.unlink(),
    ],
)
def test_unreadable_records_are_misses(
    store: EngineStore, recipe: Recipe, encoder: nn.Module, spoil: Any
) -> None:
    spoil(only(store).directory / RECORD_NAME)
    assert list(store) == []
    assert (
        select_engine("auto", encoder, subject_of(recipe, encoder), "fp32", store=store).engine.runtime
        == "torch"
    )


def test_verify(store: EngineStore) -> None:
    assert verify_engine(only(store), CPU).min_cosine > 0.9999


def test_verify_finds_changed_files(store: EngineStore) -> None:
    weights = only(store).directory / "encoder.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 255
    weights.write_bytes(content)
    with pytest.raises(EngineError, match=r"encoder\.bin has changed since it was built; build it again"):
        verify_engine(only(store), CPU)
    weights.unlink()
    with pytest.raises(EngineError, match=r"encoder\.bin is missing"):
        verify_engine(only(store), CPU)


def test_verify_finds_another_engine(store: EngineStore) -> None:
    """Files as recorded, but not the encoder's features."""
    import numpy as np

    path = only(store).directory / "reference.npz"
    with np.load(path) as kept:
        np.savez(path, pixels=kept["pixels"], features=kept["features"][::-1])
    changed_record(store, checksums={})
    with pytest.raises(EngineError, match="its least cosine"):
        verify_engine(only(store), CPU)


def _build_in_process(root: Path, started: Any, progress: Any) -> None:
    recipe = tiny_recipe()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:  # a slide takes seconds to draw
        patch.setattr(build_module, "tissue_pixels", lambda recipe, count: smooth_pixels(count))
        patch.setattr("slide2vec.compile.speed.ROUND_S", 0.01)
        started.wait()
        build(
            recipe, tiny_encoder(recipe), EngineStore(root), FP32, progress=lambda *step: progress.put(step)
        )


@pytest.mark.slow
def test_two_builders_at_once(tmp_path: Path) -> None:
    started, progress = CONTEXT.Barrier(2), CONTEXT.SimpleQueue()
    builders = [
        CONTEXT.Process(target=_build_in_process, args=(tmp_path, started, progress)) for _ in range(2)
    ]
    for each in builders:
        each.start()
    for each in builders:
        each.join(120)
    assert [each.exitcode for each in builders] == [0, 0]
    steps = []
    while not progress.empty():
        steps.append(progress.get()[0])
    assert steps.count("exporting to ONNX") == 1, "one builds, the other waits and finds it"
    engine = only(EngineStore(tmp_path))
    assert engine.damage() is None
    assert list(tmp_path.glob("*.partial")) == [] and list(tmp_path.glob(".*.partial")) == []


def test_what_a_killed_build_left_is_removed(store: EngineStore, recipe: Recipe, encoder: nn.Module) -> None:
    left = store.root / f".{only(store).name}.abc.partial"
    left.mkdir()
    (left / "encoder.xml").write_text("half")
    assert len(list(store)) == 1
    build(recipe, encoder, store, FP32)
    assert not left.exists()


# selection -------------------------------------------------------------------------------------


def test_auto_takes_the_engine(store: EngineStore, recipe: Recipe, encoder: nn.Module) -> None:
    selected = select_engine("auto", encoder, subject_of(recipe, encoder), "fp32", store=store)
    assert selected.engine.runtime == "openvino" and selected.batch_size == 8
    plain = select_engine("torch", encoder, subject_of(recipe, encoder), "fp32", store=store)
    assert plain.engine.runtime == "torch" and plain.batch_size is None


def test_auto_passes_over_what_was_slower(store: EngineStore, recipe: Recipe, encoder: nn.Module) -> None:
    changed_record(store, speed={"engine": 50.0, "torch": 100.0})
    target = subject_of(recipe, encoder)
    assert select_engine("auto", encoder, target, "fp32", store=store).engine.runtime == "torch"
    assert select_engine("openvino", encoder, target, "fp32", store=store).engine.runtime == "openvino"


def test_no_advice_where_it_is_not_worth_it(
    tmp_path: Path, recipe: Recipe, encoder: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    quick = recipe.model_copy(update={"name": "quick", "engine": EnginePolicy(advised=False)})
    with caplog.at_level("INFO"):
        select_engine("auto", encoder, subject_of(quick, encoder), "fp32", store=EngineStore(tmp_path))
    assert "build-engine" not in caplog.text


def test_auto_without_an_engine_tells_how_to_get_one(
    tmp_path: Path, recipe: Recipe, encoder: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    named = recipe.model_copy(update={"name": "never seen"})
    for _ in range(2):
        with caplog.at_level("INFO"):
            selected = select_engine(
                "auto", encoder, subject_of(named, encoder), "fp32", store=EngineStore(tmp_path)
            )
    assert selected.engine.runtime == "torch"
    assert caplog.text.count("`slide2vec build-engine --preset never seen --precision fp32`") == 1


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("slide2vec", "0.0.1", "slide2vec"),
        ("runtime_version", "1.0", "runtime_version"),
        ("device", {"type": "cpu", "machine": "s390x", "computes_in": []}, "device"),
        ("weights", "0" * 32, "weights"),
        ("normalisation", [[0.5] * 3, [0.5] * 3], "normalisation"),
        ("encoder", {}, "encoder"),
    ],
)
def test_stale_engines_are_misses_with_a_reason(
    store: EngineStore,
    recipe: Recipe,
    encoder: nn.Module,
    caplog: pytest.LogCaptureFixture,
    field: str,
    value: Any,
    reason: str,
) -> None:
    changed_record(store, identity={**only(store).record.identity, field: value})
    found = find_engine(store, subject_of(recipe, encoder), "fp32", ("openvino",))
    assert found.matching == []
    assert found.stale == {only(store).name: f"built with another {reason}"}
    assert (
        select_engine("auto", encoder, subject_of(recipe, encoder), "fp32", store=store).engine.runtime
        == "torch"
    )
    assert f"is not used: built with another {reason}" in caplog.text
    with pytest.raises(
        EngineError, match=rf"no openvino engine of tiny.*another {reason}.*build-engine --preset tiny"
    ):
        select_engine("openvino", encoder, subject_of(recipe, encoder), "fp32", store=store)


def test_other_weights_are_another_engine(store: EngineStore, recipe: Recipe) -> None:
    other = tiny_encoder(recipe, seed=1)
    assert find_engine(store, subject_of(recipe, other), "fp32", ("openvino",)).matching == []


def test_weights_are_read_only_where_all_else_agrees(store: EngineStore, recipe: Recipe) -> None:
    def weights() -> str:
        raise AssertionError("they were read")

    for other in (
        recipe.model_copy(update={"name": "other"}),
        recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"prefix_tokens": 1})}),
    ):
        assert (
            find_engine(store, EngineTarget(other, "both", CPU, weights), "fp32", ("openvino",)).matching
            == []
        )
    with pytest.raises(AssertionError, match="were read"):
        find_engine(store, EngineTarget(recipe, "both", CPU, weights), "fp32", ("openvino",))


def test_engine_that_cannot_be_loaded(
    store: EngineStore, recipe: Recipe, encoder: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    (only(store).directory / "encoder.xml").write_text("<net/>")
    assert (
        select_engine("auto", encoder, subject_of(recipe, encoder), "fp32", store=store).engine.runtime
        == "torch"
    )
    assert "OpenVINO cannot load" in caplog.text
    with pytest.raises(EngineError, match="OpenVINO cannot load"):
        select_engine("openvino", encoder, subject_of(recipe, encoder), "fp32", store=store)


def test_store_shared_with_a_machine_without_the_runtime(
    store: EngineStore,
    recipe: Recipe,
    encoder: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("slide2vec.runtime.openvino_engine.find_spec", lambda name: None)
    capabilities.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    target = subject_of(recipe, encoder)
    assert select_engine("auto", encoder, target, "fp32", store=store).engine.runtime == "torch"
    assert "is not used: OpenVINO is not installed" in caplog.text
    with pytest.raises(EngineError, match=r"OpenVINO is not installed: .*pip install"):
        select_engine("openvino", encoder, target, "fp32", store=store)


def test_runtime_that_does_not_load(
    store: EngineStore, recipe: Recipe, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ImportError("libopenvino.so: cannot open shared object file")

    monkeypatch.setattr("slide2vec.runtime.openvino_engine.capabilities", broken)
    found = find_engine(store, subject_of(recipe, encoder), "fp32", ("openvino",))
    assert found.matching == []
    assert found.stale[only(store).name].startswith("OpenVINO is installed, but does not load: libopenvino")


def test_user_without_a_home(
    recipe: Recipe, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SLIDE2VEC_ENGINES", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    target = subject_of(recipe, encoder)
    with caplog.at_level("INFO"):
        assert select_engine("auto", encoder, target, "fp32").engine.runtime == "torch"
    assert "set SLIDE2VEC_ENGINES" in caplog.text
    with pytest.raises(EngineError, match="set SLIDE2VEC_ENGINES to a folder"):
        build_engine(encoder, recipe, "both", CPU, FP32)


def test_weights_are_hashed_once_per_build(
    store: EngineStore, recipe: Recipe, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the largest encoders take seconds."""
    hashed = []
    monkeypatch.setattr(
        build_module, "weights_digest", lambda module: hashed.append(module) or weights_digest(module)
    )
    build(recipe, encoder, store, replace(FP32, force=True))
    assert len(hashed) == 1


def test_choices_that_make_no_sense(tmp_path: Path, recipe: Recipe, encoder: nn.Module) -> None:
    target, store = subject_of(recipe, encoder), EngineStore(tmp_path)
    with pytest.raises(EngineError, match="'tensorrt' does not run on cpu"):
        select_engine("tensorrt", encoder, target, "fp32", store=store)
    with pytest.raises(ConfigError, match="is not auto, torch, tensorrt, tensorrt-rtx, openvino, inductor"):
        select_engine("onnx", encoder, target, "fp32", store=store)
    with pytest.raises(EngineError, match="PyTorch does not run tiny in fp8"):
        select_engine("auto", encoder, target, "fp8", store=store)


def test_store_that_is_not_there(tmp_path: Path) -> None:
    assert list(EngineStore(tmp_path / "none")) == []


def test_build_is_timed(built: StoredEngine) -> None:
    assert 0 < built.record.build_seconds < 600
    assert built.record.built_at <= time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
