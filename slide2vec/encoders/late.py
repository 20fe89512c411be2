"""An encoder that is built when its module is first needed: until then its digest stands for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import Any, Self, TypeAlias, TypeVar

from torch import nn

from slide2vec.encoders.known_digests import (
    KnownDigest,
    WeightsFiles,
    forget,
    look_up,
    made_of,
    remember,
)
from slide2vec.encoders.published_files import check_download
from slide2vec.encoders.weights import WeightsChoice, find_weights, weights_digest, weights_files
from slide2vec.errors import WeightsError
from slide2vec.recipes import Recipe, Variant

__all__ = [
    "AnyEncoder",
    "LateEncoder",
    "as_module",
    "handed_over",
    "held_bytes",
    "late_encoder",
    "release",
    "weights_bytes",
]

T = TypeVar("T")

#: Weights of fewer bytes are loaded, and hashed, in less time than it would take to know them.
LEAST_BYTES = 16 * 2**20
#: Encoders are built one at a time: random weights are drawn from PyTorch's one generator.
_ONE_AT_A_TIME = threading.RLock()


class LateEncoder:
    """A tile encoder and the digest of its weights.

    It is built at once unless an earlier run has built it from the same files: then the digest is known, and
    nothing is loaded before `module` is asked for. A digest that is known is not yet certain: the files are
    read in a thread, and `confirm` waits for what comes of that.

    Args:
        build: gives the module, in evaluation mode.
        files: of its weights; None: they are not to be known by their files.
        made_of: what else decides its digest, see `known_digests.made_of`.

    Raises:
        WeightsError: as `build`.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        files: WeightsFiles | None = None,
        made_of: Mapping[str, Any] | None = None,
    ) -> None:
        self._build, self._files, self._made_of = build, files, made_of or {}
        self._known = None if files is None else look_up(files, self._made_of)
        self._content: Future[str] | None = None
        self._remembering: Future[None] | None = None
        self._module: nn.Module | None = None
        self._is_changeable = False
        self._begun: Future[nn.Module] | None = None
        self._building = threading.RLock()
        if self._known is None:
            with _ONE_AT_A_TIME:
                self._module = build()

    @classmethod
    def of(cls, encoder: AnyEncoder) -> Self | LateEncoder:
        """One that is built already; one of these as it is."""
        if isinstance(encoder, LateEncoder):
            return encoder
        made = cls(lambda: encoder)
        made._is_changeable = True
        return made

    @property
    def is_built(self) -> bool:
        return self._module is not None

    @property
    def module(self) -> nn.Module:
        """The encoder, built now if it is not yet.

        Raises:
            WeightsError: its files cannot be loaded, or have changed since they were looked at.
        """
        with self._building:
            if self._module is None:
                with _ONE_AT_A_TIME:
                    made = self._build()
                if self._files is not None and (changed := self._files.changed()):
                    raise WeightsError(f"weights file {changed} was changed while it was loaded: start again")
                if self._files is None and weights_digest(made) != self.digest:
                    raise WeightsError("weights have changed since they were first loaded: start again")
                self._module = made
            return self._module

    @property
    def held_bytes(self) -> int:
        """Of its weights, as far as they are in memory."""
        if self._module is None:
            return 0
        return sum(values.nbytes for values in (*self._module.parameters(), *self._module.buffers()))

    def release(self) -> None:
        """Free the module, which is built anew when it is next needed. One stays that was given as it is, or
        that somebody has in hand who may have changed it."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.exception()  # it would be built after this, else
        with self._building:
            if self._module is not None and not self._is_changeable:
                _ = self.digest
                self._module = None

    def hand_over(self) -> nn.Module:
        """The module, for whoever may change its weights: the digest, if nobody has asked for it yet, is then
        that of the module, and is not kept."""
        module = self.module
        self._is_changeable = True
        if "digest" not in self.__dict__:
            self._known = self._files = None
        return module

    def begin(self) -> None:
        """Have it built in a thread, if it is not yet; whoever needs it then waits for that."""
        if not self.is_built:
            self._begun = _in_background(
                lambda: self.module
            )  # what it raises, it raises again to who asks for it

    @cached_property
    def digest(self) -> str:
        """Of the values of its weights."""
        if self._known is not None:
            assert self._files is not None
            self._content = _in_background(self._files.content)
            return self._known.weights
        digest = weights_digest(self.module)
        if self._files is not None:
            self._remembering = _in_background(lambda: self._remember(digest))
        return digest

    def _remember(self, digest: str) -> None:
        assert self._files is not None
        content = self._files.content()
        if self._files.changed() is None:
            remember(self._files, self._made_of, KnownDigest(content, digest))

    def confirm(self) -> None:
        """Wait until a digest that was known is certain. To be called before anything is finished under it.

        Raises:
            WeightsError: it is another one; it is forgotten.
        """
        if self._known is None or self._content is None:
            return
        assert self._files is not None
        where = ", ".join(self._files.stamps)
        try:
            content = self._content.result()
        except OSError as error:
            raise WeightsError(f"weights file {where} cannot be read any more: {error}") from error
        if content != self._known.content:
            forget(self._files, self._made_of)
            raise WeightsError(
                f"weights file {where} looks as it did when an earlier run loaded it, but its content has "
                "changed: no embedding was written, and what was known of it is forgotten. Start again"
            )


#: A module, or one that is built when it is needed.
AnyEncoder: TypeAlias = nn.Module | LateEncoder


def as_module(encoder: AnyEncoder) -> nn.Module:
    """The module, built now if it is not yet; raises as `LateEncoder.module`."""
    return encoder.module if isinstance(encoder, LateEncoder) else encoder


def handed_over(encoder: AnyEncoder) -> nn.Module:
    """The module, for whoever may change it; see `LateEncoder.hand_over`."""
    return encoder.hand_over() if isinstance(encoder, LateEncoder) else encoder


def held_bytes(encoder: AnyEncoder) -> int:
    """Of its weights that are in memory."""
    return LateEncoder.of(encoder).held_bytes


def weights_bytes(encoder: AnyEncoder, recipe: Recipe) -> int:
    """Of its weights, wherever they are: in fp32, by the number that the recipe says, while they are not in
    memory."""
    return held_bytes(encoder) or round(4e6 * recipe.params_m)


def release(encoder: AnyEncoder) -> None:
    """See `LateEncoder.release`; a module stays."""
    if isinstance(encoder, LateEncoder):
        encoder.release()


def late_encoder(
    recipe: Recipe, variant: Variant, weights: WeightsChoice, build: Callable[[WeightsChoice], nn.Module]
) -> AnyEncoder:
    """The encoder of a recipe: of tiles, from weights that may be known by their files; else built now.

    Args:
        build: builds it with these weights.

    Raises:
        WeightsError, GatedWeightsError: as `build`; that files cannot be had is found out now.
    """
    if recipe.encoder.family in ("module", "registered"):
        return build(weights)
    by_file = recipe.level == "tile" and not recipe.generic and recipe.encoder.family != "remote"
    if weights == "random" or recipe.weights is None or not by_file:
        return LateEncoder(lambda: build(weights))
    path = find_weights(recipe, weights)

    def load() -> nn.Module:
        if weights is None:  # as for the hub: as a path it is a file of the user's
            check_download(path, recipe)
        return build(path)

    try:
        files = WeightsFiles.of(weights_files(path))
    except OSError:  # which file it is, and why, is said when it is loaded
        return LateEncoder(load)
    if files.size_bytes < LEAST_BYTES:
        return LateEncoder(load)
    return LateEncoder(load, files, made_of(recipe, variant))


def _in_background(work: Callable[[], T]) -> Future[T]:
    """What comes of it, done in a thread that the end of the process does not wait for."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return done
