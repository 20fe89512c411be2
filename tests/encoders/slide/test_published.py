"""Parameters, names and shapes of the published checkpoints; loading them, and refusing others."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from published import PUBLISHED, SLIDE_PRESETS, in_dim, random_state, shapes_of, small
from shallow import shallow
from slide_helpers import a_bag, built, embed, loaded, write_checkpoint

from slide2vec.encoders import build_encoder
from slide2vec.encoders.slide import build_patient_encoder, build_slide_encoder
from slide2vec.errors import ModelLevelError, WeightsError
from slide2vec.recipes import Recipe, load_recipe

#: Of the models as published; those that we leave out are named in `UNUSED`.
PARAMETERS = {
    "titan": 48_539_904,
    "prism": 99_037_440,
    "gigapath-slide": 86_330_880,
    "gigapath-flash-slide": 21_489_408,
    "feather": 788_097,
    "feather-uni": 919_169,
    "feather-uni2": 1_181_313,
    "madeleine": 4_996_740,
    "chief": 1_199_624,
    "moozy-slide": 42_829_056,
    "moozy": 21_270_528,
}
UNUSED = {
    "madeleine": ["token_projector"],
    "chief": ["classifiers", "instance_classifiers", "att_head", "text_to_vision", "organ_embedding"],
    "titan": ["vision_encoder.proj", "vision_encoder.attn_pool."],
    "moozy-slide": [
        "mask_token",
        "blocks.0.pos",
        "blocks.1.pos",
        "blocks.2.pos",
        "blocks.3.pos",
        "blocks.4.pos",
        "blocks.5.pos",
    ],
}
KEYS = {"prism": 87, "gigapath-slide": 247, "moozy-slide": 110, "moozy": 57}


def on_meta(preset: str) -> torch.nn.Module:
    with torch.device("meta"):
        return built(load_recipe(preset), "random")


@pytest.mark.parametrize("preset", PUBLISHED)
def test_names_and_shapes(preset: str) -> None:
    """All of the published ones, except those that are not used."""
    published = shapes_of(load_recipe(preset))
    assert preset not in KEYS or len(published) == KEYS[preset]
    used = {
        name: shape for name, shape in published.items() if not name.startswith(tuple(UNUSED.get(preset, ())))
    }
    assert {name: tuple(value.shape) for name, value in on_meta(preset).state_dict().items()} == used


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameter_count(preset: str) -> None:
    published = shapes_of(load_recipe(preset))
    count = sum(math.prod(shape) for name, shape in published.items() if "slopes" not in name)
    assert count == PARAMETERS[preset]
    unused = [name for name in published if name.startswith(tuple(UNUSED.get(preset, ["-"])))]
    unused_count = sum(math.prod(published[name]) for name in unused if "slopes" not in name)
    ours = sum(parameter.numel() for parameter in on_meta(preset).parameters())
    assert ours == count - unused_count
    assert ours / 1e6 == pytest.approx(load_recipe(preset).params_m, abs=0.005)


def test_dimensions_of_the_outputs() -> None:
    shapes = {"titan": (768,), "prism": (1280,), "gigapath-slide": (768,), "moozy-slide": (768,)}
    for preset, shape in shapes.items():
        recipe = shallow(load_recipe(preset))
        found = embed(built(recipe, "random"), a_bag(recipe, 3))
        assert found.embedding.shape == shape == (recipe.variant(None)[1].dim,)
        assert (found.latents is not None) == recipe.has_latents
        if found.latents is not None:
            assert found.latents.shape == (512, 1280)
    assert built(shallow(load_recipe("moozy")), "random")(torch.randn(2, 768)).shape == (768,)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_random_weights_are_seeded_and_frozen(preset: str) -> None:
    recipe = small(preset)
    state = torch.get_rng_state()
    first, again, other = (built(recipe, "random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    one, two, three = (encoder.state_dict() for encoder in (first, again, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert not first.training and not any(parameter.requires_grad for parameter in first.parameters())


# loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PUBLISHED)
def test_checkpoint_loads(preset: str, tmp_path: Path) -> None:
    """From the file and from its folder, with the values of the file."""
    encoder, state = loaded(small(preset), tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    from_folder = built(small(preset), tmp_path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in from_folder.items())


#: A parameter of each that is used.
ONE = {
    "gigapath-flash-slide": "encoder.layers.1.self_attn.inner_attn_ln.weight",
    "feather": "model.global_attn.attention_c.weight",
    "feather-uni": "model.global_attn.attention_a.0.weight",
    "feather-uni2": "model.patch_embed.0.bias",
    "madeleine": "wsi_embedders.pre_attn.5.weight",
    "chief": "attention_net.3.attention_b.0.weight",
    "titan": "vision_encoder.attn_pool_contrastive.query",
    "prism": "image_resampler.perceiver.layers.1.xattn.xattn.to_kv.weight",
    "gigapath-slide": "encoder.layers.1.self_attn.inner_attn_ln.weight",
    "moozy-slide": "pos_bias.slopes",
    "moozy": "blocks.1.ls_mlp.gamma",
}


@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.parametrize("change", ["missing", "unexpected", "of another shape"])
def test_keys_must_match(preset: str, change: str, tmp_path: Path) -> None:
    state, key = random_state(small(preset)), ONE[preset]
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        key = "surprise.weight"
        state[key] = torch.zeros(2)
    else:
        state[key] = torch.zeros(3, 5)
    with pytest.raises(WeightsError, match=rf"{preset}; {change}: {key}"):
        built(small(preset), write_checkpoint(small(preset), state, tmp_path))


def test_text_encoders_may_be_there(tmp_path: Path) -> None:
    for preset, name in (("titan", "text_encoder.x.weight"), ("prism", "text_decoder.model.x.weight")):
        state = random_state(small(preset)) | {name: torch.zeros(2)}
        built(small(preset), write_checkpoint(small(preset), state, tmp_path))


def other_names(name: str) -> list[str]:
    """Of a parameter of PRISM that is shared between rounds."""
    first, later = "perceiver.layers.0.tf.", "perceiver.layers.1.xattn."
    if first in name:
        return [name.replace(first, f"perceiver.layers.{number}.tf.") for number in range(1, 8)]
    if later in name:
        return [name.replace(later, f"perceiver.layers.{number}.xattn.") for number in range(2, 8)]
    return []


def test_prism_with_all_names_of_what_it_shares(tmp_path: Path) -> None:
    """A PyTorch file names a shared tensor once for every place where it is used."""
    published = list(shapes_of(load_recipe("prism")))
    assert len(published) + sum(len(other_names(name)) for name in published) == 573
    state = random_state(small("prism"))
    shared = {other: value for name, value in state.items() for other in other_names(name)}
    torch.save(state | shared, tmp_path / "pytorch_model.bin")
    encoder = built(small("prism"), tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("preset", "config", "key"),
    [("moozy-slide", "slide_encoder_config", "n_heads"), ("moozy", "case_transformer_config", "num_heads")],
)
class TestPayload:
    """MOOZY's file holds two models and their configurations."""

    def written(self, preset: str, folder: Path, **changes: Any) -> Path:
        return write_checkpoint(small(preset), random_state(small(preset)), folder, **changes)

    def config(self, preset: str, config: str, folder: Path, **changes: Any) -> dict[str, Any]:
        payload = torch.load(self.written(preset, folder), weights_only=True)
        return {**payload[config], **changes}

    @pytest.mark.parametrize("value", [8, None])
    def test_of_another_model(
        self, preset: str, config: str, key: str, value: int | None, tmp_path: Path
    ) -> None:
        """The number of heads is in no shape, so only the configuration can tell."""
        other = self.config(preset, config, tmp_path, **{key: value})
        path = self.written(preset, tmp_path, **{config: other})
        with pytest.raises(WeightsError, match=rf"{preset}: {key} {value} instead of 12"):
            built(small(preset), path)

    def test_with_layers_that_ours_does_not_have(
        self, preset: str, config: str, key: str, tmp_path: Path
    ) -> None:
        other = self.config(preset, config, tmp_path, qk_norm=True)
        with pytest.raises(WeightsError, match="qk_norm True instead of False"):
            built(small(preset), self.written(preset, tmp_path, **{config: other}))

    def test_what_is_left_out_is_off(self, preset: str, config: str, key: str, tmp_path: Path) -> None:
        less = self.config(preset, config, tmp_path)
        del less["qk_norm"]
        built(small(preset), self.written(preset, tmp_path, **{config: less}))

    def test_no_such_part_and_no_configuration(
        self, preset: str, config: str, key: str, tmp_path: Path
    ) -> None:
        with pytest.raises(WeightsError, match=f"no configuration .*{config}"):
            built(small(preset), self.written(preset, tmp_path, **{config: None}))
        torch.save({"model_state_dict": {}}, tmp_path / "moozy.pt")
        with pytest.raises(WeightsError, match=r"it has no .*, only model_state_dict"):
            built(small(preset), tmp_path / "moozy.pt")
        torch.save(torch.zeros(1), tmp_path / "moozy.pt")
        with pytest.raises(WeightsError, match=r"it has no .*, only Tensor"):
            built(small(preset), tmp_path / "moozy.pt")

    def test_no_code_of_the_file_is_run(self, preset: str, config: str, key: str, tmp_path: Path) -> None:
        path = self.written(preset, tmp_path, optimizer=_Malicious(tmp_path / "owned"))
        with pytest.raises(WeightsError, match="cannot be read"):
            built(small(preset), path)
        assert not (tmp_path / "owned").exists()


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_configuration_under_its_other_name(tmp_path: Path) -> None:
    recipe = small("moozy-slide")
    payload = torch.load(write_checkpoint(recipe, random_state(recipe), tmp_path), weights_only=True)
    payload["meta"] = payload.pop("slide_encoder_config")
    torch.save(payload, tmp_path / "moozy.pt")
    built(recipe, tmp_path)


# levels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "presets", "level"),
    [
        (build_slide_encoder, ["moozy", "virchow"], "slide"),
        (build_patient_encoder, ["moozy-slide", "virchow"], "patient"),
        (build_encoder, ["moozy", "titan", "prism2"], "tile"),
    ],
)
def test_presets_of_another_level(build: Any, presets: list[str], level: str) -> None:
    for preset in presets:
        recipe = load_recipe(preset)
        with pytest.raises(ModelLevelError, match=rf"{preset} is {recipe.level}-level"):
            build(recipe, recipe.variant(None)[1], "random")


@pytest.mark.parametrize(
    "preset", [*SLIDE_PRESETS, "care", "prism2", "gigapath-flash-slide", "feather-uni", "feather-uni2"]
)
def test_the_tile_preset_feeds_it(preset: str) -> None:
    """Its output has the dimension that the encoder takes, and its transform is the recipe's, unless its
    authors fed it otherwise."""
    recipe = load_recipe(preset)
    assert recipe.tile_encoder is not None
    tiles = load_recipe(recipe.tile_encoder.preset)
    assert tiles.variants[recipe.tile_encoder.variant].dim == in_dim(recipe)
    assert (tiles.transform == recipe.transform) == (preset != "moozy-slide")
    assert (recipe.default_spacing_um in tiles.spacing_um) == (preset != "madeleine")  # CONCH at 10x


def test_the_slide_preset_feeds_it() -> None:
    recipe: Recipe = load_recipe("moozy")
    assert recipe.slide_encoder is not None
    slides = load_recipe(recipe.slide_encoder)
    assert slides.level == "slide" and slides.variant(None)[1].dim == recipe.encoder.kwargs["d_model"]
    assert (slides.tile_size_px, slides.spacing_um) == (recipe.tile_size_px, recipe.spacing_um)
