"""Every preset of the catalogue, built whole on the meta device: parameters, dimensions, sizes."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from shallow import each
from torch.utils.flop_counter import FlopCounterMode

from slide2vec.encoders import build_encoder
from slide2vec.encoders.slide import SlideFeatures
from slide2vec.recipes import list_models, load_recipe

#: Of the published parameter counts, which are rounded.
PARAMETERS = 1e-3
#: Of GFLOP: those of timm's transformers are counted with the attention products, as here.
FLOPS = 5e-3

NAMES = list_models("tile")
ABOVE = [*list_models("slide"), *list_models("patient")]
BUILT = [name for name in NAMES if load_recipe(name).encoder.family != "remote"]
TIMM = [name for name in BUILT if load_recipe(name).encoder.family in ("timm", "headed")]


@cache
def on_meta(name: str, variant: str) -> torch.nn.Module:
    recipe = load_recipe(name)
    with torch.device("meta"):
        return build_encoder(recipe, recipe.variants[variant], "random")


@pytest.mark.parametrize("name", [*NAMES, *ABOVE])
def test_says_what_is_needed(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.licence.url.startswith("https://") and recipe.licence.terms
    assert recipe.citation and recipe.summary
    assert recipe.transform.crop <= recipe.transform.resize
    assert all(0 < value <= 1 for value in recipe.transform.std)
    if recipe.weights is None:
        return
    assert recipe.verified or recipe.unconfirmed
    assert recipe.weights.files
    if recipe.weights.url:
        assert recipe.weights.url.startswith("https://") and recipe.weights.sha256
    elif recipe.weights.revision == "main":
        assert "commit" in recipe.unconfirmed, "an unpinned revision is said to be one"
    else:
        assert re.fullmatch(r"[0-9a-f]{40}", recipe.weights.revision)


@pytest.mark.parametrize("name", each(BUILT))
def test_published_parameter_count(name: str) -> None:
    recipe = load_recipe(name)
    encoder = on_meta(name, recipe.default_variant)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count / 1e6 == pytest.approx(recipe.params_m, rel=PARAMETERS)


@pytest.mark.parametrize("name", each(name for name in BUILT if load_recipe(name).weights is not None))
def test_dimension_of_every_output(name: str) -> None:
    recipe = load_recipe(name)
    for variant, output in recipe.variants.items():
        encoder = on_meta(name, variant)
        pixels = torch.empty(2, 3, recipe.transform.crop, recipe.transform.crop, device="meta")
        with torch.no_grad():
            assert encoder(pixels).shape == (2, output.dim), variant


@pytest.mark.slow
@pytest.mark.parametrize("name", each(TIMM))
def test_gflops_are_those_of_one_tile(name: str) -> None:
    recipe = load_recipe(name)
    encoder = on_meta(name, recipe.default_variant)
    pixels = torch.empty(1, 3, recipe.transform.crop, recipe.transform.crop, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(pixels)
    assert counter.get_total_flops() / 1e9 == pytest.approx(recipe.gflops, rel=FLOPS)


@pytest.mark.parametrize("name", each(name for name in TIMM if load_recipe(name).encoder.family == "timm"))
def test_prefix_tokens_are_those_of_the_backbone(name: str) -> None:
    recipe = load_recipe(name)
    encoder = on_meta(name, recipe.default_variant)
    assert getattr(encoder.trunk, "num_prefix_tokens", 0) == recipe.encoder.prefix_tokens


# tools/check_presets.py --------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "check_presets.py"
    spec = importlib.util.spec_from_file_location("check_presets", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_presets", made)
    spec.loader.exec_module(made)
    return made


def test_check_without_the_hub(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line per preset that says why, and no failure."""
    monkeypatch.setattr(tool, "tissue_tiles", tool.random_tiles)  # whose slide takes seconds to draw
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert tool.main(["lunit", "uni", "phikon", "scattering", "titan", "moozy", "chief"]) == 0
    text = capsys.readouterr().out
    assert text.count("no access") == 12 and "Traceback" not in text  # while it runs, and in the table
    assert "scattering" not in text


@pytest.mark.parametrize(("shift", "status"), [(0.0, "same"), (1e-2, "DIFFERS")])
def test_check_tells_same_from_different(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, shift: float, status: str
) -> None:
    recipe = load_recipe("prost40m")
    shallow = recipe.encoder.model_copy(update={"kwargs": {**recipe.encoder.kwargs, "depth": 1}})
    recipe = recipe.model_copy(update={"encoder": shallow})
    ours = build_encoder(recipe, recipe.variants["default"], "random")
    original = build_encoder(recipe, recipe.variants["default"], "random").trunk
    original.norm.bias.data += shift  # type: ignore[union-attr, operator]
    asked: list[Any] = []
    monkeypatch.setattr(tool, "build_encoder", lambda *_, **__: ours)
    monkeypatch.setattr(tool.timm, "create_model", lambda name, **_: asked.append(name) or original)
    row = tool.check(recipe, torch.cat([tool.random_tiles(1), tool.tissue_tiles(1)]), False)
    assert row.status == status
    assert asked == ["hf-hub:waticlems/Prost40M@main"]
    assert row.difference == pytest.approx(shift, abs=1e-6) and row.cosine > 0.99


@pytest.mark.parametrize(("name", "dim"), [("titan", 768), ("moozy", 768), ("prism", 1280)])
@pytest.mark.parametrize(("shift", "status"), [(0.0, "same"), (1.0, "DIFFERS")])
def test_check_compares_slides_and_patients(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, dim: int, shift: float, status: str
) -> None:
    """A stand-in for the network of both sides, which sees whole slides and patients."""

    def features(given: Any) -> torch.Tensor:
        return (given.features if name != "moozy" else given).mean(0)[:1].expand(dim)

    ours = {"titan": SlideFeatures, "prism": SlideFeatures, "moozy": lambda values: values}[name]
    monkeypatch.setattr(tool, "load_ours", lambda *_: lambda given: ours(features(given)))
    monkeypatch.setattr(tool, "load_original", lambda *_: lambda given: features(given)[None] + shift)
    row = tool.check(load_recipe(name), torch.empty(0), False)
    assert (row.status, row.difference) == (status, pytest.approx(shift))
