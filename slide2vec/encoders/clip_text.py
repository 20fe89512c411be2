"""The text side of CLIP: a causal transformer over tokens; its state at the end of the text is projected into
the space of images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.encoders.clip_tokens import ClipTokeniser, clip_vocabulary
from slide2vec.encoders.weights import WeightsChoice, find_weights, read_checkpoint, seeded
from slide2vec.errors import ConfigError, UnsupportedError, WeightsError
from slide2vec.recipes import Recipe

__all__ = ["ClipTextEncoder", "embed_texts", "load_text_encoder"]

#: Keys of transformers' CLIPModel -> those of OpenAI's and open_clip's models.
_TRANSFORMERS = (
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.(\d+)\.layer_norm", r"transformer.resblocks.\1.ln_"),
    (r"^text_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^text_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"^text_model\.encoder\.layers\.(\d+)\.self_attn\.", r"transformer.resblocks.\1.attn."),
)


class _Block(nn.Module):
    """Attention to what is before, then an MLP; each of a norm's output, and added."""

    def __init__(self, width: int, heads: int, quick: bool) -> None:
        super().__init__()
        self.heads, self.quick = heads, quick
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {"in_proj": nn.Linear(width, 3 * width), "out_proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, W) -> (N, T, W)."""
        parts = self.attn["in_proj"](self.ln_1(tokens)).chunk(3, dim=-1)
        query, key, value = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        tokens = tokens + self.attn["out_proj"](mixed.transpose(1, 2).flatten(2))
        hidden = self.mlp["c_fc"](self.ln_2(tokens))
        # OpenAI's models were trained with an approximation of GELU.
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        return cast("Tensor", tokens + self.mlp["c_proj"](hidden))


class ClipTextEncoder(nn.Module):
    """Tokens (N, context) int64 -> (N, dim), as image embeddings not of unit length.

    Args:
        vocabulary: tokens that there are, the last of which marks the end of a text.
        quick_gelu: OpenAI's approximation of GELU.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layers: int,
        dim: int,
        context: int = 77,
        vocabulary: int = 49_408,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.context, self.end = context, vocabulary - 1
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width) * 0.01)
        blocks = nn.ModuleList(_Block(width, heads, quick_gelu) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        states = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in cast("nn.ModuleList", self.transformer["resblocks"]):
            states = block(states)
        ends = (tokens == self.end).int().argmax(dim=1)
        at_end = self.ln_final(states[torch.arange(len(tokens), device=tokens.device), ends])
        return cast("Tensor", at_end @ self.text_projection)


def load_text_encoder(recipe: Recipe, variant: str, weights: WeightsChoice, seed: int = 0) -> ClipTextEncoder:
    """The text side of a preset, from the same weights as its image side; in evaluation mode, on the CPU.

    Args:
        variant: output of the image side that texts are to be compared with.

    Raises:
        UnsupportedError: the preset has no text side that slide2vec runs, or its space is another output's.
        WeightsError: the weights cannot be had or have no such text side.
    """
    spec = recipe.text
    if spec is None:
        raise UnsupportedError(f"preset {recipe.name} has no text side that slide2vec runs")
    if variant != spec.variant:
        raise UnsupportedError(
            f"texts of preset {recipe.name} are in the space of its output {spec.variant!r}, not of "
            f"{variant!r}: embed slides with output_variant={spec.variant!r} to compare them"
        )
    options: dict[str, Any] = {**spec.kwargs, "dim": recipe.variants[variant].dim}
    if weights == "random":
        with seeded(seed):
            encoder = ClipTextEncoder(**options)
    else:
        path = find_weights(recipe, weights)
        with torch.device("meta"):
            encoder = ClipTextEncoder(**options)
        state, own = _text_state(read_checkpoint(path)), encoder.state_dict()
        wrong = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
        if wrong:
            raise WeightsError(
                f"weights file {path} has no text side of preset {recipe.name}: {wrong[0]} is missing or of "
                "another shape"
            )
        encoder.load_state_dict({key: state[key].float() for key in own}, assign=True)
    return encoder.eval().requires_grad_(False)


def embed_texts(
    encoder: ClipTextEncoder, texts: Sequence[str], tokenise: ClipTokeniser | None = None
) -> Tensor:
    """(N, D) float32 on the CPU, not of unit length.

    Args:
        tokenise: None = with CLIP's vocabulary.

    Raises:
        ConfigError: `texts` is one text rather than several, or one of them is empty or too long.
        ExtraMissingError: the vocabulary is not there.
    """
    if isinstance(texts, str):
        raise ConfigError(f"texts={texts!r}: give a list of texts, [{texts!r}]")
    tokenise = tokenise or ClipTokeniser(clip_vocabulary())
    if tokenise.end != encoder.end:
        raise ConfigError(
            f"the vocabulary has {tokenise.end + 1} tokens, and the encoder was trained on {encoder.end + 1}"
        )
    device = encoder.text_projection.device
    with torch.inference_mode():
        return cast("Tensor", encoder(tokenise(texts, encoder.context).to(device))).float().cpu()


def _text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of OpenAI, open_clip or transformers -> our keys; others' keys stay as they are."""
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, new in _TRANSFORMERS:
            key = re.sub(pattern, new, key)
        made[key.replace(".attn.in_proj_", ".attn.in_proj.")] = value
    for key in [key for key in made if key.startswith("transformer.") and ".attn.q_proj." in key]:
        parts = [made.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        made[key.replace("q_proj", "in_proj")] = torch.cat(parts)
    if "text_projection.weight" in made:  # a linear layer
        made["text_projection"] = made.pop("text_projection.weight").T.contiguous()
    return made
