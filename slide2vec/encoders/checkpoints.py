"""From the keys of published checkpoints to those of our encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from slide2vec.errors import WeightsError
from slide2vec.recipes import EncoderSpec

__all__ = ["State", "convert"]

State = dict[str, Tensor]
Convert = Callable[[State, EncoderSpec], State]

#: Names that `weights.convert` of a recipe may give.
CONVERSIONS: Mapping[str, Convert] = MappingProxyType({})


def convert(name: str, state: State, spec: EncoderSpec) -> State:
    """The checkpoint with the encoder's keys; as it is for "".

    Raises:
        WeightsError: there is no such conversion, or the checkpoint lacks what it needs.
    """
    if not name:
        return state
    if name not in CONVERSIONS:
        raise WeightsError(f"weights.convert={name!r} is not one of {sorted(CONVERSIONS)}")
    return CONVERSIONS[name](state, spec)
