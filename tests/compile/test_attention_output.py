"""Attention maps as a further output of engines, with the features and from one pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compile_helpers import CPU, SIDE, smooth_pixels, tiny_encoder, tiny_recipe
from rtx_compiler import WHY_NOT, build, refusals
from torch import nn

from slide2vec.attention_maps import attention_of_slide, with_attention
from slide2vec.compile import BuildOptions, EngineStore, build_engine
from slide2vec.compile.export_module import ExportedEncoder
from slide2vec.compile.onnx import export_onnx
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.encoders.attention import AttentionEncoder, features_and_attention
from slide2vec.slides import as_slide
from slide2vec.tile_embedder import TileEmbedder

onnxruntime = pytest.importorskip("onnxruntime")
#: Of the largest value: fp32 in another order of the same sums, and what the roundings of fp16 leave.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2}


@pytest.fixture(scope="module")
def with_maps() -> AttentionEncoder:
    return AttentionEncoder(tiny_encoder(tiny_recipe()), blocks=(0, -1), include_registers=True).eval()


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_exported_graph(with_maps: AttentionEncoder, tmp_path: Path, precision: str) -> None:
    recipe = tiny_recipe()
    module = ExportedEncoder(with_maps, recipe.transform, "float32_nchw", precision, recipe.engine).eval()
    path = tmp_path / "encoder.onnx"
    export_onnx(module, path, input_size_px=SIDE)
    pixels = smooth_pixels(3).permute(0, 3, 1, 2).float() / 255
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = torch.from_numpy(session.run(["features"], {"pixels": pixels.numpy()})[0])
    features, maps = with_maps.apart(rows, SIDE)
    with torch.inference_mode():
        expected = features_and_attention(with_maps.encoder, pixels, blocks=(0, -1), include_registers=True)
    assert maps.shape == expected[1].shape == (3, 2 * 5 * 2, 4, 4)
    for found, right in zip((features, maps), expected, strict=True):
        assert (found - right).abs().max() <= TOLERANCE[precision] * right.abs().max()
    assert refusals(path) == []
    if precision == "fp16" and not WHY_NOT:  # fp32 attention needs a mark, with maps or without
        assert build(path, target="SM89")


def test_an_engine_is_built_and_found(
    with_maps: AttentionEncoder,
    generated_slide: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLIDE2VEC_ENGINES", str(tmp_path / "engines"))
    recipe = tiny_recipe(default_spacing_um=0.25, spacing_um=(0.25,))
    own = TileEmbedder(recipe, "both", with_maps.encoder, CPU, "fp32")
    both = with_attention(own, with_maps, SIDE)
    assert both.variant == "both+attention.0.1.registers"
    options = BuildOptions(runtime="openvino", precision="fp32", batch_size=4)
    built = build_engine(both.encoder, both.recipe, both.variant, CPU, options, store=EngineStore())
    assert built.record.variant == both.variant
    slide = as_slide(generated_slide(tmp_path / "drawn.svs", size_px=1024, seed=0, levels=2))
    config = PreprocessingConfig(requested_spacing_um=0.25, requested_tile_size_px=SIDE)
    asked = {"blocks": (0, -1), "include_registers": True}
    at = [(300, 300), (600, 300), (100, 700)]
    ran: list[str] = []
    select = TileEmbedder.select

    def noted(self: TileEmbedder, *args: object) -> object:
        found = select(self, *args)  # type: ignore[arg-type]
        ran.append(found.engine.runtime)
        return found

    monkeypatch.setattr(TileEmbedder, "select", noted)
    compiled = attention_of_slide(own, slide, config, ExecutionOptions(engine="openvino"), at, **asked)
    plain = attention_of_slide(own, slide, config, ExecutionOptions(engine="torch"), at, **asked)
    assert set(ran) == {"openvino", "torch"}
    for name in ("maps", "tile_embeddings"):
        found, right = getattr(compiled, name), getattr(plain, name)
        assert found.shape == right.shape
        assert (found - right).abs().max() <= TOLERANCE["fp32"] * right.abs().max()


def test_maps_count_where_engines_are_compared(with_maps: AttentionEncoder) -> None:
    """An engine with wrong maps and right features is not close."""
    pixels = smooth_pixels(2).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        right = with_maps(pixels)
    features, maps = with_maps.apart(right, SIDE)
    for spoilt in (torch.zeros_like(maps), torch.rand(maps.shape) / 8):
        wrong = torch.cat([features, spoilt.flatten(1) * 16], dim=1)
        assert nn.functional.cosine_similarity(right, wrong).max() < 0.99
