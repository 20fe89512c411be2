"""The whole matrix through NVIDIA's own compiler: minutes, by hand (`make test-slow`)."""

from __future__ import annotations

import pytest
from rtx_compiler import WHY_NOT

from benchmarks.engine_matrix import COMPILABLE, LAYOUTS, PRECISIONS, rows
from slide2vec.runtime.base import Layout


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", COMPILABLE)
def test_every_precision_is_built(name: str, layout: Layout) -> None:
    """At one block. The scattering transform has no product to quantise."""
    found = {each["precision"]: each for each in rows(name, layout, "sm89", 1, PRECISIONS)}
    refused = {precision: each["refused"] for precision, each in found.items() if "refused" in each}
    assert refused.keys() <= ({"fp8"} if name == "scattering" else set()), refused
    assert all(each["nodes"] <= each["nodes_exported"] for each in found.values())
