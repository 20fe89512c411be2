"""`slide2vec models`."""

from __future__ import annotations

import json

from slide2vec import list_models
from slide2vec.recipes import load_recipe


def test_table_names_every_preset_and_fits(run) -> None:
    text = run("models").stdout
    assert all(name in text for name in list_models())
    assert "CC-BY-NC-ND-4.0, gated" in text and "no weights needed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_level(run) -> None:
    assert "virchow2" in run("models", "--level", "tile").stdout
    slide_level = run("models", "--level", "slide")
    assert slide_level.exit_code == 0 and "virchow2" not in slide_level.stdout


def test_details(run) -> None:
    text = " ".join(run("models", "virchow2").stdout.split())
    recipe = load_recipe("virchow2")
    assert recipe.title in text and "cls_patch_mean: 2560 dimensions (default)" in text
    assert recipe.weights is not None and recipe.weights.revision in text
    assert "non-commercial" in text and "hf auth login" in text


def test_json(run) -> None:
    listed = json.loads(run("models", "--json").stdout)
    assert [item["name"] for item in listed] == list_models()
    assert json.loads(run("models", "virchow2", "--json").stdout)["variants"]["cls"]["dim"] == 1280
