"""What a call finds out and builds serves the next one."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slide2vec import ExecutionOptions, Model, Models, Pipeline, PreprocessingConfig, tile_embedder
from slide2vec.compile import select_engine
from slide2vec.compile.store import EngineStore
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.record import RECORD_NAME, EngineRecord, key_of
from slide2vec.stream import stream
from slide2vec.stream.transfer import HostTransfer

CONFIG = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=1.0)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [generated_slide(folder / f"{n}.svs", size_px=768, seed=n, levels=1) for n in range(2)]


@pytest.fixture
def model() -> Model:
    return Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what is to be kept was made."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(tile_embedder, name)

        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    for name in ("tile_transfer", "choose_preparer"):
        monkeypatch.setattr(tile_embedder, name, counted(name))
    return counts


def test_calls_share_what_feeds_the_encoder(model: Model, slides: list[Path], made: Counter[str]) -> None:
    first = model.embed_slide(slides[0], CONFIG)
    again = model.embed_slide(slides[0], CONFIG, ExecutionOptions(batch_size=3))
    torch.testing.assert_close(again.tile_embeddings, first.tile_embeddings)
    assert first.num_tiles and made == {"tile_transfer": 1, "choose_preparer": 1}
    model.embed_slide(slides[0], CONFIG.updated(preparer="torch"))
    model.embed_slide(slides[0], CONFIG.updated(requested_tile_size_px=96))
    assert made["choose_preparer"] == 3


def test_calls_at_once_share_nothing(model: Model, slides: list[Path], made: Counter[str]) -> None:
    calls = [model.iter_slides(slides, CONFIG) for _ in range(2)]
    for call in calls:
        next(call)
    assert made["choose_preparer"] == 2
    assert [len(list(call)) for call in calls] == [1, 1]
    model.embed_slide(slides[0], CONFIG)
    assert made["choose_preparer"] == 2


def test_a_call_leaves_no_memory_to_be_collected(
    model: Model, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nobody would look for circles before its memory is full."""
    kept: list[weakref.ref[Any]] = []

    def allocate(self: Any, shape: tuple[int, ...]) -> torch.Tensor:
        tiles = torch.zeros(shape, dtype=torch.uint8)
        kept.append(weakref.ref(tiles))
        return tiles

    class Encoder(stream.BatchEncoder):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            kept.append(weakref.ref(self))

    monkeypatch.setattr(HostTransfer, "allocate", allocate)
    monkeypatch.setattr(stream, "BatchEncoder", Encoder)
    gc.collect()
    gc.disable()
    try:
        assert model.embed_slide(slides[0], CONFIG, ExecutionOptions(batch_size=3)).num_tiles > 6
        assert len(kept) > 1 and not any(each() is not None for each in kept)
    finally:
        gc.enable()


def test_what_broke_is_not_used_again(model: Model, slides: list[Path], made: Counter[str]) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("CUDA error")

    model.resolve_preprocessing(CONFIG)  # tries the encoder on tiles of this size
    hook = model.encoder.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        model.embed_slide(slides[0], CONFIG)
    hook.remove()
    assert model.embed_slide(slides[0], CONFIG).num_tiles and made["choose_preparer"] == 2


def test_memory_of_a_gpu_is_tried_once_and_looked_at_for_each_call(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    free = [8_000, 100_000]

    def trial(engine: Any, preparer: Any, wanted: int, tile_size_px: int) -> float:
        tried.append(tile_size_px)
        return 100.0

    monkeypatch.setattr(tile_embedder, "bytes_per_tile", trial)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free.pop(0), 0))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 3_000)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 1_000)
    tiles = model._tile_embedder
    engine: Any = object()
    first, second = (tile_embedder._Workspace(None, None) for _ in range(2))  # type: ignore[arg-type]
    assert tiles._fitting(first, engine, 64, 224) == 64 and not tried
    tiles.device = torch.device("cuda")
    # 0.6 of the 10,000 bytes that are free, or that PyTorch holds and does not use, are 60 tiles
    assert [tiles._fitting(workspace, engine, 64, 224) for workspace in (first, second)] == [32, 64]
    assert tried == [224], "once for an engine: its CUDA graphs would take next to nothing"


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of one engine of the encoder, which was built by another version."""
    monkeypatch.setenv("SLIDE2VEC_ENGINES", str(tmp_path))
    identity = {"slide2vec": "0.0.1", "device": {"type": "cpu"}, "weights": "0"}
    record = EngineRecord(
        **{"key": key_of(identity), "identity": identity, "preset": "scattering", "variant": "default"},
        **{"runtime": "inductor", "precision": "fp32", "asked_precision": "fp32", "layout": "float32_nchw"},
        **{"input_size_px": 224, "feature_dim": 1, "profile": BatchProfile(1, 1, 1), "file": "a.pt2"},
        **{"opset": None, "parity": {}, "licence": "", "versions": {}, "built_at": "", "build_seconds": 1.0},
    )
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / RECORD_NAME).write_text(record.as_json())
    return tmp_path


@pytest.mark.usefixtures("stale")
def test_the_store_is_looked_through_once_and_a_stale_engine_told_once(
    model: Model, slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scans = []
    look = EngineStore.__iter__

    def counted(store: EngineStore) -> Iterator[Any]:
        scans.append(store)
        return look(store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineStore, "__iter__", counted)
        for _ in range(2):
            model.embed_slide(slides[0], CONFIG)
        Pipeline(model, CONFIG, ExecutionOptions(output_dir=tmp_path / "out")).run(slides)
        told = [record.getMessage() for record in caplog.records if "is not used" in record.getMessage()]
        assert len(scans) == 1 and len(told) == 1 and "engine engine is not used: built with" in told[0]
        model.embed_slide(slides[0], CONFIG, ExecutionOptions(precision="bf16"))
    assert len(scans) == 2, "what is asked for otherwise is looked for anew"


def test_the_encoder_is_as_it_was_in_the_next_call(model: Model, slides: list[Path]) -> None:
    first = model.embed_slide(slides[0], CONFIG)
    model.encoder.train()
    model.embed_slide(slides[0], CONFIG)
    assert not model.encoder.training and first.num_tiles


# building before the first slide -------------------------------------------------------------------


@pytest.fixture
def considered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slides of each call for which a build was considered."""
    found: list[int] = []

    def consider(encoder: Any, target: Any, precision: str, slides: Any, config: Any, **more: Any) -> None:
        found.append(len(slides))

    monkeypatch.setattr(tile_embedder, "build_where_it_pays", consider)
    return found


def test_a_build_is_considered_before_the_first_slide(
    model: Model, slides: list[Path], tmp_path: Path, considered: list[int]
) -> None:
    model.embed_slides(slides, CONFIG)
    assert considered == [2]
    model.embed_slides(slides, CONFIG)  # PyTorch runs the encoder of this model from now on
    Pipeline(model, CONFIG, ExecutionOptions(output_dir=tmp_path)).run(slides)
    assert considered == [2]


@pytest.mark.parametrize(
    "options",
    [
        {"build_engine": "never"},
        {"engine": "torch"},
        {"torch_compile": True},
        {"shard": "1/2"},  # other processes run other shards, which would not wait for an engine
    ],
)
def test_a_build_is_not_considered(
    model: Model,
    slides: list[Path],
    tmp_path: Path,
    considered: list[int],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *args, **more: None)
    Pipeline(model, CONFIG, ExecutionOptions(output_dir=tmp_path, **options)).run(slides)
    assert considered == []


@pytest.mark.parametrize("options", [{"build_engine": "never"}, {"engine": "torch"}, {"torch_compile": True}])
def test_what_is_not_built_brings_nothing(
    model: Model, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_embedder, "gain_of_build", lambda target, precision: precision)
    assert model.gain_of_build(CONFIG, ExecutionOptions()) == "fp32"
    assert model.gain_of_build(CONFIG, ExecutionOptions(**options)) is None


def test_a_build_is_considered_for_every_run_and_model(
    slides: list[Path], tmp_path: Path, considered: list[int]
) -> None:
    made = {
        name: Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
        for name in ("a", "b", "c")
    }
    Pipeline(made["a"], CONFIG, ExecutionOptions(output_dir=tmp_path / "a")).run(slides)
    assert considered == [2]
    made["b"].embed_tiles(
        slides[:1], preprocessing=CONFIG, execution=ExecutionOptions(output_dir=tmp_path / "b")
    )
    assert considered == [2, 1]
    Models({"b": made["b"], "c": made["c"]}).embed_slides(slides, CONFIG)
    assert considered == [2, 1, 2]


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_began_in_pytorch_goes_on_there(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    chosen = []

    def select(choice: str, *args: Any, **more: Any) -> Any:
        chosen.append(choice)
        return select_engine(choice, *args, **more)

    monkeypatch.setattr(tile_embedder, "select_engine", select)
    options = {"output_dir": tmp_path / "out"}
    for _ in range(2):  # as two processes
        model = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
        config = CONFIG.updated(resume=resume)
        result = Pipeline(model, config, ExecutionOptions(**options)).run(slides)
    assert result.resumed == (2 if resume else 0)
    assert chosen == ["auto", "torch" if resume else "auto"]
    bf16 = ExecutionOptions(**options, precision="bf16")
    Pipeline(model, CONFIG.updated(resume=resume), bf16).run(slides)
    assert chosen[2:] == ["auto"]


def test_bf16_is_offered_where_nobody_asked_for_a_precision(
    model: Model, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = []
    monkeypatch.setattr(tile_embedder, "offer_bf16", lambda target, precision: offered.append(precision))
    model.embed_slide(slides[0], CONFIG, ExecutionOptions(precision="fp32"))
    asked = Model.from_preset(
        "scattering", device="cpu", precision="fp32", allow_non_recommended_settings=True
    )
    asked.embed_slide(slides[0], CONFIG)
    assert offered == []
    model.embed_slide(slides[0], CONFIG)
    assert offered == ["fp32"]
