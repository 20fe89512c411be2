"""Grids of patch tokens: what an encoder makes of each patch of a picture, before anything is pooled."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast

from torch import Tensor, nn

from slide2vec.encoders.base_classes import TileEncoder, TimmTileEncoder
from slide2vec.encoders.channelwise import ChannelwiseEncoder
from slide2vec.encoders.input_size import for_input
from slide2vec.errors import ConfigError, UnsupportedError
from slide2vec.recipes import Recipe

__all__ = [
    "PatchTokenEncoder",
    "TokenKind",
    "encode_tiles_dense",
    "encode_tiles_dense_prenorm",
    "patch_size",
    "ready_for",
]

#: After the closing norm, or before it.
TokenKind: TypeAlias = Literal["patch_features", "patch_features_prenorm"]


class PatchTokenEncoder(nn.Module):
    """The patch tokens of an encoder as one row of features: what runs features runs it, engines too.

    `forward` takes normalised pixels (B, 3, S, S) float and returns (B, d · h · w) float32.

    Args:
        encoder: of `build_encoder`.
        kind: which tokens.

    Raises:
        UnsupportedError: a NotImplementedError: it has no such tokens, or only code of a user's class knows
            them.
    """

    def __init__(self, encoder: nn.Module, kind: TokenKind) -> None:
        super().__init__()
        self.encoder, self.kind = encoder, kind
        self._dim = _token_dim(encoder)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, d · h · w)."""
        encode = encode_tiles_dense if self.kind == "patch_features" else encode_tiles_dense_prenorm
        return encode(self.encoder, pixels).float().flatten(1)

    def grid(self, size_px: int) -> tuple[int, int, int]:
        """(d, h, w) of tiles of a size."""
        height, width = patch_size(self.encoder)
        dim = self._dim
        if self.kind == "patch_features_prenorm":
            dim = int(_trunk(self.encoder).num_features)
        return dim, size_px // height, size_px // width


def encode_tiles_dense(encoder: nn.Module, batch: Tensor) -> Tensor:
    """Patch tokens after the last block and its norm, as a grid; class token and registers left out.

    Of an encoder whose features are projected tokens they are projected, too; those of one that sees red,
    green and blue as three pictures are side by side.

    Args:
        encoder: of `build_encoder`; `ready_for` prepares it for other sizes than its own.
        batch: (B, 3, H, W) float, normalised; H and W are multiples of the patch.

    Returns:
        (B, d, H / patch, W / patch).

    Raises:
        UnsupportedError: a NotImplementedError: it has no patch tokens.
        ConfigError: a ValueError: the batch has another shape.
    """
    from slide2vec.encoders.clip_linear import ClipLinearEncoder  # imports timm

    if (theirs := _theirs(encoder, "encode_tiles_dense")) is not None:
        return cast("Tensor", theirs(batch))
    grid = _grid(encoder, batch)
    if isinstance(encoder, ChannelwiseEncoder):
        tokens = encoder.norm(encoder.tokens(batch))
        grids = _folded(tokens, encoder.prefix_tokens, grid)
        return grids.reshape(-1, 3 * grids.shape[1], *grid)
    network = getattr(encoder, "network", None)
    if network is not None:  # of code that came with the weights
        tokens = network(pixel_values=batch).last_hidden_state
        return _folded(tokens, cast("int", encoder.prefix_tokens), grid)
    trunk = _trunk(encoder)
    tokens = trunk.forward_features(batch)
    if isinstance(encoder, ClipLinearEncoder):
        tokens = encoder.projection(tokens)
    return _folded(tokens, trunk.num_prefix_tokens, grid)


def encode_tiles_dense_prenorm(encoder: nn.Module, batch: Tensor) -> Tensor:
    """As `encode_tiles_dense`, before the closing norm of the last block: what timm's feature extraction
    (`features_only`, `forward_intermediates(norm=False)`) gives.

    Raises:
        UnsupportedError: a NotImplementedError: the encoder is none of timm's vision transformers.
    """
    if (theirs := _theirs(encoder, "encode_tiles_dense_prenorm")) is not None:
        return cast("Tensor", theirs(batch))
    _grid(encoder, batch)
    trunk: Any = getattr(encoder, "trunk", None) or getattr(getattr(encoder, "own", None), "_model", None)
    if trunk is None or not hasattr(trunk, "forward_intermediates"):
        raise UnsupportedError(
            f"{type(encoder).__name__} has no tokens before a closing norm (patch_features_prenorm): that is "
            "of vision transformers of timm; ask for patch_features"
        )
    found: Tensor = trunk.forward_intermediates(
        batch, indices=1, norm=False, intermediates_only=True, output_fmt="NCHW"
    )[-1]
    return found


def patch_size(encoder: nn.Module) -> tuple[int, int]:
    """(height, width) of a patch in px.

    Raises:
        UnsupportedError: a NotImplementedError: the encoder has no patches.
    """
    if isinstance(encoder, ChannelwiseEncoder):
        return encoder.patch, encoder.patch
    if (theirs := _theirs(encoder, "patch_size")) is not None:
        return cast("tuple[int, int]", theirs)
    network = getattr(encoder, "network", None)
    owner: Any = _trunk(encoder) if network is None else getattr(network, "model", network)
    sides = owner.patch_embed.patch_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return int(height), int(width)


def ready_for(encoder: nn.Module, recipe: Recipe, size: tuple[int, int], asked: str) -> None:
    """Prepare an encoder for inputs of a size (height, width).

    Args:
        asked: what asks for that size, for the message.

    Raises:
        ConfigError: a ValueError: it does not take them.
    """
    for side in sorted(set(size) - {recipe.transform.crop}):
        for_input(recipe, encoder, side, asked)
    if recipe.positions == "fixed" and size != (recipe.transform.crop,) * 2:
        raise ConfigError(f"{asked}: preset {recipe.name} takes inputs of {recipe.transform.crop} px only")


def _token_dim(encoder: nn.Module) -> int:
    """d of tokens after the closing norm."""
    from slide2vec.encoders.clip_linear import ClipLinearEncoder  # imports timm

    if _theirs(encoder, "encode_tiles_dense") is not None or getattr(encoder, "network", None) is not None:
        raise UnsupportedError(f"patch tokens of {type(encoder).__name__} are made by code of its own")
    if isinstance(encoder, ChannelwiseEncoder):
        return 3 * int(encoder.norm.normalized_shape[0])
    if isinstance(encoder, ClipLinearEncoder):
        return encoder.projection.out_features
    return int(_trunk(encoder).num_features)


def _theirs(encoder: nn.Module, name: str) -> Any:
    """What the class of an encoder that a user brought has of its own; None where there is none."""
    own = getattr(encoder, "own", None)
    if not isinstance(own, TileEncoder):
        return None
    if getattr(type(own), name) in (getattr(TileEncoder, name), getattr(TimmTileEncoder, name)):
        return None
    return getattr(own, name)


def _trunk(encoder: nn.Module) -> Any:
    own = getattr(encoder, "own", None)
    trunk: Any = (
        getattr(encoder, "trunk", None) or getattr(encoder, "vit", None) or getattr(own, "_model", own)
    )
    if trunk is None or not hasattr(trunk, "num_prefix_tokens") or not hasattr(trunk, "patch_embed"):
        raise UnsupportedError(
            f"{type(encoder if trunk is None else trunk).__name__} has no patch tokens: it is no vision "
            "transformer"
        )
    return trunk


def _grid(encoder: nn.Module, batch: Tensor) -> tuple[int, int]:
    height, width = patch_size(encoder)
    shape = tuple(batch.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] % height or shape[3] % width:
        raise ConfigError(
            f"patch tokens are of tiles (B, 3, H, W) whose sides are multiples of the patch, {height} x "
            f"{width} px; got {shape}"
        )
    return shape[2] // height, shape[3] // width


def _folded(tokens: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """(B, T, d) -> (B, d, h, w); patches are row by row."""
    if tokens.ndim != 3 or tokens.shape[1] != prefix + grid[0] * grid[1]:
        raise UnsupportedError(
            f"the encoder gives tokens of shape {tuple(tokens.shape)}, not {prefix} and one for each of "
            f"{grid[0]} x {grid[1]} patches"
        )
    patches = tokens[:, prefix:].transpose(1, 2)
    return patches.reshape(-1, patches.shape[1], *grid)
