"""Every recipe parses; what a recipe says of an encoder is true of the encoder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from slide2vec.encoders import build_encoder
from slide2vec.errors import PresetError
from slide2vec.recipes import list_models, load_recipe, read_recipe


def test_presets_of_this_release() -> None:
    expected = {"scattering", "lunit", "prost40m", "dinov2-vitb14", "uni", "uni2", "virchow", "virchow2"}
    expected |= {"gigapath", "h-optimus-0", "h-optimus-1", "h0-mini", "mstar", "gpfm", "conch", "conchv15"}
    expected |= {
        "phikon",
        "phikonv2",
        "phaet",
        "mascaret",
        "hibou-b",
        "hibou-l",
        "midnight",
        "isight",
        "musk",
    }
    expected |= {"genbio-pathfm", "rudolfv2", "rudolfv2-b", "rudolfv2-s"}
    expected |= {"mettle", "dinov3-vitb16", "gigapath-flash", "openmidnight", "openpath", "keep", "plip"}
    expected |= {"kaiko-s8", "kaiko-s16", "kaiko-b8", "kaiko-b16", "kaiko-l14", "ctranspath"}
    expected |= {"chief-ctranspath", "quiltnet-b32", "quiltnet-b16", "quiltnet-b16-pmb", "biomedclip"}
    expected |= {"pathorchestra", "lunit-s16", "lunit-bt", "lunit-moco", "lunit-swav", "crown", "crisp"}
    assert expected == set(list_models("tile"))
    assert list_models() == sorted(list_models())


def test_presets_above_the_tile_level() -> None:
    expected = ["care", "chief", "feather", "feather-uni", "feather-uni2", "gigapath-flash-slide"]
    expected += ["gigapath-slide", "madeleine", "moozy-slide", "prism", "prism2", "titan"]
    assert list_models("slide") == expected
    assert list_models("patient") == ["moozy"]
    titan, moozy = load_recipe("titan"), load_recipe("moozy")
    assert titan.tile_encoder is not None
    assert (titan.tile_encoder.preset, titan.tile_encoder.variant) == ("conchv15", "default")
    assert moozy.slide_encoder == "moozy-slide" and moozy.transform == load_recipe("moozy-slide").transform
    assert titan.tile_size_px == 512 and titan.transform.resize == 448  # as it was trained
    assert [name for name in list_models() if load_recipe(name).has_latents] == ["prism"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("titan", ('preset = "conchv15"', 'preset = "conchv16"'), "conchv16"),
        ("titan", ('preset = "conchv15"', ""), "needs tile_encoder"),
        ("titan", ('variant = "default"', 'variant = "other"'), "no output variant 'other'"),
        ("titan", ('level = "slide"', 'level = "patient"'), "needs slide_encoder"),
        ("titan", ('preset = "conchv15"', 'preset = "prism"'), "prism, which is a slide preset"),
        ("titan", ("[encoder]", "[transform]\nresize = 448\n\n[encoder]"), "transform is that of conchv15"),
        ("moozy", ('slide_encoder = "moozy-slide"\n', ""), "needs slide_encoder"),
        ("moozy", ('"moozy-slide"', '"lunit"'), "lunit, which is a tile preset"),
        (
            "lunit",
            ("schema_version = 1", 'schema_version = 1\nslide_encoder = "moozy-slide"'),
            "for patient presets",
        ),
        ("lunit", ("schema_version = 1", "schema_version = 1\nhas_latents = true"), "for slide presets"),
        ("lunit", ("gflops", "#gflops"), "needs gflops"),
    ],
)
def test_what_feeds_a_preset_must_be_there(
    name: str, change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    for source in (Path(__file__).parents[2] / "engines").glob("*.toml"):
        (tmp_path / source.name).write_text(source.read_text())
    path = tmp_path / f"{name}.toml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(PresetError, match=message):
        read_recipe(path)


def test_traps_of_single_presets() -> None:
    """What the names and the hub's configurations say wrongly."""
    gigapath, gpfm, mstar = (load_recipe(name) for name in ("gigapath", "gpfm", "mstar"))
    assert gigapath.encoder.kwargs["patch_size"] == 16
    assert (gigapath.tile_size_px, gigapath.transform.resize, gigapath.transform.crop) == (224, 224, 224)
    assert (gpfm.transform.resize, gpfm.transform.crop) == (224, 224)
    assert mstar.transform.mean == (0.485, 0.456, 0.406)
    assert load_recipe("uni2").encoder.prefix_tokens == 9
    assert load_recipe("h0-mini").default_variant == "cls_patch_mean"


def test_virchow2_without_spacing_means_half_a_micron() -> None:
    recipe = load_recipe("virchow2")
    assert recipe.spacing_um == (0.25, 0.5, 1.0, 2.0)
    assert recipe.default_spacing_um == 0.5


@pytest.mark.parametrize(
    ("spacing", "tile", "problem"),
    [
        *((0.5, 224, None), (0.525, 224, None), (0.475, 224, None), (2.1, 224, None)),
        (0.535, 224, "0.535 µm/px (it was trained at 0.25, 0.5, 1, 2)"),
        (0.465, 224, "0.465 µm/px (it was trained at 0.25, 0.5, 1, 2)"),
        (2.15, 224, "2.15 µm/px (it was trained at 0.25, 0.5, 1, 2)"),
        (0.5, 225, "tiles of 225 px (it was trained on 224)"),
        (
            0.6,
            225,
            "0.6 µm/px (it was trained at 0.25, 0.5, 1, 2) or tiles of 225 px (it was trained on 224)",
        ),
    ],
)
def test_what_a_preset_is_for(spacing: float, tile: int, problem: str | None) -> None:
    """Five per cent off one of its spacings, seven no more."""
    told = None if problem is None else f"preset virchow2 is not for {problem}"
    assert load_recipe("virchow2").not_recommended(spacing, tile) == told


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        *(("prov-gigapath", "gigapath"), ("uni_v1", "uni"), ("uni_v2", "uni2"), ("conch_v15", "conchv15")),
        *(("conch_v1", "conch"), ("hoptimus0", "h-optimus-0"), ("hoptimus1", "h-optimus-1")),
        *(("phikon_v2", "phikonv2"), ("hibou_l", "hibou-l"), ("kaiko-vitb8", "kaiko-b8")),
        *(("lunit-vits8", "lunit"), ("midnight12k", "midnight"), ("feather_uni_v2", "feather-uni2")),
        *(("lunit-dino-s16", "lunit-s16"), ("open-midnight", "openmidnight"), ("quiltnet", "quiltnet-b32")),
        *(("gigapath-flash-slide-encoder", "gigapath-flash-slide"), ("virchow2", "virchow2")),
    ],
)
def test_names_of_other_tools(alias: str, name: str) -> None:
    """Of TRIDENT, LazySlide and raw2features."""
    assert load_recipe(alias) == load_recipe(name)
    assert load_recipe(alias).name == name


def test_an_alias_means_one_preset() -> None:
    names = list_models()
    aliases = [alias for name in names for alias in load_recipe(name).aliases]
    assert len({*names, *aliases}) == len(names) + len(aliases)


def test_the_page_of_encoders_has_all_of_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert list(rows) == list_models()
    for name, row in rows.items():
        recipe = load_recipe(name)
        assert f"[{recipe.licence.name}]({recipe.licence.url})" in row
        assert all(f"`{alias}`" in row for alias in recipe.aliases)
        assert (recipe.unconfirmed or "–") in row
        if recipe.weights is not None:
            assert ("SHA-256" in row, "main" in row.split("|")[3]) == (
                bool(recipe.weights.sha256),
                recipe.weights.revision == "main",
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gated = false", 'gated = false\nurl = "https://example.org"'), "not both"),
        (("gated = false", 'gated = false\nsha256 = { "x.bin" = "%s" }' % ("0" * 64)), "not one of files"),
        (("gated = false", 'gated = false\nsha256 = { "model.safetensors" = "abc" }'), "sha256"),
    ],
)
def test_where_weights_are_must_be_clear(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (Path(__file__).parents[2] / "engines" / "prost40m.toml").read_text()
    assert change[0] in text
    (tmp_path / "prost40m.toml").write_text(text.replace(*change))
    with pytest.raises(PresetError, match=message):
        read_recipe(tmp_path / "prost40m.toml")


@pytest.mark.parametrize("name", ["virchw2", "../secrets", "Virchow2"])
def test_unknown_preset_names_the_nearest(name: str) -> None:
    with pytest.raises(PresetError, match="virchow2" if "irch" in name else "no preset"):
        load_recipe(name)


def test_unknown_variant_and_level() -> None:
    with pytest.raises(PresetError, match="cls_patch_mean"):
        load_recipe("virchow2").variant("cls_patch")
    with pytest.raises(PresetError, match="slide"):
        list_models("slides")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("schema_version = 1", "schema_version = 2"), "schema_version 2"),
        (('default_variant = "default"', 'default_variant = "other"'), "default_variant 'other'"),
        (("crop = 224", "crop = 300"), "larger"),
        (("gflops", "gigaflops"), "gigaflops"),
        (("[licence]", "[licence"), "recipe .*broken.toml"),
    ],
)
def test_broken_recipe_names_file_and_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    source = Path(__file__).parents[2] / "engines" / "prost40m.toml"
    path = tmp_path / "broken.toml"
    path.write_text(source.read_text().replace(*change))
    with pytest.raises(PresetError, match=message):
        read_recipe(path)


def test_scattering_gives_the_dimension_that_its_recipe_says() -> None:
    recipe = load_recipe("scattering")
    encoder = build_encoder(recipe, recipe.variant(None)[1])
    assert encoder(torch.rand(1, 3, 224, 224)).shape == (1, recipe.variant(None)[1].dim)


def test_what_cannot_be_compiled_says_why(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "engines" / "lunit.toml").read_text()
    path = tmp_path / "lunit.toml"
    path.write_text(f"compile = false\n{text}")
    with pytest.raises(PresetError, match="compile_note"):
        read_recipe(path)
    path.write_text(f'compile = false\ncompile_note = "because"\n{text}')
    assert not read_recipe(path).compile


#: The ResNets, since TensorRT-RTX parses no convolutions in bf16.
IN_FP16 = {"isight", "lunit-bt", "lunit-moco", "lunit-swav"}


def test_encoders_run_in_bf16_on_a_gpu_and_say_what_that_rests_on() -> None:
    """But for one that is known to be less exact in it, and those whose code nobody has here."""
    transformers = [
        recipe
        for recipe in map(load_recipe, list_models("tile"))
        if recipe.compile and recipe.encoder.family != "scattering"
    ]
    assert len(transformers) == 50
    for recipe in transformers:
        assert recipe.precision == ("fp16" if recipe.name in IN_FP16 else "bf16"), recipe.name
        found = re.fullmatch(
            r"with random weights bf16 has a least cosine of (0\.9\d+) to fp32 .*", recipe.precision_note
        )
        assert found is not None, recipe.precision_note
        assert float(found[1]) >= recipe.engine.threshold("bf16")
