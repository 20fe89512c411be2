"""TensorRT-RTX on a real GPU that it knows: an engine is built, proven, used; its kernels are kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compile_helpers import smooth_pixels
from torch import nn

from slide2vec.compile import BuildOptions, EngineStore, EngineTarget, build_engine, select_engine
from slide2vec.compile.proof import proofs
from slide2vec.compile.tensorrt import unavailable
from slide2vec.encoders.weights import weights_digest
from slide2vec.recipes import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(unavailable("tensorrt-rtx") is not None, reason=str(unavailable("tensorrt-rtx"))),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_built_elsewhere_proven_here(
    precision: str, recipe: Recipe, encoder: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Built as on a machine without a GPU, for this one among others."""
    if reason := unavailable("tensorrt-rtx", precision):
        pytest.skip(reason)
    store = EngineStore(tmp_path / "elsewhere")
    options = BuildOptions(runtime="tensorrt-rtx", precision=precision, batch_size=16)
    mine = build_engine(encoder, recipe, "both", GPU, options, store=EngineStore(tmp_path / "here"))
    here = mine.record.identity["device"]["targets"]
    made = build_engine(encoder, recipe, "both", CPU, replace(options, targets=tuple(here)), store=store)
    assert list(proofs(made)) == [] and [proof.problem for proof in proofs(mine)] == [""]
    subject = EngineTarget(recipe, "both", GPU, lambda: weights_digest(encoder))
    for told in ("kernels were compiled", "its kernels were there"):
        with caplog.at_level(logging.INFO):
            engine = select_engine("tensorrt-rtx", encoder, subject, precision, store=store).engine
        assert told in caplog.text
        caplog.clear()
        pixels = smooth_pixels(21).to(GPU)
        whole = engine.run(pixels)
        assert whole.isfinite().all()
        torch.testing.assert_close(engine.run(pixels[:3]), whole[:3], atol=0.05, rtol=0.05)
        engine.close()
    (proof,) = proofs(made)
    assert proof.problem == "" and proof.gpu == torch.cuda.get_device_name(GPU)
    assert proof.parity["min_cosine"] >= recipe.engine.threshold(precision)
