"""The text sides of CONCH, TITAN, KEEP and MUSK with small vocabularies, against open_clip, torchscale, or
written out from the description, in the published keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slide2vec.choices import TEXT_ENCODERS
from slide2vec.encoders.text import TextSide, load_text_side
from slide2vec.encoders.text.tokenisers import load_tokeniser
from slide2vec.errors import ConfigError, ExtraMissingError, WeightsError
from slide2vec.recipes import Recipe, load_recipe

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

DEPTH, WIDTH, HEADS, HIDDEN = 2, 48, 4, 96
#: fp32, other order of the same sums.
TOLERANCE = 1e-5
TEXTS = ["lung tumor", "Tumor cells in lung", "lung"]
State = dict[str, Tensor]


def byte_level(folder: Path) -> Path:
    """Of CONCH's kind: byte pairs of lower case without accents, a space before each word, marks around."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    merges = [("t", "u"), ("tu", "m"), ("Ġ", "l"), ("l", "l"), ("Ġl", "u")]
    pieces = [
        "<pad>",
        "<start_of_text>",
        "<end_of_text>",
        *sorted(letters),
        *("".join(each) for each in merges),
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    n = tokenizers.normalizers
    made.normalizer = n.Sequence([n.NFD(), n.StripAccents(), n.Lowercase()])
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>",
        special_tokens=[("<start_of_text>", 1), ("<end_of_text>", 2)],
    )
    made.add_special_tokens(pieces[:3])
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def word_pieces(folder: Path) -> Path:
    """Of BERT's kind."""
    path = folder / "vocab.txt"
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "lung",
        "tum",
        "##or",
        "cell",
        "##s",
        "in",
        ",",
        "a",
    ]
    path.write_text("\n".join(pieces) + "\n")
    return path


@pytest.fixture(scope="module")
def trained_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of XLM-RoBERTa's kind, from a few words."""
    folder = tmp_path_factory.mktemp("spm")
    words = "lung tumor cells in the lung of a patient, tumour cell nests and normal tissue. " * 30
    (folder / "words.txt").write_text("\n".join(words.split(".")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"), model_prefix=str(folder / "t"), vocab_size=28, minloglevel=2
    )
    return (folder / "t.model").rename(folder / "tokenizer.spm")


# Tokens ------------------------------------------------------------------------------------------


def test_byte_level_tokens(tmp_path: Path) -> None:
    tokenise = load_tokeniser(byte_level(tmp_path))
    vocab = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    assert tokenise.size == len(vocab) == 3 + 256 + 5
    wanted = [1, *(vocab[piece] for piece in ("Ġlu", "n", "g", "Ġ", "tum", "o", "r")), 2, 0]
    assert tokenise(["Lung TUMÖR"], 10).tolist() == [wanted]


def test_word_pieces(tmp_path: Path) -> None:
    tokenise = load_tokeniser(word_pieces(tmp_path))
    assert tokenise.size == 13
    assert tokenise(["lung tumor, in cells"], 10).tolist() == [[2, 5, 6, 7, 11, 10, 8, 9, 3, 0]]
    assert tokenise(["LÜNG xyz"], 6).tolist() == [[2, 5, 1, 3, 0, 0]]


def test_sentence_pieces_are_counted_as_xlm_roberta_does(trained_pieces: Path) -> None:
    """Against the tokeniser of transformers over the same pieces."""
    transformers = pytest.importorskip("transformers")
    own = sentencepiece.SentencePieceProcessor(model_file=str(trained_pieces))
    pieces = [(own.id_to_piece(number), own.get_score(number)) for number in range(3, own.vocab_size())]
    marks = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    theirs = transformers.XLMRobertaTokenizer(vocab=[*marks, *pieces, ("<mask>", 0.0)])
    tokenise = load_tokeniser(trained_pieces)
    assert tokenise.size == own.vocab_size() + 1
    for text in (*TEXTS, "tissue & cells"):
        row = tokenise([text], 40)[0].tolist()
        wanted = theirs(text)["input_ids"]
        assert row == wanted + [1] * (40 - len(wanted)), text
    assert 3 in row  # "&" is in no piece


def test_texts_that_cannot_be_taken(tmp_path: Path, trained_pieces: Path) -> None:
    for path in (byte_level(tmp_path), word_pieces(tmp_path), trained_pieces):
        tokenise = load_tokeniser(path)
        with pytest.raises(ConfigError, match="text '' is empty"):
            tokenise(["lung", ""], 20)
        with pytest.raises(ConfigError, match=r"text 'lung.* tokens; the encoder takes 2"):
            tokenise(["lung lung tumor cells"], 4)


def test_files_that_are_no_tokenisers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.json", "a.spm"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(WeightsError, match=rf"tokeniser .*{name} cannot be read"):
            load_tokeniser(tmp_path / name)
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "bare.json"))
    with pytest.raises(WeightsError, match=r"bare.json has no padding .*, or sets no marks around a text"):
        load_tokeniser(tmp_path / "bare.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("a.json", "a.spm"):
        with pytest.raises(ExtraMissingError, match=r"\[text\]"):
            load_tokeniser(tmp_path / name)


# Embeddings --------------------------------------------------------------------------------------


def small(name: str, dim: int, **kwargs: Any) -> Recipe:
    """The preset with a narrow text side of two layers."""
    recipe = load_recipe(name)
    assert recipe.text is not None
    variants = dict(recipe.variants)
    variants[recipe.text.variant] = variants[recipe.text.variant].model_copy(update={"dim": dim})
    text = recipe.text.model_copy(update={"kwargs": {**recipe.text.kwargs, **kwargs}})
    return recipe.model_copy(update={"text": text, "variants": variants})


def drawn(shapes: dict[str, torch.Size]) -> State:
    """Every parameter random, norms too: nothing may hide behind a one or a zero."""
    generator = torch.Generator().manual_seed(5)
    return {
        key: torch.randn(shape, generator=generator) * 0.2 + float("ln" in key and key.endswith("weight"))
        for key, shape in shapes.items()
    }


def compared(
    recipe: Recipe, state: State, folder: Path, expected: Callable[[Tensor], Tensor], pad: int
) -> None:
    """Embeddings of texts from a checkpoint of the whole model and a tokeniser beside it."""
    beside = {
        "logit_scale": torch.ones(()),
        "visual.trunk.x": torch.zeros(2),
        "vision_encoder.x": torch.zeros(1),
    }
    torch.save({**beside, **state}, folder / "w.pt")

    def loaded(name: str) -> TextSide:
        path = folder / name
        assert recipe.text is not None
        return load_text_side(
            recipe, recipe.text.variant, {recipe.name: path} if recipe.level == "slide" else path
        )

    side = loaded("w.pt")
    found = side.embed(TEXTS)
    tokens = side.tokenise(TEXTS, side.encoder.context)  # type: ignore[arg-type]
    assert (tokens == pad).any() and (tokens[1] != pad).sum() > (tokens[2] != pad).sum()
    with torch.inference_mode():
        wanted = F.normalize(expected(tokens), dim=-1)
    assert found.shape == wanted.shape and (wanted[0] - wanted[2]).abs().max() > 0.02
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(side.embed(TEXTS[1:2]), found[1:2], atol=TOLERANCE, rtol=0)
    key = next(
        key for key in state if ("ayer" in key and ".B." in key) or "LayerNorm" in key or "ln_final" in key
    )
    torch.save({**beside, **{k: v for k, v in state.items() if k != key}}, folder / "less.pt")
    with pytest.raises(WeightsError, match=rf"no text side of preset {recipe.name}; missing: "):
        loaded("less.pt")
    torch.save({**beside, **state, f"{key}.new": state[key]}, folder / "more.pt")
    with pytest.raises(WeightsError, match=rf"no text side of preset {recipe.name}; unexpected: .*new"):
        loaded("more.pt")


@pytest.mark.parametrize(("name", "prefix"), [("conch", "text."), ("titan", "text_encoder.")])
def test_coca_equals_open_clip(tmp_path: Path, name: str, prefix: str) -> None:
    transformer = pytest.importorskip("open_clip.transformer")
    theirs = transformer.TextTransformer(
        **{"context_length": 31, "vocab_size": 264, "width": WIDTH, "heads": HEADS, "layers": DEPTH},
        **{"output_dim": 24, "embed_cls": True, "pad_id": 0},
    ).eval()
    state = drawn({key: value.shape for key, value in theirs.state_dict().items()})
    theirs.load_state_dict(state)
    byte_level(tmp_path)
    recipe = small(name, 24, width=WIDTH, heads=HEADS, layers=DEPTH, context=31, vocabulary=264)
    compared(recipe, {f"{prefix}{key}": value for key, value in state.items()}, tmp_path, theirs, 0)


def test_the_gathering_token_sees_one_token_of_padding_and_not_itself() -> None:
    """As the published code has it, whose mask is shifted by one; seen from what changes the result."""
    torch.manual_seed(0)
    build = TEXT_ENCODERS["coca"].imported()
    encoder = build(width=WIDTH, heads=HEADS, layers=1, dim=8, context=9, vocabulary=20).eval()
    encoder.cls_emb.data.normal_()
    tokens = torch.tensor([[1, 5, 6, 2, 0, 0, 0, 0, 0]])
    first = encoder(tokens)
    positions = encoder.positional_embedding.data
    for place, matters in ((3, True), (4, True), (5, False), (8, False), (9, True)):
        kept = positions[place].clone()
        positions[place] += 1
        assert torch.equal(encoder(tokens), first) is not matters, place
        positions[place] = kept


def bert(state: State) -> Callable[[Tensor], Tensor]:
    """BERT from its description: a norm after each half of a layer; the first token, a layer and tanh."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"text.{name}.weight"], state[f"text.{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = (state[f"text.{name}.LayerNorm.{kind}"] for kind in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)

    def embedding(tokens: Tensor) -> Tensor:
        table = {
            kind: state[f"text.embeddings.{kind}_embeddings.weight"]
            for kind in ("word", "position", "token_type")
        }
        x = table["word"][tokens] + table["position"][: tokens.shape[1]] + table["token_type"][0]
        x = norm(x, "embeddings")
        for layer in range(DEPTH):
            stem = f"encoder.layer.{layer}"
            parts = (linear(x, f"{stem}.attention.self.{part}") for part in ("query", "key", "value"))
            q, k, v = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in parts)
            scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
            scores = scores.masked_fill((tokens == 0)[:, None, None], -torch.inf)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = norm(x + linear(mixed, f"{stem}.attention.output.dense"), f"{stem}.attention.output")
            hidden = F.gelu(linear(x, f"{stem}.intermediate.dense"))
            x = norm(x + linear(hidden, f"{stem}.output.dense"), f"{stem}.output")
        return linear(x[:, 0], "pooler.dense").tanh()

    return embedding


def test_keep_equals_bert_written_out(tmp_path: Path) -> None:
    word_pieces(tmp_path)
    sizes = {"vocab_size": 13, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    recipe = small("keep", WIDTH, **sizes, intermediate_size=HIDDEN, max_position_embeddings=40, context=32)
    names = ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"]
    shapes = dict(zip(names, ((13, WIDTH), (40, WIDTH)), strict=True))
    shapes["embeddings.token_type_embeddings.weight"] = (2, WIDTH)

    def add(name: str, out: int, into: int | None = None) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out,) if into is None else (out, into), (out,)

    add("embeddings.LayerNorm", WIDTH)
    add("pooler.dense", WIDTH, WIDTH)
    for layer in range(DEPTH):
        stem = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            add(f"{stem}.attention.{part}", WIDTH, WIDTH)
        add(f"{stem}.attention.output.LayerNorm", WIDTH)
        add(f"{stem}.intermediate.dense", HIDDEN, WIDTH)
        add(f"{stem}.output.dense", WIDTH, HIDDEN)
        add(f"{stem}.output.LayerNorm", WIDTH)
    state = drawn({f"text.{key}": torch.Size(shape) for key, shape in shapes.items()})
    state = {key: value + ("LayerNorm.weight" in key) for key, value in state.items()}
    compared(recipe, state, tmp_path, bert(state), 0)


def beit3_shapes(vocabulary: int) -> dict[str, torch.Size]:
    """Of MUSK's keys of both experts' blocks as torchscale has them."""
    shapes: dict[str, tuple[int, ...]] = {
        "beit3.text_embed.weight": (vocabulary, WIDTH),
        "beit3.encoder.embed_positions.B.weight": (1024, WIDTH),
        "language_head.weight": (24, WIDTH),
    }

    def add(name: str, out: int, into: int | None = None) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out,) if into is None else (out, into), (out,)

    for expert in "AB":
        add(f"beit3.encoder.layer_norm.{expert}", WIDTH)
        for layer in range(DEPTH):
            stem = f"beit3.encoder.layers.{layer}"
            for name in ("self_attn_layer_norm", "final_layer_norm", "self_attn.inner_attn_ln"):
                add(f"{stem}.{name}.{expert}", WIDTH)
            for part in ("q", "k", "v", "out"):
                add(f"{stem}.self_attn.{part}_proj.{expert}", WIDTH, WIDTH)
            add(f"{stem}.ffn.{expert}.fc1", HIDDEN, WIDTH)
            add(f"{stem}.ffn.{expert}.fc2", WIDTH, HIDDEN)
            add(f"{stem}.ffn.{expert}.ffn_layernorm", HIDDEN)
    return {key: torch.Size(shape) for key, shape in shapes.items()}


def beit3_written_out(state: State) -> Callable[[Tensor], Tensor]:
    """The text expert from its description; padding is taken off, not masked."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def one(tokens: Tensor) -> Tensor:
        tokens = tokens[tokens != 1]
        x = state["beit3.text_embed.weight"][tokens]
        x = x + state["beit3.encoder.embed_positions.B.weight"][2 : 2 + len(tokens)]
        for layer in range(DEPTH):
            stem = f"beit3.encoder.layers.{layer}"
            y = norm(x, f"{stem}.self_attn_layer_norm.B")
            parts = (linear(y, f"{stem}.self_attn.{part}_proj.B") for part in "qkv")
            q, k, v = (each.unflatten(1, (HEADS, -1)).transpose(0, 1) for each in parts)
            mixed = (q @ k.transpose(1, 2) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
            y = norm(mixed.transpose(0, 1).flatten(1), f"{stem}.self_attn.inner_attn_ln.B")
            x = x + linear(y, f"{stem}.self_attn.out_proj.B")
            y = F.gelu(linear(norm(x, f"{stem}.final_layer_norm.B"), f"{stem}.ffn.B.fc1"))
            x = x + linear(norm(y, f"{stem}.ffn.B.ffn_layernorm"), f"{stem}.ffn.B.fc2")
        return norm(x[0], "beit3.encoder.layer_norm.B") @ state["language_head.weight"].T

    return lambda rows: torch.stack([one(row) for row in rows])


def torchscale(state: State) -> Callable[[Tensor], Tensor]:
    """The original library's class."""
    config = pytest.importorskip("torchscale.architecture.config")
    beit3 = pytest.importorskip("torchscale.model.BEiT3")
    model = beit3.BEiT3(
        config.EncoderConfig(
            **{"img_size": 32, "patch_size": 16, "vocab_size": len(state["beit3.text_embed.weight"])},
            **{"multiway": True, "layernorm_embedding": False, "normalize_output": True},
            **{"no_output_layer": True, "drop_path_rate": 0, "encoder_embed_dim": WIDTH},
            **{"encoder_attention_heads": HEADS, "encoder_ffn_embed_dim": HIDDEN, "encoder_layers": DEPTH},
        )
    ).eval()
    own = {key.removeprefix("beit3."): value for key, value in state.items() if key.startswith("beit3.")}
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected and all("vision" in key or key.endswith("positions.A.weight") for key in missing)

    def embedding(rows: Tensor) -> Tensor:
        out = model(textual_tokens=rows, text_padding_position=(rows == 1).int())["encoder_out"]
        return out[:, 0] @ state["language_head.weight"].T  # type: ignore[no-any-return]

    return embedding


@pytest.mark.parametrize("reference", [beit3_written_out, torchscale])
def test_musk_equals(tmp_path: Path, trained_pieces: Path, reference: Any) -> None:
    (tmp_path / "tokenizer.spm").write_bytes(trained_pieces.read_bytes())
    vocabulary = load_tokeniser(trained_pieces).size + 9
    sizes = {"width": WIDTH, "heads": HEADS, "layers": DEPTH, "hidden": HIDDEN, "vocabulary": vocabulary}
    state = drawn(beit3_shapes(vocabulary))
    state = {k: v + (("norm" in k or "_ln." in k) and k.endswith("weight")) for k, v in state.items()}
    compared(small("musk", 24, **sizes), state, tmp_path, reference(state), 1)


# Presets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own", "others", "published"),
    [
        # The image side with its projection, the captions' pooling, decoder and temperature.
        ("conch", 110_129_664, 87_574_272 + 262_144 + 2_563_584 + 194_719_494 + 1, 395.2),
        # The image side, both projections, a token for masking and the temperature.
        ("musk", 370_200_576, 303_936_512 + 1_048_576 + 1024 + 1, 675.19),
        # The vision side with the pooling for captions, which is not used.
        ("titan", 110_326_272, 48_539_904, 158.9),
        ("keep", 109_482_240, 0, 109.48),  # BERT-base
    ],
)
def test_published_parameter_count(name: str, own: int, others: int, published: float) -> None:
    recipe = load_recipe(name)
    assert recipe.text is not None
    with torch.device("meta"):
        build = TEXT_ENCODERS[recipe.text.family].imported()
        encoder = build(**recipe.text.kwargs, dim=recipe.variants[recipe.text.variant].dim)
    assert sum(each.numel() for each in encoder.parameters()) == own
    assert (own + others) / 1e6 == pytest.approx(published, abs=0.06)


def test_a_tokeniser_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small("conch", 24, width=WIDTH, heads=HEADS, layers=1, context=31, vocabulary=264)
    assert recipe.text is not None
    build = TEXT_ENCODERS["coca"].imported()
    encoder = build(width=WIDTH, heads=HEADS, layers=1, dim=24, context=31, vocabulary=264)
    state = {f"text.{key}".replace("in_proj.", "in_proj_"): v for key, v in encoder.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        WeightsError, match=r"needs conch_byte.*json or tokenizer.json.*get it from .*github.com"
    ):
        load_text_side(recipe, "aligned", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"its tokeniser, beside its weights: .* It is at .*github.com"):
        load_text_side(recipe, "aligned", "random")
    byte_level(tmp_path)
    assert load_text_side(recipe, "aligned", tmp_path).embed(["lung"]).shape == (1, 24)
