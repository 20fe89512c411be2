"""`slide2vec models`."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest

from slide2vec import list_models
from slide2vec.choices import learned_methods
from slide2vec.cli.models import _checked
from slide2vec.recipes import load_recipe


def test_table_names_every_preset_and_fits(run) -> None:
    text = run("models").stdout
    assert all(name in text for name in list_models())
    assert "CC-BY-NC-ND-4.0 gated" in text and "no weights needed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_segmenters_are_listed_with_what_they_find_and_where_their_weights_are(run) -> None:
    text = run("models", "--segmenters").stdout
    assert all(name in text for name in learned_methods()) and "virchow2" not in text
    lines = {
        line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("hest ", "sam2 "))
    }
    assert lines["hest"][1:] == ["tissue", "1", "CC-BY-NC-SA-4.0", "hub"] and lines["sam2"][2] == "8"
    assert "by hand" in text and max(map(len, text.splitlines())) <= 80
    assert (
        "grandqc-artefact-2um" in run("models").stdout
        and "hest " not in run("models", "--level", "tile").stdout
    )


def test_one_segmenter(run) -> None:
    text = " ".join(run("models", "grandqc-artefact").stdout.split())
    assert "finds tissue, fold, spot, pen, bubble, blur" in text and "512 x 512 px at 1.5 µm/px" in text
    assert "https://zenodo.org/records/14041538 by hand: get GrandQC_MPP15.pth there" in text
    row = json.loads(run("models", "sam2", "--json").stdout)
    assert row["spacing_um"] == 8.0 and row["source"] == "https://huggingface.co/AtlasAnalyticsLab/AtlasPatch"


def test_segmenters_of_other_packages_are_listed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("like-auto", "slide2vec.tiling.auto_tissue:AUTO", "slide2vec.segmenters"),
        EntryPoint("nothing", "not_there_at_all:IT", "slide2vec.segmenters"),
    ]
    monkeypatch.setattr("slide2vec.cli.segmenters.providers", lambda group: entries)
    rows = {row["name"]: row for row in json.loads(run("models", "--segmenters", "--json").stdout)}
    assert rows["like-auto"]["classes"] == ["tissue", "pen", "unscanned"]
    assert rows["like-auto"]["spacing_um"] == 8.0 and rows["like-auto"]["problem"] is None
    assert "No module named 'not_there_at_all'" in rows["nothing"]["problem"]
    assert "like-auto" in run("models", "--segmenters").stdout


def test_slide_and_patient_presets_say_what_feeds_them(run) -> None:
    text = " ".join(run("models", "prism").stdout.split())
    assert "fed by virchow, output cls_patch_mean" in text and "latents beside the embedding" in text
    assert "GFLOP" not in text and "99 M parameters" in text and "224 px" in text
    assert "fed by moozy-slide" in " ".join(run("models", "moozy").stdout.split())
    prism2 = " ".join(run("models", "prism2").stdout.split())
    assert "bf16 on a GPU" in prism2 and "fp32 on a CPU" not in prism2
    assert "--trust-remote-code" in prism2 and "diagnostic: 3072 dimensions" in prism2


def test_level(run) -> None:
    assert "virchow2" in run("models", "--level", "tile").stdout
    slide_level = run("models", "--level", "slide")
    assert slide_level.exit_code == 0 and "virchow2" not in slide_level.stdout
    assert "titan" in slide_level.stdout and "moozy " in run("models", "--level", "patient").stdout


def test_details(run) -> None:
    text = " ".join(run("models", "virchow2").stdout.split())
    recipe = load_recipe("virchow2")
    assert recipe.title in text and "cls_patch_mean: 2560 dimensions (default)" in text
    assert recipe.weights is not None and recipe.weights.revision in text
    assert "non-commercial" in text and "hf auth login" in text
    assert "mean 0.485 0.456 0.406" in text and "340.1 GFLOP" in text
    assert "2.5 GB in fp32, 1.3 GB in fp16" in text  # 631 M parameters of 4 and 2 bytes
    assert recipe.verified in text and recipe.unconfirmed in text and recipe.citation in text


def test_what_becomes_of_a_tile(run) -> None:
    """On slides it is only normalised; ready images are resized and cropped as published."""
    lunit = " ".join(run("models", "lunit").stdout.split())
    assert "tiles 224 px at 0.5 µm/px transform mean 0.7032 0.5361 0.661, standard" in lunit
    assert "images resize to 248 px (bicubic), central 224 px" in lunit
    gigapath = " ".join(run("models", "gigapath").stdout.split())
    assert "tiles 224 px at 0.5 µm/px transform mean 0.485" in gigapath
    assert "images resize to 256 px (bicubic), central 224 px" in gigapath


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("scattering", {}, "yes"),
        ("uni", {}, "random"),
        ("uni", {"verified": ""}, "no"),
        ("uni", {"unconfirmed": ""}, "yes"),
    ],
)
def test_how_it_was_checked_in_a_word(name: str, changes: dict[str, str], expected: str) -> None:
    assert _checked(load_recipe(name).model_copy(update=changes)) == expected


def test_any_model_of_timm(run) -> None:
    text = " ".join(run("models", "timm:resnet50").stdout.split())
    assert "2048 dimensions" in text and "any µm/px (say which)" in text and "26 M" not in text
    wrong = run("models", "timm:resnet5O")
    assert wrong.exit_code == 1 and "resnet50" in wrong.stderr


def test_json(run) -> None:
    listed = json.loads(run("models", "--json").stdout)
    assert [item["name"] for item in listed] == list_models()
    virchow2 = json.loads(run("models", "virchow2", "--json").stdout)
    assert virchow2["variants"]["cls"]["dim"] == 1280 and virchow2["checked"] == "random"
