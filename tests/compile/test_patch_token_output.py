"""Engines of patch tokens, for dense features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compile_helpers import CPU, SIDE, smooth_pixels, tiny_encoder, tiny_recipe
from PIL import Image
from rtx_compiler import refusals

from slide2vec import DenseImageOptions, DenseOptions, ExecutionOptions, ImageSpec, Model
from slide2vec.compile import BuildOptions, EngineStore, build_engine
from slide2vec.compile.export_module import ExportedEncoder
from slide2vec.compile.onnx import export_onnx
from slide2vec.encoders.patch_tokens import PatchTokenEncoder, encode_tiles_dense
from slide2vec.errors import ConfigError, EngineError, UnsupportedError
from slide2vec.images.token_engine import with_patch_tokens
from slide2vec.runtime.record import EngineRecord

onnxruntime = pytest.importorskip("onnxruntime")
#: Of the largest value: the same sums in another order, and what the roundings of fp16 leave.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2}


@pytest.fixture(scope="module")
def model() -> Model:
    recipe = tiny_recipe()
    encoder = tiny_encoder(recipe)
    return Model(recipe, "both", encoder, device=CPU, precision="fp32", weights="given")


@pytest.fixture(scope="module")
def engines(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an engine of its patch tokens."""
    folder = tmp_path_factory.mktemp("engines")
    tokens = with_patch_tokens(model.tile_encoding, PatchTokenEncoder(model.encoder, "patch_features"), SIDE)
    options = BuildOptions(runtime="openvino", precision="fp32", batch_size=4)
    built = build_engine(
        tokens.encoder, tokens.recipe, tokens.variant, CPU, options, store=EngineStore(folder)
    )
    assert (built.record.variant, built.record.layout) == ("patch_features", "float32_nchw")
    return folder


@pytest.fixture
def stored(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDE2VEC_ENGINES", str(engines))
    monkeypatch.setattr(EngineRecord, "is_slower", False)  # whatever was measured when it was built


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    "options",
    [
        {"target_size": SIDE},
        {"target_size": SIDE - 5, "pad_mode": "constant", "image_pad_value": 0.3},
        {"target_size": 2 * SIDE - 10, "window_size": SIDE, "overlap": 0.5},
    ],
    ids=["whole", "padded", "windows"],
)
@pytest.mark.parametrize("choice", ["openvino", "auto"])
def test_grids_by_an_engine(model: Model, options: dict[str, object], choice: str) -> None:
    dense = DenseOptions(spacing_um=0.5, **options)  # type: ignore[arg-type]
    kits = {
        engine: model.prepare_dense_encoder(dense=dense, execution=ExecutionOptions(engine=engine))  # type: ignore[arg-type]
        for engine in (choice, "torch")
    }
    assert [kit._encoder.runtime for kit in kits.values()] == ["openvino", "torch"]
    side = dense.target_size
    pictures = smooth_pixels(6, 2 * SIDE)[:, :side, :side].permute(0, 3, 1, 2)
    batch = torch.stack([kits["torch"].preprocessor()(each) for each in pictures])
    found, right = (kit.encode(batch) for kit in kits.values())
    assert found.shape == right.shape == (6, 64, -(-side // 16), -(-side // 16))
    assert (found - right).abs().max() <= TOLERANCE["fp32"] * right.abs().max()


@pytest.mark.usefixtures("stored")
def test_files_say_what_made_them_and_another_runtime_makes_them_anew(model: Model, tmp_path: Path) -> None:
    Image.fromarray(smooth_pixels(1)[0].numpy()).save(tmp_path / "a.png")
    image = ImageSpec(sample_id="a", image_path=tmp_path / "a.png", spacing_at_level_0=0.5)
    dense, execution = (
        DenseImageOptions(target_size=SIDE, spacing_um=0.5),
        ExecutionOptions(output_dir=tmp_path),
    )
    times = []
    for engine in ("openvino", "openvino", "torch"):
        (made,) = model.embed_images_dense([image], dense=dense, execution=execution.updated(engine=engine))
        times.append(made.path.stat().st_mtime_ns)
        assert json.loads(made.metadata_path.read_text())["compatibility"]["runtime"] == engine
    assert times[0] == times[1] < times[2]
    other = model.dense_identity_differences(
        made.metadata["compatibility"], dense=dense, execution=ExecutionOptions(engine="openvino")
    )
    assert other == {"runtime": ("torch", "openvino")}


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_size": (SIDE, 2 * SIDE)}, ConfigError, r"takes? squares.*window_size"),
        ({"feature_kind": "cls_attention"}, ConfigError, "attention are made in PyTorch"),
        ({"target_size": 2 * SIDE}, EngineError, r"--patch-tokens patch_features --input-size 128"),
        ({"feature_kind": "patch_features_prenorm"}, EngineError, "--patch-tokens patch_features_prenorm"),
    ],
)
def test_what_no_engine_does(
    model: Model, options: dict[str, object], error: type[Exception], message: str
) -> None:
    dense = DenseImageOptions(**{"target_size": SIDE, **options})  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        model.prepare_dense_encoder(dense=dense, execution=ExecutionOptions(engine="openvino"))
    assert model.prepare_dense_encoder(dense=dense)._encoder.runtime == "torch"


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("fp16", "patch_features"),
        pytest.param("fp32", "patch_features_prenorm", marks=pytest.mark.slow),
    ],
)
def test_exported_graph(model: Model, tmp_path: Path, precision: str, kind: str) -> None:
    recipe, tokens = model.recipe, PatchTokenEncoder(model.encoder, kind).eval()  # type: ignore[arg-type]
    module = ExportedEncoder(tokens, recipe.transform, "float32_nchw", precision, recipe.engine).eval()
    path = tmp_path / "encoder.onnx"
    export_onnx(module, path, input_size_px=SIDE)
    pixels = smooth_pixels(3).permute(0, 3, 1, 2).float() / 255
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = torch.from_numpy(session.run(["features"], {"pixels": pixels.numpy()})[0])
    with torch.inference_mode():
        right = tokens(pixels)
    assert rows.shape == right.shape == (3, 64 * 4 * 4)
    assert (rows - right).abs().max() <= TOLERANCE[precision] * right.abs().max()
    assert refusals(path) == []


def test_a_row_is_a_grid(model: Model) -> None:
    tokens, pixels = PatchTokenEncoder(model.encoder, "patch_features"), torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        grid = encode_tiles_dense(model.encoder, pixels)
        assert torch.equal(tokens(pixels).reshape(2, *tokens.grid(SIDE)), grid)
    with pytest.raises(UnsupportedError, match="no vision transformer"):
        PatchTokenEncoder(torch.nn.Linear(2, 2), "patch_features")
