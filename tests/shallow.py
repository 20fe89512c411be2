"""Presets with encoders of the published width and few blocks: built and run in a tenth of the time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from torch import nn

from benchmarks.common import of_depth
from slide2vec.encoders import preset_chain
from slide2vec.recipes import Recipe

__all__ = ["DEPTHS", "TWINS", "each", "few_blocks", "shallow"]

#: By family of encoders.
FEW: dict[str, dict[str, Any]] = {
    "longnet": {"depth": 2},
    "moozy_case": {"num_layers": 1, "dim_feedforward": 256},
    "moozy_slide": {"n_layers": 2, "dim_feedforward": 256},
    "prism": {"rounds": 2, "depth": 1},
    "titan": {"depth": 2},
}


def shallow(recipe: Recipe) -> Recipe:
    """The recipe with few blocks."""
    if recipe.encoder.family in ("timm", "headed"):
        return of_depth(recipe, 1)
    kwargs = {**recipe.encoder.kwargs, **FEW.get(recipe.encoder.family, {})}
    encoder = recipe.encoder.model_copy(update={"kwargs": kwargs})
    return recipe.model_copy(update={"encoder": encoder})


#: Presets that differ from another by their weights, or by numbers: their tests are slow.
TWINS = {
    *("chief-ctranspath", "crisp", "feather-uni", "feather-uni2", "lunit-moco", "lunit-s16", "lunit-swav"),
    *("kaiko-b16", "kaiko-b8", "kaiko-s16", "kaiko-s8", "openmidnight", "openpath", "pathorchestra"),
    *("quiltnet-b16", "quiltnet-b16-pmb", "quiltnet-b32"),
}


def each(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, slow where another preset stands for them."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in TWINS else name for name in names]


@contextmanager
def few_blocks() -> Iterator[None]:
    """Presets that are loaded meanwhile, with random weights, have few blocks."""
    build = preset_chain._build

    def build_shallow(recipe: Recipe, *rest: Any) -> nn.Module:
        return build(shallow(recipe), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preset_chain, "_build", build_shallow)
        yield


#: Parameters of a test: with few blocks, and, slowly, with all.
DEPTHS = [
    pytest.param(few_blocks, id="few blocks"),
    pytest.param(nullcontext, id="whole", marks=pytest.mark.slow),
]
