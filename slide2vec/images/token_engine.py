"""Patch tokens by an engine: what is compiled of an encoder, and what of the store runs it."""

from __future__ import annotations

import logging
from math import prod
from typing import TYPE_CHECKING, Self, TypeVar

from torch import Tensor, nn

from slide2vec.encoders.patch_tokens import PatchTokenEncoder, TokenKind
from slide2vec.errors import ConfigError, EngineError, UnsupportedError
from slide2vec.images.dense_options import DenseLike
from slide2vec.images.pooled import BatchSource
from slide2vec.recipes import Recipe

if TYPE_CHECKING:
    from slide2vec.config import ExecutionOptions
    from slide2vec.runtime import Engine

__all__ = ["TokenEngine", "with_patch_tokens"]

Source = TypeVar("Source", bound=BatchSource)
logger = logging.getLogger(__name__)


def with_patch_tokens(source: Source, encoder: PatchTokenEncoder, size_px: int) -> Source:
    """The same with patch tokens of tiles of a size instead of features: what an engine of them is built
    from, and found by. It takes normalised pixels, for padding may be none of a picture's.

    Args:
        encoder: around that of the source.
    """
    dim = prod(encoder.grid(size_px))
    return source.with_encoder(encoder, encoder.kind, dim, size_px, normalised=True)


class TokenEngine:
    """An engine that gives the patch tokens of windows of one size."""

    def __init__(self, engine: Engine, grid: tuple[int, int, int]) -> None:
        self._engine, self._grid = engine, grid
        self.runtime, self.precision = engine.runtime, engine.precision

    def __call__(self, windows: Tensor) -> Tensor:
        """(B, 3, S, S) float32, normalised -> (B, d, h, w) float32."""
        rows = self._engine.run(windows.float().contiguous())
        return rows.reshape(len(rows), *self._grid)

    @classmethod
    def of(
        cls,
        source: BatchSource,
        encoder: nn.Module,
        dense: DenseLike,
        size: tuple[int, int],
        execution: ExecutionOptions,
    ) -> Self | None:
        """The engine of the store for windows of a size; None: PyTorch makes the tokens.

        Raises:
            ConfigError: an engine is asked for, and none can do what the options say.
            EngineError: it is asked for and not there.
        """
        if execution.engine == "torch":
            return None
        try:
            made = _compilable(encoder, dense, size)
        except UnsupportedError as error:
            if execution.engine != "auto":
                raise ConfigError(f'engine="{execution.engine}": {error}; say engine="torch"') from error
            return None
        found = with_patch_tokens(source, made, size[0])
        asked = execution.updated(torch_compile=False)
        try:
            engine = found.select(asked, size[0]).engine
        except EngineError as error:
            raise EngineError(f"{error} {_how_to_build(source.recipe, made.kind, size[0])}") from error
        if engine.runtime == "torch":  # whose number types a grid has by `GridEncoder`
            engine.close()
            return None
        logger.info("patch tokens by engine of %s, %s", engine.runtime, engine.precision)
        return cls(engine, made.grid(size[0]))


def _compilable(encoder: nn.Module, dense: DenseLike, size: tuple[int, int]) -> PatchTokenEncoder:
    """What an engine is of; raises UnsupportedError where there is none of it."""
    kind: TokenKind
    if dense.feature_kind == "cls_attention":
        raise UnsupportedError("grids of attention are made in PyTorch")
    kind = dense.feature_kind
    if size[0] != size[1]:
        raise UnsupportedError(
            f"engines take squares, and the windows are {size[0]} x {size[1]} px (height, width): choose a "
            "window_size that fits into the picture"
        )
    return PatchTokenEncoder(encoder, kind)


def _how_to_build(recipe: Recipe, kind: str, side: int) -> str:
    size = "" if side == recipe.transform.crop else f" --input-size {side}"
    return f"(of patch tokens: with --patch-tokens {kind}{size})"
