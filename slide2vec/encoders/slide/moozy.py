"""MOOZY: a transformer over the tiles of a slide, and one over the slides of a patient."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slide2vec.encoders.slide.alibi import alibi_attention, alibi_slopes
from slide2vec.encoders.slide.bag import SlideFeatures, TileBag, checked_features
from slide2vec.encoders.slide.blocks import in_chunks, split_heads
from slide2vec.errors import ConfigError, NothingToEmbedError

__all__ = ["MoozyCaseTransformer", "MoozySlideEncoder"]


class MoozySlideEncoder(nn.Module):
    """The slide encoder of MOOZY. Parameters have the names of the published checkpoint, arguments those
    of its configuration.

    Tiles are placed where they are, not moved to a grid: MOOZY's own loader refuses tiles that are more
    than a quarter of a tile off one grid, and ours are laid from each piece of tissue. On one grid both
    are the same. As there, tiles whose embeddings are all zero are background and left out.
    """

    def __init__(
        self,
        feat_dim: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        dim_feedforward: int,
        num_registers: int,
    ) -> None:
        super().__init__()
        self.feat_dim = feat_dim
        self.cls_token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(1, num_registers, d_model) * 0.02)
        self.input_proj = nn.Sequential(nn.Linear(feat_dim, d_model), nn.GELU())
        self.pos_bias = _Slopes(n_heads)
        self.blocks = nn.ModuleList(_Block(d_model, n_heads, dim_feedforward) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, bag: TileBag) -> SlideFeatures:
        """The tiles of a slide -> embedding (d_model,).

        Raises:
            NothingToEmbedError: there are no tiles, or their embeddings are all zero.
            ConfigError: they are not of the tile preset that this encoder takes.
        """
        features = checked_features(bag, self.feat_dim, self.cls_token)
        seen = (features != 0).any(dim=1)
        if not seen.any():
            raise NothingToEmbedError(
                "the embeddings of the slide's tiles are all zero: MOOZY has nothing to embed"
            )
        coords = bag.coords.to(features.device)[seen]
        places = (coords - coords.amin(dim=0)).float()  # exact: below 2^24 px
        slopes = [-slope / bag.tile_size_lv0 for slope in self.pos_bias.slopes[:, 0].tolist()]
        tokens = torch.cat([self.cls_token[0], self.register_tokens[0], self.input_proj(features[seen])])
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens, places, slopes)
        # Only the class token of the last block is the output, so it alone is computed there.
        return SlideFeatures(self.norm(last(tokens, places, slopes, queries=1))[0].float())


class MoozyCaseTransformer(nn.Module):
    """The case transformer of MOOZY: any number of slides of a patient, in any order. Parameters have
    the names of the published checkpoint, arguments those of its configuration."""

    def __init__(
        self, d_model: int, num_layers: int, num_heads: int, dim_feedforward: int, num_registers: int = 0
    ) -> None:
        super().__init__()
        if num_registers:
            raise ConfigError(f"num_registers={num_registers}: the published case transformer has none")
        self.case_token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.blocks = nn.ModuleList(
            _Block(d_model, num_heads, dim_feedforward, scaled=True) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)

    def forward(self, slides: Tensor) -> Tensor:
        """Slide embeddings (S, d_model) float -> patient embedding (d_model,) float32.

        One slide is run, too: it comes out changed.

        Raises:
            NothingToEmbedError: there are no slides.
            ConfigError: the embeddings have another dimension.
        """
        dim = self.case_token.shape[-1]
        if slides.ndim != 2 or slides.shape[1] != dim:
            raise ConfigError(f"slide embeddings {tuple(slides.shape)} of a patient must be (S, {dim})")
        if not len(slides):
            raise NothingToEmbedError("the patient has no slides with an embedding: leave the patient out")
        tokens = torch.cat([self.case_token[0], slides.to(self.case_token)])
        for block in self.blocks:
            tokens = block(tokens)
        return cast("Tensor", self.norm(tokens[0]).float())


class _Slopes(nn.Module):
    """Minus the slopes of ALiBi, (heads, 1), as the checkpoint keeps them."""

    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes", -torch.tensor(alibi_slopes(heads))[:, None])


class _Block(nn.Module):
    """Attention and an MLP, each after a norm; `scaled`: their outputs are scaled per dimension."""

    def __init__(self, dim: int, heads: int, hidden: int, scaled: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.ls_attn: nn.Module = _Scale(dim) if scaled else nn.Identity()
        self.ls_mlp: nn.Module = _Scale(dim) if scaled else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        places: Tensor | None = None,
        slopes: list[float] | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """(N, dim) -> the first `queries` of them (None: all); `places` and `slopes` as for ALiBi."""
        normed = self.norm1(tokens)
        query = split_heads(self.q_proj(normed[:queries]), self.heads)
        key, value = (split_heads(layer(normed), self.heads) for layer in (self.k_proj, self.v_proj))
        if places is None or slopes is None:
            attended = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
        else:
            attended = alibi_attention(query, key, value, places, slopes)
        tokens = tokens[:queries] + self.ls_attn(self.out_proj(attended.transpose(0, 1).flatten(1)))
        return tokens + in_chunks(self._mlp, tokens)

    def _mlp(self, tokens: Tensor) -> Tensor:
        return cast("Tensor", self.ls_mlp(self.fc2(F.gelu(self.fc1(self.norm2(tokens))))))


class _Scale(nn.Module):
    """Without a checkpoint it is one: random weights are to stand for trained ones, and training begins
    with 1e-5, of which a patient's slides would not be seen."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.gamma
