"""Every preset, layout and precision through NVIDIA's own compiler (`benchmarks.engine_matrix`)."""

from __future__ import annotations

from itertools import product

import pytest
from rtx_compiler import WHY_NOT
from shallow import TWINS

from benchmarks.engine_matrix import COMPILABLE, LAYOUTS, PRECISIONS, rows
from slide2vec.runtime.base import Layout

pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]
#: A ViT, one of open_clip's, one with windows: CI tries the second layout, which differs before the first
#: layer only, with these.
IN_BOTH_LAYOUTS = ("virchow2", "conch", "ctranspath")
#: Of those with another's architecture CI tries none.
LEFT_OUT = {
    (name, layout)
    for name in COMPILABLE
    for layout in LAYOUTS
    if name in TWINS or (layout == "float32_nchw" and name not in IN_BOTH_LAYOUTS)
}
CASES = [
    pytest.param(*case, marks=pytest.mark.large if case in LEFT_OUT else ())
    for case in product(COMPILABLE, LAYOUTS)
]
#: Without a product of matrices that fp8 could be for.
CONVOLUTIONS = ("scattering", "lunit-bt", "lunit-moco", "lunit-swav")


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_preset_is_built(name: str, layout: Layout) -> None:
    """In every precision, at one block; fp8 is made from the same export as fp16."""
    found = {each["precision"]: each for each in rows(name, layout, "sm89", 1, PRECISIONS)}
    assert found.keys() == set(PRECISIONS)
    if name in CONVOLUTIONS:
        assert "no matrix product" in found.pop("fp8")["refused"]
    if name in CONVOLUTIONS[1:]:
        assert "cannot parse" in found.pop("bf16")["refused"]  # they run in fp16
    for each in found.values():
        assert "refused" not in each and each["plan_mb"] > 0.1
        assert each["nodes"] <= each["nodes_exported"]
