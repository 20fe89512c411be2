"""CLIP's text side against transformers' own: tokens, embeddings, checkpoints."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from slide2vec.encoders.text import TextSide, load_text_side, text_spec
from slide2vec.encoders.text.clip import ClipTextEncoder
from slide2vec.encoders.text.clip_tokens import ClipTokeniser, clip_vocabulary
from slide2vec.errors import ConfigError, ExtraMissingError, UnsupportedError, WeightsError
from slide2vec.recipes import Recipe, TextSpec, load_recipe

transformers = pytest.importorskip("transformers")

MERGES = [
    "t u",
    "tu m",
    "tum o",
    "tumo r</w>",
    "c e",
    "ce l",
    "l s</w>",
    "cel ls</w>",
    "n e",
    "a a",
    "aa a</w>",
]
TEXTS = [
    "Tumor cells",
    "necrosis, 3 mm; tumour's edge",
    "aaaa aaa aa aaaaa",
    "  CD3+ T-cells &amp; müller-type   ½²ß 細胞 ",
    "isn't they're 'sharp' !!'s??",
    "“quoted” ‘text’",
]
#: fp32, other order of the same sums.
TOLERANCE = 1e-5
SMALL = {"width": 32, "heads": 4, "layers": 2, "context": 16}


def vocabulary(folder: Path) -> Path:
    """A small one, as a file of CLIP's kind."""
    path = folder / "merges.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: 0.2", *MERGES, "x y"]))
    return path


def theirs_of(merges: list[str]) -> Any:
    """transformers' tokeniser of the same merges, which has a regular expression where ours has a loop."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    singles = list(bytes_to_unicode().values())
    pieces = [*singles, *(f"{each}</w>" for each in singles), *("".join(each.split()) for each in merges)]
    numbers = {each: n for n, each in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=numbers, merges=[tuple(each.split()) for each in merges])


def test_tokens_of_a_small_vocabulary(tmp_path: Path) -> None:
    ours, theirs = ClipTokeniser(vocabulary(tmp_path), len(MERGES)), theirs_of(MERGES)
    for text in TEXTS:
        plain = text.replace("&amp;", "&")
        if "“" not in text:
            assert ours.tokens(text) == theirs(plain)["input_ids"][1:-1], text
    assert ours.tokens("tumor") == [512 + 3]
    assert ours.tokens(TEXTS[-1]) == ours.tokens("\"quoted\" 'text'")
    assert ours(["tumor cells"], 6).tolist() == [[523, 515, 519, 524, 0, 0]]


def test_texts_that_cannot_be_taken(tmp_path: Path) -> None:
    ours = ClipTokeniser(vocabulary(tmp_path), len(MERGES))
    with pytest.raises(ConfigError, match="text '  ' is empty"):
        ours(["tumor", "  "], 8)
    with pytest.raises(ConfigError, match="has 7 tokens; the encoder takes 6"):
        ours(["1234567"], 8)


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="no vocabulary")
def test_tokens_of_clips_vocabulary() -> None:
    path = clip_vocabulary()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    theirs, ours = theirs_of(merges), ClipTokeniser(path)
    for text in (text for text in TEXTS if "“" not in text):
        assert ours.tokens(text) == theirs(text.replace("&amp;", "&"))["input_ids"][1:-1], text
    assert (ours.start, ours.end) == (49406, 49407)


def test_without_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match=r"\[text\]"):
        clip_vocabulary()


def their_model(activation: str) -> Any:
    config = transformers.CLIPTextConfig(
        **{"vocab_size": 525, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 16, "projection_dim": 24},
        **{"hidden_act": activation, "bos_token_id": 523, "eos_token_id": 524, "pad_token_id": 0},
    )
    torch.manual_seed(0)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.3, 0.3)
    return model


def recipe_with(activation: str) -> Recipe:
    """A preset whose text side is a small one."""
    kwargs = {**SMALL, "vocabulary": 525, "quick_gelu": activation == "quick_gelu"}
    recipe = load_recipe("phikon")
    variant = next(iter(recipe.variants.values())).model_copy(update={"dim": 24})
    text = TextSpec(variant="shared", kwargs=kwargs)
    return recipe.model_copy(
        update={"variants": {"shared": variant, "other": variant}, "default_variant": "shared", "text": text}
    )


def as_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under open_clip's keys, beside an image side."""
    made = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "visual.conv1.weight": torch.zeros(3),
        "logit_scale": torch.zeros(()),
    }
    for kind in ("weight", "bias"):
        made[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for layer in range(2):
            theirs, ours = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            parts = [state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            made[f"{ours}.attn.in_proj_{kind}"] = torch.cat(parts)
            made[f"{ours}.attn.out_proj.{kind}"] = state[f"{theirs}.self_attn.out_proj.{kind}"]
            for number in "12":
                made[f"{ours}.ln_{number}.{kind}"] = state[f"{theirs}.layer_norm{number}.{kind}"]
            made[f"{ours}.mlp.c_fc.{kind}"] = state[f"{theirs}.mlp.fc1.{kind}"]
            made[f"{ours}.mlp.c_proj.{kind}"] = state[f"{theirs}.mlp.fc2.{kind}"]
    return made


@pytest.fixture
def small_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClipTokeniser:
    """Stands in for the one of open-clip-torch."""
    path = vocabulary(tmp_path)
    monkeypatch.setattr("slide2vec.encoders.text.tokenisers.clip_vocabulary", lambda: path)
    monkeypatch.setattr("slide2vec.encoders.text.clip_tokens.MERGES", len(MERGES))
    monkeypatch.setattr(ClipTokeniser.__init__, "__defaults__", (len(MERGES),))
    return ClipTokeniser(path, len(MERGES))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layout", ["transformers", "open_clip"])
def test_embeddings_are_those_of_transformers(
    tmp_path: Path, small_vocabulary: ClipTokeniser, activation: str, layout: str
) -> None:
    model = their_model(activation)
    state = model.state_dict()
    if layout == "open_clip":
        state = as_open_clip(state)
    torch.save({"vision_model.x": torch.zeros(1), **state}, tmp_path / "w.pt")
    ours = load_text_side(recipe_with(activation), "shared", tmp_path / "w.pt")
    texts = ["tumor cells", "a", "nerve 12"]
    with torch.inference_mode():
        expected = model(input_ids=small_vocabulary(texts, 16)).text_embeds
    found = ours.embed(texts)
    assert found.shape == (3, 24) and expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (found[0] - found[1]).abs().max() > 0.1
    torch.testing.assert_close(ours.embed(texts[1:2]), found[1:2])


def test_what_is_no_text_side_is_said(tmp_path: Path, small_vocabulary: ClipTokeniser) -> None:
    recipe = recipe_with("gelu")
    with pytest.raises(
        UnsupportedError, match=r"preset uni has no text side .* \(those that have: conch, .*titan"
    ):
        text_spec(load_recipe("uni"))
    with pytest.raises(
        UnsupportedError, match=r"conchv15 .*texts of titan.* compared with embeddings of slides"
    ):
        text_spec(load_recipe("conchv15"))
    with pytest.raises(NotImplementedError, match="in the space of its output 'shared', not of 'other'"):
        load_text_side(recipe, "other", "random")
    torch.save({"visual.x": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"no text side of preset phikon; missing: "):
        load_text_side(recipe, "shared", tmp_path / "w.pt")
    torch.save({**their_model("gelu").state_dict(), "transformer.new": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"no text side of preset phikon; unexpected: transformer.new"):
        load_text_side(recipe, "shared", tmp_path / "w.pt")
    side = load_text_side(recipe, "shared", "random")
    with pytest.raises(ConfigError, match=r"give a list of texts, \['tumor'\]"):
        side.embed("tumor")


@pytest.mark.parametrize(("rows", "trained"), [(524, 524), (541, 541)])
def test_a_vocabulary_of_another_model_is_refused(
    small_vocabulary: ClipTokeniser, rows: int, trained: int
) -> None:
    recipe = recipe_with("gelu")
    assert recipe.text is not None
    text = recipe.text.model_copy(update={"kwargs": {**recipe.text.kwargs, "vocabulary": rows}})
    wrong = f"the vocabulary has 525 tokens, and the encoder was trained on {trained}"
    with pytest.raises(ConfigError, match=wrong):
        load_text_side(recipe.model_copy(update={"text": text}), "shared", "random")


def test_random_weights_are_seeded(small_vocabulary: ClipTokeniser) -> None:
    def projection(seed: int) -> torch.Tensor:
        side = load_text_side(recipe_with("gelu"), "shared", "random", seed)
        assert isinstance(side, TextSide) and isinstance(side.encoder, ClipTextEncoder)
        assert not side.encoder.training
        return side.encoder.text_projection

    assert torch.equal(projection(1), projection(1)) and not torch.equal(projection(1), projection(2))
